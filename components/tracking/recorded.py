"""Reads runs back: finds a run by the start of its ID, reads steps, metric histories and the lineage of a pipeline run."""

import time

from components.lineage import COMPONENTS, Artifact, Lineage, Step, short
from components.tracking import names, runs, step_file
from components.tracking.store import Store
from trainer.shared.errors import UserError

History = dict[str, list[tuple[int, float]]]
"""All (step, value) pairs of each metric in order, by the metric's name."""


def knows(store: Store, run_id: str) -> bool:
    """Returns whether the store has a run that was not deleted."""
    run = runs.find(store, run_id)
    return run is not None and run.info.lifecycle_stage == "active"


def was_recorded(store: Store, run_id: str) -> bool:
    """Returns whether the store has a run, or had it until somebody deleted it."""
    return runs.find(store, run_id) is not None


def why_lost(store: Store, run_id: str) -> str:
    """Returns why the record of a finished step cannot be used any more, or "" if it can."""
    if not knows(store, run_id):
        return "is not in MLflow any more"
    return "" if step_file.is_complete(store, run_id) else _gone(store, run_id)


def _gone(store: Store, run_id: str) -> str:
    return f"is lost: its artifacts are gone from {store.client.get_run(run_id).info.artifact_uri}"


def find_run(store: Store, prefix: str) -> str:
    """Returns the ID of the run whose ID begins with `prefix`. Raises UserError if there is none, or more than one."""
    if len(prefix) < 8:
        raise UserError(f"run {prefix} is too short: give at least the first 8 characters of a run ID")
    found = store.client.search_runs([store.experiment_id], max_results=50000)
    matches = [run.info.run_id for run in found if run.info.run_id.startswith(prefix)]
    if not matches:
        raise UserError(f"there is no run {prefix}; sogclr ui shows all runs")
    if len(matches) > 1:
        raise UserError(f"run {prefix} could be any of {', '.join(matches)}: give more characters")
    return matches[0]


def find_step(store: Store, run_id: str, *components: str) -> Step:
    """Returns the step that belongs to the run `run_id`, of the first of `components` that it has.

    That is the run itself, a run whose output it used, or a step of the same pipeline run. Raises UserError if there is none.
    """
    component = " or ".join(components)
    tags = store.client.get_run(run_id).data.tags
    if names.COMPONENT not in tags:
        raise UserError(f"run {short(run_id)} is no run of sogclr: it has no {component}")
    pipeline = store.client.get_run(tags[names.PARENT]) if names.PARENT in tags else None
    known = {**(pipeline.data.tags if pipeline else {}), **tags}
    found = next((known[names.RUN_OF + one] for one in components if names.RUN_OF + one in known), None)
    if found is None:
        there = [name for name in COMPONENTS if names.RUN_OF + name in tags]
        raise UserError(
            f"run {short(run_id)} has no {component}, only {', '.join(there) or 'nothing'}; sogclr run goes on from there"
        )
    step = read_step(store, found)
    if step.status == "FINISHED" and not step.outputs:
        raise UserError(f"the {step.component} {short(found)} {_gone(store, found)}; sogclr run makes it again")
    return step


def read_step(store: Store, run_id: str) -> Step:
    """Returns a step as its run recorded it."""
    run = store.client.get_run(run_id)
    tags = run.data.tags
    recorded = step_file.read(store, run_id)
    return Step(
        component=tags[names.COMPONENT],
        run_id=run_id,
        pipeline_id=tags[names.PARENT],
        status=run.info.status,
        seconds=((run.info.end_time or time.time() * 1000) - run.info.start_time) / 1000,
        arguments=recorded["arguments"],
        outputs={name: Artifact(**artifact) for name, artifact in recorded["outputs"].items()},
        metrics=run.data.metrics,
        error=tags.get(names.ERROR, ""),
        user_error=tags.get(names.USER_ERROR) == "true",
    )


def history(store: Store, run_id: str) -> History:
    """Returns every metric that a run recorded."""
    found = runs.metric_histories(store, run_id)
    # A training step that was repeated after a restart counts once: its values are bit-identical.
    return {name: sorted({point.step: point.value for point in points}.items()) for name, points in found.items()}


def history_behind(store: Store, run_id: str, component: str) -> History:
    """Returns every metric of the run of `component` whose output `run_id` used; empty if this store lacks that run."""
    source = runs.find(store, store.client.get_run(run_id).data.tags.get(names.RUN_OF + component, ""))
    return history(store, source.info.run_id) if source else {}


def sources(store: Store, run_id: str) -> dict[str, str]:
    """Returns the IDs of the run itself and of the runs whose outputs it used, by component."""
    named = runs.named_by(store.client.get_run(run_id))
    return {name: named[names.RUN_OF + name] for name in COMPONENTS if names.RUN_OF + name in named}


def lineage(store: Store, pipeline_id: str) -> Lineage:
    """Returns the lineage of a pipeline run."""
    run = store.client.get_run(pipeline_id)
    ids = [run.data.tags.get(names.RUN_OF + component, "") for component in COMPONENTS]
    steps = tuple(read_step(store, run_id) for run_id in ids if runs.find(store, run_id))
    return Lineage(pipeline_id, run.info.run_name, steps)


def picture_uri(store: Store, pipeline_id: str) -> str:
    """Returns the URI of the picture of a pipeline run's lineage."""
    return f"{store.client.get_run(pipeline_id).info.artifact_uri}/{names.LINEAGE_PICTURE}"

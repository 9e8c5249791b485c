"""What runs recorded, read back: a run by a part of its ID, a step, the history of metrics, and a pipeline run's lineage."""

import time

from components.lineage import COMPONENTS, Artifact, Lineage, Step, short
from components.tracking import names, runs, step_file
from components.tracking.store import Store
from trainer.shared.errors import UserError

History = dict[str, list[tuple[int, float]]]
"""Every (step, value) of each metric in order, by the metric's name."""


def knows(store: Store, run_id: str) -> bool:
    """Returns whether a run is there and was not deleted."""
    run = runs.find(store, run_id)
    return run is not None and run.info.lifecycle_stage == "active"


def find_run(store: Store, prefix: str) -> str:
    """Returns the ID of the one run that begins with `prefix`. Raises UserError if there is none, or several."""
    if len(prefix) < 8:
        raise UserError(f"run {prefix} is too short: give at least the first 8 characters of a run ID")
    found = store.client.search_runs([store.experiment_id], max_results=50000)
    matches = [run.info.run_id for run in found if run.info.run_id.startswith(prefix)]
    if not matches:
        raise UserError(f"there is no run {prefix}; sogclr ui shows those there are")
    if len(matches) > 1:
        raise UserError(f"run {prefix} could be any of {', '.join(matches)}: give more of it")
    return matches[0]


def find_step(store: Store, run_id: str, component: str) -> Step:
    """Returns the run of `component` that the run `run_id` is, follows from or belongs to.

    Raises UserError if there is none.
    """
    tags = store.client.get_run(run_id).data.tags
    if names.COMPONENT not in tags:
        raise UserError(f"run {short(run_id)} is no run of sogclr: it has no {component}")
    pipeline = store.client.get_run(tags[names.PARENT]) if names.PARENT in tags else None
    tag = names.RUN_OF + component
    found = tags.get(tag) or (pipeline.data.tags.get(tag) if pipeline else None)
    if found is None:
        there = [name for name in COMPONENTS if names.RUN_OF + name in tags]
        raise UserError(
            f"run {short(run_id)} has no {component}, only {', '.join(there) or 'nothing'}; sogclr run goes on from there"
        )
    return read_step(store, found)


def read_step(store: Store, run_id: str) -> Step:
    """Returns what a step's run recorded."""
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
    # A step that was taken again after a restart counts once: its values are the same bits.
    return {name: sorted({point.step: point.value for point in points}.items()) for name, points in found.items()}


def history_behind(store: Store, run_id: str, component: str) -> History:
    """Returns every metric of the run of `component` that `run_id` follows from; none where this store lacks that run."""
    source = runs.find(store, store.client.get_run(run_id).data.tags.get(names.RUN_OF + component, ""))
    return history(store, source.info.run_id) if source else {}


def sources(store: Store, run_id: str) -> dict[str, str]:
    """Returns by component the run itself and the runs that it follows from."""
    named = runs.named_by(store.client.get_run(run_id))
    return {name: named[names.RUN_OF + name] for name in COMPONENTS if names.RUN_OF + name in named}


def lineage(store: Store, pipeline_id: str) -> Lineage:
    """Returns what led to what in a pipeline run."""
    run = store.client.get_run(pipeline_id)
    ids = [run.data.tags.get(names.RUN_OF + component, "") for component in COMPONENTS]
    steps = tuple(read_step(store, run_id) for run_id in ids if runs.find(store, run_id))
    return Lineage(pipeline_id, run.info.run_name, steps)


def picture_uri(store: Store, pipeline_id: str) -> str:
    """Returns where the picture of a pipeline run's lineage is."""
    return f"{store.client.get_run(pipeline_id).info.artifact_uri}/{names.LINEAGE_PICTURE}"

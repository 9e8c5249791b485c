"""Runs that are not a step's: the run of a pipeline, on this machine or as a cluster job, and the run of a cost estimate."""

import os
import shlex
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mlflow.entities import Run

from components import console, variables
from components.lineage import Lineage
from components.tracking import names, runs
from components.tracking.notes import redraw
from components.tracking.recorded import lineage
from components.tracking.store import Store


def start_pipeline(
    store: Store,
    name: str,
    *,
    command: Sequence[str],
    root: str,
    code_version: str,
    git_commit: str = "",
    params: Mapping[str, Any],
    rerun_of: str = "",
    token: str = "",
) -> str:
    """Opens a pipeline's run and returns its ID.

    `root` is the --root that a later command needs; empty for the default. `rerun_of` is the ID of the step's run that is
    repeated. `running` returns the `token` until `note_started`.
    """
    tags = {
        names.COMPONENT: names.PIPELINE,
        names.COMMAND: shlex.join([*command, *(["--root", root] if root else [])]),
        names.ROOT: root,
        names.CODE: code_version,
        names.COMMIT: git_commit,
        names.RERUN_OF: rerun_of,
        names.STARTING: token,
    }
    run = store.client.create_run(store.experiment_id, run_name=name, tags={key: value for key, value in tags.items() if value})
    runs.log_params(store, run.info.run_id, params)
    return run.info.run_id


def note_started(store: Store, pipeline_id: str) -> None:
    """Removes the token of a pipeline's run."""
    store.client.delete_tag(pipeline_id, names.STARTING)


def running(store: Store) -> dict[str, str]:
    """Returns the token, or "", of every pipeline run that is recorded as running, by the run's ID."""
    chosen = f"attributes.status = 'RUNNING' and tags.`{names.COMPONENT}` = '{names.PIPELINE}'"
    found = store.client.search_runs([store.experiment_id], chosen)
    return {run.info.run_id: run.data.tags.get(names.STARTING, "") for run in found}


def end_pipeline(store: Store, pipeline_id: str, status: str, run_ids: Iterable[str] = ()) -> Lineage:
    """Closes a pipeline's run, which consists of `run_ids` and of the runs nested in it. Returns its lineage.

    Marks a step that is still recorded as running as killed, even if it died before it was joined to the pipeline's run.
    """
    nested = runs.search(store, names.PARENT, pipeline_id)
    _join(store, pipeline_id, [*nested, *(store.client.get_run(run_id) for run_id in run_ids)])
    for run in nested:
        if run.info.status == "RUNNING":
            store.client.set_terminated(run.info.run_id, "KILLED")
    chain = lineage(store, pipeline_id)
    result = chain.output("metrics")
    if status == "FINISHED" and result is not None:
        final = {f"eval/{key}": value for key, value in result.metadata.items() if key != "run_id"}
        runs.log_metrics_once(store, pipeline_id, final, step=0)
    store.client.set_terminated(pipeline_id, status)
    redraw(store, pipeline_id)
    return chain


# ---- A job on a cluster


def job_of(output_uri: str) -> str:
    """Returns the name of the pipeline job that writes to `output_uri`, which ends in JOB/TASK/OUTPUT."""
    return output_uri.rstrip("/").split("/")[-3]


def find_job(store: Store, job: str, environ: Mapping[str, str] = os.environ) -> str | None:
    """Returns the ID of the run of a pipeline job, or None. If several steps opened one at the same time, the first counts.

    The job folder in `environ` distinguishes jobs of the same name in several projects or regions. If `environ` has no job
    folder, the run must have none either.
    """
    folder = environ.get(variables.JOB_FOLDER, "")
    found = [run for run in runs.search(store, names.JOB, job) if run.data.tags.get(names.JOB_FOLDER, "") == folder]
    return found[0].info.run_id if found else None


def pipeline_of_job(store: Store, job: str, environ: Mapping[str, str] = os.environ) -> str:
    """Returns the ID of the run of a pipeline job, and opens the run if there is none."""
    known = find_job(store, job, environ)
    if known:
        return known
    folder = environ.get(variables.JOB_FOLDER, "")
    tags = {
        names.COMPONENT: names.PIPELINE,
        names.JOB: job,
        names.JOB_FOLDER: folder,
        names.JOB_LINK: _job_link(folder, job),
        names.IMAGE: environ.get(variables.IMAGE, ""),
        names.COMMIT: environ.get(variables.COMMIT, ""),
        names.RERUN_OF: environ.get(variables.RERUN_OF, ""),
    }
    run_id = store.client.create_run(store.experiment_id, run_name=job, tags={k: v for k, v in tags.items() if v}).info.run_id
    # Another step may have opened a run at the same time. From now on, every step finds the first one.
    return find_job(store, job, environ) or run_id


def _job_link(folder: str, job: str) -> str:
    """Returns the URL of a pipeline job's page. `folder` is projects/PROJECT/locations/REGION, or empty."""
    if not folder:
        return ""
    _, project, _, region = folder.split("/")
    return console.pipeline_job_page(project, region, job)


def join(store: Store, job: str, run_ids: Iterable[str]) -> None:
    """Records that a pipeline job consists of the runs `run_ids`, including those that it took from the cache."""
    pipeline_id = pipeline_of_job(store, job)
    _join(store, pipeline_id, list(filter(None, (runs.find(store, run_id) for run_id in run_ids))))
    redraw(store, pipeline_id)


def _join(store: Store, pipeline_id: str, steps: Sequence[Run]) -> None:
    """Tags a pipeline's run with its steps' runs, and with the runs whose outputs the steps used."""
    tags = {key: run_id for run in steps for key, run_id in runs.named_by(run).items()}
    # A step that was reused by the content of its inputs may name another run than the one that made this pipeline's input.
    tags |= {names.RUN_OF + run.data.tags[names.COMPONENT]: run.info.run_id for run in steps}
    if tags:
        runs.set_tags(store, pipeline_id, tags)


def end_job(store: Store, job: str, state: str) -> None:
    """Closes the run of a pipeline job. `state` is KFP's word for how the job ended: SUCCEEDED, FAILED or CANCELLED."""
    status = {"SUCCEEDED": "FINISHED", "CANCELLED": "KILLED"}.get(state, "FAILED")
    end_pipeline(store, pipeline_of_job(store, job), status)


# ---- A cost estimate


def log_estimate(store: Store, name: str, plan: Mapping[str, Any]) -> str:
    """Records a cost estimate, as `sogclr plan --json` prints it, in a run of its own and returns the run's ID."""
    run_id = store.client.create_run(store.experiment_id, run_name=name, tags={names.COMPONENT: names.ESTIMATE}).info.run_id
    store.client.log_dict(run_id, dict(plan), names.ESTIMATE_FILE)
    numbers = {key: value for key, value in plan.items() if isinstance(value, int | float) and not isinstance(value, bool)}
    runs.log_metrics_once(store, run_id, {f"plan/{key}": value for key, value in numbers.items()}, step=0)
    runs.log_params(store, run_id, {key: plan[key] for key in ("preset", "accelerator", "fits", "bound_by") if key in plan})
    store.client.set_terminated(run_id)
    return run_id

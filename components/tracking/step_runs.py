"""The run of a step: nested in its pipeline's run, continued by later attempts of the same job, closed with its outcome."""

import json
import os
import shlex
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from matplotlib.figure import Figure
from mlflow.entities import Run

from components import variables
from components.lease import LostLeaseError
from components.patience import UnansweredError, answer, is_transient, one_line, say
from components.tracking import names, recorded, runs, step_file
from components.tracking.datasets import Datasets
from components.tracking.encoders import Encoders
from components.tracking.metrics import Metrics
from components.tracking.notes import redraw
from components.tracking.phase import Phase
from components.tracking.pipeline_runs import find_job, job_of, pipeline_of_job
from components.tracking.step_file import KfpArtifact
from components.tracking.store import Store, impatient, open_job_store
from trainer.shared.errors import UserError
from trainer.shared.files import naming_full_disk

_LOCAL_JOB = "pipeline run "
"""Prefix of the name of a pipeline job on this machine, before the ID of its run."""


class StepRun:
    """The run of a step that is running. `metrics`, `phase`, `datasets` and `encoders` record the things of their
    names."""

    def __init__(self, store: Store, run_id: str, job: str = "", component: str = "") -> None:
        self.run_id = run_id
        self._component = component
        self.job = job
        """The pipeline job of this step; on Vertex AI, its resource name."""
        self.metrics = Metrics(store, run_id)
        self.phase = Phase(store, run_id)
        self.datasets = Datasets(store, run_id)
        self.encoders = Encoders(store, run_id, self.metrics)
        self._store = store
        self._at_end: list[Callable[[bool], None]] = []

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Records parameters. A value that is a mapping becomes several parameters with dotted names."""
        runs.log_params(self._store, self.run_id, params)

    def log_devices(self, devices: Mapping[str, str]) -> None:
        """Records the devices of the step, as `trainer.distribution.describe_run` returns them.

        They are tags because a later attempt may run on another machine, and MLflow refuses to change a parameter.
        """
        tags = {names.DEVICE: "device", names.TENSORFLOW: "tensorflow", names.REPLICAS: "replicas"}
        runs.set_tags(self._store, self.run_id, {tag: devices[name] for tag, name in tags.items()})

    def log_figure(self, figure: Figure, file: str) -> None:
        self._store.client.log_figure(self.run_id, figure, file, save_kwargs={"dpi": 120})

    def log_text(self, text: str, file: str) -> None:
        self._store.client.log_text(self.run_id, text, file)

    def sources(self) -> dict[str, str]:
        """Returns the IDs of this run and of the runs whose outputs it used, by component."""
        return recorded.sources(self._store, self.run_id)

    def history_behind(self, component: str) -> recorded.History:
        """Returns every metric of the run of `component` whose output this one used; empty if the store lacks that run."""
        return recorded.history_behind(self._store, self.run_id, component)

    def run_in(self, job: str) -> str:
        """Returns the ID of this component's run in another `job` of this machine, or "" if the store has none."""
        found = _attempts(self._store, self._component, job.removeprefix(_LOCAL_JOB)) if job.startswith(_LOCAL_JOB) else []
        return found[-1].info.run_id if found else ""

    def at_end(self, end: Callable[[bool], None]) -> None:
        """Registers `end(finished)`, which `close` calls after the metrics are delivered or stored."""
        self._at_end.append(end)

    def close(self, finished: bool = False) -> None:
        """Closes the metrics and the phase, then calls the functions that `at_end` registered."""
        self.metrics.close(finished)
        self.phase.close(finished)
        for end in self._at_end:
            end(finished)


def recorded_before(
    component: str, arguments: Mapping[str, Any], outputs: Mapping[str, KfpArtifact], environ: Mapping[str, str] = os.environ
) -> bool:
    """Returns whether an earlier attempt of the same pipeline job finished `component`. If so, fills `outputs` from its run.

    Such an attempt can still have failed afterwards, because KFP stores the outputs only after the component's code has ended.
    """
    store = open_job_store(environ)
    pipeline_id = environ.get("MLFLOW_RUN_ID") or find_job(store, job_of(next(iter(outputs.values())).uri), environ)
    earlier = _attempts(store, component, pipeline_id) if pipeline_id else []
    if not pipeline_id or not earlier:
        return False
    run_id = earlier[-1].info.run_id
    found = step_file.read(store, run_id)
    if found["outputs"].keys() != outputs.keys() or found["arguments"] != json.loads(json.dumps(dict(arguments))):
        return False
    for name, artifact in outputs.items():
        artifact.uri = found["outputs"][name]["uri"]
        artifact.metadata.update(found["outputs"][name]["metadata"])
    say(f"{component} was finished by an earlier attempt, as run {run_id}")
    if earlier[-1].info.status != "FINISHED":
        _reopen(store, earlier[-1])
        store.client.set_terminated(run_id, "FINISHED")
    redraw(store, pipeline_id)
    return True


@contextmanager
def step(
    component: str,
    arguments: Mapping[str, Any],
    outputs: Mapping[str, KfpArtifact],
    inputs: Mapping[str, KfpArtifact] | None = None,
    environ: Mapping[str, str] = os.environ,
) -> Iterator[StepRun]:
    """Opens the run of `component` in its pipeline's run, and closes it as finished, or as failed with the reason.

    MLflow's own variables name the store and the pipeline's run. Without MLFLOW_RUN_ID, the pipeline's run is found by the name
    of the job. If an earlier attempt of the same job did not finish, its run is continued. The metadata of every output gets
    `run_id`.
    """
    store = open_job_store(environ)
    first = next(iter(outputs.values()))
    pipeline_id = environ.get("MLFLOW_RUN_ID") or pipeline_of_job(store, job_of(first.uri), environ)
    earlier = [run for run in _attempts(store, component, pipeline_id)[-1:] if run.info.status != "FINISHED"]
    if earlier:
        _reopen(store, earlier[0])
        run_id = earlier[0].info.run_id
    else:
        run_id = _open_run(store, component, pipeline_id, arguments, inputs or {}, environ)
    # An earlier attempt may have died when it had created the run, and before this.
    _place(store, run_id, component, pipeline_id)
    for artifact in outputs.values():
        artifact.metadata["run_id"] = run_id

    folder = environ.get(variables.JOB_FOLDER, "")
    run = StepRun(store, run_id, f"{folder}/pipelineJobs/{job_of(first.uri)}" if folder else _LOCAL_JOB + pipeline_id, component)
    if earlier:
        run.metrics.skip_recorded()
    run.log_params(arguments)
    step_file.begin(store, run_id, arguments)
    try:
        with naming_full_disk(first.uri, or_its_own=True):
            yield run
            run.metrics.flush()
            step_file.complete(store, run_id, arguments, outputs)
    except LostLeaseError:
        # The new holder of the folder may be the next attempt, which writes to the same run.
        run.metrics.abandon()
        run.close()
        raise
    except BaseException as error:
        run.close()
        # A step whose patience has ended does not wait again. The step's own error is raised, not the server's.
        try:
            _record_failure(impatient(store) if isinstance(error, UnansweredError) else store, run_id, pipeline_id, error)
        except Exception as unrecorded:
            what = f"MLflow {answer(unrecorded)}" if is_transient(unrecorded) else one_line(unrecorded)
            say(f"warning: MLflow does not know that this step failed: {what}")
        raise
    store.client.set_terminated(run_id, "FINISHED")
    redraw(store, pipeline_id)
    run.close(finished=True)


def _open_run(
    store: Store,
    component: str,
    pipeline_id: str,
    arguments: Mapping[str, Any],
    inputs: Mapping[str, KfpArtifact],
    environ: Mapping[str, str],
) -> str:
    """Creates a run of `component` that names its pipeline's run and the runs whose outputs it uses. Returns its ID."""
    inherited = store.client.get_run(pipeline_id).data.tags
    tags = {names.COMPONENT: component, names.PARENT: pipeline_id, names.CODE: str(arguments.get("code_version", ""))}
    tags |= {key: inherited[key] for key in (names.COMMIT, names.ROOT, names.JOB_LINK) if key in inherited}
    tags |= {names.IMAGE: environ[variables.IMAGE]} if environ.get(variables.IMAGE) else {}
    for artifact in inputs.values():
        source = runs.find(store, str(artifact.metadata.get("run_id", "")))
        tags |= runs.named_by(source) if source else {}
    return store.client.create_run(store.experiment_id, run_name=component, tags=tags).info.run_id


def _place(store: Store, run_id: str, component: str, pipeline_id: str) -> None:
    """Tags a run with its own ID and the command that repeats it, and its pipeline's run with all runs that it names."""
    run = store.client.get_run(run_id)
    again = ["sogclr", "rerun", component, "--run", run_id]
    again += ["--root", run.data.tags[names.ROOT]] if names.ROOT in run.data.tags else []
    runs.set_tags(store, run_id, {names.RUN_OF + component: run_id, names.COMMAND: shlex.join(again)})
    runs.set_tags(store, pipeline_id, {**runs.named_by(run), names.RUN_OF + component: run_id})


def _attempts(store: Store, component: str, pipeline_id: str) -> list[Run]:
    """Returns the runs of a component in a pipeline run, the oldest first."""
    return [run for run in runs.search(store, names.PARENT, pipeline_id) if run.data.tags.get(names.COMPONENT) == component]


def _reopen(store: Store, run: Run) -> None:
    """Sets a failed run back to running and removes its error tags."""
    store.client.update_run(run.info.run_id, status="RUNNING")
    for tag in {names.ERROR, names.USER_ERROR} & set(run.data.tags):
        store.client.delete_tag(run.info.run_id, tag)


def _record_failure(store: Store, run_id: str, pipeline_id: str, error: BaseException) -> None:
    user_error = isinstance(error, UserError)
    text = one_line(error) if user_error else f"{type(error).__name__}: {one_line(error)}"
    runs.set_tags(store, run_id, {names.ERROR: text, names.USER_ERROR: str(user_error).lower()})
    store.client.set_terminated(run_id, "FAILED" if isinstance(error, Exception) else "KILLED")
    redraw(store, pipeline_id)

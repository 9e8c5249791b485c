"""A step's run: opened under its pipeline's, gone on with by later attempts of the same job, and closed with how it ended."""

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
from components.tracking.pipeline_runs import find_job, job_of, pipeline_of_job
from components.tracking.step_file import KfpArtifact
from components.tracking.store import Store, impatient, open_job_store
from trainer.shared.errors import UserError


class StepRun:
    """The run of a step while the step runs. Its `metrics`, `datasets` and `encoders` record what they are named for."""

    def __init__(self, store: Store, run_id: str, job: str = "") -> None:
        self.run_id = run_id
        self.job = job
        """Names the pipeline job that this is a step of, on Vertex AI as the API does."""
        self.metrics = Metrics(store, run_id)
        self.datasets = Datasets(store, run_id)
        self.encoders = Encoders(store, run_id, self.metrics)
        self._store = store
        self._at_end: list[Callable[[bool], None]] = []

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Records parameters. A mapping among them becomes parameters with dotted names."""
        runs.log_params(self._store, self.run_id, params)

    def log_devices(self, devices: Mapping[str, str]) -> None:
        """Records what the step runs on, as `trainer.distribution.describe_run` returns it.

        Tags, because a later attempt may run on another machine, and MLflow refuses to change a parameter.
        """
        tags = {names.DEVICE: "device", names.TENSORFLOW: "tensorflow", names.REPLICAS: "replicas"}
        runs.set_tags(self._store, self.run_id, {tag: devices[name] for tag, name in tags.items()})

    def log_figure(self, figure: Figure, file: str) -> None:
        self._store.client.log_figure(self.run_id, figure, file, save_kwargs={"dpi": 120})

    def log_text(self, text: str, file: str) -> None:
        self._store.client.log_text(self.run_id, text, file)

    def sources(self) -> dict[str, str]:
        """Returns by component this run and the runs that it follows from."""
        return recorded.sources(self._store, self.run_id)

    def history_behind(self, component: str) -> recorded.History:
        """Returns every metric of the run of `component` that this one follows from; none where the store lacks that run."""
        return recorded.history_behind(self._store, self.run_id, component)

    def at_end(self, end: Callable[[bool], None]) -> None:
        """Has `end` called when the step ends and its metrics are delivered or stored, with whether it is finished."""
        self._at_end.append(end)

    def close(self, finished: bool = False) -> None:
        """Closes the metrics, then does what `at_end` was given."""
        self.metrics.close(finished)
        for end in self._at_end:
            end(finished)


def recorded_before(
    component: str, arguments: Mapping[str, Any], outputs: Mapping[str, KfpArtifact], environ: Mapping[str, str] = os.environ
) -> bool:
    """Returns whether an earlier attempt of the same pipeline job recorded all of `component`, and fills `outputs` from it.

    An attempt can fail after that: KFP stores the outputs when the component's own code has ended.
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
    """Opens the run of `component` under its pipeline's, and closes it as finished, or as failed with the reason.

    MLflow's own variables name the store and the pipeline's run; without MLFLOW_RUN_ID the run of the pipeline job is found by
    its name. Goes on with the run of an earlier attempt of the same job that did not finish. Every output's metadata gets
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
    for artifact in outputs.values():
        artifact.metadata["run_id"] = run_id

    folder = environ.get(variables.JOB_FOLDER, "")
    run = StepRun(store, run_id, f"{folder}/pipelineJobs/{job_of(first.uri)}" if folder else f"pipeline run {pipeline_id}")
    if earlier:
        run.metrics.skip_recorded()
    run.log_params(arguments)
    step_file.write(store, run_id, arguments, {})
    try:
        yield run
        run.metrics.flush()
        step_file.write(store, run_id, arguments, outputs)
    except LostLeaseError:
        # Whoever has the folder now may be the next attempt, in the same run.
        run.metrics.abandon()
        run.close()
        raise
    except BaseException as error:
        run.close()
        # A step that waited for the server as long as it may does not wait again, and fails for its own reason.
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
    """Makes a run of `component` in a pipeline run, each of which names the other, and returns its ID."""
    inherited = store.client.get_run(pipeline_id).data.tags
    tags = {names.COMPONENT: component, names.PARENT: pipeline_id, names.CODE: str(arguments.get("code_version", ""))}
    tags |= {key: inherited[key] for key in (names.COMMIT, names.ROOT, names.JOB_LINK) if key in inherited}
    tags |= {names.IMAGE: environ[variables.IMAGE]} if environ.get(variables.IMAGE) else {}
    for artifact in inputs.values():
        source = runs.find(store, str(artifact.metadata.get("run_id", "")))
        tags |= runs.named_by(source) if source else {}
    run_id = store.client.create_run(store.experiment_id, run_name=component, tags=tags).info.run_id
    again = ["sogclr", "rerun", component, "--run", run_id] + (["--root", tags[names.ROOT]] if names.ROOT in tags else [])
    runs.set_tags(store, run_id, {names.RUN_OF + component: run_id, names.COMMAND: shlex.join(again)})
    runs.set_tags(store, pipeline_id, runs.named_by(store.client.get_run(run_id)))
    return run_id


def _attempts(store: Store, component: str, pipeline_id: str) -> list[Run]:
    """Returns the runs of a component in a pipeline run, the oldest first."""
    return [run for run in runs.search(store, names.PARENT, pipeline_id) if run.data.tags.get(names.COMPONENT) == component]


def _reopen(store: Store, run: Run) -> None:
    """Takes back that a run failed."""
    store.client.update_run(run.info.run_id, status="RUNNING")
    for tag in {names.ERROR, names.USER_ERROR} & set(run.data.tags):
        store.client.delete_tag(run.info.run_id, tag)


def _record_failure(store: Store, run_id: str, pipeline_id: str, error: BaseException) -> None:
    user_error = isinstance(error, UserError)
    text = one_line(error) if user_error else f"{type(error).__name__}: {one_line(error)}"
    runs.set_tags(store, run_id, {names.ERROR: text, names.USER_ERROR: str(user_error).lower()})
    store.client.set_terminated(run_id, "FAILED" if isinstance(error, Exception) else "KILLED")
    redraw(store, pipeline_id)

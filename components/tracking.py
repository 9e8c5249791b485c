"""All that is known of MLflow: stores, runs, what they record, and the words and the picture that join them.

A pipeline run is a parent run, a component's run is nested in it. Beside MLflow's own, runs carry these tags:

    sogclr.component        what it is: one of `COMPONENTS`, or `pipeline`
    sogclr.job, sogclr.job_folder    name of a pipeline job, and where it is: projects/PROJECT/locations/REGION
    sogclr.run.COMPONENT    the run of COMPONENT that it is, follows from, or, for a pipeline, consists of
    sogclr.device, sogclr.tensorflow, sogclr.replicas    what a step last ran on

so that one search finds everything that came of a run. The arguments and outputs of a component's run are in its artifact
`step.json`. Nothing here uses MLflow's notion of an active run: every call names its run.

An unreachable server does not stop a job: metrics queue in a file, and other calls are repeated until the store's patience
ends.
"""

import json
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol, cast
from urllib.parse import unquote, urlsplit

import mlflow
import numpy as np
from matplotlib.figure import Figure
from mlflow import MlflowClient
from mlflow.entities import (
    Dataset,
    DatasetInput,
    InputTag,
    LoggedModelInput,
    LoggedModelOutput,
    Metric,
    Param,
    Run,
    RunTag,
)
from mlflow.exceptions import MlflowException
from mlflow.models import Model, ModelSignature
from mlflow.types import ColSpec, DataType, Schema, TensorSpec

from components import figures, registration, variables
from components.lease import LostLeaseError
from components.lineage import COMPONENTS, Artifact, Lineage, Step, short
from components.outbox import (
    Outbox,
    PatientClient,
    Point,
    UnansweredError,
    answer,
    hide_credentials,
    is_transient,
    one_line,
    patiently,
)
from components.registration import ENCODER
from trainer.shared.errors import UserError

EXPERIMENT = "sogclr"
CHAMPION = "champion"
"""Alias of the version that measured best."""

PIPELINE = "pipeline"
REPORT = "report.html"
LINEAGE_PICTURE = "lineage.png"

_COMPONENT = "sogclr.component"
_RUN_OF = "sogclr.run."
_JOB = "sogclr.job"
_JOB_FOLDER = "sogclr.job_folder"
_JOB_LINK = "sogclr.job_link"
_IMAGE = "sogclr.image"
_DEVICE = "sogclr.device"
_TENSORFLOW = "sogclr.tensorflow"
_REPLICAS = "sogclr.replicas"
_ROOT = "sogclr.root"
_RESUMED_FROM = "sogclr.resumed_from"
_COMMAND = "sogclr.command"
_RERUN_OF = "sogclr.rerun_of"
_CODE = "sogclr.code_version"
_ERROR = "sogclr.error"
_USER_ERROR = "sogclr.user_error"
_COMMIT = "mlflow.source.git.commit"
_PARENT = "mlflow.parentRunId"
_NOTE = "mlflow.note.content"
_STEP = "step.json"
_TOP_1 = "top_1"
_TOP_1_DATASET = "top_1.dataset_fingerprint"
_TOP_1_RUN = "top_1.run_id"
_MODEL_TRAINING = {"mlflow.experimentKind": "custom_model_development"}
_VIEW = "?workflowType=machine_learning"
"""The UI's own word for pages about training; it shows those about agents otherwise."""
_DIGEST_LENGTH = 36
"""What MLflow has room for."""
_LOADER = "eval.serving"
_SERVED_WITH = ("mlflow", "numpy", "pandas", "keras", "protobuf")
"""What a server installs besides TensorFlow, in the versions that are here."""
_INVALID_HOST = "Invalid Host header"
"""What an MLflow server says where --allowed-hosts lacks the host that the client asked for."""
_SECONDS_FOR_A_SECRET = 30.0
_PATIENCE_OF_STEPS = 3600.0
"""Seconds that a step waits for a server that is down, before it gives up what it made to the next attempt."""


class KfpArtifact(Protocol):
    """What a component is given and gives: any of KFP's artifacts."""

    schema_title: str
    uri: str
    metadata: dict[str, Any]


@dataclass(frozen=True)
class Store:
    """Where runs are kept."""

    client: MlflowClient
    experiment_id: str


def open_store(uri: str, experiment: str = EXPERIMENT, artifacts: str | None = None, patience: float = 0.0) -> Store:
    """Returns the store at `uri`, with its experiment; where that is new, its artifacts go to the folder `artifacts`.

    While the store does not answer, a call is made again for `patience` seconds. Raises UserError for a store that cannot
    be used.
    """
    with _refused_in_one_line(uri):
        client = cast(MlflowClient, PatientClient(MlflowClient(uri), patience))
        found = client.get_experiment_by_name(experiment)
        return Store(client, found.experiment_id if found else client.create_experiment(experiment, artifacts, _MODEL_TRAINING))


def describe_store(uri: str, experiment: str = EXPERIMENT) -> str:
    """Returns in words what the store at `uri` holds, and changes nothing in it. Raises UserError where it cannot be used."""
    with _refused_in_one_line(uri):
        found = MlflowClient(uri).get_experiment_by_name(experiment)
        return f"has the experiment {experiment}" if found else f"answers; sogclr run makes the experiment {experiment}"


@contextmanager
def _refused_in_one_line(uri: str) -> Iterator[None]:
    try:
        yield
    except MlflowException as error:
        said = f"it {answer(error)}" if is_transient(error) else one_line(error)
        host = urlsplit(without_credentials(uri)).netloc
        if _INVALID_HOST in said:
            hint = f"the server accepts no requests for the host {host}: start mlflow server with --allowed-hosts {host}"
        elif error.get_http_status_code() in (401, 403):
            hint = "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
        else:
            hint = "mend or unset MLFLOW_TRACKING_URI"
        raise UserError(f"MLflow cannot use {without_credentials(uri)}: {said}; {hint}") from error


def patient(client: MlflowClient) -> MlflowClient:
    """Returns a client that waits for a server that is down, as long as a step does."""
    inner = client.impatient if isinstance(client, PatientClient) else client
    return cast(MlflowClient, PatientClient(inner, _PATIENCE_OF_STEPS))


def _impatient(store: Store) -> Store:
    """Returns the same store with a client that makes every call once."""
    return replace(store, client=store.client.impatient) if isinstance(store.client, PatientClient) else store


def without_credentials(uri: str) -> str:
    """Returns `uri` as it may be shown."""
    return hide_credentials(uri)


def move_credentials(environ: MutableMapping[str, str] = os.environ) -> None:
    """Moves a password in the address of a server to MLflow's own variables: MLflow repeats the address in its errors."""
    uri = urlsplit(environ.get("MLFLOW_TRACKING_URI", ""))
    if uri.scheme.startswith("http") and uri.password is not None:
        environ["MLFLOW_TRACKING_URI"] = without_credentials(uri.geturl())
        environ["MLFLOW_TRACKING_USERNAME"], environ["MLFLOW_TRACKING_PASSWORD"] = (
            unquote(uri.username or ""),
            unquote(uri.password),
        )


def read_secret(environ: MutableMapping[str, str] = os.environ) -> None:
    """Puts the secret that `environ` names, if it names one, where MLflow looks for credentials.

    Waits for Secret Manager as long as a step waits for MLflow. Raises UserError where the secret cannot be read.
    """
    name = environ.get(variables.SECRET)
    if not name:
        return
    from google.api_core.exceptions import Forbidden, GoogleAPICallError
    from google.auth.exceptions import GoogleAuthError
    from google.cloud import secretmanager

    def read() -> str:
        # The client's own retries end after 60 s in an exception that hides the answer.
        client = secretmanager.SecretManagerServiceClient()
        return str(client.access_secret_version(name=name, retry=None, timeout=_SECONDS_FOR_A_SECRET).payload.data.decode())

    try:
        secret = patiently(read, _PATIENCE_OF_STEPS, f"Secret Manager, asked for {name},")
    except GoogleAPICallError as error:
        hint = "give --mlflow-secret a version that exists, as in projects/P/secrets/S/versions/latest"
        if isinstance(error, Forbidden):
            hint = "the service account of the steps needs roles/secretmanager.secretAccessor on it"
        raise UserError(f"the secret {name} cannot be read ({answer(error)}): {hint}") from error
    except GoogleAuthError as error:
        raise UserError(f"the secret {name} cannot be read without credentials of Google Cloud ({one_line(error)})") from error
    user, separator, password = secret.strip().partition(":")
    if separator:
        environ.update(MLFLOW_TRACKING_USERNAME=user, MLFLOW_TRACKING_PASSWORD=password)
    else:
        environ["MLFLOW_TRACKING_TOKEN"] = user


# ---- The pipeline's run


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
) -> str:
    """Opens a parent run and returns its ID.

    `root` is what a later command must be given as --root, empty where that is its default; `rerun_of` is the run of the
    component that is done again.
    """
    tags = {
        _COMPONENT: PIPELINE,
        _COMMAND: shlex.join([*command, *(["--root", root] if root else [])]),
        _ROOT: root,
        _CODE: code_version,
        _COMMIT: git_commit,
        _RERUN_OF: rerun_of,
    }
    run = store.client.create_run(store.experiment_id, run_name=name, tags={key: value for key, value in tags.items() if value})
    _log_params(store, run.info.run_id, params)
    return run.info.run_id


def end_pipeline(store: Store, pipeline_id: str, status: str, run_ids: Iterable[str] = ()) -> Lineage:
    """Closes a parent run that consists of the runs `run_ids` and of those that it made; returns what led to what.

    A step that is still said to be running is said to be killed.
    """
    for run_id in run_ids:
        _set_tags(store, pipeline_id, _runs_named_by(store.client.get_run(run_id)))
    for one in lineage(store, pipeline_id).steps:
        if one.status == "RUNNING" and one.pipeline_id == pipeline_id:
            store.client.set_terminated(one.run_id, "KILLED")
    chain = lineage(store, pipeline_id)
    result = chain.output("metrics")
    if status == "FINISHED" and result is not None:
        final = {f"eval/{key}": value for key, value in result.metadata.items() if key != "run_id"}
        _log_once(store, pipeline_id, final, step=0)
    store.client.set_terminated(pipeline_id, status)
    redraw(store, pipeline_id)
    return chain


def open_job_store(environ: Mapping[str, str] = os.environ) -> Store:
    """Returns the store that the variables of a step name, with a step's patience."""
    move_credentials()
    if not environ.get("MLFLOW_TRACKING_URI"):
        raise UserError("MLFLOW_TRACKING_URI is not set: a component records what it does where that says")
    read_secret()
    experiment = environ.get("MLFLOW_EXPERIMENT_NAME") or EXPERIMENT
    return open_store(environ["MLFLOW_TRACKING_URI"], experiment, patience=_PATIENCE_OF_STEPS)


def job_of(output_uri: str) -> str:
    """Returns the name of the pipeline job that writes to `output_uri`, which ends in JOB/TASK/OUTPUT."""
    return output_uri.rstrip("/").split("/")[-3]


def find_job(store: Store, job: str, environ: Mapping[str, str] = os.environ) -> str | None:
    """Returns the parent run of a pipeline job, if there is one: the first of several that began at once.

    The folder of jobs that `environ` names tells jobs of one name in several projects or regions apart. Without one it is a
    run that has none.
    """
    folder = environ.get(variables.JOB_FOLDER, "")
    found = [run for run in _search(store, _JOB, job) if run.data.tags.get(_JOB_FOLDER, "") == folder]
    return found[0].info.run_id if found else None


def pipeline_of_job(store: Store, job: str, environ: Mapping[str, str] = os.environ) -> str:
    """Returns the parent run, new if need be, of a pipeline job."""
    known = find_job(store, job, environ)
    if known:
        return known
    folder = environ.get(variables.JOB_FOLDER, "")
    tags = {_COMPONENT: PIPELINE, _JOB: job, _JOB_FOLDER: folder, _IMAGE: environ.get(variables.IMAGE, "")}
    tags |= {_RERUN_OF: environ.get(variables.RERUN_OF, "")}
    tags |= {_COMMIT: environ.get(variables.COMMIT, ""), _JOB_LINK: job_link(folder, job)}
    run_id = store.client.create_run(store.experiment_id, run_name=job, tags={k: v for k, v in tags.items() if v}).info.run_id
    # Another step may have done the same meanwhile; whoever looks later finds the first.
    return find_job(store, job, environ) or run_id


def job_link(folder: str, job: str) -> str:
    """Returns the page of a pipeline job in Google's console; `folder` is projects/PROJECT/locations/REGION, or empty."""
    if not folder:
        return ""
    _, project, _, region = folder.split("/")
    return f"https://console.cloud.google.com/vertex-ai/locations/{region}/pipelines/runs/{job}?project={project}"


def join(store: Store, job: str, run_ids: Iterable[str]) -> None:
    """Says that a pipeline job consists of the runs `run_ids`, those that it took from the cache included."""
    pipeline_id = pipeline_of_job(store, job)
    for run in filter(None, (_find(store, run_id) for run_id in run_ids)):
        _set_tags(store, pipeline_id, _runs_named_by(run))
    redraw(store, pipeline_id)


def end_job(store: Store, job: str, state: str) -> None:
    """Closes the parent run of a pipeline job, which ended as KFP says: SUCCEEDED, FAILED or CANCELLED."""
    status = {"SUCCEEDED": "FINISHED", "CANCELLED": "KILLED"}.get(state, "FAILED")
    end_pipeline(store, pipeline_of_job(store, job), status)


def knows(store: Store, run_id: str) -> bool:
    """Returns whether a run is there and was not deleted."""
    run = _find(store, run_id)
    return run is not None and run.info.lifecycle_stage == "active"


# ---- A component's run


class StepRun:
    """The run of a component while it runs."""

    def __init__(self, store: Store, run_id: str, job: str = "") -> None:
        self.run_id = run_id
        self.job = job
        """Names the pipeline job that this is a step of, on Vertex AI as the API does."""
        self._store = store
        self._recorded: set[tuple[str, int]] = set()
        """Metrics and steps that earlier attempts recorded."""
        self._at_end: list[Callable[[bool], None]] = []
        client = _impatient(store).client
        self._outbox = Outbox(
            lambda points: client.log_batch(run_id, metrics=[Metric(*point) for point in points]), _PATIENCE_OF_STEPS
        )

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Records parameters; those within others get dotted names."""
        _log_params(self._store, self.run_id, params)

    def log_devices(self, devices: Mapping[str, str]) -> None:
        """Records what the step runs on, as `trainer.distribution.describe_run` returns it.

        Tags, because a later attempt may run on another machine, and MLflow refuses to change a parameter.
        """
        names = {_DEVICE: "device", _TENSORFLOW: "tensorflow", _REPLICAS: "replicas"}
        _set_tags(self._store, self.run_id, {tag: devices[name] for tag, name in names.items()})

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Records metrics, without waiting for the store. Those that an earlier attempt recorded of the same step stay."""
        now = int(time.time() * 1000)
        new = {name: float(value) for name, value in metrics.items() if (name, step) not in self._recorded}
        self._outbox.put([(name, value, now, step) for name, value in new.items()])

    def skip_recorded_metrics(self) -> None:
        """Reads what earlier attempts recorded in this run, which goes on before the last step that they logged."""
        for name, points in _history(self._store, self.run_id).items():
            self._recorded |= {(name, point.step) for point in points}

    def at_end(self, end: Callable[[bool], None]) -> None:
        """Has `end` called when the step ends and its metrics are delivered or stored, with whether it is finished."""
        self._at_end.append(end)

    def settle(self) -> None:
        """Returns once a SIGKILL would lose none of the metrics; waits a minute at most."""
        self._outbox.settle()

    def flush(self) -> None:
        """Waits until every metric is with the store. Raises what stands in the way where there is no hope."""
        self._outbox.flush()

    def close(self, finished: bool = False) -> None:
        """Sends what can be sent at once; what cannot stays in the outbox's file, which goes once the step is `finished`."""
        self._outbox.close(finished)
        for end in self._at_end:
            end(finished)

    def abandon(self) -> None:
        """Keeps no metric that is not with the store yet, since another process does the same work now."""
        self._outbox.abandon()

    def keep_metrics_in(self, folder: str) -> None:
        """Keeps metrics that were not delivered yet in `folder`, and delivers those that an earlier attempt left there.

        Where the earlier attempt had another run, this one gets that one's history too, and says whose it is.
        """

        def inherit(before: str) -> list[Point]:
            if not knows(self._store, before):
                return []
            self._store.client.set_tag(self.run_id, _RESUMED_FROM, before)
            history = _history(self._store, before)
            return [(name, one.value, one.timestamp, one.step) for name, points in history.items() for one in points]

        self._outbox.keep_in(folder, self.run_id, inherit)
        self._recorded |= {(name, step) for name, _, _, step in self._outbox.taken_over}

    def history(self) -> dict[str, list[tuple[int, float]]]:
        """Returns all that was recorded of each metric, by name: (step, value), in order."""
        self.flush()
        return history(self._store, self.run_id)

    def history_behind(self, component: str) -> dict[str, list[tuple[int, float]]]:
        """Returns the same of the run of `component` that this one follows from; nothing where the store does not know it."""
        return history_behind(self._store, self.run_id, component)

    def sources(self) -> dict[str, str]:
        """Returns the runs, by component, that this one follows from, and itself."""
        named = _runs_named_by(self._store.client.get_run(self.run_id))
        return {name: named[_RUN_OF + name] for name in COMPONENTS if _RUN_OF + name in named}

    def log_figure(self, figure: Figure, file: str) -> None:
        self._store.client.log_figure(self.run_id, figure, file, save_kwargs={"dpi": 120})

    def log_text(self, text: str, file: str) -> None:
        self._store.client.log_text(self.run_id, text, file)

    def log_dataset(self, dataset: KfpArtifact, context: str) -> None:
        """Records a dataset as input, in the context "training", "eval" or "output".

        MLflow keeps one entry for equal datasets, with the source of the first: the tags of the input say which this one is.
        """
        uri, about = dataset.uri, dataset.metadata
        entry = Dataset(
            **_name_and_digest(dataset),
            source_type="gs" if uri.startswith("gs://") else "local",
            source=json.dumps({"uri": uri, "run_id": about["run_id"]}),
            profile=json.dumps({key: int(about[key]) for key in ("train_images", "validation_images", "classes")}),
        )
        tags = {"mlflow.data.context": context, "uri": uri} | {key: str(about[key]) for key in ("fingerprint", "run_id")}
        inputs = [DatasetInput(entry, [InputTag(key, value) for key, value in tags.items()])]
        self._store.client.log_inputs(self.run_id, datasets=inputs)
        self._store.client.set_tag(self.run_id, "sogclr.dataset_fingerprint", about["fingerprint"])

    def log_features(self, dataset: KfpArtifact, features: Mapping[str, Mapping[str, Any]]) -> None:
        """Records files of features of `dataset`, by split, each a dataset of its own named by the digest of its contents."""
        inputs = []
        for split, file in features.items():
            entry = Dataset(
                name=f"{dataset.metadata['name']}-features-{split}",
                digest=str(file["digest"])[:_DIGEST_LENGTH],
                source_type="gs" if str(file["path"]).startswith("gs://") else "local",
                source=json.dumps({"uri": file["path"], "run_id": self.run_id}),
                profile=json.dumps({key: int(file[key]) for key in ("images", "dimensions")}),
            )
            tags = {"mlflow.data.context": "features", "uri": str(file["path"]), "fingerprint": dataset.metadata["fingerprint"]}
            inputs.append(DatasetInput(entry, [InputTag(key, value) for key, value in tags.items()]))
        self._store.client.log_inputs(self.run_id, datasets=inputs)

    def log_encoder(
        self,
        model: KfpArtifact,
        dataset: KfpArtifact,
        files: Sequence[str],
        exported: str,
        *,
        params: Mapping[str, Any],
        metrics: Mapping[str, float],
        step: int,
    ) -> None:
        """Records an encoder as a logged model with its final metrics, and registers it; its metadata say so.

        What an earlier attempt recorded of the same state, by `params["state_sha256"]`, is completed, not recorded again.
        The model holds `files` and what `eval.export` wrote into the folder `exported`, and any MLflow can serve it. A store in
        a database looks for the model to register where MLFLOW_TRACKING_URI says, so that must name this store.
        """
        client = self._store.client
        texts = {name: str(value) for name, value in params.items()}
        logged = registration.logged_model(client, self._store.experiment_id, self.run_id, texts)
        with tempfile.TemporaryDirectory() as made, tempfile.TemporaryDirectory() as fetched:
            source = Path(mlflow.artifacts.download_artifacts(artifact_uri=exported, dst_path=fetched))
            card = (source / "README.md").read_text()
            if not registration.is_ready(logged):
                _save_servable(made, source / "saved_model", logged.model_id, self.run_id)
                for file in (*files, str(source / "encoder.keras"), str(source / "README.md")):
                    mlflow.artifacts.download_artifacts(artifact_uri=file, dst_path=made)
                client.log_model_artifacts(logged.model_id, made)
                client.finalize_logged_model(logged.model_id, "READY")
        self._log_output(logged.model_id, step)
        self.log_final_metrics(metrics, logged.model_id, dataset, step)
        tags = {"dataset_fingerprint": dataset.metadata["fingerprint"], "uri": model.uri, **texts}
        version = registration.register(client, logged, self._store.experiment_id, self.run_id, card, tags)
        model.metadata.update(model_id=logged.model_id, model_name=ENCODER, model_version=version)

    def _log_output(self, model_id: str, step: int) -> None:
        def is_there() -> bool:
            outputs = self._store.client.get_run(self.run_id).outputs
            return outputs is not None and any(one.model_id == model_id for one in outputs.model_outputs)

        # A store in a database refuses to record it twice, also where the answer to a first call was lost.
        if not is_there():
            try:
                self._store.client.log_outputs(self.run_id, [LoggedModelOutput(model_id, step)])
            except MlflowException:
                if not is_there():
                    raise

    def use_encoder(self, model: KfpArtifact) -> None:
        """Records an encoder that `log_encoder` logged as this run's input; by its path where another store has it."""
        if self._has_model(model.metadata["model_id"]):
            self._store.client.log_inputs(self.run_id, models=[LoggedModelInput(model.metadata["model_id"])])
        else:
            self._store.client.set_tag(self.run_id, "sogclr.encoder_uri", model.uri)

    def rate_encoder(self, model: KfpArtifact, dataset: KfpArtifact, card: str, top_1: float) -> None:
        """Says of a registered encoder what was measured, and moves the aliases; nothing where another store has it.

        `CHAMPION`-FINGERPRINT goes to the version with the best top-1 on `dataset`, the earliest of equals. So does `CHAMPION`,
        unless it is a version's that was measured on another dataset: accuracies on different images do not compare.
        """
        client, fingerprint = self._store.client, dataset.metadata["fingerprint"]
        versions = registration.versions(client)
        own = next((one for one in versions if one.source == f"models:/{model.metadata['model_id']}"), None)
        if own is None:
            return
        client.update_model_version(ENCODER, own.version, registration.described(card))
        for key, value in {_TOP_1: str(top_1), _TOP_1_DATASET: fingerprint, _TOP_1_RUN: self.run_id}.items():
            client.set_model_version_tag(ENCODER, own.version, key, value)
        measured = {one.version: one.tags for one in registration.versions(client) if _TOP_1 in one.tags}
        rivals = [version for version, tags in measured.items() if tags[_TOP_1_DATASET] == fingerprint]
        best = max(rivals, key=lambda version: (float(measured[version][_TOP_1]), -int(version)))
        holder = client.get_registered_model(ENCODER).aliases.get(CHAMPION)
        client.set_registered_model_alias(ENCODER, f"{CHAMPION}-{fingerprint[:12]}", best)
        if measured.get(holder, {}).get(_TOP_1_DATASET, fingerprint) == fingerprint:
            client.set_registered_model_alias(ENCODER, CHAMPION, best)

    def log_final_metrics(self, metrics: Mapping[str, float], model_id: str, dataset: KfpArtifact, step: int) -> None:
        """Records metrics as those of a model on a dataset; on the dataset alone where another store has the model.

        Adds no point to those that this run has of the same step, from training or from an earlier attempt.
        """
        about = {f"dataset_{key}": value for key, value in _name_and_digest(dataset).items()}
        about |= {"model_id": model_id} if self._has_model(model_id) else {}
        self.flush()
        _log_once(self._store, self.run_id, metrics, step, **about)

    def _has_model(self, model_id: str) -> bool:
        try:
            return bool(self._store.client.get_logged_model(model_id))
        except MlflowException as error:
            if error.get_http_status_code() != 404:
                raise
            return False


def recorded_before(
    component: str, arguments: Mapping[str, Any], outputs: Mapping[str, KfpArtifact], environ: Mapping[str, str] = os.environ
) -> bool:
    """Returns whether an earlier attempt of the same pipeline job recorded all of `component`; then `outputs` are what it made.

    An attempt can fail after that: KFP stores the outputs when the component's own code has ended.
    """
    store = open_job_store(environ)
    pipeline_id = environ.get("MLFLOW_RUN_ID") or find_job(store, job_of(next(iter(outputs.values())).uri), environ)
    earlier = _attempts(store, component, pipeline_id) if pipeline_id else []
    if not pipeline_id or not earlier:
        return False
    run_id = earlier[-1].info.run_id
    recorded = _recorded(store, run_id)
    if recorded["outputs"].keys() != outputs.keys() or recorded["arguments"] != json.loads(json.dumps(dict(arguments))):
        return False
    for name, artifact in outputs.items():
        artifact.uri = recorded["outputs"][name]["uri"]
        artifact.metadata.update(recorded["outputs"][name]["metadata"])
    print(f"{component} was finished by an earlier attempt, as run {run_id}", file=sys.stderr, flush=True)
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

    The store and the pipeline's run are those that MLflow's own variables name; without MLFLOW_RUN_ID the run of the
    pipeline job is found by its name. What an earlier attempt of the same job began is gone on with. Every output's metadata
    gets `run_id`.
    """
    store = open_job_store(environ)
    first = next(iter(outputs.values()))
    pipeline_id = environ.get("MLFLOW_RUN_ID") or pipeline_of_job(store, job_of(first.uri), environ)
    earlier = [run for run in _attempts(store, component, pipeline_id)[-1:] if run.info.status != "FINISHED"]
    run_id = _open_run(store, component, pipeline_id, arguments, inputs or {}, environ, earlier)
    for artifact in outputs.values():
        artifact.metadata["run_id"] = run_id

    folder = environ.get(variables.JOB_FOLDER, "")
    run = StepRun(store, run_id, f"{folder}/pipelineJobs/{job_of(first.uri)}" if folder else f"pipeline run {pipeline_id}")
    if earlier:
        run.skip_recorded_metrics()
    run.log_params(arguments)
    _log_step(store, run_id, arguments, {})
    try:
        yield run
        run.flush()
        _log_step(store, run_id, arguments, outputs)
    except LostLeaseError:
        # Whoever has the folder now may be the next attempt, in the same run.
        run.abandon()
        run.close()
        raise
    except BaseException as error:
        run.close()
        # A step that waited for the server as long as it may does not wait again, and fails for its own reason.
        try:
            _record_failure(_impatient(store) if isinstance(error, UnansweredError) else store, run_id, pipeline_id, error)
        except Exception as unrecorded:
            what = f"MLflow {answer(unrecorded)}" if is_transient(unrecorded) else one_line(unrecorded)
            print(f"warning: MLflow does not know that this step failed: {what}", file=sys.stderr, flush=True)
        raise
    store.client.set_terminated(run_id, "FINISHED")
    redraw(store, pipeline_id)
    run.close(finished=True)


def _record_failure(store: Store, run_id: str, pipeline_id: str, error: BaseException) -> None:
    user_error = isinstance(error, UserError)
    text = one_line(error) if user_error else f"{type(error).__name__}: {one_line(error)}"
    _set_tags(store, run_id, {_ERROR: text, _USER_ERROR: str(user_error).lower()})
    store.client.set_terminated(run_id, "FAILED" if isinstance(error, Exception) else "KILLED")
    redraw(store, pipeline_id)


def _attempts(store: Store, component: str, pipeline_id: str) -> list[Run]:
    """Returns the runs of a component in a pipeline run, the oldest first."""
    return [run for run in _search(store, _PARENT, pipeline_id) if run.data.tags.get(_COMPONENT) == component]


def _reopen(store: Store, run: Run) -> None:
    """Takes back that a run failed."""
    store.client.update_run(run.info.run_id, status="RUNNING")
    for tag in {_ERROR, _USER_ERROR} & set(run.data.tags):
        store.client.delete_tag(run.info.run_id, tag)


def _open_run(
    store: Store,
    component: str,
    pipeline_id: str,
    arguments: Mapping[str, Any],
    inputs: Mapping[str, KfpArtifact],
    environ: Mapping[str, str],
    earlier: Sequence[Run],
) -> str:
    """Returns the run of `component` in a pipeline run: the one of an `earlier` attempt, else a new one."""
    if earlier:
        _reopen(store, earlier[-1])
        return earlier[-1].info.run_id
    inherited = store.client.get_run(pipeline_id).data.tags
    tags = {_COMPONENT: component, _PARENT: pipeline_id, _CODE: str(arguments.get("code_version", ""))}
    tags |= {key: inherited[key] for key in (_COMMIT, _ROOT, _JOB_LINK) if key in inherited}
    tags |= {_IMAGE: environ[variables.IMAGE]} if environ.get(variables.IMAGE) else {}
    for artifact in inputs.values():
        source = _find(store, str(artifact.metadata.get("run_id", "")))
        tags |= _runs_named_by(source) if source else {}
    run_id = store.client.create_run(store.experiment_id, run_name=component, tags=tags).info.run_id
    again = ["sogclr", "rerun", component, "--run", run_id] + (["--root", tags[_ROOT]] if _ROOT in tags else [])
    _set_tags(store, run_id, {_RUN_OF + component: run_id, _COMMAND: shlex.join(again)})
    _set_tags(store, pipeline_id, _runs_named_by(store.client.get_run(run_id)))
    return run_id


def log_plan(store: Store, name: str, plan: Mapping[str, Any]) -> str:
    """Records a plan, as of `pipelines/plan/`, as a run of its own and returns the run's ID."""
    run_id = store.client.create_run(store.experiment_id, run_name=name, tags={_COMPONENT: "plan"}).info.run_id
    store.client.log_dict(run_id, dict(plan), "plan.json")
    numbers = {key: value for key, value in plan.items() if isinstance(value, int | float) and not isinstance(value, bool)}
    _log_once(store, run_id, {f"plan/{key}": value for key, value in numbers.items()}, step=0)
    _log_params(store, run_id, {key: plan[key] for key in ("preset", "accelerator", "fits", "bound_by") if key in plan})
    store.client.set_terminated(run_id)
    return run_id


# ---- What was recorded


def find_run(store: Store, prefix: str) -> str:
    """Returns the ID of the one run that begins with `prefix`. Raises UserError where there is none, or several."""
    if len(prefix) < 8:
        raise UserError(f"run {prefix} is too short: give at least the first 8 characters of a run ID")
    runs = store.client.search_runs([store.experiment_id], max_results=50000)
    matches = [run.info.run_id for run in runs if run.info.run_id.startswith(prefix)]
    if not matches:
        raise UserError(f"there is no run {prefix}; sogclr ui shows those there are")
    if len(matches) > 1:
        raise UserError(f"run {prefix} could be any of {', '.join(matches)}: give more of it")
    return matches[0]


def find_step(store: Store, run_id: str, component: str) -> Step:
    """Returns the run of `component` that the run `run_id` is, follows from or belongs to.

    Raises UserError where there is none.
    """
    tags = store.client.get_run(run_id).data.tags
    if _COMPONENT not in tags:
        raise UserError(f"run {short(run_id)} is no run of sogclr: it has no {component}")
    pipeline = store.client.get_run(tags[_PARENT]) if _PARENT in tags else None
    found = tags.get(_RUN_OF + component) or (pipeline.data.tags.get(_RUN_OF + component) if pipeline else None)
    if found is None:
        there = [name for name in COMPONENTS if _RUN_OF + name in tags]
        raise UserError(
            f"run {short(run_id)} has no {component}, only {', '.join(there) or 'nothing'}; sogclr run goes on from there"
        )
    return read_step(store, found)


def read_step(store: Store, run_id: str) -> Step:
    """Returns what a component's run recorded."""
    run = store.client.get_run(run_id)
    tags = run.data.tags
    recorded = _recorded(store, run_id)
    return Step(
        component=tags[_COMPONENT],
        run_id=run_id,
        pipeline_id=tags[_PARENT],
        status=run.info.status,
        seconds=((run.info.end_time or time.time() * 1000) - run.info.start_time) / 1000,
        arguments=recorded["arguments"],
        outputs={name: Artifact(**artifact) for name, artifact in recorded["outputs"].items()},
        metrics=run.data.metrics,
        error=tags.get(_ERROR, ""),
        user_error=tags.get(_USER_ERROR) == "true",
    )


def history(store: Store, run_id: str) -> dict[str, list[tuple[int, float]]]:
    """Returns all that a run recorded of each metric, by name: (step, value), in order."""
    found = _history(store, run_id)
    # A step that was taken again after a restart counts once: its values are the same bits.
    return {name: sorted({point.step: point.value for point in points}.items()) for name, points in found.items()}


def history_behind(store: Store, run_id: str, component: str) -> dict[str, list[tuple[int, float]]]:
    """Returns the same of the run of `component` that `run_id` follows from; nothing where this store does not know it."""
    source = _find(store, store.client.get_run(run_id).data.tags.get(_RUN_OF + component, ""))
    return history(store, source.info.run_id) if source else {}


def lineage(store: Store, pipeline_id: str) -> Lineage:
    """Returns what led to what in a pipeline run."""
    run = store.client.get_run(pipeline_id)
    ids = [run.data.tags.get(_RUN_OF + component, "") for component in COMPONENTS]
    return Lineage(pipeline_id, run.info.run_name, tuple(read_step(store, run_id) for run_id in ids if _find(store, run_id)))


def picture_uri(store: Store, pipeline_id: str) -> str:
    """Returns where the picture of a pipeline run's lineage is."""
    return f"{store.client.get_run(pipeline_id).info.artifact_uri}/{LINEAGE_PICTURE}"


# ---- Words and picture


def redraw(store: Store, pipeline_id: str) -> None:
    """Draws a pipeline run's lineage, and writes the description of every run that has part in it."""
    chain = lineage(store, pipeline_id)
    store.client.log_figure(pipeline_id, figures.lineage(chain), LINEAGE_PICTURE)
    tags = store.client.get_run(pipeline_id).data.tags
    store.client.set_tag(pipeline_id, _NOTE, _pipeline_note(store, chain, tags))
    steps = {step.run_id: step for step in chain.steps}
    if _find(store, tags.get(_RERUN_OF, "")):
        steps[tags[_RERUN_OF]] = read_step(store, tags[_RERUN_OF])
    for run_id, one in steps.items():
        store.client.set_tag(run_id, _NOTE, _step_note(store, one))


def _pipeline_note(store: Store, chain: Lineage, tags: Mapping[str, str]) -> str:
    lines = []
    for one in chain.steps:
        reused = f", reused from {_link(store, one.pipeline_id, short(one.pipeline_id))}" if chain.reused(one) else ""
        lines.append(f"- {_link(store, one.run_id, one.component)}{reused}: {_made(one)}")
    if _find(store, tags.get(_RERUN_OF, "")):
        lines.append(f"- Does {_link(store, tags[_RERUN_OF], 'run ' + short(tags[_RERUN_OF]))} again")
    if _JOB_LINK in tags:
        lines.append(f"- Vertex AI: [job {tags[_JOB]}]({tags[_JOB_LINK]})")
    if _COMMAND in tags:
        lines.append(f"- Run again: `{tags[_COMMAND]}`")
    return "\n".join([*lines, "", f"![lineage](get-artifact?run_uuid={chain.run_id}&path={LINEAGE_PICTURE})"])


def _step_note(store: Store, one: Step) -> str:
    tags = store.client.get_run(one.run_id).data.tags
    sources = [tags[_RUN_OF + name] for name in COMPONENTS if name != one.component and _RUN_OF + name in tags]
    came_of_it = _search(store, _RUN_OF + one.component, one.run_id)
    later = [run for run in came_of_it if run.info.run_id not in (one.run_id, one.pipeline_id)]
    used_by = [run for run in later if run.data.tags[_COMPONENT] != PIPELINE]
    reused_by = [run for run in later if run.data.tags[_COMPONENT] == PIPELINE]
    done_again_by = _search(store, _RERUN_OF, one.run_id)
    lines = [f"**{one.component}** of {_link(store, one.pipeline_id, 'pipeline run ' + short(one.pipeline_id))}", ""]
    if "raw" in one.arguments:
        lines.append(f"- From: `{one.arguments['raw']}`")
    for source in (read_step(store, run_id) for run_id in sources if _find(store, run_id)):
        lines.append(f"- From: {_link(store, source.run_id, source.component)}, {_made(source)}")
    lines.append(f"- Made: {_made(one)}")
    if _DEVICE in tags:
        lines.append(f"- Ran on: {tags[_DEVICE]}, TensorFlow {tags[_TENSORFLOW]}, replicas: {tags[_REPLICAS]}")
    if "report" in one.outputs:
        lines.append(f"- Report: [{REPORT}](#/experiments/{store.experiment_id}/runs/{one.run_id}/artifacts/{REPORT})")
    if _find(store, tags.get(_RESUMED_FROM, "")):
        lines.append(f"- Went on from the checkpoints of {_link(store, tags[_RESUMED_FROM], short(tags[_RESUMED_FROM]))}")
    for title, runs in (("Used by", used_by), ("Reused by", reused_by), ("Done again by", done_again_by)):
        if runs:
            lines.append(f"- {title}: " + ", ".join(_link(store, run.info.run_id, _title(run)) for run in runs))
    lines.append(f"- Run again: `{tags[_COMMAND]}`")
    return "\n".join(lines)


def _made(one: Step) -> str:
    """Says in a few words of Markdown what came out of a step."""
    if not one.outputs:
        return f"nothing yet, {one.status.lower()} {one.error}".strip()
    about = next(iter(one.outputs.values()))
    if one.component == "build-tfrecords":
        counts = f"{about.count('train_images'):,} training and {about.count('validation_images'):,} validation images"
        return f"dataset `{about.short('fingerprint', 16)}`, {counts} in {about.count('classes'):,} classes"
    if one.component == "pretrain":
        name, version = about.metadata["model_name"], about.metadata["model_version"]
        return f"encoder [{name} version {version}](#/models/{name}/versions/{version}{_VIEW}), {about.count('steps'):,} steps"
    control = about.metadata.get("untrained_top_1_accuracy")
    beside = "no untrained control" if control is None else f"untrained control {float(control):.1%}"
    return f"top-1 {float(about.metadata['top_1_accuracy']):.1%}, {beside}"


def _title(run: Run) -> str:
    component = run.data.tags[_COMPONENT]
    return f"{'pipeline run' if component == PIPELINE else component} {short(run.info.run_id)}"


def _link(store: Store, run_id: str, text: str) -> str:
    return f"[{text}](#/experiments/{store.experiment_id}/runs/{run_id}{_VIEW})"


# ---- Small things


def _find(store: Store, run_id: str) -> Run | None:
    try:
        return store.client.get_run(run_id) if run_id else None
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None


def _search(store: Store, tag: str, value: str) -> list[Run]:
    return list(store.client.search_runs([store.experiment_id], f"tags.`{tag}` = '{value}'", order_by=["attributes.start_time"]))


def _runs_named_by(run: Run) -> dict[str, str]:
    return {key: value for key, value in run.data.tags.items() if key.startswith(_RUN_OF)}


def _history(store: Store, run_id: str) -> dict[str, list[Metric]]:
    names = store.client.get_run(run_id).data.metrics
    return {name: list(store.client.get_metric_history(run_id, name)) for name in names}


def _recorded(store: Store, run_id: str) -> dict[str, Any]:
    """Returns the arguments and outputs of a component's run; none where it was killed before it recorded them."""
    if not any(file.path == _STEP for file in store.client.list_artifacts(run_id)):
        return {"arguments": {}, "outputs": {}}
    with tempfile.TemporaryDirectory() as folder:
        found: dict[str, Any] = json.loads(Path(store.client.download_artifacts(run_id, _STEP, folder)).read_text())
    return found


def _set_tags(store: Store, run_id: str, tags: Mapping[str, str]) -> None:
    store.client.log_batch(run_id, tags=[RunTag(key, value) for key, value in tags.items()])


def _log_params(store: Store, run_id: str, params: Mapping[str, Any]) -> None:
    flat: dict[str, Any] = {}
    for key, value in params.items():
        flat |= {f"{key}.{inner}": item for inner, item in value.items()} if isinstance(value, Mapping) else {key: value}
    store.client.log_batch(run_id, params=[Param(key, _text(value)) for key, value in flat.items()])


def _text(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _log_once(store: Store, run_id: str, metrics: Mapping[str, float], step: int, **of: str) -> None:
    """Records metrics; where the run has the same value of the same step, as that point: MLflow keeps equal points once."""
    now, points = int(time.time() * 1000), []
    for name, value in metrics.items():
        there = store.client.get_metric_history(run_id, name)
        same = [point.timestamp for point in there if (point.step, point.value) == (step, float(value))]
        points.append(Metric(name, float(value), min(same, default=now), step, **of))
    store.client.log_batch(run_id, metrics=points)


def _log_step(store: Store, run_id: str, arguments: Mapping[str, Any], outputs: Mapping[str, KfpArtifact]) -> None:
    artifacts = {name: asdict(Artifact(a.schema_title, a.uri, a.metadata)) for name, a in outputs.items()}
    store.client.log_dict(run_id, {"arguments": dict(arguments), "outputs": artifacts}, _STEP)


def _name_and_digest(dataset: KfpArtifact) -> dict[str, str]:
    return {"name": dataset.metadata["name"], "digest": dataset.metadata["fingerprint"][:_DIGEST_LENGTH]}


def _save_servable(folder: str, saved_model: Path, model_id: str, run_id: str) -> None:
    """Makes `folder` a model that MLflow serves: a SavedModel, what loads it, and what a server has to install.

    The packages that the loader is in go with it, so a server needs neither this project nor the training's machine.
    """
    tensorflow = metadata.packages_distributions()["tensorflow"][0]
    needed = [f"{name}=={metadata.version(name)}" for name in _SERVED_WITH]
    # A TPU's build is for the machine that trains.
    needed.append(f"{tensorflow.replace('_', '-').removesuffix('-tpu')}=={metadata.version(tensorflow)}")
    packages = [str(Path(str(spec.origin)).parent) for spec in map(find_spec, ("eval", "trainer")) if spec]
    inputs, outputs = ColSpec(DataType.binary, "image_bytes"), TensorSpec(np.dtype(np.float32), (-1, -1))
    mlflow.pyfunc.save_model(
        folder,
        loader_module=_LOADER,
        data_path=str(saved_model),
        code_paths=packages,
        pip_requirements=needed,
        mlflow_model=Model(
            run_id=run_id, model_id=model_id, signature=ModelSignature(inputs=Schema([inputs]), outputs=Schema([outputs]))
        ),
    )

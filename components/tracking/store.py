"""Opens and describes the MLflow store. While a store is down, its client repeats every call."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import cast
from urllib.parse import urlsplit

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from components.patience import PATIENCE_OF_STEPS, PatientClient, answer, is_transient, one_line, without_credentials
from components.tracking.credentials import move_credentials, read_secret
from trainer.shared.errors import UserError

EXPERIMENT = "sogclr"
"""Default name of the experiment."""

_MODEL_TRAINING = {"mlflow.experimentKind": "custom_model_development"}
_INVALID_HOST = "Invalid Host header"
"""The answer of an MLflow server whose --allowed-hosts lacks the host in the client's request."""


@dataclass(frozen=True)
class Store:
    """An experiment on an MLflow server or in a database."""

    client: MlflowClient
    experiment_id: str


def open_store(uri: str, experiment: str = EXPERIMENT, artifacts: str | None = None, patience: float = 0.0) -> Store:
    """Returns the store at `uri`. Creates its experiment if there is none, with the folder `artifacts` for artifacts.

    While the store is down, its client repeats each call for `patience` seconds. Raises UserError if the store cannot be used.
    """
    with _refused_in_one_line(uri):
        client = cast(MlflowClient, PatientClient(MlflowClient(uri), patience))
        found = client.get_experiment_by_name(experiment)
        return Store(client, found.experiment_id if found else client.create_experiment(experiment, artifacts, _MODEL_TRAINING))


def open_job_store(environ: Mapping[str, str] = os.environ) -> Store:
    """Returns the store that a step's environment variables name, with the patience of a step."""
    move_credentials()
    if not environ.get("MLFLOW_TRACKING_URI"):
        raise UserError("MLFLOW_TRACKING_URI is not set: it must name the MLflow store that components record to")
    read_secret()
    experiment = environ.get("MLFLOW_EXPERIMENT_NAME") or EXPERIMENT
    return open_store(environ["MLFLOW_TRACKING_URI"], experiment, patience=PATIENCE_OF_STEPS)


def describe_store(uri: str, experiment: str = EXPERIMENT) -> str:
    """Returns in words whether the store at `uri` has the experiment. Changes nothing. Raises UserError if it cannot be used."""
    with _refused_in_one_line(uri):
        found = MlflowClient(uri).get_experiment_by_name(experiment)
        return f"has the experiment {experiment}" if found else f"answers; sogclr run makes the experiment {experiment}"


def patient(client: MlflowClient) -> MlflowClient:
    """Returns a client with the patience of a step: it waits for a server that is down."""
    inner = client.impatient if isinstance(client, PatientClient) else client
    return cast(MlflowClient, PatientClient(inner, PATIENCE_OF_STEPS))


def impatient(store: Store) -> Store:
    """Returns the same store with a client that does not retry."""
    return replace(store, client=store.client.impatient) if isinstance(store.client, PatientClient) else store


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
            hint = "fix or unset MLFLOW_TRACKING_URI"
        raise UserError(f"MLflow cannot use {without_credentials(uri)}: {said}; {hint}") from error

"""Opens and describes the MLflow store. While a store is down, its client repeats every call."""

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast
from urllib.parse import urlsplit

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from components.patience import (
    PATIENCE_OF_STEPS,
    PatientClient,
    answer,
    is_transient,
    one_line,
    patiently,
    without_credentials,
)
from components.tracking import database
from components.tracking.credentials import move_credentials, read_secret
from trainer.shared.errors import UserError

EXPERIMENT = "sogclr"
"""Default name of the experiment."""

_KIND = "custom_model_development"
_PATIENCE_WITH_A_DATABASE = 300.0
"""Seconds that a call waits for another process to unlock a database. A server that is down is an error at once."""
_INVALID_HOST = "Invalid Host header"
"""The answer of an MLflow server whose --allowed-hosts lacks the host in the client's request."""


# MLflow would print the traceback of an error that this project puts into one line.
logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)


@dataclass(frozen=True)
class Store:
    """An experiment on an MLflow server or in a database."""

    client: MlflowClient
    experiment_id: str


def open_store(uri: str, experiment: str = EXPERIMENT, artifacts: str | None = None, patience: float = 0.0) -> Store:
    """Returns the store at `uri`. Creates its experiment if there is none, with the folder `artifacts` for artifacts.

    Makes the database of a local store if there is none. While the store is down, its client repeats each call for `patience`
    seconds. Raises UserError if the store cannot be used.
    """
    file = database.file_of(uri)
    if file:
        patience = max(patience, _PATIENCE_WITH_A_DATABASE)
        patiently(lambda: database.require_whole(file), patience)
    with _refused_in_one_line(uri):
        client = cast(MlflowClient, PatientClient(patiently(lambda: MlflowClient(uri), patience), patience))
        return Store(client, _experiment(client, experiment, artifacts))


def _experiment(client: MlflowClient, name: str, artifacts: str | None) -> str:
    """Returns the ID of an experiment, and creates it if there is none. Raises UserError if it is deleted."""
    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return client.create_experiment(name, artifacts, {"mlflow.experimentKind": _KIND})
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            # Another process made it meanwhile, or the answer to the first call was lost.
            return _experiment(client, name, artifacts)
    if found.lifecycle_stage == "deleted":
        raise UserError(
            f"the experiment {name} is deleted in MLflow: mlflow experiments restore --experiment-id {found.experiment_id} "
            "brings it back with its runs, MLFLOW_EXPERIMENT_NAME=NAME starts another"
        )
    return found.experiment_id


def open_root(root: Path, experiment: str = EXPERIMENT) -> Store:
    """Returns the store in a root, and makes it if there is none. If the root has moved, its records follow."""
    file = root / database.DATABASE
    patiently(lambda: database.require_whole(file), _PATIENCE_WITH_A_DATABASE)
    patiently(lambda: database.follow_root(root, _KIND), _PATIENCE_WITH_A_DATABASE)
    return open_store(f"sqlite:///{file}", experiment, str(root / database.ARTIFACTS))


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
    file = database.file_of(uri)
    if file and not database.is_whole(file):
        raise UserError(f"{file} is half made: sogclr run makes it again if it holds no runs")
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

"""Puts the credentials of MLflow's server into the variables that MLflow reads."""

import os
from collections.abc import MutableMapping
from urllib.parse import unquote, urlsplit

from components import variables
from components.patience import PATIENCE_OF_STEPS, answer, one_line, patiently, without_credentials
from trainer.shared.errors import UserError

_SECONDS_FOR_A_SECRET = 30.0


def move_credentials(environ: MutableMapping[str, str] = os.environ) -> None:
    """Moves a password in the server's URL to MLflow's own variables, because MLflow prints the URL in its errors."""
    uri = urlsplit(environ.get("MLFLOW_TRACKING_URI", ""))
    if uri.scheme.startswith("http") and uri.password is not None:
        environ["MLFLOW_TRACKING_URI"] = without_credentials(uri.geturl())
        environ["MLFLOW_TRACKING_USERNAME"], environ["MLFLOW_TRACKING_PASSWORD"] = (
            unquote(uri.username or ""),
            unquote(uri.password),
        )


def read_secret(environ: MutableMapping[str, str] = os.environ) -> None:
    """Reads the secret that `environ` names into MLflow's own variables. Does nothing if it names none.

    Waits for Secret Manager as long as a step waits for MLflow. Raises UserError if the secret cannot be read.
    """
    name = environ.get(variables.SECRET)
    if not name:
        return
    from google.api_core.exceptions import Forbidden, GoogleAPICallError
    from google.auth.exceptions import GoogleAuthError
    from google.cloud import secretmanager

    def read() -> str:
        # The client's own retries end after 60 s with an exception that hides the server's answer.
        client = secretmanager.SecretManagerServiceClient()
        return str(client.access_secret_version(name=name, retry=None, timeout=_SECONDS_FOR_A_SECRET).payload.data.decode())

    try:
        secret = patiently(read, PATIENCE_OF_STEPS, f"Secret Manager, asked for {name},")
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

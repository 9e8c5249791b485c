"""The Google Cloud credentials of this machine."""

import os
from typing import TYPE_CHECKING

import google.auth
import google.auth.transport.requests
from google.auth import exceptions

from trainer.shared.errors import UserError

if TYPE_CHECKING:
    from google.auth.credentials import Credentials


def find_credentials() -> "tuple[Credentials, str]":
    """Returns the credentials of this machine and their project. Raises UserError if there are none."""
    try:
        found, project = google.auth.default(scopes=["https://www.googleapis.com/auth/cloud-platform"])
    except exceptions.GoogleAuthError as error:
        if named := os.environ.get("GOOGLE_APPLICATION_CREDENTIALS"):
            raise UserError(
                f"GOOGLE_APPLICATION_CREDENTIALS names {named}, which holds no credentials: fix or unset it"
            ) from error
        raise UserError(
            "there are no Google Cloud credentials on this machine: run gcloud auth application-default login, or name a key "
            "file in GOOGLE_APPLICATION_CREDENTIALS"
        ) from error
    return found, project or ""


def access_token(credentials: "Credentials") -> str:
    """Returns a new access token of `credentials`. Raises UserError if Google refuses them."""
    try:
        credentials.refresh(google.auth.transport.requests.Request())
    except exceptions.GoogleAuthError as error:
        raise UserError("the credentials are not valid: gcloud auth application-default login renews them") from error
    return str(credentials.token or "")

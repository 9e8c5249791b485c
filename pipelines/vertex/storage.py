"""Checks of Cloud Storage for a job: its bucket must be writable, its raw archives and its first checkpoint readable."""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import requests
from google.api_core import exceptions
from google.auth import exceptions as auth_exceptions
from google.cloud import storage
from google.cloud.storage.retry import DEFAULT_RETRY

from pipelines.vertex.jobs import Place
from trainer.shared.errors import UserError

if TYPE_CHECKING:
    from google.auth.credentials import Credentials

_PATIENCE = 120.0
"""Seconds for which a call to Cloud Storage is repeated after a transient error."""
_CHECKPOINT = re.compile(r"checkpoint-(\d{8,})\.npz")
_TO_READ = ["storage.objects.get", "storage.objects.list"]
_TO_WRITE = ["storage.objects.create", "storage.objects.delete", *_TO_READ]


def check_bucket(uri: str, place: Place, credentials: "Credentials", *, writes: bool) -> str:
    """Returns a short text about the bucket of the folder `uri`.

    `writes` tells whether the job writes to the bucket with these `credentials`; a job with a service account does not. Raises
    UserError if the bucket does not exist or these credentials may not use it.
    """
    name = _bucket_of(uri)
    needed = _TO_WRITE if writes else _TO_READ
    with _as_user_errors(name, "roles/storage.objectUser and roles/storage.legacyBucketReader on it allow it"):
        patience = DEFAULT_RETRY.with_timeout(_PATIENCE)
        bucket = storage.Client(project=place.project, credentials=credentials).get_bucket(name, retry=patience)
        allowed = bucket.test_iam_permissions(needed, retry=patience)
    missing = [one for one in needed if one not in allowed]
    if missing:
        raise UserError(f"gs://{name} does not allow {', '.join(missing)}: roles/storage.objectUser on it allows them")
    what = f"gs://{name} is writable" if writes else f"gs://{name} exists"
    location = (bucket.location or "").lower()
    if location and not place.region.startswith(location) and not location.startswith(place.region):
        return f"{what}; it is in {location}, so reading it from {place.region} may cost transfer"
    return what


def raw_identity(raw: str, beside: Iterable[str] = (), *, validation: bool = True) -> str:
    """Returns a digest that identifies the raw archives in a folder and the files `beside`, which the conversion reads too.

    validation: whether there must be a validation split

    Raises UserError if they are missing or not readable.
    """
    from apache_beam.io.filesystem import BeamIOError

    from beam_jobs import raw as raw_data

    bucket = _bucket_of(raw)
    with _as_user_errors(bucket, "roles/storage.objectViewer and roles/storage.legacyBucketReader on it allow it"):
        try:
            return raw_data.raw_identity(raw, beside, validation=validation)
        except BeamIOError as error:
            if "NotFound" in str(error):
                raise UserError(f"there is no bucket gs://{bucket}: --raw must name the folder of the raw archives") from error
            raise UserError(f"{raw} cannot be read: {' '.join(str(error).split())[:200]}") from error


def find_checkpoint(uri: str, place: Place, credentials: "Credentials") -> tuple[str, str, dict[str, Any]]:
    """Returns (path of the checkpoint `uri`, a digest of its bytes, the content of the config.json beside it).

    `uri` is a file, or a folder for its newest checkpoint. Raises UserError if there is none.
    """
    name = _bucket_of(uri)
    path = uri.removeprefix(f"gs://{name}").strip("/")
    folder, _, file = path.rpartition("/") if path.endswith(".npz") else (path, "", "")
    with _as_user_errors(name, "roles/storage.objectViewer on it allows it"):
        patience = DEFAULT_RETRY.with_timeout(_PATIENCE)
        client = storage.Client(project=place.project, credentials=credentials)
        blobs = client.list_blobs(name, prefix=f"{folder}/", delimiter="/", retry=patience)
        found = {blob.name.rpartition("/")[2]: blob for blob in blobs}
        steps = {int(match[1]): match[0] for match in map(_CHECKPOINT.fullmatch, found) if match}
        newest = file or (steps[max(steps)] if steps else "")
        if newest not in found or "config.json" not in found:
            raise UserError(f"{uri} holds no checkpoint of a pretraining run")
        about = json.loads(found["config.json"].download_as_bytes(retry=patience))
    return f"gs://{name}/{folder}/{newest}", str(found[newest].md5_hash or found[newest].crc32c), about


def identity_of_files(uri: str, place: Place, credentials: "Credentials") -> tuple[int, str]:
    """Returns (number of files, a digest of their bytes) of a file, of the files that begin with a prefix, or of a folder.

    Raises UserError if there is none. Whether they are a checkpoint is known only once they are read.
    """
    name = _bucket_of(uri)
    path = re.sub(r"\.(index|data-\d{5}-of-\d{5})$", "", uri.removeprefix(f"gs://{name}").strip("/"))
    with _as_user_errors(name, "roles/storage.objectViewer on it allows it"):
        client = storage.Client(project=place.project, credentials=credentials)
        blobs = client.list_blobs(name, prefix=path, retry=DEFAULT_RETRY.with_timeout(_PATIENCE))
        # Files of checkpoints that only begin with the same name, as ckpt-20 does with ckpt-2, are none of this one's.
        own = [blob for blob in blobs if blob.name[len(path) : len(path) + 1] in ("", ".", "/")]
    if not own:
        raise UserError(f"{uri} does not exist: --encoder names a file, the prefix of a TensorFlow checkpoint, or a folder")
    content = sorted((blob.name, str(blob.md5_hash or blob.crc32c)) for blob in own)
    return len(own), f"blobs:{hashlib.sha256(json.dumps(content).encode()).hexdigest()}"


def _bucket_of(uri: str) -> str:
    return uri.removeprefix("gs://").partition("/")[0]


@contextmanager
def _as_user_errors(bucket: str, remedy: str) -> Iterator[None]:
    """Turns errors of Cloud Storage into UserErrors. `remedy` tells which roles allow reading the bucket."""
    try:
        yield
    except exceptions.NotFound as error:
        raise UserError(f"there is no bucket gs://{bucket}; docs/vertex.md says how to make it") from error
    except exceptions.Forbidden as error:
        raise UserError(f"gs://{bucket} is not readable with these credentials: {remedy}") from error
    except (exceptions.Unauthorized, auth_exceptions.GoogleAuthError) as error:
        raise UserError("the credentials are not valid: gcloud auth application-default login renews them") from error
    except (exceptions.GoogleAPICallError, requests.RequestException, exceptions.RetryError) as error:
        raise UserError(f"Cloud Storage does not answer for gs://{bucket}: {type(error).__name__}") from error

"""A bucket and a loopback Google for what submits jobs to Vertex AI, and how such a command is said."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from gcp_storage_emulator.server import create_server
from google.cloud import storage
from vertex.accounts import give_credentials, nothing_leaves_this_machine
from vertex.google import Google, serving

from beam_jobs.layouts.archives import TRAIN_ARCHIVE, VALIDATION_ARCHIVE
from pipelines.vertex import client

PROJECT, REGION, TAG = "my-project", "europe-west4", "0123456789ab"
FOLDER = f"projects/{PROJECT}/locations/{REGION}"
DIGEST = {"cpu": "sha256:" + "c" * 64, "tpu": "sha256:" + "7" * 64}
SECRET = "planted-password"


@contextlib.contextmanager
def bucket_of_archives() -> Iterator[storage.Bucket]:
    """Gives a bucket with raw archives."""
    server = create_server("localhost", 0, in_memory=True, default_bucket="a-bucket")
    server.start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STORAGE_EMULATOR_HOST", f"http://localhost:{server._api._httpd.server_port}")
        bucket = storage.Client(project=PROJECT).bucket("a-bucket")
        for name in (TRAIN_ARCHIVE, VALIDATION_ARCHIVE):
            bucket.blob(f"raw/{name}").upload_from_string(b"tar")
        yield bucket
    server.stop()


@contextlib.contextmanager
def google_with_images(folder: Path, patch: pytest.MonkeyPatch) -> Iterator[Google]:
    """Gives a loopback Google that has images, and commands that submit to it.

    This process has credentials for it and no way to another machine, and works in `folder`. Commands wait for a short time only.
    """
    with nothing_leaves_this_machine(patch), serving() as google:
        give_credentials(patch, folder, PROJECT, google.url)
        for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "GOOGLE_CLOUD_PROJECT"):
            patch.delenv(name, raising=False)
        patch.setenv("MLFLOW_TRACKING_PASSWORD", SECRET)
        for name, seconds in {"_FIRST_WAIT": 0.01, "_LONGEST_WAIT": 0.05, "_PATIENCE": 1.5}.items():
            patch.setattr(client, name, seconds)
        patch.setattr(client, "_SECONDS_BETWEEN_POLLS", 0.01)
        patch.setattr(client, "_SECONDS_FOR_A_CALL", 1.0)
        patch.chdir(folder)
        repository = google.url.removeprefix("http://") + "/my-project/sogclr"
        google.accounts.images = {f"my-project/sogclr/sogclr-{build}:{TAG}": digest for build, digest in DIGEST.items()}
        google.options = ["--project", PROJECT, "--region", REGION, "--endpoint", google.url]
        google.submit = [
            *("submit", "--preset", "sogclr_imagenet_r50_b512", "--accelerator", "v5e-8", *google.options),
            *("--pipeline-root", "gs://a-bucket/runs", "--raw", "gs://a-bucket/raw", "--images", repository, "--tag", TAG),
            *("--mlflow-uri", "https://mlflow.example", "--mlflow-secret", "projects/my-project/secrets/mlflow/versions/1"),
        ]
        google.quick = [*google.submit, "--job-id", "mine", "--skip-check", "options", "vertex", "bucket", "images", "raw"]
        yield google


def one_error_line(capsys: pytest.CaptureFixture[str]) -> str:
    """Returns the line that says what is wrong. Fails where there are more, or a traceback."""
    said = capsys.readouterr()
    lines = [line for line in said.err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, said.err
    assert "Traceback" not in said.err + said.out
    return lines[0]

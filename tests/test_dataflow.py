"""The conversion on Dataflow: Beam's real client submits to a loopback Dataflow, which ends the job as it is told."""

import contextlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from gcp_storage_emulator.server import create_server
from google.cloud import storage
from kfp import dsl
from mlflow import MlflowClient
from test_pipeline import raw_archives
from vertex.accounts import give_credentials, nothing_leaves_this_machine
from vertex.google import serving

from components.steps import build_tfrecords

IMAGE = "europe-west4-docker.pkg.dev/my-project/sogclr/sogclr-cpu@sha256:" + "c" * 64


@contextlib.contextmanager
def dataflow(states):
    """A Dataflow that goes through `states`, a look each, and gives what it was sent."""
    sent, left = [], list(states)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])) or "{}")
            sent.append(body)
            self._say({**self._job("JOB_STATE_PENDING"), "name": body.get("name", "")})

        def do_GET(self):
            if self.path.partition("?")[0].endswith("/messages"):
                text = "Workflow failed: no quota" if left and left[-1] == "JOB_STATE_FAILED" else "Worker pool stopped."
                message = {
                    "id": "1",
                    "time": "2026-01-01T00:00:00Z",
                    "messageText": text,
                    "messageImportance": "JOB_MESSAGE_ERROR",
                }
                return self._say({"jobMessages": [message] if len(left) == 1 else []})
            if "/jobs/" not in self.path:
                return self._say({})
            return self._say(self._job(left.pop(0) if len(left) > 1 else left[0]))

        def _job(self, state):
            times = {"createTime": "2026-01-01T00:00:00Z", "currentStateTime": "2026-01-01T00:00:00Z"}
            return {"id": "job-1", "projectId": "my-project", "currentState": state, "location": "europe-west4", **times}

        def _say(self, answer):
            text = json.dumps(answer).encode()
            self.send_response(200)
            for header in (("Content-Type", "application/json"), ("Content-Length", str(len(text)))):
                self.send_header(*header)
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield f"http://localhost:{server.server_port}", sent
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="module")
def environ(tmp_path_factory):
    """Raw archives in a bucket, MLflow in SQLite, and no way to Google."""
    folder = tmp_path_factory.mktemp("dataflow")
    raw = raw_archives(folder)
    server = create_server("localhost", 0, in_memory=True, default_bucket="a-bucket")
    server.start()
    with serving() as google, pytest.MonkeyPatch.context() as patch, nothing_leaves_this_machine(patch):
        give_credentials(patch, folder, "my-project", google.url)
        patch.setenv("STORAGE_EMULATOR_HOST", f"http://localhost:{server._api._httpd.server_port}")
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder / 'mlflow.db'}")
        patch.delenv("MLFLOW_RUN_ID", raising=False)
        patch.chdir(folder)
        bucket = storage.Client(project="my-project").bucket("a-bucket")
        for file in raw.iterdir():
            bucket.blob(f"raw/{file.name}").upload_from_filename(str(file))
        yield patch
    server.stop()


def convert(job, url):
    dataset = dsl.Dataset(name="dataset", uri=f"gs://a-bucket/runs/1/{job}/build-tfrecords_1/dataset", metadata={})
    options = [
        *("--runner=DataflowRunner", "--project=my-project", "--region=europe-west4", f"--dataflow_endpoint={url}"),
        *("--temp_location=gs://a-bucket/temp", "--staging_location=gs://a-bucket/staging", "--max_num_workers=3"),
        *("--worker_machine_type=n2-standard-8", f"--sdk_container_image={IMAGE}", "--sdk_location=container"),
    ]
    build_tfrecords.python_func(raw="gs://a-bucket/raw", raw_identity="", beam_args=options, code_version="c0de", dataset=dataset)


@pytest.mark.parametrize(
    ("state", "named"),
    [("JOB_STATE_FAILED", "FAILED"), ("JOB_STATE_CANCELLED", "CANCELLED"), ("JOB_STATE_DONE", "the runner lost")],
)
def test_a_dataflow_job_that_did_not_write_the_dataset_fails_the_step(environ, caplog, monkeypatch, state, named):
    monkeypatch.setattr("apache_beam.runners.dataflow.dataflow_runner.time.sleep", lambda seconds: None)
    job = state.rpartition("_")[2].lower()
    with dataflow(["JOB_STATE_QUEUED", "JOB_STATE_RUNNING", state]) as (url, sent), pytest.raises(Exception, match=named):
        convert(job, url)
    submitted = json.dumps(sent[0])
    assert IMAGE in submitted
    assert "n2-standard-8" in submitted
    assert sent[0]["environment"]["workerPools"][0]["autoscalingSettings"]["maxNumWorkers"] == 3
    said = caplog.text
    assert "JOB_STATE_RUNNING" in said
    assert re.search(r"console\.cloud\.google\.com/dataflow/jobs/europe-west4/job-1", said)
    ended = MlflowClient().search_runs(["1"], f"tags.`sogclr.job` = '{job}'")
    assert [run.info.status for run in ended] == ["RUNNING"], "the exit handler closes it"
    (step,) = MlflowClient().search_runs(["1"], f"tags.`mlflow.parentRunId` = '{ended[0].info.run_id}'")
    assert step.info.status == "FAILED"

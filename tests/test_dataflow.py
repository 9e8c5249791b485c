"""The conversion on Dataflow: Beam's real client submits to a loopback Dataflow, which does with the job as it is told."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from gcp_storage_emulator.server import create_server
from google.cloud import storage
from kfp import dsl
from mlflow import MlflowClient
from support.fake_dataflow import JOBS, serving_dataflow
from support.processes import started, until
from support.raw_data import striped_archives
from vertex.accounts import give_credentials, nothing_leaves_this_machine
from vertex.google import serving

from beam_jobs import job as conversion
from components.dataflow import label_of
from components.steps import build_tfrecords
from pipelines import cli
from trainer.shared.errors import UserError

IMAGE = "europe-west4-docker.pkg.dev/my-project/sogclr/sogclr-cpu@sha256:" + "c" * 64
REPOSITORY = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def environ(tmp_path_factory):
    """Raw archives in a bucket, MLflow in SQLite, and no way to Google."""
    folder = tmp_path_factory.mktemp("dataflow")
    raw = striped_archives(folder)
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
        yield bucket
    server.stop()


@pytest.fixture
def no_pauses(monkeypatch):
    monkeypatch.setattr("apache_beam.runners.dataflow.dataflow_runner.time.sleep", lambda seconds: None)


def beam_args(url, *more):
    return [
        *("--runner=DataflowRunner", "--project=my-project", "--region=europe-west4", f"--dataflow_endpoint={url}"),
        *("--temp_location=gs://a-bucket/temp", "--staging_location=gs://a-bucket/staging", "--max_num_workers=3"),
        *("--worker_machine_type=n2-standard-8", f"--sdk_container_image={IMAGE}", "--sdk_location=container", *more),
    ]


def convert(job, url, *more):
    dataset = dsl.Dataset(name="dataset", uri=f"gs://a-bucket/runs/1/{job}/build-tfrecords_1/dataset", metadata={})
    build_tfrecords.python_func(
        raw="gs://a-bucket/raw", raw_identity="", beam_args=beam_args(url, *more), code_version="c0de", dataset=dataset
    )
    return dataset


def process(output, url):
    """Starts a conversion in a process of its own."""
    command = [sys.executable, "-m", "beam_jobs.build_tfrecords", "--raw", "gs://a-bucket/raw", "--output", output]
    variables = {**os.environ, "NO_GCE_CHECK": "true"}
    return started(
        [*command, *beam_args(url)], cwd=REPOSITORY, env=variables, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


@pytest.mark.parametrize(
    ("state", "named"), [("FAILED", r"job-1.*FAILED"), ("CANCELLED", r"job-1.*CANCELLED"), ("DONE", "the runner lost")]
)
def test_a_dataflow_job_that_did_not_write_the_dataset_fails_the_step(environ, caplog, no_pauses, state, named):
    with serving_dataflow(["QUEUED", "RUNNING", state]) as dataflow, pytest.raises(Exception, match=named):
        convert(state.lower(), dataflow.url)
    submitted = json.dumps(dataflow.sent[0])
    assert IMAGE in submitted
    assert "n2-standard-8" in submitted
    assert dataflow.sent[0]["environment"]["workerPools"][0]["autoscalingSettings"]["maxNumWorkers"] == 3
    said = caplog.text
    assert "JOB_STATE_RUNNING" in said
    assert re.search(r"console\.cloud\.google\.com/dataflow/jobs/europe-west4/job-1", said)
    ended = MlflowClient().search_runs(["1"], f"tags.`sogclr.job` = '{state.lower()}'")
    assert [run.info.status for run in ended] == ["RUNNING"], "the exit handler closes it"
    (step,) = MlflowClient().search_runs(["1"], f"tags.`mlflow.parentRunId` = '{ended[0].info.run_id}'")
    assert step.info.status == "FAILED"


# ---- A second attempt


def test_the_job_is_named_by_what_it_converts_and_labelled_by_its_pipeline_job(environ, no_pauses):
    with serving_dataflow(["FAILED"]) as dataflow:
        for job, *more in (("first",), ("first",), ("second",), ("third", "--job_name=mine", "--labels=team=vision")):
            with pytest.raises(Exception, match="FAILED"):
                convert(job, dataflow.url, *more)
    names = [one["name"] for one in dataflow.sent]
    assert names[0] == names[1] != names[2]
    assert names[3] == "mine"
    assert [one["labels"]["sogclr-job"] for one in dataflow.sent] == ["first", "first", "second", "third"]
    assert dataflow.sent[3]["labels"]["team"] == "vision"


@pytest.mark.parametrize("job", ["sogclr-1", "a" * 63, "a" * 64, "a" * 127 + "b", "a" * 128, "Run.1"])
def test_a_label_names_any_pipeline_job(job):
    label = label_of(job)
    assert re.fullmatch(r"[a-z0-9_-]{1,63}", label)
    assert (label == job) == (len(job) < 64 and job != "Run.1")
    assert len({label_of("a" * 127 + "b"), label_of("a" * 128)}) == 2


@pytest.mark.thorough
def test_the_job_of_an_attempt_that_was_killed_is_gone_on_with(environ, no_pauses, capfd):
    """What its workers are writing meanwhile stays."""
    uri = "gs://a-bucket/runs/1/killed/build-tfrecords_1/dataset"
    with serving_dataflow() as dataflow:
        with process(uri, dataflow.url) as first:
            until(lambda: dataflow.count("GET", f"{JOBS}/job-1"), first)
            first.kill()
            first.wait()
        half = environ.blob(f"{uri.removeprefix('gs://a-bucket/')}/images-train.tfrecord-00000-of-00001.{'0' * 32}.tmp")
        half.upload_from_string(b"half")
        there = []

        def finish(job):
            there.append(half.exists())
            half.delete()
            # The job's own work, with the same workers' code.
            conversion.build("gs://a-bucket/raw", f"{uri}-elsewhere")
            for blob in list(environ.list_blobs(prefix=f"{uri.removeprefix('gs://a-bucket/')}-elsewhere/")):
                environ.copy_blob(blob, environ, blob.name.replace("-elsewhere/", "/"))

        dataflow.finish = finish
        dataflow.go_to("job-1", "RUNNING", "RUNNING", "DONE")
        dataset = convert("killed", dataflow.url)
    assert len(dataflow.sent) == 1
    assert there == [True]
    assert dataset.metadata["train_images"] == 36
    assert "going on with Dataflow job build-tfrecords-" in capfd.readouterr().err


def earlier(dataflow, job, *states):
    """Leaves a job in `states` that an earlier attempt at what `job` converts had started."""
    with pytest.raises(Exception, match="FAILED"):
        convert(job, dataflow.url)
    dataflow.add("earlier", dataflow.sent[0]["name"], dataflow.sent[0]["labels"], states)


@pytest.mark.parametrize("state", ["FAILED", "CANCELLED"])
def test_a_job_that_ends_badly_while_a_second_attempt_waits_for_it_is_named(environ, no_pauses, state):
    with serving_dataflow(["FAILED"]) as dataflow:
        earlier(dataflow, f"attached-{state}", "RUNNING", state)
        with pytest.raises(Exception, match=rf"Dataflow job build-tfrecords-\w+ \(earlier\): .*{state}"):
            convert(f"attached-{state}", dataflow.url)
    assert len(dataflow.sent) == 1


def test_a_job_that_is_being_cancelled_is_waited_for_and_another_one_started(environ, no_pauses, monkeypatch):
    monkeypatch.setattr("beam_jobs.dataflow._SECONDS_BETWEEN_POLLS", 0)
    with serving_dataflow(["FAILED"]) as dataflow:
        earlier(dataflow, "dying", "CANCELLING", "CANCELLED")
        with pytest.raises(Exception, match=r"\(job-3\): .*FAILED"):
            convert("dying", dataflow.url)


def test_a_job_of_another_conversion_is_not_gone_on_with(environ, no_pauses):
    with serving_dataflow() as dataflow:
        dataflow.add("other", "mine", {"sogclr-conversion": "another"})
        with pytest.raises(UserError, match=r"job mine \(other\) is active and does something else: "):
            convert("another", dataflow.url, "--job_name=mine")
    assert dataflow.sent == []
    assert dataflow.count("GET", JOBS) == 1, "trying again does not help"


# ---- The end


@pytest.mark.thorough
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_the_job_is_cancelled_with_the_process_that_waits_for_it(environ, number, code):
    with serving_dataflow() as dataflow, process(f"gs://a-bucket/ended-{code}", dataflow.url) as running:
        until(lambda: dataflow.count("GET", f"{JOBS}/job-1"), running)
        running.send_signal(number)
        said = running.communicate()[1]
        assert running.returncode == code
        assert "Dataflow job job-1 is cancelled" in said
        assert "Traceback" not in said
        assert dataflow.state("job-1") in ("CANCELLING", "CANCELLED")


@pytest.mark.thorough
def test_a_job_whose_making_is_not_answered_yet_is_cancelled_too(environ):
    with serving_dataflow() as dataflow, process("gs://a-bucket/unanswered", dataflow.url) as running:
        dataflow.answers.clear()
        until(dataflow.created.is_set, running)
        running.terminate()
        assert running.wait() == 143
        assert dataflow.state("job-1") == "CANCELLING"


@pytest.mark.thorough
def test_the_process_ends_where_dataflow_does_not_answer(environ):
    """It says what may go on, and how to end that. Nobody waits for more than pytest's own limit."""
    with serving_dataflow() as dataflow, process("gs://a-bucket/away", dataflow.url) as running:
        until(lambda: dataflow.count("GET", f"{JOBS}/job-1"), running)
        dataflow.faults = {"GET": 503, "PUT": 503}
        running.terminate()
        said = running.communicate()[1]
        assert running.returncode == 143
        assert re.search(
            r"Dataflow job build-tfrecords-\w+ may go on .*: gcloud dataflow jobs cancel job-1 --region=europe-west4", said
        )
        assert dataflow.count("PUT", f"{JOBS}/job-1") > 1


@pytest.fixture
def submitted(environ, tmp_path, monkeypatch):
    """A pipeline job on a loopback Vertex AI whose step runs `convert`, and the options that name the place."""
    with serving() as google, serving_dataflow() as dataflow:
        give_credentials(monkeypatch, tmp_path, "my-project", google.url)
        monkeypatch.delenv("MLFLOW_TRACKING_URI")
        place = ["--project", "my-project", "--region", "europe-west4", "--endpoint", google.url]
        options = [
            *("--preset", "sogclr_imagenet_r50_b512", "--accelerator", "v5e-8", *place, "--pipeline-root", "gs://a-bucket/runs"),
            *("--raw", "gs://a-bucket/raw", "--images", "registry/sogclr", "--tag", "abc", "--mlflow-uri", "https://m"),
            *("--job-id", "mine", f"--dataflow-arg=--dataflow_endpoint={dataflow.url}"),
            *("--skip-check", "options", "vertex", "bucket", "images", "raw", "mlflow"),
        ]
        assert cli.main(["submit", *options]) == 0
        dataflow.add("a-step-s", "build-tfrecords-1", {"sogclr-job": label_of("mine")})
        dataflow.add("another-s", "build-tfrecords-2", {"sogclr-job": label_of("another")})
        dataflow.add("nobody-s", "wordcount", {})
        yield dataflow, place


def test_cancelling_a_job_cancels_its_dataflow_job(submitted, capsys):
    """The step that waits for it may be gone."""
    dataflow, place = submitted
    dataflow.faults = {"PUT": 503}
    until_put = dataflow.answer

    def answered(method, target, body):
        answer = until_put(method, target, body)
        if method == "PUT":
            dataflow.faults.clear()
        return answer

    dataflow.answer = answered
    capsys.readouterr()
    assert cli.main(["cancel", "mine", *place]) == 0
    assert "cancelled: Dataflow job a-step-s\n" in capsys.readouterr().out
    assert {job: dataflow.state(job) for job in dataflow.jobs} == {
        "a-step-s": "CANCELLING",
        "another-s": "RUNNING",
        "nobody-s": "RUNNING",
    }
    # Once more: there is nothing left to do.
    assert cli.main(["cancel", "mine", *place, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["state"] == "CANCELLED"


@pytest.mark.parametrize(("method", "status"), [("GET", 403), ("PUT", 403), ("GET", 503)])
def test_a_dataflow_job_that_cannot_be_cancelled_is_one_line(submitted, capsys, monkeypatch, method, status):
    monkeypatch.setattr("pipelines.vertex.dataflow._FIRST_WAIT", 0.01)
    dataflow, place = submitted
    dataflow.faults = {method: status}
    capsys.readouterr()
    assert cli.main(["cancel", "mine", *place]) == 0
    said = capsys.readouterr()
    assert "mine: cancelled" in said.out
    assert re.fullmatch(r"warning: a Dataflow job of mine may go on \(.*\); gcloud dataflow jobs list .*\n", said.err), said.err


def test_a_job_without_dataflow_asks_nothing_of_it(submitted, capsys, monkeypatch):
    dataflow, place = submitted
    monkeypatch.setattr("pipelines.vertex.jobs.Job.arguments", lambda job, component: {"beam_args": []})
    assert cli.main(["cancel", "mine", *place]) == 0
    assert dataflow.requests == []

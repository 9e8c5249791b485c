"""The conversion on Dataflow: Beam's real client submits to a loopback Dataflow, which does with the job as it is told."""

import contextlib
import json
import re
import signal
import threading

import pytest
from gcp_storage_emulator.server import create_server
from google.cloud import dataflow_v1beta3 as api
from google.cloud import storage
from kfp import dsl
from mlflow import MlflowClient
from support.processes import until
from support.raw_data import striped_archives
from vertex.accounts import give_credentials, nothing_leaves_this_machine
from vertex.google import Fault, serving

from beam_jobs import job as conversion
from components.dataflow import label_of
from components.steps import build_tfrecords
from pipelines import cli
from trainer.shared.errors import UserError

IMAGE = "europe-west4-docker.pkg.dev/my-project/sogclr/sogclr-cpu@sha256:" + "c" * 64
JOBS = "/v1b3/projects/my-project/locations/europe-west4/jobs"
FIRST, SECOND = (f"2026-01-01_00_00_00-{number}" for number in (1, 2))
"""IDs of the jobs that are created."""


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
        raw="gs://a-bucket/raw",
        raw_identity="",
        data_settings=[],
        beam_args=beam_args(url, *more),
        code_version="c0de",
        dataset=dataset,
    )
    return dataset


def process(copies, output, url):
    """Starts a conversion in a process of its own."""
    given = ("--raw", "gs://a-bucket/raw", "--output", output, *beam_args(url))
    return copies.started("beam_jobs.build_tfrecords", *given, NO_GCE_CHECK="true")


@contextlib.contextmanager
def dataflow(*states):
    """Gives a loopback Google whose Dataflow has a new job come to a state at each look; without states it runs on."""
    with serving() as google:
        google.url = google.url.replace("127.0.0.1", "localhost")  # what Beam takes for an address
        google.dataflow.run = lambda job: google.dataflow.go_to(job, "PENDING", *(states or ("RUNNING",)))
        yield google


def bodies(google):
    """Returns the jobs that Dataflow was asked to create."""
    return [json.loads(body) for body in google.sent("POST", JOBS)]


def states(google):
    """Returns the state of each job of Dataflow by its ID."""
    return {name: job.current_state.name.removeprefix("JOB_STATE_") for name, job in google.dataflow.jobs.items()}


def looks_at_first(google):
    return google.sent("GET", rf"{JOBS}/{FIRST}(\?|$)")


@pytest.mark.parametrize(
    ("state", "named"), [("FAILED", f"{FIRST}.*FAILED"), ("CANCELLED", f"{FIRST}.*CANCELLED"), ("DONE", "the runner lost")]
)
def test_a_dataflow_job_that_did_not_write_the_dataset_fails_the_step(environ, caplog, no_pauses, state, named):
    with dataflow("QUEUED", "RUNNING", state) as google, pytest.raises(Exception, match=named):
        convert(state.lower(), google.url)
    (submitted,) = bodies(google)
    assert IMAGE in json.dumps(submitted)
    assert "n2-standard-8" in json.dumps(submitted)
    assert submitted["environment"]["workerPools"][0]["autoscalingSettings"]["maxNumWorkers"] == 3
    said = caplog.text
    assert "JOB_STATE_RUNNING" in said
    assert re.search(rf"console\.cloud\.google\.com/dataflow/jobs/europe-west4/{FIRST}", said)
    ended = MlflowClient().search_runs(["1"], f"tags.`sogclr.job` = '{state.lower()}'")
    assert [run.info.status for run in ended] == ["RUNNING"], "the exit handler closes it"
    (step,) = MlflowClient().search_runs(["1"], f"tags.`mlflow.parentRunId` = '{ended[0].info.run_id}'")
    assert step.info.status == "FAILED"


# ---- A second attempt


def test_the_job_is_named_by_what_it_converts_and_labelled_by_its_pipeline_job(environ, no_pauses):
    with dataflow("FAILED") as google:
        for job, *more in (("first",), ("first",), ("second",), ("third", "--job_name=mine", "--labels=team=vision")):
            with pytest.raises(Exception, match="FAILED"):
                convert(job, google.url, *more)
    sent = bodies(google)
    names = [one["name"] for one in sent]
    assert names[0] == names[1] != names[2]
    assert names[3] == "mine"
    assert [one["labels"]["sogclr-job"] for one in sent] == ["first", "first", "second", "third"]
    assert sent[3]["labels"]["team"] == "vision"


@pytest.mark.parametrize("job", ["sogclr-1", "a" * 63, "a" * 64, "a" * 127 + "b", "a" * 128, "Run.1"])
def test_a_label_names_any_pipeline_job(job):
    label = label_of(job)
    assert re.fullmatch(r"[a-z0-9_-]{1,63}", label)
    assert (label == job) == (len(job) < 64 and job != "Run.1")
    assert len({label_of("a" * 127 + "b"), label_of("a" * 128)}) == 2


@pytest.mark.thorough
def test_the_job_of_an_attempt_that_was_killed_is_gone_on_with(copies, environ, no_pauses, capfd):
    """What its workers are writing meanwhile stays."""
    uri = "gs://a-bucket/runs/1/killed/build-tfrecords_1/dataset"
    with dataflow() as google:
        with process(copies, uri, google.url) as first:
            until(lambda: looks_at_first(google), first)
            first.send_signal(signal.SIGKILL)
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

        google.dataflow.finish = finish
        google.dataflow.go_to(google.dataflow.jobs[FIRST], "RUNNING", "RUNNING", "DONE")
        dataset = convert("killed", google.url)
    assert len(bodies(google)) == 1
    assert there == [True]
    assert dataset.metadata["train_images"] == 36
    assert "going on with Dataflow job build-tfrecords-" in capfd.readouterr().err


def earlier(google, job, *states):
    """Leaves a job in `states` that an earlier attempt at what `job` converts had started."""
    with pytest.raises(Exception, match="FAILED"):
        convert(job, google.url)
    first = google.dataflow.jobs[FIRST]
    google.dataflow.add(api.Job(id="earlier", name=first.name, labels=dict(first.labels)), *states)


@pytest.mark.parametrize("state", ["FAILED", "CANCELLED"])
def test_a_job_that_ends_badly_while_a_second_attempt_waits_for_it_is_named(environ, no_pauses, state):
    with dataflow("FAILED") as google:
        earlier(google, f"attached-{state}", "RUNNING", state)
        with pytest.raises(Exception, match=rf"Dataflow job build-tfrecords-\w+ \(earlier\): .*{state}"):
            convert(f"attached-{state}", google.url)
    assert len(bodies(google)) == 1


def test_a_job_that_is_being_cancelled_is_waited_for_and_another_one_started(environ, no_pauses, monkeypatch):
    monkeypatch.setattr("beam_jobs.dataflow._SECONDS_BETWEEN_POLLS", 0)
    with dataflow("FAILED") as google:
        earlier(google, "dying", "CANCELLING", "CANCELLED")
        with pytest.raises(Exception, match=rf"\({SECOND}\): .*FAILED"):
            convert("dying", google.url)


def test_a_job_of_another_conversion_is_not_gone_on_with(environ, no_pauses):
    with dataflow() as google:
        google.dataflow.add(api.Job(id="other", name="mine", labels={"sogclr-conversion": "another"}), "RUNNING")
        with pytest.raises(UserError, match=r"job mine \(other\) is active and does something else: "):
            convert("another", google.url, "--job_name=mine")
    assert bodies(google) == []
    assert len(google.sent("GET", rf"{JOBS}(\?|$)")) == 1, "trying again does not help"


# ---- The end


@pytest.mark.thorough
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_the_job_is_cancelled_with_the_process_that_waits_for_it(copies, environ, number, code):
    with dataflow() as google, process(copies, f"gs://a-bucket/ended-{code}", google.url) as running:
        until(lambda: looks_at_first(google), running)
        running.send_signal(number)
        said = running.communicate()[1]
        assert running.returncode == code
        assert f"Dataflow job {FIRST} is cancelled" in said
        assert "Traceback" not in said
        assert states(google)[FIRST] in ("CANCELLING", "CANCELLED")


@pytest.mark.thorough
def test_a_job_whose_making_is_not_answered_yet_is_cancelled_too(copies, environ):
    with dataflow() as google, process(copies, "gs://a-bucket/unanswered", google.url) as running:
        created, ended = threading.Event(), threading.Event()
        google.dataflow.run = lambda job: (created.set(), ended.wait())
        try:
            until(created.is_set, running)
            running.send_signal(signal.SIGTERM)
            assert running.wait() == 143
        finally:
            ended.set()
        assert states(google)[FIRST] == "CANCELLING"


@pytest.mark.thorough
def test_the_process_ends_where_dataflow_does_not_answer(copies, environ):
    """It says what may go on, and how to end that. Nobody waits for more than pytest's own limit."""
    with dataflow() as google, process(copies, "gs://a-bucket/away", google.url) as running:
        until(lambda: looks_at_first(google), running)
        google.fail_for(503, 3600, f"(GET|PUT) .*{JOBS}")
        running.send_signal(signal.SIGTERM)
        said = running.communicate()[1]
        assert running.returncode == 143
        assert re.search(
            rf"Dataflow job build-tfrecords-\w+ may go on .*: gcloud dataflow jobs cancel {FIRST} --region=europe-west4", said
        )
        assert len(google.sent("PUT", f"{JOBS}/{FIRST}")) > 1


@pytest.fixture
def submitted(environ, tmp_path, monkeypatch):
    """A pipeline job on a loopback Vertex AI whose step runs `convert`, and the options that name the place."""
    with serving() as google:
        give_credentials(monkeypatch, tmp_path, "my-project", google.url)
        monkeypatch.delenv("MLFLOW_TRACKING_URI")
        place = ["--project", "my-project", "--region", "europe-west4", "--endpoint", google.url]
        options = [
            *("--preset", "sogclr_imagenet_r50_b512", "--accelerator", "v5e-8", *place, "--pipeline-root", "gs://a-bucket/runs"),
            *("--raw", "gs://a-bucket/raw", "--images", "registry/sogclr", "--tag", "abc", "--mlflow-uri", "https://m"),
            *("--job-id", "mine", f"--dataflow-arg=--dataflow_endpoint={google.url}"),
            *("--skip-check", "options", "vertex", "bucket", "images", "raw", "mlflow"),
        ]
        assert cli.main(["submit", *options]) == 0
        for job, name, labels in (
            ("a-step-s", "build-tfrecords-1", {"sogclr-job": label_of("mine")}),
            ("another-s", "build-tfrecords-2", {"sogclr-job": label_of("another")}),
            ("nobody-s", "wordcount", {}),
        ):
            google.dataflow.add(api.Job(id=job, name=name, labels=labels), "RUNNING")
        yield google, place


def test_cancelling_a_job_cancels_its_dataflow_job(submitted, capsys):
    """The step that waits for it may be gone."""
    google, place = submitted
    google.faults = [Fault(503, f"PUT .*{JOBS}")]
    capsys.readouterr()
    assert cli.main(["cancel", "mine", *place]) == 0
    assert "cancelled: Dataflow job a-step-s\n" in capsys.readouterr().out
    assert states(google) == {"a-step-s": "CANCELLING", "another-s": "RUNNING", "nobody-s": "RUNNING"}
    # Once more: there is nothing left to do.
    assert cli.main(["cancel", "mine", *place, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["state"] == "CANCELLED"


@pytest.mark.parametrize(("method", "status"), [("GET", 403), ("PUT", 403), ("GET", 503)])
def test_a_dataflow_job_that_cannot_be_cancelled_is_one_line(submitted, capsys, monkeypatch, method, status):
    monkeypatch.setattr("pipelines.vertex.dataflow._FIRST_WAIT", 0.01)
    google, place = submitted
    google.fail_for(status, 3600, f"{method} .*{JOBS}")
    capsys.readouterr()
    assert cli.main(["cancel", "mine", *place]) == 0
    said = capsys.readouterr()
    assert "mine: cancelled" in said.out
    assert re.fullmatch(r"warning: a Dataflow job of mine may go on \(.*\); gcloud dataflow jobs list .*\n", said.err), said.err


def test_a_job_without_dataflow_asks_nothing_of_it(submitted, capsys, monkeypatch):
    google, place = submitted
    monkeypatch.setattr("pipelines.vertex.jobs.Job.arguments", lambda job, component: {"beam_args": []})
    assert cli.main(["cancel", "mine", *place]) == 0
    assert not any("/v1b3/" in path for _, path, _ in google.requests)

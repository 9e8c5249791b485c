"""Jobs on Vertex AI: followed, ended and done again, with Google's real clients against a loopback Google."""

import json
import re

import pytest
from google.cloud import aiplatform_v1
from google.protobuf import json_format
from support.submitting import DIGEST, FOLDER, bucket_of_archives, google_with_images, one_error_line

from pipelines import cli
from pipelines.vertex import client


@pytest.fixture(scope="module")
def bucket():
    with bucket_of_archives() as bucket:
        yield bucket


@pytest.fixture
def google(tmp_path, monkeypatch):
    with google_with_images(tmp_path, monkeypatch) as google:
        yield google


# ---- Following


HAPPY = [
    {"job": "RUNNING", "build-tfrecords": "RUNNING"},
    {"build-tfrecords": "SUCCEEDED", "pretrain": "RUNNING"},
    {"pretrain": "SUCCEEDED", "linear-eval": "RUNNING"},
    {"linear-eval": "SUCCEEDED", "record-lineage": "SUCCEEDED", "end-pipeline": "SUCCEEDED", "job": "SUCCEEDED"},
]


def test_waiting_shows_the_states_of_the_steps_and_links_to_their_logs(google, bucket, capsys):
    google.vertex.script = [{}, *HAPPY]
    assert cli.main([*google.quick, "--wait"]) == 0
    said = capsys.readouterr().out.splitlines()
    states = [line.split("  ")[0] for line in said if line.startswith("[")]
    assert states == [
        "[job] pending",
        "[job] running",
        "[build-tfrecords] running",
        "[build-tfrecords] succeeded",
        "[pretrain] running",
        "[pretrain] succeeded",
        "[linear-eval] running",
        "[job] succeeded",
        "[linear-eval] succeeded",
        "[record-lineage] succeeded",
        "[end-pipeline] succeeded",
    ]
    assert any(line.startswith("[pretrain] running") and "console.cloud.google.com/logs" in line for line in said)


@pytest.mark.parametrize("component", ["build-tfrecords", "pretrain", "linear-eval", "record-lineage", "end-pipeline"])
def test_a_step_that_fails_ends_the_wait_with_its_reason(google, bucket, capsys, component):
    google.vertex.script = [{"job": "RUNNING", component: "RUNNING"}, {component: "FAILED: the disk is full", "job": "FAILED"}]
    assert cli.main([*google.quick, "--wait"]) == 1
    assert f"{component} failed: the disk is full" in one_error_line(capsys)


@pytest.mark.parametrize("state", ["CANCELLED", "PAUSED"])
def test_a_job_that_somebody_else_ended_ends_the_wait_as_failed(google, bucket, capsys, state):
    google.vertex.script = [{"job": "RUNNING", "pretrain": "RUNNING"}, {"job": state, "pretrain": "CANCELLED"}]
    assert cli.main([*google.quick, "--wait"]) == 1
    assert f"job mine {state.lower()}" in one_error_line(capsys)


@pytest.mark.thorough
@pytest.mark.parametrize("fault", ["cut", 429, 500, 503, "slow"])
def test_a_fault_while_waiting_is_waited_out(google, capsys, fault):
    assert cli.main(google.quick) == 0
    google.vertex.script = list(HAPPY)
    google.fail(fault, fault, path="pipelineJobs/mine")
    assert cli.main(["status", "mine", *google.options, "--wait"]) == 0
    assert "mine: succeeded" in capsys.readouterr().out


def test_a_step_from_the_cache_and_a_step_that_is_tried_again_are_shown_as_such(google, bucket, capsys):
    google.vertex.script = [
        {"job": "RUNNING", "build-tfrecords": "SKIPPED", "pretrain": "RUNNING"},
        {"pretrain": "PENDING"},
        {"pretrain": "RUNNING"},
        {"pretrain": "SUCCEEDED", "job": "SUCCEEDED"},
    ]
    assert cli.main([*google.quick, "--wait"]) == 0
    said = capsys.readouterr().out
    assert said.count("[pretrain] running") == 2
    assert "build-tfrecords  reused from the cache" in said


def test_cancelling_ends_a_job_once(google, bucket, capsys):
    assert cli.main([*google.quick, "--no-dataflow"]) == 0
    google.fail(429, "cut", 500, path=":cancel")
    for _ in range(2):
        assert cli.main(["cancel", "mine", *google.options, "--wait"]) == 0
    said = capsys.readouterr()
    assert "mine: cancelled" in said.out
    assert "error" not in said.err
    assert len(google.sent("POST", ":cancel")) == 4
    assert cli.main(["status", "mine", *google.options]) == 1
    assert "job mine cancelled" in one_error_line(capsys)


def test_status_names_what_is_not_there(google, capsys):
    for arguments, named in (
        (["nothing", *google.options], "there is no job nothing"),
        (["nothing"], "--project and --region must say where"),
        (["projects/p/jobs/x"], "names no job"),
    ):
        assert cli.main(["status", *arguments]) == 2
        assert named in one_error_line(capsys)


def test_status_as_json_is_for_scripts(google, bucket, capsys):
    assert cli.main([*google.quick, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["job_id"] == "mine"
    google.vertex.script = [{"job": "RUNNING", "pretrain": "RUNNING"}]
    name = f"{FOLDER}/pipelineJobs/mine"
    assert cli.main(["status", name, "--endpoint", google.url, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["state"], found["tasks"]["pretrain"]["state"]) == ("RUNNING", "RUNNING")


def test_an_interrupt_leaves_the_job_running_and_says_how_to_go_on(google, bucket, capsys, monkeypatch):
    assert cli.main(google.quick) == 0

    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(client.time, "sleep", interrupted)
    assert cli.main(["status", "mine", *google.options, "--wait"]) == 130
    assert "the job goes on; sogclr status mine" in capsys.readouterr().err
    assert google.sent("POST", ":cancel") == []


# ---- Doing a step again


def leave(google, bucket, states):
    """Makes a job whose steps left artifacts."""
    assert cli.main([*google.quick, "--set", "epochs=70"]) == 0
    (job,) = google.vertex.jobs.values()
    google.vertex.step_on(job, states)
    made = {
        "build-tfrecords": ("dataset", "system.Dataset", {"fingerprint": "f" * 64, "run_id": "1" * 32}),
        "pretrain": ("model", "system.Model", {"steps": 9, "run_id": "2" * 32}),
        "linear-eval": ("metrics", "system.Metrics", {"top_1_accuracy": 0.5, "run_id": "3" * 32}),
    }
    for detail in job.job_detail.task_details:
        if detail.task_name in made and detail.state.name in ("SUCCEEDED", "SKIPPED"):
            name, title, metadata = made[detail.task_name]
            artifact = aiplatform_v1.Artifact(uri=f"gs://a-bucket/runs/{name}", schema_title=title, metadata=metadata)
            detail.outputs = {name: aiplatform_v1.PipelineTaskDetail.ArtifactList(artifacts=[artifact])}


def test_a_step_is_done_again_on_vertex_from_what_a_job_left(google, bucket, capsys):
    leave(google, bucket, {"build-tfrecords": "SKIPPED", "pretrain": "SUCCEEDED", "job": "SUCCEEDED"})
    images = google.submit[google.submit.index("--images") :]
    arguments = ["rerun", "pretrain", "--run", "vertex:mine", *google.options, "--accelerator", "v3-8", *images]
    assert cli.main([*arguments, "--set", "gamma=0.8", "--job-id", "again"]) == 0
    job = json_format.MessageToDict(aiplatform_v1.PipelineJob.pb(google.vertex.jobs[f"{FOLDER}/pipelineJobs/again"]))
    spec = job["pipelineSpec"]
    tasks = spec["components"]["comp-exit-handler-1"]["dag"]["tasks"]
    assert set(tasks) == {"importer", "pretrain"}
    given = {name: one["runtimeValue"]["constant"] for name, one in tasks["pretrain"]["inputs"]["parameters"].items()}
    assert given["overrides"] == ["epochs=70", "gamma=0.8"]
    assert given["preset"] == "sogclr_imagenet_r50_b512"
    assert given["base_output_directory"] == "gs://a-bucket/runs/custom-jobs"
    importer = spec["deploymentSpec"]["executors"]["exec-importer"]["importer"]
    assert importer["artifactUri"]["constant"] == "gs://a-bucket/runs/dataset"
    (pool,) = spec["components"]["comp-pretrain"]["inputDefinitions"]["parameters"]["worker_pool_specs"]["defaultValue"]
    assert pool["machine_spec"] == {"machine_type": "cloud-tpu", "accelerator_type": "TPU_V3", "accelerator_count": 8}
    assert {"name": "SOGCLR_RERUN_OF", "value": "2" * 32} in pool["container_spec"]["env"]


@pytest.mark.parametrize(("component", "machine"), [("build-tfrecords", "cpu"), ("linear-eval", "v5e-4")])
def test_the_other_steps_are_done_again_on_vertex_too_and_the_plan_is_of_them_alone(google, bucket, capsys, component, machine):
    leave(google, bucket, dict.fromkeys(("build-tfrecords", "pretrain", "linear-eval", "job"), "SUCCEEDED"))
    capsys.readouterr()
    images = google.submit[google.submit.index("--images") :]
    arguments = ["rerun", component, "--run", "vertex:mine", *google.options, "--accelerator", machine, *images]
    assert cli.main([*arguments, "--job-id", "again"]) == 0
    said = capsys.readouterr().out
    assert {name for name in ("build-tfrecords", "pretrain", "linear-eval") if re.search(f"^{name} ", said, re.M)} == {component}
    assert "off: every step runs" in said
    assert ("gs://a-bucket/raw can be read" in said) == (component == "build-tfrecords")
    job = json_format.MessageToDict(aiplatform_v1.PipelineJob.pb(google.vertex.jobs[f"{FOLDER}/pipelineJobs/again"]))
    tasks = job["pipelineSpec"]["components"]["comp-exit-handler-1"]["dag"]["tasks"]
    assert {name for name in tasks if "importer" not in name} == {component}
    given = {name: one["runtimeValue"]["constant"] for name, one in tasks[component]["inputs"]["parameters"].items()}
    if component == "build-tfrecords":
        assert f"--sdk_container_image={google.url[7:]}/my-project/sogclr/sogclr-cpu@{DIGEST['cpu']}" in given["beam_args"]
    else:
        assert set(tasks[component]["inputs"]["artifacts"]) == {"dataset", "model"}


def test_an_evaluation_is_not_done_again_where_it_cannot_end(google, bucket, capsys):
    leave(google, bucket, dict.fromkeys(("build-tfrecords", "pretrain", "linear-eval", "job"), "SUCCEEDED"))
    capsys.readouterr()
    images = google.submit[google.submit.index("--images") :]
    arguments = ["rerun", "linear-eval", "--run", "vertex:mine", *google.options, "--accelerator", "cpu", *images]
    assert cli.main([*arguments, "--set", "linear_eval.protocols=official", "--job-id", "again"]) == 2
    assert "more than a day: take --accelerator v5e-" in capsys.readouterr().out
    assert len(google.vertex.jobs) == 1


def test_a_step_without_what_it_needs_is_not_done_again(google, bucket, capsys):
    leave(google, bucket, {"build-tfrecords": "SUCCEEDED", "pretrain": "FAILED: no", "job": "FAILED"})
    capsys.readouterr()
    assert cli.main(["rerun", "linear-eval", "--run", "vertex:mine", *google.options]) == 2
    assert "no output of pretrain to go on from: it is FAILED" in one_error_line(capsys)

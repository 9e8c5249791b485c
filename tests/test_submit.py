"""Jobs on Vertex AI: checked and submitted, with Google's real clients against a loopback Google."""

import json
import re
from pathlib import Path

import pytest
from google.cloud import aiplatform_v1
from google.protobuf import json_format
from support.submitting import (
    DIGEST,
    FOLDER,
    PROJECT,
    REGION,
    SECRET,
    TAG,
    bucket_of_archives,
    google_with_images,
    one_error_line,
)
from vertex.accounts import KEY

from pipelines import cli
from pipelines.plan import compiler, estimate
from pipelines.vertex import client
from pipelines.vertex import storage as cloud_storage
from trainer.config import as_dict
from trainer.presets import resolve


@pytest.fixture(scope="module")
def bucket():
    with bucket_of_archives() as bucket:
        yield bucket


@pytest.fixture
def google(tmp_path, monkeypatch):
    with google_with_images(tmp_path, monkeypatch) as google:
        yield google


def jobs_made(google):
    return google.sent("POST", "/pipelineJobs")


# ---- Before


def test_a_dry_run_shows_the_plan_and_the_checks_and_makes_nothing(google, bucket, capsys):
    assert cli.main([*google.submit, "--dry-run"]) == 0
    said = capsys.readouterr().out
    for text in ("v5e-8: ct5lp-hightpu-8t (2x4), 8 replicas", DIGEST["tpu"], DIGEST["cpu"], "Dataflow", "gs://a-bucket/runs"):
        assert text in said
    assert "missing" not in said
    assert jobs_made(google) == []


def test_a_dry_run_on_a_bare_machine_explains_the_plan_and_what_is_missing(google, monkeypatch, capsys):
    monkeypatch.delenv("GOOGLE_APPLICATION_CREDENTIALS")
    monkeypatch.setenv("HOME", str(Path.cwd()))
    monkeypatch.setenv("CLOUDSDK_CONFIG", str(Path.cwd()))
    arguments = [one for one in google.submit if "mlflow" not in one]
    assert cli.main([*arguments, "--dry-run"]) == 2
    said = capsys.readouterr()
    assert "v5e-8: ct5lp-hightpu-8t (2x4), 8 replicas" in said.out
    assert "gcloud auth application-default login" in said.out
    assert "--mlflow-uri" in said.out
    assert re.fullmatch(
        r"error: it would not work: mlflow, credentials must be fixed first; vertex, .* can be checked then\n", said.err
    )
    assert google.requests == []


@pytest.mark.parametrize(
    ("fits", "said"), [(True, "ok       memory: the step fits: 4.4 of 16.0 GB"), (False, "missing  memory: the step does")]
)
def test_a_step_that_was_found_not_to_fit_is_neither_compiled_nor_submitted(google, bucket, capsys, monkeypatch, fits, said):
    assert cli.main([*google.submit, "--dry-run"]) == 0
    assert "?        memory: whether the step fits into v5e-8 is not known; sogclr plan" in capsys.readouterr().out

    compiled = {
        "fits": fits,
        "used_bytes": 32e9,
        "compiler": "",
        "compile_seconds": 1,
        "arguments_bytes": 3e8,
        "results_bytes": 0,
    }
    compiled |= {"temp_bytes": 4e9, "code_bytes": 1e8, "flops": 2e12, "bytes_accessed": 4e10}
    known = {"state_bytes": 3e8, "collectives": [], "compiled": compiled}
    monkeypatch.setattr(estimate, "_lower_and_compile", lambda *_: known)
    monkeypatch.setattr(compiler, "tpu_python", lambda project: None)
    step = ("--preset", "sogclr_imagenet_r50_b512", "--accelerator", "v5e-8")
    assert cli.main(["plan", *step]) == 0
    assert cli.main([*google.submit, "--dry-run"]) == (0 if fits else 2)
    assert said in capsys.readouterr().out
    capsys.readouterr()
    assert cli.main(["compile", *step, "--images", "example.com/sogclr", "--tag", TAG, "--output", "p.yaml"]) == (
        0 if fits else 2
    )
    if not fits:
        error = one_error_line(capsys)
        assert re.search("does not fit into v5e-8: 32.0 of 16.0 GB a device; take --set global_batch_size=192 or less", error)
    assert Path("p.yaml").exists() == fits


def machines_of(google, component):
    """Returns the machine types that the one job asks for, of a component."""
    inputs = the_job(google)["pipelineSpec"]["components"][f"comp-{component}"]["inputDefinitions"]["parameters"]
    return [pool["machine_spec"]["machine_type"] for pool in inputs["worker_pool_specs"]["defaultValue"]]


@pytest.mark.parametrize(("option", "machine"), [((), "ct5lp-hightpu-8t"), (("--eval-accelerator", "cpu"), "n2-standard-16")])
def test_the_evaluation_has_pretraining_s_machine_unless_another_is_named(google, bucket, capsys, option, machine):
    assert cli.main([*google.quick, *option]) == 0
    assert machines_of(google, "pretrain") == ["ct5lp-hightpu-8t"]
    assert machines_of(google, "linear-eval") == [machine]
    assert re.search(r"^ok       evaluation: features, .*, \$.* on (v5e-8|cpu)$", capsys.readouterr().out, re.MULTILINE)


DAYS_ON_A_CPU = ("--eval-accelerator", "cpu", "--set", "linear_eval.protocols=official")


def test_an_evaluation_of_more_than_a_day_is_refused_with_a_better_machine(google, bucket, capsys):
    assert cli.main([*google.quick, *DAYS_ON_A_CPU]) == 2
    said = capsys.readouterr()
    assert re.search(
        r"^missing  evaluation: .* hours on cpu, more than a day: take --eval-accelerator v5e-\d \(", said.out, re.MULTILINE
    )
    assert said.err == "error: nothing was submitted: evaluation must be fixed first\n"
    assert jobs_made(google) == []
    assert cli.main([*google.quick, *DAYS_ON_A_CPU, "--skip-check", "evaluation"]) == 0
    assert machines_of(google, "linear-eval") == ["n2-standard-16"]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (DAYS_ON_A_CPU, "more than a day: take --eval-accelerator"),
        (("--eval-accelerator", "cpu", "--timeout-hours", "0.5"), "more than --timeout-hours 0.5: take --eval-accelerator"),
        (("--disk-gb", "100", "--set", "width_multiplier=16"), "more than --disk-gb 100: take --disk-gb"),
    ],
)
def test_an_evaluation_that_cannot_end_is_not_compiled(google, capsys, options, named):
    command = ["compile", "--preset", "sogclr_imagenet_r50_b512", "--accelerator", "v5e-8", "--tag", TAG, "--output", "p.yaml"]
    assert cli.main([*command, *options]) == 2
    assert named in one_error_line(capsys)
    assert not Path("p.yaml").exists()


def test_a_key_file_that_is_none_is_named(google, monkeypatch, capsys):
    for path in ("nothing.json", __file__):
        monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", path)
        assert cli.main(["status", "mine", *google.options]) == 2
        assert f"GOOGLE_APPLICATION_CREDENTIALS names {path}" in one_error_line(capsys)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (["--accelerator", "v6e-8"], "runs no TensorFlow"),
        (["--accelerator", "v5e-7"], "no v5e of size 7"),
        (["--accelerator", "v5-8"], "did you mean v"),
        (["--accelerator", "v3-32"], "--accelerator v3-32 is refused: each of its 4 hosts would train alone; take v3-8"),
        (["--eval-accelerator", "v4-8"], "--eval-accelerator v4-8 is refused"),
        (["--accelerator", "v5e-16", "--force-accelerator", "--spot"], "leave out --spot"),
        (["--set", "global_batch_size=500"], "does not divide among the 8 replicas"),
        (["--set", "global_batch_size=4"], "take --set global_batch_size=8"),
        (["--set", "ghost_batch_size=32", "global_batch_size=64"], "does not divide the 8 images of a replica: take 8, or 0"),
        (["--pipeline-root", "/tmp/runs"], "--pipeline-root"),
        (["--raw", "/data"], "--raw"),
        (["--project", "My Project"], "--project"),
        (["--region", "europe"], "--region"),
        (["--job-id", "My_Job"], "--job-id"),
        (["--label", "Team=A"], "--label Team=A"),
        (["--service-account", "me"], "--service-account"),
        (["--network", "default"], "--network"),
        (["--encryption-key", "key"], "--encryption-key"),
        (["--schedule", "every day"], "--schedule"),
        (["--tag", "latest"], "another image tomorrow"),
        (["--mlflow-uri", "https://me:planted-password@mlflow.example"], "without credentials"),
        (["--mlflow-secret", SECRET], "--mlflow-secret"),
        (["--timeout-hours", "0"], "--timeout-hours"),
        (["--timeout-hours", "169"], "--timeout-hours 169 is more than 168: Google documents no custom job of more than 7 days"),
        (["--timeout-hours", "inf"], "--timeout-hours inf is more than 168"),
        (["--timeout-hours", "nan"], "--timeout-hours nan"),
        (["--skip-check", "all"], "--skip-check all"),
        (["--skip-check", "credentials"], "--skip-check credentials"),
        (["--project", ""], "--project is empty"),
        (["--pipeline-root", ""], "--pipeline-root is empty"),
        (["--raw", ""], "--raw is empty"),
        (["--max-runs", "3"], "--schedule"),
        (["--preset", "sogclr_imagenet"], "did you mean"),
    ],
)
def test_what_cannot_work_is_refused_without_a_request(google, capsys, change, named):
    assert cli.main([*google.submit, *change]) == 2
    line = one_error_line(capsys)
    assert named in line
    assert SECRET not in line
    assert google.requests == []


@pytest.mark.parametrize(
    ("change", "break_it", "named"),
    [
        (["--region", "us-east1"], None, "region us-east1 has no v5e-8"),
        (["--tag", "fedcba987654"], None, "there is no image"),
        (["--pipeline-root", "gs://b-bucket/runs"], None, "there is no bucket gs://b-bucket"),
        (["--raw", "gs://a-bucket/other"], None, "lacks ILSVRC2012_img_train.tar"),
        ([], lambda google: google.fail(*[403] * 9), "docs/vertex.md lists the roles"),
        ([], lambda google: setattr(google.accounts, "token_ok", False), "the credentials are not valid"),
        ([], lambda google: google.fail(401, path="/v2/"), "roles/artifactregistry.reader"),
        ([], lambda google: google.fail(500, path="/v2/"), "answers 500"),
    ],
)
def test_what_is_missing_is_named_and_nothing_is_submitted(google, bucket, capsys, change, break_it, named):
    if break_it:
        break_it(google)
    assert cli.main([*google.submit, *change]) == 2
    said = capsys.readouterr()
    assert named in said.out
    assert said.err.startswith("error: nothing was submitted: ")
    assert jobs_made(google) == []


def test_the_bucket_s_faults_are_one_line_each(google, monkeypatch, capsys):
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", google.url)
    monkeypatch.setattr(cloud_storage, "_PATIENCE", 0.2)
    arguments = [*google.quick[:-5], "options", "vertex", "images", "--dry-run"]
    named = {403: "roles/storage.legacyBucketReader", 401: "login", 429: "not answer", 500: "not answer", "cut": "not answer"}
    for fault, text in named.items():
        google.fail(*[fault] * 1000, path="/storage/")
        assert cli.main([*arguments, "--skip-check", "raw"]) == 2
        said = capsys.readouterr()
        assert re.search(rf"^missing  bucket: .*{text}", said.out, re.MULTILINE), said.out
        assert said.err == "error: it would not work: bucket must be fixed first\n"
    for fault, text in {
        403: "roles/storage.objectViewer and roles/storage.legacyBucketReader",
        404: "there is no bucket gs://a-bucket",
    }.items():
        google.fail(*[fault] * 1000, path="/storage/")
        assert cli.main(arguments) == 2
        assert re.search(rf"^missing  raw: .*{text}", capsys.readouterr().out, re.MULTILINE)


def test_a_check_can_be_skipped(google, bucket, capsys):
    assert cli.main([*google.submit, "--region", "us-east1", "--skip-check", "region", "images", "--tag", "fedcba987654"]) == 0
    assert "sogclr-tpu:fedcba987654" in jobs_made(google)[0]


# ---- Sending


def the_job(google):
    (job,) = google.vertex.jobs.values()
    return json_format.MessageToDict(aiplatform_v1.PipelineJob.pb(job))


def test_a_submitted_job_is_what_was_asked_for(google, bucket, capsys):
    options = [
        *("--job-id", "mine", "--label", "team=vision", "cost=a1", "--service-account", "s@my-project.iam.gserviceaccount.com"),
        *("--network", "projects/12/global/networks/net", "--spot", "--no-cache", "--timeout-hours", "2", "--retries", "5"),
        *("--encryption-key", "projects/p/locations/r/keyRings/k/cryptoKeys/c", "--dataflow-workers", "3"),
        *(
            "--dataflow-machine",
            "n2-standard-8",
            "--dataflow-arg=--no_use_public_ips",
            "--set",
            "epochs=30",
            "linear_eval.seed=2",
        ),
    ]
    assert cli.main([*google.submit, *options]) == 0
    said = capsys.readouterr().out
    assert f"https://console.cloud.google.com/vertex-ai/locations/{REGION}/pipelines/runs/mine?project={PROJECT}" in said
    job = the_job(google)
    assert job["labels"].items() >= {"team": "vision", "cost": "a1"}.items()
    assert job["serviceAccount"] == "s@my-project.iam.gserviceaccount.com"
    assert job["network"] == "projects/12/global/networks/net"
    assert job["encryptionSpec"]["kmsKeyName"].endswith("/cryptoKeys/c")
    assert job["runtimeConfig"]["gcsOutputDirectory"] == "gs://a-bucket/runs"
    values = job["runtimeConfig"]["parameterValues"]
    assert values["overrides"] == ["epochs=30"]
    assert values["linear_eval_overrides"] == ["linear_eval.seed=2"]
    assert len(values["raw_identity"]) == 16
    spec = job["pipelineSpec"]
    tasks = spec["components"]["comp-exit-handler-1"]["dag"]["tasks"]
    assert not any(task["cachingOptions"].get("enableCache") for task in tasks.values())
    assert tasks["pretrain"]["retryPolicy"]["maxRetryCount"] == 5
    pretrain = spec["components"]["comp-pretrain"]["inputDefinitions"]["parameters"]
    assert pretrain["strategy"]["defaultValue"] == "SPOT"
    assert pretrain["timeout"]["defaultValue"] == "7200s"
    assert pretrain["restart_job_on_worker_restart"]["defaultValue"] is True
    (pool,) = pretrain["worker_pool_specs"]["defaultValue"]
    assert pool["container_spec"]["image_uri"].endswith(DIGEST["tpu"])
    beam = tasks["build-tfrecords"]["inputs"]["parameters"]["beam_args"]["runtimeValue"]["constant"]
    assert {"--runner=DataflowRunner", "--max_num_workers=3", "--worker_machine_type=n2-standard-8", "--no_use_public_ips"} < set(
        beam
    )
    (image,) = (one for one in beam if one.startswith("--sdk_container_image="))
    assert image.endswith(DIGEST["cpu"])


def test_a_job_starts_from_the_newest_checkpoint_of_a_folder_that_fits(google, bucket, capsys):
    """The job has the file's name, so that a later checkpoint in the folder changes nothing when a step is tried again."""
    config = as_dict(resolve("sogclr_imagenet_r50_b512", ["epochs=10"]))
    about = {"config": config, "dataset_fingerprint": "f" * 64}
    bucket.blob("encoder/config.json").upload_from_string(json.dumps(about))
    for number in (5, 40, 100000000):
        bucket.blob(f"encoder/checkpoint-{number:08}.npz").upload_from_string(str(number))
    given = ["--init-from", "gs://a-bucket/encoder/"]
    assert cli.main([*google.submit, *given, "--job-id", "mine"]) == 0
    newest = "gs://a-bucket/encoder/checkpoint-100000000.npz"
    assert f"init-from: {newest} fits" in capsys.readouterr().out
    values = the_job(google)["runtimeConfig"]["parameterValues"]
    assert values["init_from"] == newest
    assert values["init_identity"]
    tasks = the_job(google)["pipelineSpec"]["components"]["comp-exit-handler-1"]["dag"]["tasks"]
    assert "init_from" in json.dumps(tasks["pretrain"]["inputs"]["parameters"]["init_from"])

    for wrong, said in (
        (["--set", "depth=18", *given], "has depth=50, not 18: set depth=50"),
        (["--init-from", "gs://a-bucket/raw"], "holds no checkpoint of a pretraining run"),
        (["--init-from", "gs://a-bucket/encoder/checkpoint-00000007.npz"], "holds no checkpoint"),
    ):
        assert cli.main([*google.submit, "--dry-run", *wrong]) == 2
        assert said in capsys.readouterr().out
    assert cli.main([*google.submit, "--init-from", "runs/checkpoints"]) == 2
    assert "--init-from runs/checkpoints is not valid: it must be a checkpoint" in one_error_line(capsys)


@pytest.mark.parametrize("account", ["", "s@my-project.iam.gserviceaccount.com"])
def test_pipeline_custom_jobs_and_dataflow_run_as_the_one_account_that_the_plan_names(google, bucket, capsys, account):
    """Vertex AI would run a custom job without an account as an agent of its own, which may read other things."""
    assert cli.main([*google.submit, *(("--service-account", account) if account else ())]) == 0
    who = re.search(r"^who +(\S+)", capsys.readouterr().out, re.MULTILINE)[1]
    assert who == (account or "PROJECT_NUMBER-compute@developer.gserviceaccount.com,")
    job = the_job(google)
    assert job.get("serviceAccount", "") == account
    spec = job["pipelineSpec"]
    for component in ("pretrain", "linear-eval"):
        inputs = spec["components"][f"comp-{component}"]["inputDefinitions"]["parameters"]
        assert inputs["service_account"]["defaultValue"] == (account or "{{$.pipeline_service_account}}")
    tasks = spec["components"]["comp-exit-handler-1"]["dag"]["tasks"]
    beam = tasks["build-tfrecords"]["inputs"]["parameters"]["beam_args"]["runtimeValue"]["constant"]
    # Without the option, a worker of Dataflow runs as Compute Engine's default account too.
    assert [one for one in beam if "service_account" in one] == ([f"--service_account_email={account}"] if account else [])


def test_no_secret_is_in_the_job_or_said(google, bucket, capsys):
    assert cli.main([*google.submit, "--debug"]) == 0
    said = capsys.readouterr()
    for text in (said.out, said.err, *jobs_made(google)):
        for secret in (SECRET, "planted-access-token", KEY.splitlines()[2]):
            assert secret not in text
    assert "projects/my-project/secrets/mlflow/versions/1" in jobs_made(google)[0]


@pytest.mark.thorough
@pytest.mark.parametrize("faults", [["lost"], ["cut"], [429, 429], [500], [503, "cut", "lost"], ["slow"]], ids=str)
def test_faults_that_pass_end_in_one_job(google, bucket, capsys, faults):
    google.fail(*faults, path="pipelineJobs?pipelineJobId=")
    assert cli.main(google.quick) == 0
    assert "submitted: mine" in capsys.readouterr().out
    assert len(google.vertex.jobs) == 1
    assert google.faults == []


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("fault", "named"),
    [(429, "out of quota"), (500, "has an internal error"), (403, "not allowed"), ("cut", "cannot be reached"), (400, "refuses")],
)
def test_a_fault_that_stays_is_one_line_and_no_job(google, bucket, capsys, fault, named):
    google.fail(*[fault] * 1000, path="pipelineJobs?pipelineJobId=")
    assert cli.main(google.quick) == 2
    assert named in one_error_line(capsys)
    assert google.vertex.jobs == {}


@pytest.mark.thorough
@pytest.mark.parametrize("fault", ["slow", "lost"])
def test_a_job_that_may_have_been_made_is_still_one_when_it_is_submitted_again(google, bucket, capsys, monkeypatch, fault):
    monkeypatch.setattr(client, "_PATIENCE", 0.3)
    google.fail(*[fault] * 1000, path="pipelineJobs?pipelineJobId=")
    assert cli.main(google.quick) == 2
    assert "job mine may have been made" in one_error_line(capsys)
    google.fail()
    assert cli.main(google.quick) == 0
    assert len(google.vertex.jobs) == 1


SCHEDULE = f"{FOLDER}/schedules/1"


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("command", "path"),
    [
        (["status", "mine"], "pipelineJobs/mine"),
        (["status", "mine", "--wait"], "pipelineJobs/mine"),
        (["cancel", "mine"], ":cancel"),
        (["cancel", SCHEDULE], "schedules/1"),
        (["rerun", "pretrain", "--run", "vertex:mine"], "pipelineJobs/mine"),
        (["submit", "--schedule", "0 3 * * 1"], "schedules"),
    ],
    ids=lambda value: " ".join(value[:2]) if isinstance(value, list) else "",
)
def test_every_fault_that_stays_is_one_line_whatever_was_asked(google, capsys, monkeypatch, command, path):
    name = f"{FOLDER}/pipelineJobs/mine"
    google.vertex.jobs[name] = aiplatform_v1.PipelineJob(name=name, state="PIPELINE_STATE_RUNNING")
    for name in ("_PATIENCE", "_PATIENCE_OF_FOLLOWING", "_SECONDS_FOR_A_CALL"):
        monkeypatch.setattr(client, name, 0.1)
    arguments = [*google.quick, *command[1:]] if command[0] == "submit" else [*command, *google.options]
    for fault in (429, 500, 403, "cut", "slow"):
        google.fail(*[fault] * 1000, path=path)
        assert cli.main(arguments) == 2
        assert re.search("quota|internal|allowed|reached", one_error_line(capsys))
        assert google.vertex.schedules == {}


def test_the_same_submission_twice_is_one_job_and_another_of_its_name_is_refused(google, bucket, capsys):
    arguments = google.quick
    assert cli.main(arguments) == cli.main(arguments) == 0
    assert "was there already: mine" in capsys.readouterr().out
    assert cli.main([*arguments, "--set", "gamma=0.7"]) == 2
    assert "give another --job-id" in one_error_line(capsys)
    assert len(jobs_made(google)) == 1


def test_a_schedule_is_made_once(google, bucket, capsys):
    arguments = [*google.submit, "--schedule", "TZ=Europe/Berlin 0 3 * * 1", "--max-runs", "4"]
    google.fail("lost", path="schedules")
    assert cli.main(arguments) == 0
    assert cli.main(arguments) == 0
    (schedule,) = google.vertex.schedules.values()
    assert (schedule.cron, schedule.max_run_count) == ("TZ=Europe/Berlin 0 3 * * 1", 4)
    assert "was there already" in capsys.readouterr().out
    assert cli.main(["cancel", schedule.name, "--endpoint", google.url]) == 0
    assert google.vertex.schedules == {}
    assert cli.main(["cancel", schedule.name, "--endpoint", google.url]) == 2
    assert "finds nothing of that name" in one_error_line(capsys)


def test_a_lost_answer_to_a_new_schedule_makes_no_second_one(google, bucket, capsys):
    # The first request to schedules lists them, the second makes one.
    google.fail("", "lost", path="schedules")
    assert cli.main([*google.submit, "--schedule", "0 3 * * 1"]) == 0
    assert len(google.vertex.schedules) == 1

"""Steps that record on a real MLflow server with passwords: what they leave there, and what they do while it is down."""

import json
import os
from base64 import b64encode
from pathlib import Path
from urllib.parse import quote

import pytest
from google.auth.credentials import AnonymousCredentials
from google.auth.exceptions import DefaultCredentialsError
from google.cloud import secretmanager
from kfp import dsl
from mlflow import MlflowClient
from support.loopback import skip_waits
from support.mlflow_server import PASSWORD, USER, serving
from support.processes import Hold
from support.raw_data import striped_archives
from vertex.google import serving as serving_google

from components import outbox, tracking, variables, workspace
from trainer.shared.errors import UserError

REPOSITORY = Path(__file__).parents[1]
TOKEN = "planted-mlflow-token"
STEPS, EVERY, DOWN, UP = 36, 3, 6, 30
"""Of pretraining, which takes one more than whole epochs have: steps, those between two logs, where the server goes and comes."""


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with serving(tmp_path_factory.mktemp("server")) as server:
        yield server


@pytest.fixture(autouse=True)
def environ(server, monkeypatch):
    for name in ("MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_TRACKING_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    for name, value in server.environ.items():
        monkeypatch.setenv(name, value)


def artifact(kind, folder, job, task, name):
    return kind(name=name, uri=str(folder / job / task / name), metadata={})


# ---- Who may


def test_without_a_password_the_server_refuses_in_one_line(server, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_PASSWORD")
    with pytest.raises(UserError, match=r"set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"):
        tracking.open_store(server.uri)


def test_a_password_in_the_address_is_not_repeated(server):
    uri = server.uri.replace("http://", "http://someone:planted-wrong-password@")
    with pytest.raises(UserError) as raised:
        tracking.open_store(uri)
    assert "planted-wrong-password" not in str(raised.value)


def test_a_password_in_the_address_goes_where_mlflow_repeats_it_in_no_error(server, monkeypatch):
    for name in ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri.replace("http://", f"http://{USER}:{quote(PASSWORD, safe='')}@"))
    store = tracking.open_job_store()
    assert store.client.get_experiment(store.experiment_id).name == tracking.EXPERIMENT
    assert os.environ["MLFLOW_TRACKING_URI"] == server.uri
    assert (os.environ["MLFLOW_TRACKING_USERNAME"], os.environ["MLFLOW_TRACKING_PASSWORD"]) == (USER, PASSWORD)


SECRET = "projects/p/secrets/mlflow/versions/1"


@pytest.fixture
def google(monkeypatch):
    """A loopback Secret Manager, which `read_secret` asks."""
    client = secretmanager.SecretManagerServiceClient
    skip_waits(monkeypatch)
    with serving_google() as google:
        options = {"api_endpoint": google.url}
        monkeypatch.setattr(
            secretmanager,
            "SecretManagerServiceClient",
            lambda: client(transport="rest", client_options=options, credentials=AnonymousCredentials()),
        )
        yield google


@pytest.mark.parametrize("secret", [f"{USER}:{PASSWORD}\n", "token-1"])
def test_credentials_come_from_secret_manager(google, secret):
    environ = {variables.SECRET: SECRET}
    google.accounts.secrets[SECRET] = secret
    tracking.read_secret(environ)
    with pytest.raises(UserError, match=r"roles/secretmanager\.secretAccessor"):
        tracking.read_secret({variables.SECRET: SECRET.replace("mlflow", "other")})
    if ":" in secret:
        assert (environ["MLFLOW_TRACKING_USERNAME"], environ["MLFLOW_TRACKING_PASSWORD"]) == (USER, PASSWORD)
    else:
        assert environ["MLFLOW_TRACKING_TOKEN"] == secret


@pytest.mark.parametrize("fault", [503, 500, 429, "cut"])
def test_a_secret_manager_that_is_down_is_waited_for(google, capsys, fault):
    environ = {variables.SECRET: SECRET}
    google.accounts.secrets[SECRET] = "token-1"
    google.fail(fault, fault, fault, path="/secrets/")
    tracking.read_secret(environ)
    assert environ["MLFLOW_TRACKING_TOKEN"] == "token-1"
    answers = "does not answer at http" if fault == "cut" else f"answers HTTP {fault} (GET {google.url}"
    said = capsys.readouterr().err
    assert said.startswith(f"Secret Manager, asked for {SECRET}, {answers}")
    assert said.endswith("; waiting for it\n")
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (503, r"Secret Manager, asked for .*mlflow/versions/1, answers HTTP 503 .*on demand.*start the same command again"),
        ("cut", r"Secret Manager, asked for .*mlflow/versions/1, does not answer at http"),
        (404, r"secret .*mlflow/versions/1 cannot be read \(answers HTTP 404 .*: give --mlflow-secret a version that exists"),
    ],
)
def test_a_secret_that_cannot_be_had_is_one_line(google, fault, message):
    google.fail(*[fault] * 1000, path="/secrets/")
    with pytest.raises(UserError, match=message) as raised:
        tracking.read_secret({variables.SECRET: SECRET})
    assert "\n" not in str(raised.value)


def test_without_credentials_of_google_a_secret_is_refused_in_one_line(monkeypatch):
    def client():
        raise DefaultCredentialsError("Your default credentials were not found.\nTo set up, see there.")

    monkeypatch.setattr(secretmanager, "SecretManagerServiceClient", client)
    with pytest.raises(UserError, match=r"credentials were not found\. To set up"):
        tracking.read_secret({variables.SECRET: SECRET})


# ---- One job, several machines


def test_a_job_s_steps_are_one_run_and_a_retry_goes_on_with_its_step_s_run(server, tmp_path, monkeypatch):
    store = tracking.open_store(server.uri)
    monkeypatch.setenv(variables.JOB_FOLDER, "projects/p/locations/europe-west4")
    environ = {
        **server.environ,
        variables.IMAGE: "registry/sogclr-tpu@sha256:77",
        variables.JOB_FOLDER: "projects/p/locations/europe-west4",
        variables.COMMIT: "abc",
    }
    runs = []
    for attempt in range(2):
        dataset = artifact(dsl.Dataset, tmp_path, "job-1", f"build-tfrecords_{attempt}", "dataset")
        try:
            with tracking.step("build-tfrecords", {"raw": "gs://b/raw"}, {"dataset": dataset}, environ=environ) as run:
                runs.append(run.run_id)
                if attempt == 0:
                    raise OSError("the machine was taken away")
                dataset.metadata.update(fingerprint="f" * 64, name="images", train_images=1, validation_images=1, classes=1)
                run.datasets.log(dataset, "output")
        except OSError:
            assert store.client.get_run(runs[0]).info.status == "FAILED"
    assert runs[0] == runs[1]
    run = store.client.get_run(runs[0])
    assert run.info.status == "FINISHED"
    assert "sogclr.error" not in run.data.tags
    parent = store.client.get_run(run.data.tags["mlflow.parentRunId"])
    assert parent.info.status == "RUNNING"
    assert parent.data.tags["sogclr.job"] == "job-1"
    assert parent.data.tags["sogclr.job_link"].endswith("/locations/europe-west4/pipelines/runs/job-1?project=p")
    assert run.data.tags["sogclr.image"] == "registry/sogclr-tpu@sha256:77"
    assert run.data.tags["mlflow.source.git.commit"] == "abc"

    tracking.join(store, "job-1", [run.info.run_id])
    tracking.end_job(store, "job-1", "SUCCEEDED")
    assert store.client.get_run(parent.info.run_id).info.status == "FINISHED"
    for state, status in (("FAILED", "FAILED"), ("CANCELLED", "KILLED")):
        tracking.end_job(store, f"job-{state}", state)
        (ended,) = store.client.search_runs([store.experiment_id], f"tags.`sogclr.job` = 'job-{state}'")
        assert ended.info.status == status


# ---- While the server is down


def test_metrics_wait_in_a_file_and_the_next_attempt_delivers_them(server, tmp_path, monkeypatch):
    monkeypatch.setattr(outbox, "_SECONDS_BETWEEN_CALLS", 0.05)
    store = tracking.open_store(server.uri)
    run_id = store.client.create_run(store.experiment_id).info.run_id
    folder = tmp_path / "checkpoints"
    nowhere = tracking.Store(MlflowClient("http://127.0.0.1:9"), store.experiment_id)
    for first, of in ((0, nowhere), (100, nowhere), (200, store)):
        run = tracking.StepRun(of, run_id)
        run.metrics.keep_in(str(folder))
        for step in range(first, first + 100):
            run.metrics.log({"loss": 1 / (step + 1), "nan": float("nan")}, step)
        if of is store:
            assert [step for step, _ in run.metrics.history()["loss"]] == list(range(300))
            assert len(run.metrics.history()["nan"]) == 300
        run.close(finished=True)
        # As long as the file is there, whoever does the same gets the folder.
        assert (folder / outbox.FILE).exists() == (of is nowhere)


def test_an_interrupted_step_is_gone_on_with_by_a_run_that_has_its_history(server, tmp_path):
    store = tracking.open_store(server.uri)
    before, after = (store.client.create_run(store.experiment_id).info.run_id for _ in range(2))
    run = tracking.StepRun(store, before)
    run.metrics.keep_in(str(tmp_path / "work"))
    run.metrics.log({"loss": 3.0}, 1)
    run.close()
    run = tracking.StepRun(store, after)
    run.metrics.keep_in(str(tmp_path / "work"))
    run.metrics.log({"loss": 2.0}, 2)
    assert run.metrics.history() == {"loss": [(1, 3.0), (2, 2.0)]}
    run.close(finished=True)
    assert store.client.get_run(after).data.tags["sogclr.resumed_from"] == before


def test_unfinished_work_is_claimed_again_and_finished_work_never(tmp_path):
    def claim(job="jobs/a", **depends_on):
        return Path(workspace.claim(str(tmp_path), job, **depends_on).folder)

    def end_process():
        while workspace._held:
            workspace._held.pop().close()

    first = claim(seed=0)
    assert claim(seed=1) != first
    assert claim(seed=0) != first, "somebody works in it"
    first.mkdir()
    (first / outbox.FILE).write_text("{}")
    end_process()
    assert claim("jobs/b", seed=0) == first
    end_process()
    # As an earlier version left it, without a word on jobs.
    first.with_name(f".{first.name}.lock").write_text("")
    (first / outbox.FILE).rename(first / "result.json")
    assert claim("jobs/c", seed=0) == first.with_name(first.name.replace("-1", "-2"))


@pytest.mark.thorough
def test_a_server_that_is_killed_in_the_middle_of_a_run_loses_no_metric_and_no_step(copies, server, tmp_path, tmp_path_factory):
    raw = striped_archives(tmp_path)
    settings = ["depth=10", "image_size=16", "global_batch_size=12", f"epochs={STEPS // 3}", "warmup_epochs=0"]
    settings += [
        "width_multiplier=0.125",
        f"log_every_steps={EVERY}",
        "checkpoint_every_epochs=4",
        "linear_eval.l2_penalties=1e-2",
    ]
    command = ["pipelines.cli", "run", "--preset", "demo", "--raw", raw, "--json", "--set", *settings]
    hold = Hold("pretrain", (DOWN, UP), tmp_path_factory.mktemp("hold"))
    # Beside a password, MLflow leaves a token alone.
    environ = {**server.environ, **hold.environ, "MLFLOW_TRACKING_TOKEN": TOKEN}
    with copies.started(*command, cwd=tmp_path, **environ) as run:
        hold.wait(run, 0)
        server.kill()
        hold.release(0)
        # Training goes on without it.
        hold.wait(run, 1)
        server.start()
        hold.release(1)
        answered, said = run.communicate()
    assert run.returncode == 0, said

    result = json.loads(answered)
    client = MlflowClient(server.uri)
    runs = {name: client.get_run(step["run_id"]) for name, step in result["components"].items()}
    assert [run.info.status for run in runs.values()] == ["FINISHED"] * 3
    assert client.get_run(result["run_id"]).info.status == "FINISHED"
    for metric in ("train/contrastive_loss", "train/u_mean", "train/learning_rate"):
        history = client.get_metric_history(runs["pretrain"].info.run_id, metric)
        assert {point.step for point in history} == {*range(EVERY, STEPS + 1, EVERY), STEPS + 1}
    assert {file.path for file in client.list_artifacts(runs["pretrain"].info.run_id)} == {
        "arguments.json",
        "step.json",
        "curves.png",
    }

    planted = (PASSWORD.encode(), TOKEN.encode(), b64encode(f"{USER}:{PASSWORD}".encode()))
    kept = [path for root in (tmp_path, server.folder / "artifacts") for path in root.rglob("*") if path.is_file()]
    assert len(kept) > 20
    for path in [*kept, server.folder / "mlflow.db", server.folder / "server.log"]:
        assert not any(secret in path.read_bytes() for secret in planted), path
    assert not any(secret in said + answered for secret in (PASSWORD, TOKEN))

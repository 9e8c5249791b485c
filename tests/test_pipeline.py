"""The whole pipeline through the command line, with the real jobs, KFP's local runner and MLflow in SQLite."""

import io
import json
import os
import re
import signal
import subprocess
import sys
from contextlib import chdir, contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
from mlflow import MlflowClient
from PIL import Image
from support.processes import Hold, started
from support.raw_data import striped_archives
from vertex.accounts import give_credentials
from vertex.google import serving

from pipelines.cli import main
from pipelines.vertex.client import Vertex
from pipelines.vertex.credentials import find_credentials
from pipelines.vertex.jobs import Place
from trainer.shared.progress import parse_line

RECORDED = Path(__file__).parent / "goldens" / "recorded.json"
COMPONENTS = ["build-tfrecords", "pretrain", "linear-eval"]
TINY = [
    *("depth=10", "image_size=16", "global_batch_size=12", "epochs=8", "warmup_epochs=0", "width_multiplier=0.125"),
    *("log_every_steps=3", "checkpoint_every_epochs=1", "linear_eval.l2_penalties=1e-2"),
]

SECRETS = {f"MLFLOW_TRACKING_{name}": f"planted-{name.lower()}" for name in ("USERNAME", "PASSWORD", "TOKEN")}
"""What the environment of a run holds that nothing it leaves may hold."""


def sogclr(*arguments, cwd, **environ):
    """Runs a command that starts no process here."""
    out, err = io.StringIO(), io.StringIO()
    with chdir(cwd), redirect_stdout(out), redirect_stderr(err), pytest.MonkeyPatch.context() as patch:
        for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_RUN_ID"):
            patch.delenv(name, raising=False)
        for name, value in environ.items():
            patch.setenv(name, value)
        code = main([str(argument) for argument in arguments])
    return subprocess.CompletedProcess(arguments, code, out.getvalue(), err.getvalue())


def process(*arguments):
    """Returns how to run the command line in a process of its own, from anywhere."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
    environ["PYTHONPATH"] = str(Path(__file__).parents[1])
    return {"args": [sys.executable, "-m", "pipelines.cli", *map(str, arguments)], "env": environ, "text": True}


def answer(done):
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def one_line_and_exit_code_2(done):
    """Returns the line that says what the user can mend."""
    assert done.returncode == 2, done.stderr
    lines = [line for line in done.stderr.splitlines() if not line.startswith("[")]
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ")
    return lines[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the commands are run; its name has a space."""
    return tmp_path_factory.mktemp("some where")


@pytest.fixture(scope="module")
def raw(folder):
    return striped_archives(folder)


@pytest.fixture(scope="module")
def interrupted(folder, raw, tmp_path_factory):
    """A run that was interrupted at step 9 of pretraining, whose last checkpoint is of step 6: how it ended, what it said last.

    It ignores SIGINT, as what a script starts in the background does.
    """
    hold = Hold("pretrain", (9,), tmp_path_factory.mktemp("hold"))
    command = process("run", "--preset", "demo", "--raw", raw, "--set", *TINY)
    command["args"] = ["bash", "-c", 'trap "" INT; exec "$@"', "bash", *command["args"]]
    command["env"] |= hold.environ
    with started(command.pop("args"), **command, cwd=folder, stderr=subprocess.PIPE) as running:
        hold.wait(running)
        running.send_signal(signal.SIGTERM)
        return running.wait(), running.stderr.read().splitlines()


@pytest.fixture(scope="module")
def first(copies, folder, raw, interrupted, tmp_path_factory):
    """What the first run that ends answers, and what it says on the way in `said`.

    Its machine has a GPU, which a variable hides from TensorFlow.
    """
    driver = tmp_path_factory.mktemp("driver") / "nvidia-smi"
    driver.write_text("#!/bin/sh\necho 'NVIDIA L4, 550.54.15'\n")
    driver.chmod(0o755)
    environ = {**SECRETS, "PATH": f"{driver.parent}{os.pathsep}{os.environ['PATH']}", "CUDA_VISIBLE_DEVICES": "-1"}
    done = copies.run("pipelines.cli", "run", "--preset", "demo", "--raw", raw, "--set", *TINY, "--json", cwd=folder, **environ)
    return answer(done) | {"said": done.stderr}


@pytest.fixture(scope="module")
def second(copies, folder, raw, first):
    """The run after it with nothing changed, as a person sees it, and its MLflow run."""
    done = copies.run("pipelines.cli", "run", "--preset", "demo", "--raw", "raw", "--root", "runs", "--set", *TINY, cwd=folder)
    assert done.returncode == 0, done.stderr
    return done, client_of(folder).search_runs(["1"], "tags.`sogclr.component` = 'pipeline'", max_results=1)[0].info.run_id


@pytest.fixture(scope="module")
def rerun(copies, folder, second, tmp_path_factory):
    """What a linear eval with another setting answers, of a run that took every step from the cache.

    The store that the environment names wins over the root's.
    """
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    uri = f"sqlite:///{folder / 'runs' / 'mlflow.db'}"
    arguments = ("linear-eval", "--run", second[1][:8], "--root", "other", "--set", "linear_eval.holdout_fraction=0.5", "--json")
    done = answer(copies.run("pipelines.cli", "rerun", *arguments, cwd=elsewhere, MLFLOW_TRACKING_URI=uri))
    assert not (elsewhere / "other" / "mlflow.db").exists()
    return done


def client_of(folder):
    return MlflowClient(f"sqlite:///{folder / 'runs' / 'mlflow.db'}")


def step(result, component):
    return result["components"][component]


def test_an_interrupted_run_leaves_no_step_running_and_says_so(folder, interrupted):
    code, said = interrupted
    assert code == 130
    assert said[-1] == "interrupted"
    killed = client_of(folder).search_runs(["1"], "attributes.status = 'KILLED'")
    by_component = {run.data.tags["sogclr.component"]: run for run in killed}
    assert set(by_component) == {"pretrain", "pipeline"}
    # It said so itself: it was interrupted, not killed.
    assert by_component["pretrain"].data.tags["sogclr.error"].startswith("KeyboardInterrupt")
    assert client_of(folder).search_runs(["1"], "attributes.status = 'RUNNING'") == []


def test_the_run_after_it_reuses_what_was_done_and_goes_on_from_the_newest_checkpoint(folder, interrupted, first):
    assert "[build-tfrecords] reused: 1/1" in first["said"].splitlines()
    begun = next(one for one in map(parse_line, first["said"].splitlines()) if one and one[:2] == ("pretrain", "training"))
    assert begun[2:4] == (6, 25)
    client = client_of(folder)
    run = client.get_run(step(first, "pretrain")["run_id"])
    (killed,) = client.search_runs(["1"], "attributes.status = 'KILLED' and tags.`sogclr.component` = 'pretrain'")
    assert run.data.tags["sogclr.resumed_from"] == killed.info.run_id
    steps = {point.step for point in client.get_metric_history(run.info.run_id, "train/contrastive_loss")}
    assert steps == {*range(3, 25, 3), 25}
    assert len(list((folder / "runs" / "checkpoints").glob("*/result.json"))) == 1


def test_a_run_nests_one_run_a_component_and_answers_with_what_they_made(folder, first):
    client = client_of(folder)
    parent = client.get_run(first["run_id"])
    assert parent.info.status == "FINISHED"
    # What is shown to others names no folder of this machine but the raw data's.
    assert not any(str(folder / "runs") in value for key, value in parent.data.tags.items() if key.startswith("sogclr."))
    for component, output in zip(COMPONENTS, ("dataset", "model", "metrics"), strict=True):
        run = client.get_run(step(first, component)["run_id"])
        assert (run.info.run_name, run.info.status) == (component, "FINISHED")
        assert (run.data.tags["mlflow.parentRunId"] == first["run_id"]) == (component != "build-tfrecords")
        assert step(first, component)["reused"] == (component == "build-tfrecords")
        assert Path(step(first, component)["outputs"][output]["uri"]).is_dir()
    assert 0 <= first["metrics"]["eval/untrained_top_1_accuracy"] <= 1
    assert Image.open(first["lineage"]).size == (1300, 450)


def test_mlflow_has_the_recorded_names(folder, first):
    """Dashboards and scripts of users search by them: `goldens/recorded.json` has those of an earlier version."""
    client = client_of(folder)
    runs = {"pipeline": first["run_id"]} | {component: step(first, component)["run_id"] for component in COMPONENTS}
    assert {component: names_in(client, run_id) for component, run_id in runs.items()} == json.loads(RECORDED.read_text())[
        "mlflow"
    ]


def names_in(client, run_id):
    """Returns the names of all that a run holds; tags of the system that the test is started from are left out."""
    data = client.get_run(run_id).data
    return {
        "metrics": sorted(data.metrics),
        "params": sorted(data.params),
        "tags": sorted(tag for tag in data.tags if not tag.startswith("mlflow.source.git.")),
        "artifacts": sorted(file.path for file in client.list_artifacts(run_id)),
    }


@pytest.mark.parametrize("component", COMPONENTS[1:])
def test_a_step_says_first_what_it_runs_on_and_what_it_does_not_use_and_mlflow_has_it(folder, first, component):
    said = (line for line in first["said"].splitlines() if not parse_line(line))
    running, warning, *_ = (line for line in said if line.startswith(f"[{component}] "))
    tags = client_of(folder).get_run(step(first, component)["run_id"]).data.tags
    device, tensorflow = tags["sogclr.device"], tags["sogclr.tensorflow"]
    assert running == f"[{component}] running on {device}, TensorFlow {tensorflow}, 1 replica"
    assert tags["sogclr.replicas"] == "1"
    assert re.fullmatch(r"\d+ CPU cores? \(.+\)", device)
    assert f"- Ran on: {device}, TensorFlow {tensorflow}, replicas: 1" in tags["mlflow.note.content"].splitlines()
    assert warning.startswith(f"[{component}] warning: ")
    assert 'the system shows 1 x NVIDIA L4, but CUDA_VISIBLE_DEVICES="-1" hides it: unset it' in warning


def test_metrics_curves_and_logged_model_are_recorded(folder, first):
    client = client_of(folder)
    pretrain, linear_eval = (step(first, component)["run_id"] for component in COMPONENTS[1:])
    assert client.get_metric_history(pretrain, "train/contrastive_loss")
    assert client.get_run(pretrain).data.params["image_size"] == "16"
    files = {run_id: {file.path for file in client.list_artifacts(run_id)} for run_id in (pretrain, linear_eval)}
    assert files[pretrain] == {"arguments.json", "step.json", "curves.png"}
    charts = {"accuracies.png", "curves.png", "u.png", "confusion.png", "per_class_accuracy.png"}
    assert files[linear_eval] == {"arguments.json", "step.json", "report.html", *charts}
    model_id = step(first, "pretrain")["outputs"]["model"]["metadata"]["model_id"]
    kept = {file.name for file in Path(folder, "runs/artifacts/models", model_id, "artifacts").iterdir()}
    assert {"config.json", "result.json"} < kept
    assert any(name.endswith(".npz") for name in kept)


def test_the_linear_eval_leaves_its_report_for_kubeflow_and_mlflow(folder, first, tmp_path):
    client = client_of(folder)
    run_id = step(first, "linear-eval")["run_id"]
    page = Path(step(first, "linear-eval")["outputs"]["report"]["uri"]).read_text()
    assert Path(client.download_artifacts(run_id, "report.html", str(tmp_path))).read_text() == page
    for component in COMPONENTS:
        assert step(first, component)["run_id"] in page
    assert {"training", "u", "provenance"} < {line.split('"')[1] for line in page.splitlines() if line.startswith("<section")}
    assert str(folder) not in page
    assert f"/runs/{run_id}/artifacts/report.html" in client.get_run(run_id).data.tags["mlflow.note.content"]


@pytest.mark.thorough
def test_runs_are_compared_from_the_command_line(folder, first, rerun, tmp_path):
    root = folder / "runs"
    runs = (first["run_id"][:8], step(rerun, "linear-eval")["run_id"][:8])
    done = sogclr("compare", *runs, "--root", root, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for said in ("linear_eval.holdout_fraction", f"{first['metrics']['eval/top_1_accuracy']:.1%}", "p, Holm", "compare.html"):
        assert said in done.stdout
    found = answer(sogclr("compare", *runs, "--root", root, "--output", "two.html", "--json", cwd=tmp_path))
    assert [one["run_id"] for one in found["runs"].values()] == [step(one, "linear-eval")["run_id"] for one in (first, rerun)]
    assert found["differences"].keys() == {"linear_eval.holdout_fraction"}
    assert '<section id="curves">' in (tmp_path / "two.html").read_text()
    for wrong, named in ((runs[:1], "two runs or more"), ((runs[0], "0" * 32), "0" * 32), ((runs[0], "12"), "12 is too short")):
        assert named in one_line_and_exit_code_2(sogclr("compare", *wrong, "--root", root, cwd=tmp_path))


def test_from_the_linear_eval_run_alone_mlflow_leads_to_the_conversion(folder, raw, first):
    client = client_of(folder)
    run = client.get_run(step(first, "linear-eval")["run_id"])
    model = client.get_logged_model(run.inputs.model_inputs[0].model_id)
    pretraining = client.get_run(model.source_run_id)
    dataset = pretraining.inputs.dataset_inputs[0]
    tags = {tag.key: tag.value for tag in dataset.tags}
    manifest = json.loads(Path(tags["uri"], "manifest.json").read_text())
    assert tags["fingerprint"] == manifest["fingerprint"]
    assert client.get_run(tags["run_id"]).data.params["raw"] == str(raw)
    assert pretraining.info.run_id == step(first, "pretrain")["run_id"]


@pytest.mark.thorough
def test_all_that_is_kept_is_under_the_root_and_nothing_but_progress_is_said(folder, raw, first, second):
    assert sorted(path.name for path in folder.iterdir()) == ["raw", "runs"]
    assert sorted(path.name for path in (folder / "runs").iterdir()) == [
        *("artifacts", "cache", "checkpoints", "datasets", "features", "kfp", "logs", "mlflow.db")
    ]
    assert second[0].stderr.splitlines() == [
        *("[run] loading MLflow ...", "[run] loading the conversion ...", "[run] identifying the raw folder ..."),
        *(f"[{component}] reused: 1/1" for component in COMPONENTS),
    ]


def test_no_secret_of_the_environment_is_in_what_a_run_leaves_or_says(folder, first):
    kept = {path.relative_to(folder / "runs") for path in (folder / "runs").rglob("*") if path.is_file()}
    assert {path.parts[0] for path in kept} == {
        *("artifacts", "cache", "checkpoints", "datasets", "features", "kfp", "logs", "mlflow.db")
    }
    assert [path for path in kept if b"planted-" in (folder / "runs" / path).read_bytes()] == []
    assert "planted-" not in json.dumps(first)


@pytest.mark.thorough
def test_a_second_run_reuses_every_step_and_says_so(first, second):
    for component in COMPONENTS:
        assert f"{component}: reused from run {step(first, component)['run_id'][:8]}" in second[0].stdout
    for text in ("untrained", "top-1", "top-5", "lineage.png", "sogclr ui --root runs"):
        assert text in second[0].stdout


@pytest.mark.thorough
def test_a_changed_linear_eval_setting_reuses_the_two_steps_before(copies, folder, raw, first, tmp_path):
    root = folder / "runs"
    changed = ("--set", *TINY, "linear_eval.seed=1")
    arguments = ("--preset", "demo", "--raw", raw, "--root", root, *changed, "--json")
    third = answer(copies.run("pipelines.cli", "run", *arguments, cwd=tmp_path))
    assert [step(third, component)["reused"] for component in COMPONENTS] == [True, True, False]
    note = client_of(folder).get_run(step(first, "pretrain")["run_id"]).data.tags["mlflow.note.content"]
    assert third["run_id"] in note
    assert step(third, "linear-eval")["run_id"] in note


@pytest.mark.thorough
def test_a_rerun_nests_under_a_run_that_points_back_even_where_steps_came_from_the_cache(folder, first, rerun):
    source = step(first, "linear-eval")["run_id"]
    client = client_of(folder)
    parent, run = client.get_run(rerun["run_id"]), client.get_run(step(rerun, "linear-eval")["run_id"])
    assert run.info.run_id != source
    assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert run.data.params["overrides"] == "linear_eval.l2_penalties=1e-2 linear_eval.holdout_fraction=0.5"
    assert parent.data.tags["sogclr.rerun_of"] == source
    assert f"/runs/{source}" in parent.data.tags["mlflow.note.content"]
    assert f"/runs/{parent.info.run_id}" in client.get_run(source).data.tags["mlflow.note.content"]
    assert [step(rerun, component)["reused"] for component in COMPONENTS] == [True, True, False]
    assert step(rerun, "linear-eval")["outputs"] != step(first, "linear-eval")["outputs"]


@pytest.mark.thorough
def test_pretraining_starts_from_an_earlier_runs_encoder_and_mlflow_leads_back_to_it(copies, folder, first):
    model = step(first, "pretrain")["outputs"]["model"]
    given = ("--init-from", model["uri"], "--set", "epochs=1", "--json")
    done = copies.run("pipelines.cli", "rerun", "pretrain", "--run", first["run_id"], *given, cwd=folder)
    rerun = answer(done)
    (checkpoint,) = Path(model["uri"]).glob("checkpoint-00000025.npz")
    assert f"[pretrain] starts with encoder, projection, classifier, u of {checkpoint}" in done.stderr
    client, source = client_of(folder), step(first, "pretrain")["run_id"]
    run = client.get_run(step(rerun, "pretrain")["run_id"])
    assert run.data.params["init_from"] == run.data.tags["sogclr.init_from"] == str(checkpoint)
    assert run.data.tags["sogclr.init_from.state_sha256"] == model["metadata"]["state_sha256"]
    assert run.data.tags["sogclr.init_from.run_id"] == source
    assert [one.model_id for one in run.inputs.model_inputs] == [model["metadata"]["model_id"]]
    assert f"Started from: [{source[:8]}]" in run.data.tags["mlflow.note.content"]
    assert f"--init-from {checkpoint}" in client.get_run(rerun["run_id"]).data.tags["sogclr.command"].replace("'", "")

    # What it starts from is part of what a step is reused by, and of the folder that it works in.
    two = {Path(step(one, "pretrain")["outputs"]["model"]["uri"]).parent.name for one in (first, rerun)}
    assert len(two) == 1
    assert step(rerun, "pretrain")["outputs"]["model"]["uri"] != model["uri"]


def test_a_checkpoint_that_does_not_fit_is_refused_before_anything_is_converted(folder, raw, first, tmp_path):
    model = step(first, "pretrain")["outputs"]["model"]["uri"]
    for given, named in (
        (("--init-from", model, "--set", *TINY, "depth=18"), "has depth=10, not 18"),
        (("--init-from", tmp_path, "--set", *TINY), "holds no pretraining run"),
    ):
        done = sogclr("run", "--preset", "demo", "--raw", raw, "--root", tmp_path / "runs", *given, cwd=folder)
        assert named in one_line_and_exit_code_2(done)
    done = sogclr("rerun", "linear-eval", "--run", first["run_id"], "--init-from", model, cwd=folder)
    assert "is for pretrain" in one_line_and_exit_code_2(done)


@contextmanager
def gone(path):
    aside = path.with_name(path.name + ".aside")
    path.rename(aside)
    yield
    aside.rename(path)


def test_a_rerun_on_artifacts_that_are_gone_is_refused(folder, first):
    model = Path(step(first, "pretrain")["outputs"]["model"]["uri"])
    with gone(model):
        done = sogclr("rerun", "linear-eval", "--run", first["run_id"], cwd=folder)
    assert str(model) in one_line_and_exit_code_2(done)


@pytest.mark.thorough
def test_a_half_written_dataset_is_refused_by_the_step_that_reads_it(copies, folder, first):
    dataset = Path(step(first, "build-tfrecords")["outputs"]["dataset"]["uri"])
    shard = next(dataset.glob("*train*tfrecord*"))
    with gone(shard):
        done = copies.run("pipelines.cli", "rerun", "pretrain", "--run", first["run_id"][:12], cwd=folder)
    assert shard.name in one_line_and_exit_code_2(done)
    failed = client_of(folder).search_runs(["1"], "tags.`sogclr.user_error` = 'true'")[0]
    assert (failed.info.run_name, failed.info.status) == ("pretrain", "FAILED")


def test_reruns_of_nothing_and_of_other_kinds_are_refused(folder, first):
    run = ("--run", first["run_id"])
    for arguments, named in (
        (("linear-eval", "--run", "0" * 32), "0" * 32),
        (("linear-eval", *run, "--set", "epochs=2"), "epochs=2"),
        (("pretrain", *run, "--set", "linear_eval.seed=2"), "linear_eval.seed=2"),
        (("pretrain", *run, "--set", "epoch=2"), "did you mean epochs?"),
        (("build-tfrecords", *run, "--set", "epochs=2"), "epochs=2"),
    ):
        assert named in one_line_and_exit_code_2(sogclr("rerun", *arguments, cwd=folder))


@pytest.mark.thorough
def test_a_step_of_a_job_on_vertex_is_done_again_on_this_machine(copies, folder, first, tmp_path, monkeypatch):
    with serving() as google:
        give_credentials(monkeypatch, tmp_path, "my-project", google.url)
        place = ("--project", "my-project", "--region", "europe-west4", "--endpoint", google.url)
        job = ("--pipeline-root", "gs://a-bucket/runs", "--raw", "gs://a-bucket/raw", "--accelerator", "v5e-8", "--tag", "abc")
        job += ("--job-id", "mine", "--skip-check", "options", "region", "mlflow", "vertex", "bucket", "images", "raw")
        done = sogclr("submit", "--preset", "demo", *place, *job, "--set", "linear_eval.l2_penalties=1e-2", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        sent = Vertex(Place("my-project", "europe-west4", google.url), find_credentials()[0]).get("mine")
        assert set(sent.arguments("pretrain")) == {"preset", "overrides", "code_version", "init_from", "init_identity"}
        left = {name: step(first, name)["outputs"] for name in COMPONENTS[:2]}
        google.vertex.leave("mine", left)
        arguments = ("linear-eval", "--run", "vertex:mine", *place, "--set", "linear_eval.seed=3", "--json")
        rerun = answer(copies.run("pipelines.cli", "rerun", *arguments, cwd=tmp_path))
    # In a store of its own, which knows neither the encoder's run nor the encoder.
    client = MlflowClient(f"sqlite:///{tmp_path / 'runs' / 'mlflow.db'}")
    run = client.get_run(step(rerun, "linear-eval")["run_id"])
    assert run.data.params["overrides"] == "linear_eval.l2_penalties=1e-2 linear_eval.seed=3"
    assert run.data.tags["sogclr.encoder_uri"] == step(first, "pretrain")["outputs"]["model"]["uri"]
    assert run.data.metrics["eval/top_1_accuracy"] == rerun["metrics"]["eval/top_1_accuracy"]
    command = client.get_run(rerun["run_id"]).data.tags["sogclr.command"]
    assert "--run vertex:projects/my-project/locations/europe-west4/pipelineJobs/mine" in command

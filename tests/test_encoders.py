"""A pipeline that imports its encoder instead of pretraining one, through the command line, from the file to the report."""

import contextlib
import io
import json
import re
import shutil
from pathlib import Path

import pytest
import yaml
from kfp import dsl
from mlflow import MlflowClient
from support.raw_data import striped_archives

from components.steps import import_encoder
from components.tracking.encoders import Encoders
from pipelines.cli import executing, main
from trainer.folder import read_config
from trainer.importing.importer import import_checkpoint
from trainer.shared.progress import parse_line

GOLDEN = Path(__file__).parent / "goldens" / "checkpoints" / "simclr_tf2_r18"
SETTINGS = ("image_size=16", "linear_eval.l2_penalties=1e-2", "linear_eval.protocols=cached")


def sogclr(*arguments):
    """Returns what the command line answers with --json."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(one) for one in arguments])
    assert code == 0, err.getvalue()
    return json.loads(out.getvalue())


@pytest.fixture(autouse=True)
def no_store_of_the_environment(monkeypatch):
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_RUN_ID"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("encoders")


@pytest.fixture(scope="module")
def raw(folder):
    return striped_archives(folder)


def whole(folder, raw, encoder):
    options = ("--root", folder / "runs", "--set", *SETTINGS, "--json")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        return sogclr("run", "--preset", "demo", "--raw", raw, "--encoder", encoder, *options)


@pytest.fixture(scope="module")
def first(folder, raw):
    """What the run answers that imports the golden checkpoint."""
    return whole(folder, raw, GOLDEN / "ckpt-2")


@pytest.fixture(scope="module")
def client(folder, first):
    return MlflowClient(f"sqlite:///{folder / 'runs' / 'mlflow.db'}")


def step(result, component):
    return result["components"][component]


@pytest.mark.thorough
def test_the_pipeline_ends_with_a_report_and_a_lineage_that_begins_at_the_file(first, client, tmp_path):
    assert list(first["components"]) == ["build-tfrecords", "import-encoder", "linear-eval"]
    assert 0 <= first["metrics"]["eval/top_1_accuracy"] <= 1
    imported, evaluated = (client.get_run(step(first, one)["run_id"]) for one in ("import-encoder", "linear-eval"))
    tags = imported.data.tags
    about = read_config(step(first, "import-encoder")["outputs"]["model"]["uri"])[1]["imported"]
    assert tags["sogclr.source"] == str(GOLDEN / "ckpt-2")
    assert tags["sogclr.source.sha256"] == about["sha256"]
    assert tags["sogclr.source.format"] == about["format"]
    assert tags["sogclr.source"] in tags["mlflow.note.content"]
    assert about["sha256"] in tags["mlflow.note.content"]
    assert json.loads(Path(client.download_artifacts(imported.info.run_id, "import.json", str(tmp_path))).read_text()) == about
    for name in ("import", "export"):
        assert 0 <= imported.data.metrics[f"{name}/largest_feature_difference"] < 1e-4
    assert imported.data.metrics["import/arrays_taken"] == about["mapped"]
    assert evaluated.data.tags["sogclr.run.import-encoder"] == imported.info.run_id
    assert f"runs/{imported.info.run_id}" in evaluated.data.tags["mlflow.note.content"]
    report = Path(step(first, "linear-eval")["outputs"]["report"]["uri"]).read_text()
    assert imported.info.run_id in report
    assert Path(re.sub("^file://", "", first["lineage"])).stat().st_size > 0


@pytest.mark.thorough
def test_an_imported_encoder_is_a_version_with_its_source_and_no_champion(first, client):
    (version,) = client.search_model_versions("name = 'sogclr-encoder'")
    assert version.tags["sogclr.source"] == str(GOLDEN / "ckpt-2")
    assert float(version.tags["top_1"]) == first["metrics"]["eval/top_1_accuracy"]
    assert client.get_registered_model("sogclr-encoder").aliases == {}


@pytest.mark.thorough
def test_the_same_content_at_another_path_is_taken_from_the_cache(folder, raw, first):
    elsewhere = folder / "elsewhere"
    shutil.copytree(GOLDEN, elsewhere)
    again = whole(folder, raw, elsewhere / "ckpt-2.index")
    assert [step(again, one)["run_id"] for one in again["components"]] == [
        step(first, one)["run_id"] for one in first["components"]
    ]
    assert all(step(again, one)["reused"] for one in again["components"])


@pytest.mark.thorough
def test_both_steps_run_again_on_what_the_run_left(folder, first, monkeypatch):
    asked = []
    monkeypatch.setattr(executing, "execute", lambda request, record, output: asked.append(request) or 0)
    root = ("--root", str(folder / "runs"), "--run", step(first, "linear-eval")["run_id"])
    assert main(["rerun", "linear-eval", *root, "--set", "linear_eval.seed=1"]) == 0
    assert asked[0].inputs["model"].uri == step(first, "import-encoder")["outputs"]["model"]["uri"]
    assert asked[0].inputs["dataset"].uri == step(first, "build-tfrecords")["outputs"]["dataset"]["uri"]
    assert main(["rerun", "import-encoder", *root, "--set", "image_size=32"]) == 0
    assert asked[1].arguments["overrides"] == ["image_size=16", "image_size=32"]
    assert asked[1].arguments["encoder"] == str(GOLDEN / "ckpt-2")


@pytest.mark.thorough
def test_an_import_that_is_killed_and_tried_again_ends_as_one_that_was_not(first, client, folder, monkeypatch):
    """It is killed after its files are there and before they are registered."""
    root = folder / "runs"
    pipeline = client.create_run("1", tags={"sogclr.component": "pipeline"}).info.run_id
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{root / 'mlflow.db'}")
    monkeypatch.setenv("MLFLOW_RUN_ID", pipeline)
    arguments = {
        **{"preset": "demo", "overrides": ["image_size=16"], "encoder": str(GOLDEN / "ckpt-2")},
        **{"encoder_identity": "", "code_version": "c0de"},
    }
    model = dsl.Model(uri=str(root / "kfp" / "job" / "import-encoder" / "model"), metadata={})
    register = Encoders.log

    class KilledError(BaseException):
        pass

    def killed(*given, **named):
        raise KilledError

    monkeypatch.setattr(Encoders, "log", killed)
    with pytest.raises(KilledError):
        import_encoder.python_func(**arguments, model=model)
    monkeypatch.setattr(Encoders, "log", register)
    versions = len(client.search_model_versions("name = 'sogclr-encoder'"))
    import_encoder.python_func(**arguments, model=model)
    of_first = step(first, "import-encoder")["outputs"]["model"]["metadata"]
    assert {key: model.metadata[key] for key in ("state_sha256", "config", "source_sha256", "steps")} == {
        key: of_first[key] for key in ("state_sha256", "config", "source_sha256", "steps")
    }
    assert len(client.search_model_versions("name = 'sogclr-encoder'")) == versions + 1
    import_encoder.python_func(**arguments, model=model)
    assert len(client.search_model_versions("name = 'sogclr-encoder'")) == versions + 1
    changed = {**arguments, "encoder_identity": f"sha256:{'0' * 64}"}
    with pytest.raises(Exception, match="changed since the pipeline began"):
        import_encoder.python_func(**changed, model=dsl.Model(uri=str(root / "kfp/other/import-encoder/model"), metadata={}))


def test_a_run_starts_from_an_imported_encoder(tmp_path, monkeypatch):
    """What `sogclr run` gives to pretraining is the imported checkpoint, found to fit before anything runs."""
    imported = import_checkpoint(str(GOLDEN / "ckpt-2"), str(tmp_path / "imported"), image_size=32)
    asked = []
    monkeypatch.setattr(executing, "execute", lambda request, record, output: asked.append(request) or 0)
    raw = striped_archives(tmp_path)
    settings = ("depth=18", "width_multiplier=0.03125", "cifar_stem=false", "projection_layers=3", "projection_dim=16")
    options = ["--raw", str(raw), "--root", str(tmp_path / "runs"), "--init-from", str(tmp_path / "imported")]
    assert main(["run", "--preset", "demo", *options, "--set", *settings]) == 0
    assert asked[0].arguments["init_from"] == imported.checkpoint
    assert asked[0].arguments["init_identity"] == imported.state_sha256


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("--encoder", str(GOLDEN / "ckpt-2"), "--set", "epochs=10"), "epochs=10 has no effect on an imported encoder"),
        (("--encoder", str(GOLDEN / "ckpt-2"), "--init-from", "DIR"), "--init-from DIR has no effect with --encoder"),
        (("--encoder", "no/such"), "no/such does not exist"),
        (("--encoder", str(GOLDEN / "features.npz")), "features.npz"),
        (("--encoder", str(GOLDEN / "ckpt-2"), "--preset", "simclr_v1_imagenet_r50_b4096"), "has depth=18"),
    ],
)
def test_what_cannot_be_imported_is_one_line_before_anything_is_converted(options, named, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["run", "--preset", "demo", "--raw", "nowhere", *options]) == 2
    (line,) = (line for line in capsys.readouterr().err.splitlines() if not parse_line(line))
    assert line.startswith("error: ")
    assert named in line


@pytest.mark.parametrize("machine", [(), ("--accelerator", "cpu", "--tag", "recorded")])
def test_the_compiled_pipeline_imports_in_place_of_pretraining(machine, tmp_path, capsys):
    output = tmp_path / "pipeline.yaml"
    arguments = ("--encoder", "gs://bucket/model.ckpt-2", "--output", str(output), *machine)
    assert main(["compile", "--preset", "simclr_v1_imagenet_r50_b4096", *arguments]) == 0, capsys.readouterr().err
    spec, *_ = yaml.safe_load_all(output.read_text())
    tasks = spec["components"]["comp-exit-handler-1"]["dag"]["tasks"]
    assert tasks.keys() == {"build-tfrecords", "import-encoder", "linear-eval", "record-lineage"}
    assert tasks["linear-eval"]["inputs"]["artifacts"]["model"]["taskOutputArtifact"]["producerTask"] == "import-encoder"
    assert "dependentTasks" not in tasks["import-encoder"], "it waits for no conversion"
    parameters = spec["root"]["inputDefinitions"]["parameters"]
    assert parameters["encoder"]["defaultValue"] == "gs://bucket/model.ckpt-2"
    assert "init_from" not in parameters


def test_a_file_of_this_machine_is_not_sent_to_vertex(tmp_path, capsys):
    where = (
        "--project",
        "my-project",
        "--region",
        "europe-west4",
        "--pipeline-root",
        "gs://bucket/runs",
        "--raw",
        "gs://bucket/raw",
    )
    encoder = str(GOLDEN / "ckpt-2")
    assert main(["submit", "--preset", "demo", "--accelerator", "v5e-8", *where, "--encoder", encoder]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert f"--encoder {encoder} is not valid: it must be a checkpoint in Cloud Storage" in line
    assert "gcloud storage cp" in line

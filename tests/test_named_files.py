"""The files that settings name take part in a run by their content: in the cache key, in MLflow and in the evaluation."""

import json

import numpy as np
import pytest
import yaml
from support.raw_data import SYNSETS
from support.submitting import bucket_of_archives, google_with_images, one_error_line

from pipelines import cli
from pipelines.cli import executing
from trainer.checkpoint import Checkpoint, save
from trainer.config import as_dict
from trainer.presets import resolve
from trainer.shared.errors import UserError

SUBSET = "linear_eval.finetune_10_subset"
DIGEST = "linear_eval.files_sha256="


@pytest.fixture
def arguments(raw, tmp_path, monkeypatch):
    """Returns the arguments of the pipeline that `sogclr run` would run, and its recorded command."""
    seen = {}
    monkeypatch.setattr(executing, "execute", lambda request, record, output: seen.update(request.arguments, record=record) or 0)

    def run(*settings):
        seen.clear()
        assert cli.main(["run", "--preset", "demo", "--raw", str(raw), "--root", str(tmp_path / "root"), "--set", *settings]) == 0
        return dict(seen)

    return run


@pytest.mark.parametrize("key", [SUBSET, "linear_eval.finetune_1_subset", "linear_eval.train_names"])
def test_a_run_is_known_by_the_content_of_the_files_of_its_linear_eval(key, arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "ids.txt"
    file.write_text("0\n1\n")
    first, again = (arguments(f"{key}=ids.txt") for _ in range(2))
    file.write_text("0\n2\n")
    changed = arguments(f"{key}=ids.txt")
    keys = [one["linear_eval_overrides"] for one in (first, again, changed)]
    assert keys[0] == keys[1] != keys[2]
    # An earlier folder's path would not be found by a rerun from another folder.
    assert f"{key}={file}" in keys[0]
    # The recorded command is the user's: it repeats the run with what the file holds then.
    assert not any(DIGEST in part for part in first["record"].command)


def test_a_file_that_is_not_there_is_refused_before_anything_runs(raw, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["run", "--preset", "demo", "--raw", str(raw), "--set", f"{SUBSET}=none.txt"]) == 2
    assert f"there is no file {tmp_path}/none.txt" in one_error_line(capsys)


def defaults_of(tmp_path, *more):
    """The defaults of the parameters of a compiled pipeline."""
    file = tmp_path / "pipeline.yaml"
    assert cli.main(["compile", "--preset", "demo", "--output", str(file), *more]) == 0
    spec, *_ = yaml.safe_load_all(file.read_text())
    return {name: one.get("defaultValue") for name, one in spec["root"]["inputDefinitions"]["parameters"].items()}


@pytest.mark.parametrize(("key", "parameter"), [(SUBSET, "linear_eval_overrides"), ("data.subset", "raw_identity")])
def test_a_compiled_pipeline_is_known_by_the_content_of_files_that_are_here(key, parameter, tmp_path, capsys):
    file = tmp_path / "list.txt"
    found = []
    for content in (SYNSETS[0], SYNSETS[0], SYNSETS[1]):
        file.write_text(f"{content}\n")
        found.append(defaults_of(tmp_path, "--set", f"{key}={file}")[parameter])
    assert found[0] == found[1] != found[2]
    assert capsys.readouterr().err == ""


@pytest.fixture
def checkpoint(tmp_path):
    """A folder with one checkpoint of the demo's encoder: as much of it as is looked at before a run."""
    folder = tmp_path / "encoder"
    folder.mkdir()
    about = {"config": as_dict(resolve("demo")), "dataset_fingerprint": "f" * 64}
    (folder / "config.json").write_text(json.dumps(about))
    return folder


def test_a_compiled_pipeline_is_known_by_the_content_of_its_first_checkpoint(checkpoint, tmp_path):
    found = []
    for value in (1.0, 1.0, 2.0):
        save(str(checkpoint), Checkpoint(1, {"projection/w": np.array([value], np.float32)}, {}), keep=1)
        found.append(defaults_of(tmp_path, "--init-from", str(checkpoint)))
    assert found[0] == found[1]
    assert found[0]["init_identity"] != found[2]["init_identity"] != ""
    assert found[0]["init_from"] == str(checkpoint / "checkpoint-00000001.npz")


def test_what_cannot_be_read_where_a_pipeline_is_compiled_is_said_to_be_known_by_its_path(tmp_path, capsys):
    given = ["--set", f"{SUBSET}=gs://bucket/ids.txt", "data.subset=/there/classes.txt", "--init-from", "/there/run"]
    found = defaults_of(tmp_path, *given)
    assert (found["init_from"], found["init_identity"], found["raw_identity"]) == ("/there/run", "", "")
    assert found["linear_eval_overrides"] == [f"{SUBSET}=gs://bucket/ids.txt"]
    said = capsys.readouterr().err.splitlines()
    assert [line.split(" is not on this machine: ")[0] for line in said] == [
        "note: /there/run",
        "note: /there/classes.txt",
        "note: gs://bucket/ids.txt",
    ]
    assert all(line.endswith("a cache knows it by its path, not by its content") for line in said)


def test_a_job_on_vertex_ai_is_known_by_the_content_of_its_files(tmp_path, monkeypatch, capsys):
    with bucket_of_archives() as bucket, google_with_images(tmp_path, monkeypatch) as google:
        found = []
        for number, content in enumerate((b"0\n", b"0\n", b"1\n")):
            bucket.blob("ids.txt").upload_from_string(content)
            assert cli.main([*google.submit, "--set", f"{SUBSET}=gs://a-bucket/ids.txt", "--job-id", f"job-{number}"]) == 0
            body = json.loads(google.sent("POST", "/pipelineJobs")[-1])
            found.append(body["runtimeConfig"]["parameterValues"]["linear_eval_overrides"])
        assert found[0] == found[1] != found[2]
        capsys.readouterr()
        assert cli.main([*google.submit, "--dry-run", "--set", f"{SUBSET}=gs://a-bucket/none.txt"]) == 2
        assert "there is no file gs://a-bucket/none.txt" in capsys.readouterr().out
        assert cli.main([*google.submit, "--dry-run", "--set", f"{SUBSET}=ids.txt"]) == 2
        assert f"{SUBSET}=ids.txt is not in Cloud Storage: Vertex AI reads gs:// only" in one_error_line(capsys)


def test_the_linear_eval_refuses_a_file_that_has_changed_since_it_was_chosen(tmp_path):
    from trainer.named_files import with_digest

    file = tmp_path / "ids.txt"
    file.write_text("0\n")
    config = resolve("demo", [f"{SUBSET}={file}"])
    chosen = with_digest(config)
    assert with_digest(chosen) == chosen
    file.write_text("1\n")
    assert with_digest(config) != chosen
    with pytest.raises(UserError, match=f"{file} has changed since this evaluation was begun: put back what it held, or start"):
        with_digest(chosen)
    with pytest.raises(UserError, match="has no effect: no setting of the linear eval names a file"):
        with_digest(resolve("demo", [f"{DIGEST}{'0' * 64}"]))

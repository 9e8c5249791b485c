"""Linear eval of a real checkpoint: what it measures and writes, how it goes on, and what it refuses."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from support.datasets import write_dataset
from support.full_disk import fill_disk

from eval import task
from eval.measure import features as storing
from eval.measure import parts
from eval.measure.evaluation import read_evaluation
from eval.measure.features import Features, digest_of, extract, load_encoder, read_features
from eval.measure.linear_eval import linear_eval
from eval.measure.protocols import Sizes, memory_bytes, work_of
from trainer import checkpoint as checkpoints
from trainer.encoder import make_encoder
from trainer.preemption import PreemptedError
from trainer.presets import resolve
from trainer.shared.errors import UserError
from trainer.shared.locks import locked
from trainer.shared.progress import parse_line
from trainer.shared.records import manifest_to_json, read_manifest
from trainer.train import train

TINY = ["depth=10", "width_multiplier=0.0625", "global_batch_size=24", "epochs=1", "warmup_epochs=0", "base_learning_rate=1"]
QUICK = ["linear_eval.l2_penalties=1e-2"]


@pytest.fixture(scope="module")
def checkpoint(dataset, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pretrained")
    train(resolve("demo", TINY), str(dataset), str(folder))
    return folder


def test_features_are_of_every_image_once(dataset, checkpoint, tmp_path):
    config = resolve("demo", [*TINY, "linear_eval.batch_size=7"])
    manifest = read_manifest(str(dataset))
    encoder = load_encoder(config, checkpoints.load_latest(str(checkpoint)))
    reported = []
    features = extract(
        encoder, config, str(dataset), manifest, "validation", str(tmp_path / "seven"), on_progress=reported.append
    ).whole()
    np.testing.assert_array_equal(features.labels, np.arange(17) % 6)
    assert reported == [0, 7, 14, 17]
    config = resolve("demo", TINY)
    other = extract(encoder, config, str(dataset), manifest, "validation", str(tmp_path / "all")).whole()
    np.testing.assert_allclose(features.values, other.values, rtol=1e-4, atol=1e-5)
    few = extract(encoder, config, str(dataset), manifest, "validation", str(tmp_path / "all"), np.array([3, 9, 11]))
    assert list(few.whole().image_ids) == [3, 9, 11]
    np.testing.assert_allclose(few.whole().values, features.values[[3, 9, 11]], rtol=1e-4, atol=1e-5)
    assert few.digest != digest_of(encoder, config, manifest, "validation")


def test_features_are_found_again_by_an_evaluation_with_another_penalty_the_control_s_too(
    dataset, checkpoint, tmp_path, monkeypatch
):
    """Each evaluation has an output and a workspace of its own, as two runs have."""

    def evaluate(name, penalty):
        settings = [f"linear_eval.l2_penalties={penalty}", "linear_eval.protocols=cached,knn"]
        output, work, store = (str(tmp_path / one) for one in (name, f"{name}-work", "store"))
        return linear_eval(str(dataset), str(checkpoint), output, settings, workspace=work, features_dir=store)

    first = evaluate("first", "1e-2")
    settings = ["linear_eval.l2_penalties=1e-1", "linear_eval.protocols=cached,knn"]
    alone = linear_eval(str(dataset), str(checkpoint), str(tmp_path / "alone"), settings)
    monkeypatch.setattr(storing, "forward_pass", lambda *_, **__: pytest.fail("computed again"))
    second = evaluate("second", "1e-1")
    assert second.features == first.features
    assert [one.top_1 for one in second.accuracies] == [one.top_1 for one in alone.accuracies]
    assert sorted(path.name.split("-")[1] for path in (tmp_path / "store").iterdir()) == ["train", "train", *["validation"] * 2]


def test_of_two_evaluations_at_once_one_waits_for_the_features_of_the_other(dataset, checkpoint, tmp_path, capfd):
    config, manifest = resolve("demo", TINY), read_manifest(str(dataset))
    encoder = load_encoder(config, checkpoints.load_latest(str(checkpoint)))
    folder = f"{tmp_path}/features-validation-{digest_of(encoder, config, manifest, 'validation')[:16]}"

    def compute(**how):
        return extract(encoder, config, str(dataset), manifest, "validation", str(tmp_path), shared=True, **how)

    with locked(f"{folder}/.lock"), pytest.raises(PreemptedError, match="another process computes"):
        compute(should_stop=lambda: True)
    assert capfd.readouterr().err.count(f"another process computes the features in {folder}") == 1
    assert compute().count == 17


def test_an_interrupted_forward_pass_goes_on_after_its_last_part(dataset, checkpoint, tmp_path, monkeypatch):
    """A torn part, one of other batches and one of another encoder are computed again."""
    monkeypatch.setattr(storing, "PART_BYTES", 1)
    config, manifest = resolve("demo", [*TINY, "linear_eval.batch_size=7"]), read_manifest(str(dataset))
    encoder = load_encoder(config, checkpoints.load_latest(str(checkpoint)))

    def features(folder: str, stop_after: int = 100, config=config):
        reported = []
        stored = extract(
            encoder,
            config,
            str(dataset),
            manifest,
            "train",
            str(tmp_path / folder),
            on_progress=reported.append,
            should_stop=lambda: len(reported) > stop_after,
        )
        return stored, reported

    whole, reported = features("alone")
    assert reported == [0, 7, 14, 21, 28, 35, 42, 48]
    with pytest.raises(PreemptedError, match=r"kept the features of 21 of 48 images of train: start the same command again"):
        features("stopped", stop_after=3)
    again, reported = features("stopped")
    assert reported == [21, 28, 35, 42, 48]
    for ours, theirs in zip(again.parts(), whole.parts(), strict=True):
        np.testing.assert_array_equal(ours.values, theirs.values)
        np.testing.assert_array_equal(ours.image_ids, theirs.image_ids)
    assert features("stopped")[1] == [48]
    for spoil in ("torn", "other batches"):
        with pytest.raises(PreemptedError):
            features(spoil, stop_after=3)
        if spoil == "torn":
            (path,) = (tmp_path / spoil).glob("*/part-00001.parquet")
            path.write_bytes(path.read_bytes()[:-20])
            assert features(spoil)[1][0] == 7
        else:
            assert features(spoil, config=resolve("demo", [*TINY, "linear_eval.batch_size=9"]))[1][0] == 0


@pytest.mark.parametrize("part_bytes", [1, storing.PART_BYTES])
def test_a_forward_pass_that_ended_before_its_index_was_written_computes_nothing_again(
    dataset, checkpoint, tmp_path, monkeypatch, part_bytes
):
    """The last part is smaller than the others: what goes on after it would be beyond the end."""
    monkeypatch.setattr(storing, "PART_BYTES", part_bytes)
    config, manifest = resolve("demo", [*TINY, "linear_eval.batch_size=7"]), read_manifest(str(dataset))
    encoder = load_encoder(config, checkpoints.load_latest(str(checkpoint)))
    reported = []

    def features():
        reported.clear()
        return extract(encoder, config, str(dataset), manifest, "train", str(tmp_path), on_progress=reported.append)

    whole = features()
    index = Path(whole.folder) / storing.INDEX
    written = index.read_bytes()
    index.unlink()
    features()
    assert index.read_bytes() == written
    assert reported == [48]


@pytest.fixture(scope="module")
def evaluated(dataset, checkpoint, tmp_path_factory):
    logged = []
    folder = tmp_path_factory.mktemp("evaluated")
    result = linear_eval(
        str(dataset), str(checkpoint), str(folder), QUICK, log_metrics=lambda metrics, step: logged.append((metrics, step))
    )
    return result, folder, logged


def test_the_whole_validation_split_counts_and_the_control_stands_beside(evaluated):
    result, folder, logged = evaluated
    assert result.num_images == result.confusion.sum() == 17
    assert result.metrics["eval/top_1_accuracy"] == pytest.approx(np.trace(result.confusion) / 17)
    assert logged == [(result.metrics, 3)]
    written = json.loads((folder / "result.json").read_text())
    assert written["metrics"] == result.metrics
    rows = [(row["protocol"], row["encoder"]) for row in written["accuracies"]]
    assert rows == [("cached", "pretrained"), ("cached", "untrained"), ("knn", "pretrained"), ("online", "pretrained")]
    for row, name in zip(written["accuracies"], ("", "untrained_", "knn_", "online_"), strict=True):
        assert row["top_1"] == result.metrics[f"eval/{name}top_1_accuracy"]
        low, high = row["top_1_interval"]
        assert low <= row["top_1"] <= high
        assert (low, high) == tuple(result.metrics[f"eval/{name}top_1_accuracy_{end}"] for end in ("low", "high"))
    assert [row["settings"] for row in written["accuracies"][:3]] == [
        {"l2_penalty": 0.01, "images": 48},
        {"l2_penalty": 0.01, "images": 48},
        {"k": 48, "temperature": 0.07},
    ]
    for split, count in {"train": 48, "validation": 17}.items():
        file = written["features"][split]
        assert (file["images"], file["dimensions"]) == (count, 32)
        found = read_features(file["path"])
        assert (found.digest, found.count) == (file["digest"], count)
    assert not list(folder.glob("protocols-*"))
    with np.load(folder / "classifier.npz") as stored:
        assert stored["weights"].shape == (32, 6)


def test_an_evaluation_that_was_not_recorded_is_not_done_again_in_its_workspace(dataset, checkpoint, tmp_path, monkeypatch):
    def evaluate(output):
        given = ["linear_eval.l2_penalties=1e-2", "linear_eval.protocols=finetune-100"]
        return linear_eval(str(dataset), str(checkpoint), str(tmp_path / output), given, workspace=str(tmp_path / "work"))

    first = evaluate("first")
    monkeypatch.setattr("eval.measure.linear_eval._measure", lambda *_: pytest.fail("a protocol ran again"))
    assert evaluate("second").metrics == first.metrics
    assert (tmp_path / "first" / "result.json").read_bytes() == (tmp_path / "second" / "result.json").read_bytes()
    assert not list((tmp_path / "work").glob("protocols-*/*/")), "the states of training with labels are large"


def test_every_prediction_is_written_and_is_what_the_accuracies_count(evaluated):
    result, folder, _ = evaluated
    table = pq.read_table(folder / "predictions.parquet")
    assert table.column_names == ["image_id", "label", "cached", "untrained_cached", "knn", "online"]
    assert table["image_id"].to_pylist() == list(range(17))
    correct = np.mean(table["online"].to_numpy() == table["label"].to_numpy())
    assert correct == pytest.approx(result.metrics["eval/online_top_1_accuracy"])


def test_the_online_classifier_is_the_one_that_the_checkpoint_holds(evaluated, checkpoint):
    result, folder, _ = evaluated
    arrays = checkpoints.load_latest(str(checkpoint)).arrays
    features = read_features(result.features["validation"]["path"]).whole()
    logits = features.values @ arrays["classifier/dense/kernel"] + arrays["classifier/dense/bias"]
    np.testing.assert_array_equal(pq.read_table(folder / "predictions.parquet")["online"].to_numpy(), logits.argmax(axis=1))


def test_features_that_are_there_are_not_computed_again(evaluated, dataset, checkpoint, tmp_path):
    """Those of another encoder are; a trace of the stored ones shows in what is made of them."""
    result, folder, _ = evaluated
    shutil.copytree(folder, tmp_path / "out")
    part = tmp_path / "out" / Path(result.features["validation"]["path"]).name / "part-00000.parquet"
    kept = Features(*parts.columns_of(pq.read_table(part)))
    turned = replace(kept, values=kept.values[::-1].copy())
    parts.write(str(part), turned.image_ids, turned.labels, turned.values, "")
    again = linear_eval(str(dataset), str(checkpoint), str(tmp_path / "out"), QUICK)
    assert again.metrics["eval/knn_top_1_accuracy"] != result.metrics["eval/knn_top_1_accuracy"]
    index = part.parent / "features.json"
    index.write_text(index.read_text().replace(result.features["validation"]["digest"], "of another encoder"))
    assert linear_eval(str(dataset), str(checkpoint), str(tmp_path / "out"), QUICK).metrics == result.metrics
    np.testing.assert_array_equal(Features(*parts.columns_of(pq.read_table(part))).values, kept.values)


@pytest.mark.parametrize("images", [0, 20])
def test_the_control_can_be_turned_off_or_fitted_to_a_part(evaluated, dataset, checkpoint, tmp_path, images, capsys):
    shutil.copytree(evaluated[1], tmp_path / "out")
    overrides = [*QUICK, "linear_eval.protocols=cached", f"linear_eval.control_images={images}"]
    result = linear_eval(str(dataset), str(checkpoint), str(tmp_path / "out"), overrides)
    about = read_evaluation(str(tmp_path / "out")).about_control
    if images:
        assert [row.settings["images"] for row in result.accuracies] == [48, 20]
        assert about.endswith(", fitted to 20 of 48 training images")
        counts = [json.loads(index.read_text())["images"] for index in (tmp_path / "out").glob("features-train-*/features.json")]
        assert sorted(counts) == [20, 48, 48]
    else:
        assert [row.encoder for row in result.accuracies] == ["pretrained"]
        assert about == "turned off: linear_eval.control_images=0"


def test_the_encoder_that_is_evaluated_is_the_checkpoints(checkpoint):
    config = resolve("demo", TINY)
    stored = checkpoints.load_latest(str(checkpoint))
    encoder = load_encoder(config, stored)
    for variable, untrained in zip(
        encoder.variables, make_encoder(config.encoder, config.views.image_size, config.run.seed).variables, strict=True
    ):
        np.testing.assert_array_equal(variable.numpy(), stored.arrays[f"encoder/{variable.path}"])
        assert not np.array_equal(variable.numpy(), untrained.numpy())


def refused(data: Path, checkpoint: Path, folder: Path, *overrides: str) -> str:
    """Returns the line that says why an evaluation was not begun."""
    with pytest.raises(UserError) as error:
        linear_eval(str(data), str(checkpoint), str(folder / "out"), [*QUICK, *overrides])
    assert "\n" not in str(error.value)
    assert not list(folder.glob("out/*"))
    return str(error.value)


def test_a_checkpoint_of_another_architecture_is_refused(dataset, checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "run")
    about = json.loads((tmp_path / "run" / "config.json").read_text())
    about["config"]["width_multiplier"] = 0.125
    (tmp_path / "run" / "config.json").write_text(json.dumps(about))
    said = refused(dataset, tmp_path / "run", tmp_path)
    assert re.search(r"checkpoint-00000003\.npz is of another architecture: encoder/\S+ has shape \(\S.*\), not \(", said)


def test_a_diverged_encoder_is_refused_with_the_image_that_shows_it(dataset, checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "run")
    stored = checkpoints.load_latest(str(checkpoint))
    spoilt = {
        name: np.full_like(value, np.nan) if name == "encoder/stem_conv/kernel" else value
        for name, value in stored.arrays.items()
    }
    checkpoints.save(str(tmp_path / "run"), replace(stored, arrays=spoilt), 1)
    said = refused(dataset, tmp_path / "run", tmp_path)
    assert said == "the features of image ID 0 of train are not finite: the checkpoint is of a run that diverged"


@pytest.mark.parametrize(("split", "count"), [("train", 4), ("validation", 5)])
def test_a_class_without_images_is_named(checkpoint, tmp_path, split, count):
    write_dataset(tmp_path / "data", **{split: count}, shards=1)
    said = refused(tmp_path / "data", checkpoint, tmp_path)
    more = " and 1 more" if count == 4 else ""
    named = f"class n{count:08}{more} of {tmp_path / 'data'} has no {split} images: "
    assert said.startswith(named)


def test_a_dataset_of_training_images_alone_is_refused(dataset, checkpoint, tmp_path):
    shutil.copytree(dataset, tmp_path / "data")
    manifest = read_manifest(str(dataset))
    alone = replace(manifest, splits={"train": manifest.splits["train"]})
    (tmp_path / "data" / "manifest.json").write_text(manifest_to_json(alone))
    said = refused(tmp_path / "data", checkpoint, tmp_path)
    assert said == (
        f"{tmp_path / 'data'} has no validation split, which linear eval needs: "
        "build a dataset with validation images of the same classes"
    )


def test_the_online_classifier_is_not_asked_about_classes_that_it_does_not_know(dataset, checkpoint, tmp_path, capsys):
    """As many, by other names. Other protocols learn the new ones, and it is said that they are new."""
    shutil.copytree(dataset, tmp_path / "data")
    manifest = read_manifest(str(dataset))
    others = replace(manifest, synsets=tuple(f"n{label:08}" for label in range(10, 16)))
    (tmp_path / "data" / "manifest.json").write_text(manifest_to_json(others))
    said = refused(tmp_path / "data", checkpoint, tmp_path)
    assert "has other classes than the dataset that" in said
    assert said.endswith("set linear_eval.protocols=cached,knn")
    linear_eval(str(tmp_path / "data"), str(checkpoint), str(tmp_path / "out"), [*QUICK, "linear_eval.protocols=cached"])
    assert json.loads((tmp_path / "out" / "result.json").read_text())["classes_of_pretraining"] is False
    assert "note: " in capsys.readouterr().err


def test_a_duplicated_image_id_is_found(checkpoint, tmp_path):
    from trainer.shared.records import encode_example

    write_dataset(
        tmp_path, example=lambda split, encoded, label, image_id: encode_example(encoded, label, 3 if image_id == 4 else image_id)
    )
    with pytest.raises(UserError, match=r"not image IDs 0\.\.47 once each"):
        linear_eval(str(tmp_path), str(checkpoint), str(tmp_path / "out"), QUICK)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--set", "epochs=3"], "error: epochs=3 cannot be set here"),
        (["--set", "linear_eval.sed=3"], "error: linear_eval.sed is not a setting; did you mean linear_eval.seed?"),
        (
            ["--set", "linear_eval.protocols=offical"],
            "error: linear_eval.protocols=offical is not one of cached, knn, online, official, finetune-1, finetune-10, "
            "finetune-100, global-objective; did you mean official?",
        ),
        (["--checkpoint", "/nowhere"], "error: /nowhere holds no pretraining run"),
        (["--data", "/nowhere"], "error: /nowhere holds no finished dataset"),
    ],
)
def test_a_mistake_gives_one_line_and_exit_code_2(arguments, line, dataset, checkpoint, tmp_path, capfd):
    with pytest.raises(SystemExit) as ended:
        task.main(["--data", str(dataset), "--checkpoint", str(checkpoint), "--output", str(tmp_path / "out"), *arguments])
    assert ended.value.code == 2
    *notes, said = capfd.readouterr().err.splitlines()
    assert said.startswith(line)
    assert all(parse_line(note) or note.startswith(("[linear-eval] running on ", "[linear-eval] warning: ")) for note in notes)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("output", "line"),
    [
        ("out", r"out/features-train-\w+/part-00000\.parquet cannot be written: No space left on device; make room and start"),
        ("file/out", r"file/out cannot be made: a file is in the way; fix that and start"),
    ],
)
def test_an_output_that_cannot_be_written_is_one_line_and_leaves_no_file(
    output, line, dataset, checkpoint, tmp_path, monkeypatch, capfd
):
    (tmp_path / "file").touch()
    fill_disk(monkeypatch)
    with pytest.raises(SystemExit) as ended:
        task.main(["--data", str(dataset), "--checkpoint", str(checkpoint), "--output", str(tmp_path / output)])
    assert ended.value.code == 2
    (*_, said) = capfd.readouterr().err.splitlines()
    assert re.fullmatch(f"error: {tmp_path}/{line} the same command again", said)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["file"]


@pytest.mark.thorough
def test_a_mistake_is_all_that_a_process_of_its_own_says_but_for_what_it_runs_on(dataset, tmp_path):
    given = ["--data", dataset, "--checkpoint", "/nowhere", "--output", tmp_path / "out"]
    done = subprocess.run([sys.executable, "-m", "eval.task", *given], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    running, *warning, error = (line for line in done.stderr.splitlines() if not parse_line(line))
    assert running.startswith("[linear-eval] running on ")
    assert [line for line in warning if not line.startswith("[linear-eval] warning: ")] == warning[1:] == []
    assert error.startswith("error: /nowhere holds no pretraining run")


@pytest.mark.thorough
def test_the_command_prints_a_row_for_each_protocol_with_its_interval(dataset, checkpoint, evaluated, tmp_path):
    result, folder, _ = evaluated
    shutil.copytree(folder, tmp_path / "out")
    given = ["--data", str(dataset), "--checkpoint", str(checkpoint), "--output", str(tmp_path / "out"), "--set", *QUICK]
    done = subprocess.run([sys.executable, "-m", "eval.task", *given], capture_output=True, text=True, check=True)
    header, *rows, last, control = done.stdout.splitlines()
    assert header.split() == ["protocol", "encoder", "top-1", "95%", "interval", "top-5", "seconds"]
    assert [row.split()[:2] for row in rows] == [[one.protocol, one.encoder] for one in result.accuracies]
    for row, one in zip(rows, result.accuracies, strict=True):
        low, high = one.top_1_interval
        assert f" {one.top_1:.1%}  {100 * low:.1f} to {100 * high:.1f} " in row
    assert last == "17 validation images; intervals by bootstrap over them"
    assert control.startswith("untrained control: ")


@pytest.mark.parametrize(("train", "validation", "classes"), [(1_281_167, 50_000, 1000), (129_395, 5_000, 100)])
def test_the_control_costs_less_than_half_of_the_forward_passes_of_a_large_set(train, validation, classes):
    work = work_of(resolve("sogclr_imagenet_r50_b512"), Sizes(train, validation, classes, 2048))
    assert list(work) == ["features", "cached", "untrained", "knn", "online"]
    assert work["features"].forward == train + validation
    assert work["features"].forward + work["untrained"].forward < 1.5 * work["features"].forward
    assert work["cached"].forward == work["knn"].forward == 0


def test_the_memory_that_an_evaluation_plans_for_hardly_grows_with_the_training_images():
    small, large = (Sizes(train, 50_000, 1000, 2048) for train in (100_000, 1_281_167))
    config = resolve("sogclr_imagenet_r50_b512")
    assert memory_bytes(config, large) < 6e9
    assert memory_bytes(config, large) - memory_bytes(config, small) < 0.1 * 4 * 2048 * (1_281_167 - 100_000)

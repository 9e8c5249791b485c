"""Linear eval: the fit against scikit-learn, the metrics against counting, the whole against a real checkpoint."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import write_dataset
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

from eval import knn, task
from eval.cached import fit, fit_with_choice, top_k_accuracy
from eval.features import Features, digest_of, extract, load_encoder, read_features, write_features
from eval.linear_eval import features_path, linear_eval
from trainer import checkpoint as checkpoints
from trainer.config import LinearEval
from trainer.encoder import make_encoder
from trainer.presets import resolve
from trainer.records import UserError, manifest_to_json, read_manifest
from trainer.train import train

TINY = ["depth=10", "width_multiplier=0.0625", "global_batch_size=24", "epochs=1", "warmup_epochs=0", "base_learning_rate=1"]
QUICK = ["linear_eval.l2_penalties=1e-2"]


@pytest.fixture(scope="module")
def checkpoint(dataset, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pretrained")
    train(resolve("demo", TINY), str(dataset), str(folder))
    return folder


def blobs(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    labels = random.integers(0, 4, count)
    centres = np.random.default_rng(9).normal(0, 1.5, (4, 10))
    return (centres[labels] + random.normal(0, 1, (count, 10))).astype(np.float32), labels


def test_fit_is_the_optimum_that_scikit_learn_finds():
    values, labels = blobs(300, 0)
    ours = fit(values, labels, 4, [1.0, 0.01])[-1]
    standard = (values - values.mean(0)) / values.std(0)
    theirs = LogisticRegression(C=1 / (0.01 * len(values)), tol=1e-8, max_iter=5000).fit(standard, labels)
    np.testing.assert_allclose(ours.weights.T, theirs.coef_, atol=2e-3)
    test, _ = blobs(200, 1)
    agree = ours.logits(test).argmax(1) == theirs.predict((test - values.mean(0)) / values.std(0))
    assert agree.all()


def test_the_penalty_is_chosen_where_it_helps():
    """Where a fifth of the labels is wrong and most features mean nothing, next to no penalty cannot win."""
    random = np.random.default_rng(0)
    truth = random.integers(0, 2, 800)
    labels = np.where(random.random(800) < 0.2, 1 - truth, truth)
    values = np.concatenate([truth[:, None] * 4.0 + random.normal(0, 1, (800, 1)), random.normal(0, 1, (800, 200))], 1)
    settings = LinearEval(l2_penalties=(1e-8, 0.3), holdout_fraction=0.5)
    chosen = fit_with_choice(Features(values.astype(np.float32), labels), 2, settings)
    assert chosen.l2_penalty == 0.3


def test_top_k_counts_labels_among_the_largest_and_ties_against():
    logits = np.array([[3.0, 2.0, 1.0], [1.0, 2.0, 3.0], [1.0, 1.0, 1.0]])
    labels = np.array([0, 0, 1])
    assert top_k_accuracy(logits, labels, 1) == pytest.approx(1 / 3)
    assert top_k_accuracy(logits, labels, 2) == pytest.approx(1 / 3)
    assert top_k_accuracy(logits, labels, 3) == 1.0


@pytest.mark.parametrize("k", [1, 7, 300])
def test_neighbours_vote_as_scikit_learn_has_them_vote(k, monkeypatch):
    """In pieces too small to hold all of them."""
    monkeypatch.setattr(knn, "_NEIGHBOURS_AT_ONCE", 64)
    monkeypatch.setattr(knn, "_QUERIES_AT_ONCE", 30)
    values, labels = blobs(300, 0)
    queries, _ = blobs(100, 1)
    scores = knn.knn_scores(Features(values, labels), queries, 4, k, 0.07)
    theirs = KNeighborsClassifier(k, metric="cosine", weights=lambda distance: np.exp((1 - distance) / 0.07))
    expected = theirs.fit(values.astype(np.float64), labels).predict_proba(queries.astype(np.float64))
    np.testing.assert_allclose(scores / scores.sum(1, keepdims=True), expected, atol=1e-4)


def test_a_small_temperature_does_not_overflow():
    values, labels = blobs(300, 0)
    scores = knn.knn_scores(Features(values, labels), values, 4, 20, 0.001)
    np.testing.assert_array_equal(scores.argmax(1), labels)


def test_features_come_back_from_their_file_as_they_were(tmp_path):
    values, labels = blobs(40_000, 0)
    path = str(tmp_path / "features.parquet")
    write_features(path, Features(values, labels), "a digest")
    stored = read_features(path, "a digest")
    np.testing.assert_array_equal(stored.values, values)
    np.testing.assert_array_equal(stored.labels, labels)
    table = pq.read_table(path)
    assert table["image_id"].to_pylist() == list(range(40_000))
    assert str(table.schema.field("features").type) == "fixed_size_list<element: float>[10]"
    with pytest.raises(UserError, match="of another encoder or of other images"):
        read_features(path, "another")


def test_what_holds_no_features_is_refused(tmp_path):
    (tmp_path / "features.parquet").write_bytes(b"something else")
    pq.write_table(pa.table({"image_id": [1]}), tmp_path / "other.parquet")
    for name in ("features.parquet", "other.parquet", "none.parquet"):
        with pytest.raises(UserError, match="is not a file of features"):
            read_features(str(tmp_path / name))


def test_features_are_of_every_image_in_the_order_of_ids(dataset, checkpoint):
    config = resolve("demo", [*TINY, "linear_eval.batch_size=7"])
    manifest = read_manifest(str(dataset))
    encoder = load_encoder(config, checkpoints.load_latest(str(checkpoint)))
    features = extract(encoder, config, str(dataset), manifest, "validation")
    np.testing.assert_array_equal(features.labels, np.arange(17) % 6)
    whole = extract(encoder, resolve("demo", TINY), str(dataset), manifest, "validation")
    np.testing.assert_allclose(features.values, whole.values, rtol=1e-4, atol=1e-5)


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
    assert written["accuracies"][2]["settings"] == {"k": 48, "temperature": 0.07}
    for split, count in {"train": 48, "validation": 17}.items():
        file = written["features"][split]
        assert (file["images"], file["dimensions"]) == (count, 32)
        assert len(read_features(file["path"], file["digest"]).labels) == count
    with np.load(folder / "classifier.npz") as stored:
        assert stored["weights"].shape == (32, 6)


def test_every_prediction_is_written_and_is_what_the_accuracies_count(evaluated):
    result, folder, _ = evaluated
    table = pq.read_table(folder / "predictions.parquet")
    assert table.column_names == ["image_id", "label", "cached", "untrained_cached", "knn", "online"]
    assert table["image_id"].to_pylist() == list(range(17))
    correct = np.mean(table["online"].to_numpy() == table["label"].to_numpy())
    assert correct == pytest.approx(result.metrics["eval/online_top_1_accuracy"])


def test_the_online_classifier_is_the_one_that_the_checkpoint_holds(evaluated, checkpoint):
    _, folder, _ = evaluated
    arrays = checkpoints.load_latest(str(checkpoint)).arrays
    features = read_features(features_path(str(folder), "validation"))
    logits = features.values @ arrays["classifier/dense/kernel"] + arrays["classifier/dense/bias"]
    np.testing.assert_array_equal(pq.read_table(folder / "predictions.parquet")["online"].to_numpy(), logits.argmax(axis=1))


def test_features_that_are_there_are_not_computed_again(evaluated, dataset, checkpoint, tmp_path):
    """Those of another encoder are; a trace of the stored ones shows in what is made of them."""
    result, folder, _ = evaluated
    shutil.copytree(folder, tmp_path / "out")
    config, manifest = resolve("demo", TINY), read_manifest(str(dataset))
    encoder = load_encoder(config, checkpoints.load_latest(str(checkpoint)))
    path = features_path(str(tmp_path / "out"), "validation")
    kept = read_features(path)
    turned = Features(kept.values[::-1].copy(), kept.labels)
    write_features(path, turned, digest_of(encoder, config, manifest, "validation"))
    again = linear_eval(str(dataset), str(checkpoint), str(tmp_path / "out"), QUICK)
    assert again.metrics["eval/knn_top_1_accuracy"] != result.metrics["eval/knn_top_1_accuracy"]
    np.testing.assert_array_equal(read_features(path).values, turned.values)
    write_features(path, turned, "of another encoder")
    assert linear_eval(str(dataset), str(checkpoint), str(tmp_path / "out"), QUICK).metrics == result.metrics
    np.testing.assert_array_equal(read_features(path).values, kept.values)


def test_the_encoder_that_is_evaluated_is_the_checkpoints(checkpoint):
    config = resolve("demo", TINY)
    stored = checkpoints.load_latest(str(checkpoint))
    encoder = load_encoder(config, stored)
    for variable, untrained in zip(encoder.variables, make_encoder(config).variables, strict=True):
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


def test_the_online_classifier_is_not_asked_about_classes_that_it_does_not_know(dataset, checkpoint, tmp_path, capsys):
    """As many, by other names. Other protocols learn the new ones, and it is said that they are new."""
    shutil.copytree(dataset, tmp_path / "data")
    manifest = read_manifest(str(dataset))
    others = replace(manifest, synsets=tuple(f"n{label:08}" for label in range(10, 16)))
    (tmp_path / "data" / "manifest.json").write_text(manifest_to_json(others))
    said = refused(tmp_path / "data", checkpoint, tmp_path)
    assert "has other classes than the dataset that" in said
    assert said.endswith("take linear_eval.protocols=cached,knn")
    linear_eval(str(tmp_path / "data"), str(checkpoint), str(tmp_path / "out"), [*QUICK, "linear_eval.protocols=cached"])
    assert json.loads((tmp_path / "out" / "result.json").read_text())["classes_of_pretraining"] is False
    assert "note: " in capsys.readouterr().err


def test_a_duplicated_image_id_is_found(checkpoint, tmp_path):
    from trainer.records import encode_example

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
            "finetune-100; did you mean official?",
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
    assert all(note.startswith(("[linear-eval] running on ", "[linear-eval] warning: ")) for note in notes)
    assert not (tmp_path / "out").exists()


@pytest.mark.thorough
def test_a_mistake_is_all_that_a_process_of_its_own_says_but_for_what_it_runs_on(dataset, tmp_path):
    given = ["--data", dataset, "--checkpoint", "/nowhere", "--output", tmp_path / "out"]
    done = subprocess.run([sys.executable, "-m", "eval.task", *given], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    running, *warning, error = done.stderr.splitlines()
    assert running.startswith("[linear-eval] running on ")
    assert [line for line in warning if not line.startswith("[linear-eval] warning: ")] == warning[1:] == []
    assert error.startswith("error: /nowhere holds no pretraining run")


@pytest.mark.thorough
def test_the_command_prints_a_row_for_each_protocol_with_its_interval(dataset, checkpoint, evaluated, tmp_path):
    result, folder, _ = evaluated
    shutil.copytree(folder, tmp_path / "out")
    given = ["--data", str(dataset), "--checkpoint", str(checkpoint), "--output", str(tmp_path / "out"), "--set", *QUICK]
    done = subprocess.run([sys.executable, "-m", "eval.task", *given], capture_output=True, text=True, check=True)
    header, *rows, last = done.stdout.splitlines()
    assert header.split() == ["protocol", "encoder", "top-1", "95%", "interval", "top-5", "seconds"]
    assert [row.split()[:2] for row in rows] == [[one.protocol, one.encoder] for one in result.accuracies]
    for row, one in zip(rows, result.accuracies, strict=True):
        low, high = one.top_1_interval
        assert f" {one.top_1:.1%}  {100 * low:.1f} to {100 * high:.1f} " in row
    assert last == "17 validation images; intervals by bootstrap over them"

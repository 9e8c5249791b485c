"""Linear eval: the fit against scikit-learn, the metrics against counting, the whole against a real checkpoint."""

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
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from support.datasets import write_dataset

from eval import task
from eval.measure import features as storing
from eval.measure import logistic, neighbours
from eval.measure.evaluation import read_evaluation
from eval.measure.features import Examples, Features, digest_of, extract, load_encoder, read_features
from eval.measure.linear_eval import linear_eval
from eval.measure.logistic import cut, fit, fit_path, top_k_accuracy
from eval.measure.protocols import Sizes, cached, memory_bytes, work_of
from eval.measure.protocols.cached import fit_with_choice
from eval.measure.protocols.knn import knn_scores
from trainer import checkpoint as checkpoints
from trainer.encoder import make_encoder
from trainer.preemption import PreemptedError
from trainer.presets import resolve
from trainer.settings import LinearEvalSettings
from trainer.shared.errors import UserError
from trainer.shared.records import manifest_to_json, read_manifest
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


def stored(folder: Path, values: np.ndarray, labels: np.ndarray, rows: int = 64) -> storing.StoredFeatures:
    """Features on disk, in parts of `rows`, in an order that is not that of the IDs."""
    order = np.random.default_rng(5).permutation(len(labels))
    starts = range(0, len(labels), rows)
    for number, start in enumerate(starts):
        ids = order[start : start + rows]
        storing._write_part(storing._part_path(str(folder), number), Features(ids, labels[ids], values[ids]), "")
    sizes = tuple(min(rows, len(labels) - start) for start in starts)
    return storing.StoredFeatures(str(folder), "", values.shape[1], sizes)


def test_fit_is_the_optimum_that_scikit_learn_finds():
    values, labels = blobs(300, 0)
    *_, ours = fit_path(Examples.of(values, labels), 4, [1.0, 0.01], tolerance=1e-6)
    standard = (values - values.mean(0)) / values.std(0)
    theirs = LogisticRegression(C=1 / (0.01 * len(values)), tol=1e-8, max_iter=5000).fit(standard, labels)
    np.testing.assert_allclose(ours.weights.T, theirs.coef_, atol=2e-3)
    test, _ = blobs(200, 1)
    agree = ours.logits(test).argmax(1) == theirs.predict((test - values.mean(0)) / values.std(0))
    assert agree.all()


def test_the_penalty_is_chosen_where_it_helps(tmp_path):
    """Where a fifth of the labels is wrong and most features mean nothing, next to no penalty cannot win."""
    random = np.random.default_rng(0)
    truth = random.integers(0, 2, 800)
    labels = np.where(random.random(800) < 0.2, 1 - truth, truth)
    values = np.concatenate([truth[:, None] * 4.0 + random.normal(0, 1, (800, 1)), random.normal(0, 1, (800, 200))], 1)
    settings = LinearEvalSettings(l2_penalties=(1e-8, 0.3), holdout_fraction=0.5)
    chosen = fit_with_choice(stored(tmp_path, values.astype(np.float32), labels), 2, settings)
    assert chosen.l2_penalty == 0.3


def test_top_k_counts_labels_among_the_largest_and_ties_against():
    logits = np.array([[3.0, 2.0, 1.0], [1.0, 2.0, 3.0], [1.0, 1.0, 1.0]])
    labels = np.array([0, 0, 1])
    assert top_k_accuracy(logits, labels, 1) == pytest.approx(1 / 3)
    assert top_k_accuracy(logits, labels, 2) == pytest.approx(1 / 3)
    assert top_k_accuracy(logits, labels, 3) == 1.0


@pytest.mark.parametrize("k", [1, 7, 300])
def test_neighbours_vote_as_scikit_learn_has_them_vote(k, monkeypatch, tmp_path):
    """In pieces too small to hold all of them."""
    monkeypatch.setattr(neighbours, "_BANK_AT_ONCE", 50)
    monkeypatch.setattr(neighbours, "_QUERIES_AT_ONCE", 30)
    values, labels = blobs(300, 0)
    queries, _ = blobs(100, 1)
    scores = knn_scores(stored(tmp_path, values, labels), queries, 4, k, 0.07)
    theirs = KNeighborsClassifier(k, metric="cosine", weights=lambda distance: np.exp((1 - distance) / 0.07))
    expected = theirs.fit(values.astype(np.float64), labels).predict_proba(queries.astype(np.float64))
    np.testing.assert_allclose(scores / scores.sum(1, keepdims=True), expected, atol=1e-4)


def test_a_small_temperature_does_not_overflow(tmp_path):
    values, labels = blobs(300, 0)
    scores = knn_scores(stored(tmp_path, values, labels), values, 4, 20, 0.001)
    np.testing.assert_array_equal(scores.argmax(1), labels)


def test_a_fit_that_reads_its_features_at_every_pass_is_that_of_one_that_holds_them(monkeypatch, tmp_path):
    values, labels = blobs(300, 0)
    held = fit(stored(tmp_path, values, labels).examples(), 4, 0.01, tolerance=1e-6)
    monkeypatch.setattr(logistic, "HELD_BYTES", 0)
    monkeypatch.setattr(logistic, "_ROWS", 70)
    read = fit(stored(tmp_path, values, labels).examples(), 4, 0.01, tolerance=1e-6)
    np.testing.assert_allclose(read.weights, held.weights, atol=1e-3)
    np.testing.assert_allclose(read.mean, values.mean(0), rtol=1e-5)
    np.testing.assert_allclose(read.deviation, values.std(0), rtol=1e-5)


def test_features_that_hardly_differ_are_told_apart():
    """Of a feature that is 1000 plus little, the little counts."""
    values, labels = blobs(300, 0)
    ours = fit(Examples.of((values / 100 + 1000).astype(np.float32), labels), 4, 0.01)
    accuracy = np.mean(ours.logits((values / 100 + 1000).astype(np.float32)).argmax(1) == labels)
    expected = fit(Examples.of(values, labels), 4, 0.01)
    assert accuracy == pytest.approx(np.mean(expected.logits(values).argmax(1) == labels), abs=0.01)


def test_pieces_are_cut_anew_without_loss():
    pieces = [np.arange(start, stop) for start, stop in ((0, 3), (3, 3), (3, 20), (20, 21))]
    found = [piece for (piece,) in cut(((piece,) for piece in pieces), 4)]
    assert [len(piece) for piece in found] == [4, 4, 4, 4, 4, 1]
    np.testing.assert_array_equal(np.concatenate(found), np.arange(21))


def test_features_come_back_as_they_were_written(tmp_path):
    values, labels = blobs(1000, 0)
    features = stored(tmp_path, values, labels)
    whole = features.whole()
    np.testing.assert_array_equal(whole.values, values)
    np.testing.assert_array_equal(whole.labels, labels)
    np.testing.assert_array_equal(features.labels_by_id(), labels)
    wanted = labels == 2
    chosen = [piece for piece, of in features.examples(wanted).pieces() if np.all(of == 2)]
    assert sum(map(len, chosen)) == features.examples(wanted).count == wanted.sum()
    part = pq.read_table(tmp_path / "part-00003.parquet")
    assert part.column_names == ["image_id", "label", "features"]
    assert str(part.schema.field("features").type) == "fixed_size_list<element: float>[10]"


def test_what_holds_no_features_is_refused(tmp_path):
    with pytest.raises(UserError, match="is not a folder of features"):
        read_features(str(tmp_path))
    (tmp_path / "features.json").write_text('{"digest": "", "dimensions": 10, "rows": [3]}')
    for content in (b"something else", b""):
        (tmp_path / "part-00000.parquet").write_bytes(content)
        with pytest.raises(UserError, match="is not a part of features"):
            read_features(str(tmp_path)).whole()
    storing._write_part(str(tmp_path / "part-00000.parquet"), Features(np.arange(2), np.arange(2), np.zeros((2, 10), "f")), "")
    with pytest.raises(UserError, match=r"has 2 images, but features\.json says 3: delete"):
        list(read_features(str(tmp_path)).parts())


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
    assert sorted(few.ids_and_labels()[0]) == [3, 9, 11]
    assert few.digest != digest_of(encoder, config, manifest, "validation")


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
    kept = storing._to_features(pq.read_table(part))
    turned = replace(kept, values=kept.values[::-1].copy())
    storing._write_part(str(part), turned, "")
    again = linear_eval(str(dataset), str(checkpoint), str(tmp_path / "out"), QUICK)
    assert again.metrics["eval/knn_top_1_accuracy"] != result.metrics["eval/knn_top_1_accuracy"]
    index = part.parent / "features.json"
    index.write_text(index.read_text().replace(result.features["validation"]["digest"], "of another encoder"))
    assert linear_eval(str(dataset), str(checkpoint), str(tmp_path / "out"), QUICK).metrics == result.metrics
    np.testing.assert_array_equal(storing._to_features(pq.read_table(part)).values, kept.values)


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


def test_a_penalty_that_is_chosen_with_a_part_is_proved_on_all(monkeypatch, tmp_path):
    """With a part the largest is taken; on all images smaller ones are tried, until one is no better."""
    fitted = []

    def watched(examples, num_classes, penalties, *args, **kwargs):
        for one in fit_path(examples, num_classes, penalties, *args, **kwargs):
            fitted.append((examples.count, one.l2_penalty))
            yield one

    with_a_part = {1.0: 0.9, 0.1: 0.8, 0.01: 0.7, 0.001: 0.6}
    with_all = {1.0: 0.5, 0.1: 0.6, 0.01: 0.6, 0.001: 0.9}

    def accuracies(those, examples):
        assert examples.count == 50
        return [(with_all if len(those) == 1 else with_a_part)[one.l2_penalty] for one in those]

    monkeypatch.setattr(cached, "fit_path", watched)
    monkeypatch.setattr(cached, "accuracies", accuracies)
    settings = LinearEvalSettings(l2_penalties=tuple(with_a_part), holdout_fraction=0.25, choice_images=200)
    chosen = fit_with_choice(stored(tmp_path, *blobs(500, 0)), 4, settings)
    assert fitted == [(150, 1.0), (150, 0.1), (150, 0.01), (150, 0.001), (450, 1.0), (450, 0.1), (450, 0.01)]
    assert chosen.l2_penalty == 0.1


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
    assert memory_bytes(large) < 6e9
    assert memory_bytes(large) - memory_bytes(small) < 0.1 * 4 * 2048 * (1_281_167 - 100_000)

"""Linear eval: the fit against scikit-learn, the metrics against counting, the whole against a real checkpoint."""

import json
import subprocess
import sys

import numpy as np
import pytest
from conftest import write_dataset
from sklearn.linear_model import LogisticRegression

from eval.features import Features, extract, load_encoder
from eval.linear_eval import fit, fit_with_choice, linear_eval, top_k_accuracy
from trainer import checkpoint as checkpoints
from trainer.config import LinearEval
from trainer.encoder import make_encoder
from trainer.presets import resolve
from trainer.records import UserError, read_manifest
from trainer.train import train

TINY = ["width_multiplier=0.0625", "global_batch_size=24", "epochs=1", "warmup_epochs=0", "base_learning_rate=1"]


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


def test_features_are_of_every_image_in_the_order_of_ids(dataset, checkpoint):
    config = resolve("demo", [*TINY, "linear_eval.batch_size=7"])
    manifest = read_manifest(str(dataset))
    encoder = load_encoder(config, checkpoints.load_latest(str(checkpoint)))
    features = extract(encoder, config, str(dataset), manifest, "validation")
    np.testing.assert_array_equal(features.labels, np.arange(17) % 6)
    whole = extract(encoder, resolve("demo", TINY), str(dataset), manifest, "validation")
    np.testing.assert_allclose(features.values, whole.values, rtol=1e-4, atol=1e-5)


def test_the_whole_validation_split_counts_and_the_control_stands_beside(dataset, checkpoint, tmp_path):
    logged = []
    result = linear_eval(str(dataset), str(checkpoint), str(tmp_path), log_metrics=lambda m, step: logged.append((m, step)))
    assert result.num_images == result.confusion.sum() == 17
    assert result.metrics["eval/top_1_accuracy"] == pytest.approx(np.trace(result.confusion) / 17)
    names = {"eval/top_1_accuracy", "eval/top_5_accuracy", "eval/untrained_top_1_accuracy", "eval/untrained_top_5_accuracy"}
    assert names <= set(result.metrics)
    assert logged == [(result.metrics, 3)]
    written = json.loads((tmp_path / "result.json").read_text())
    assert written["metrics"] == result.metrics
    with np.load(tmp_path / "classifier.npz") as stored:
        assert stored["weights"].shape == (32, 6)


def test_the_encoder_that_is_evaluated_is_the_checkpoints(checkpoint):
    config = resolve("demo", TINY)
    stored = checkpoints.load_latest(str(checkpoint))
    encoder = load_encoder(config, stored)
    for variable, untrained in zip(encoder.variables, make_encoder(config).variables, strict=True):
        np.testing.assert_array_equal(variable.numpy(), stored.arrays[f"encoder/{variable.path}"])
        assert not np.array_equal(variable.numpy(), untrained.numpy())


def test_a_duplicated_image_id_is_found(checkpoint, tmp_path):
    from trainer.records import encode_example

    write_dataset(
        tmp_path, example=lambda split, encoded, label, image_id: encode_example(encoded, label, 3 if image_id == 4 else image_id)
    )
    with pytest.raises(UserError, match=r"not image IDs 0\.\.47 once each"):
        linear_eval(str(tmp_path), str(checkpoint), str(tmp_path / "out"))


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--set", "epochs=3"], "error: epochs=3 cannot be set here"),
        (["--set", "linear_eval.sed=3"], "error: linear_eval.sed is not a setting; did you mean linear_eval.seed?"),
        (["--checkpoint", "/nowhere"], "error: /nowhere holds no pretraining run"),
        (["--data", "/nowhere"], "error: /nowhere holds no finished dataset"),
    ],
)
def test_a_mistake_gives_one_line_and_exit_code_2(arguments, line, dataset, checkpoint, tmp_path):
    given = ["--data", str(dataset), "--checkpoint", str(checkpoint), "--output", str(tmp_path / "out"), *arguments]
    done = subprocess.run([sys.executable, "-m", "eval.task", *given], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith(line)
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()

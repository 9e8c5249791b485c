"""Linear eval: how well a linear classifier on the frozen encoder's features tells the classes apart.

Features are computed once; the classifier is the exact optimum of a convex problem (logistic regression), whose one free number
is chosen on held-out training images. An untrained encoder of the same architecture goes through the same and stands beside it.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass

import keras
import numpy as np
import tensorflow as tf
from scipy.optimize import minimize

from eval.features import Features, extract, load_encoder
from trainer import checkpoint as checkpoints
from trainer.config import LINEAR_EVAL, Config, LinearEval, override
from trainer.encoder import make_encoder
from trainer.records import UserError, read_manifest
from trainer.train import read_config

RESULT = "result.json"
_ROWS_AT_ONCE = 1 << 16


@dataclass(frozen=True)
class LinearEvalResult:
    metrics: Mapping[str, float]
    """`eval/top_1_accuracy` and the like, fractions in [0, 1]; the control's have `untrained_` before their name."""
    per_class_accuracy: tuple[float, ...]
    """By label; of a class without validation images, nan."""
    confusion: np.ndarray
    """[C, C] int64: validation images by label (row) and prediction (column)."""
    num_images: int
    """Validation images, all of them."""


@dataclass(frozen=True)
class LinearClassifier:
    """Logits are (features - mean) / deviation @ weights + bias."""

    mean: np.ndarray
    deviation: np.ndarray
    weights: np.ndarray
    """[F, C] float32."""
    bias: np.ndarray
    l2_penalty: float

    def logits(self, features: np.ndarray) -> np.ndarray:
        """Returns [n, C] float32 for [n, F] float32."""
        return (features - self.mean) / self.deviation @ self.weights + self.bias


def linear_eval(
    data_dir: str,
    checkpoint: str,
    output: str,
    overrides: Iterable[str] = (),
    *,
    log_metrics: Callable[[dict[str, float], int], None] = lambda metrics, step: None,
    report: Callable[[int, int, str], None] = lambda done, total, text: None,
) -> LinearEvalResult:
    """Evaluates the encoder in `checkpoint`, a folder (the newest in it) or one file, on the dataset in `data_dir`.

    `overrides` are `linear_eval.` settings. Writes result.json and classifier.npz into `output`, calls `log_metrics` once with
    the step of the checkpoint, `report(images done, images in all, text)` as it goes. Raises UserError for what it cannot use.
    """
    folder = checkpoint.rpartition("/")[0] or "." if checkpoint.endswith(".npz") else checkpoint.rstrip("/")
    pretraining, about = read_config(folder)
    config = _with_settings(pretraining, overrides)
    stored = checkpoints.load(checkpoint) if checkpoint.endswith(".npz") else checkpoints.load_latest(folder)
    if stored is None:
        raise UserError(f"{folder} holds no whole checkpoint: pretraining has not come so far")
    manifest = read_manifest(data_dir)
    trained = load_encoder(config, stored)

    images = sum(split.records for split in manifest.splits.values())

    def evaluate(encoder: keras.Model, name: str, begun: int) -> tuple[LinearClassifier, np.ndarray, Features]:
        def progress(done: int) -> None:
            report(begun + done, 2 * images, f"features, {name}")

        train = extract(encoder, config, data_dir, manifest, "train", progress)
        begun += len(train.labels)
        validation = extract(encoder, config, data_dir, manifest, "validation", progress)
        classifier = fit_with_choice(train, manifest.num_classes, config.linear_eval)
        return classifier, classifier.logits(validation.values), validation

    classifier, logits, validation = evaluate(trained, "trained", 0)
    _, control_logits, _ = evaluate(make_encoder(config), "untrained", images)

    metrics = {
        "eval/top_1_accuracy": top_k_accuracy(logits, validation.labels, 1),
        "eval/top_5_accuracy": top_k_accuracy(logits, validation.labels, 5),
        "eval/untrained_top_1_accuracy": top_k_accuracy(control_logits, validation.labels, 1),
        "eval/untrained_top_5_accuracy": top_k_accuracy(control_logits, validation.labels, 5),
        "eval/l2_penalty": classifier.l2_penalty,
    }
    log_metrics(metrics, stored.step)
    confusion = np.zeros((manifest.num_classes, manifest.num_classes), np.int64)
    np.add.at(confusion, (validation.labels, logits.argmax(axis=1)), 1)
    per_label = confusion.sum(axis=1)
    per_class = np.where(per_label > 0, np.diag(confusion) / np.maximum(per_label, 1), np.nan)
    result = LinearEvalResult(metrics, tuple(per_class.tolist()), confusion, len(validation.labels))

    tf.io.gfile.makedirs(output)
    written = {
        "metrics": metrics,
        "num_images": result.num_images,
        "per_class_accuracy": [None if np.isnan(value) else value for value in result.per_class_accuracy],
        "synsets": manifest.synsets,
        "linear_eval": asdict(config.linear_eval),
        "checkpoint": stored.path,
        "step": stored.step,
        "dataset_fingerprint": manifest.fingerprint,
        "pretraining_dataset_fingerprint": about["dataset_fingerprint"],
    }
    checkpoints.write_arrays(f"{output}/classifier.npz", asdict(classifier))
    checkpoints.write_whole(f"{output}/{RESULT}", (json.dumps(written, indent=1, sort_keys=True) + "\n").encode())
    return result


def _with_settings(config: Config, overrides: Iterable[str]) -> Config:
    items = list(overrides)
    for item in items:
        if not item.strip().startswith(LINEAR_EVAL):
            raise UserError(
                f"{item} cannot be set here: pretraining is over, only settings that begin with {LINEAR_EVAL} are left"
            )
    return override(config, items)


def fit_with_choice(train: Features, num_classes: int, settings: LinearEval) -> LinearClassifier:
    """Returns the classifier fitted on all of `train`, with the penalty that is best on a held-out part of it."""
    count = len(train.labels)
    random = np.random.Generator(np.random.Philox(key=[settings.seed, 0]))
    order = random.permutation(count)
    held_out = max(1, round(count * settings.holdout_fraction))
    kept, out = order[held_out:], order[:held_out]
    penalties = sorted(settings.l2_penalties, reverse=True)
    if len(penalties) == 1:
        return fit(train.values, train.labels, num_classes, penalties)[0]
    candidates = fit(train.values[kept], train.labels[kept], num_classes, penalties)
    accuracies = [top_k_accuracy(one.logits(train.values[out]), train.labels[out], 1) for one in candidates]
    best = int(np.argmax(accuracies))
    return fit(train.values, train.labels, num_classes, penalties[: best + 1])[-1]


def fit(values: np.ndarray, labels: np.ndarray, num_classes: int, l2_penalties: Iterable[float]) -> list[LinearClassifier]:
    """Minimises mean cross-entropy + penalty/2 |W|^2 on standardised features, once a penalty, each started from the one before.

    `values` is [n, F] float32, `labels` [n] int64. For a penalty above 0 the optimum is unique.
    """
    mean = values.mean(axis=0)
    deviation = np.maximum(values.std(axis=0), 1e-6)
    count, dim = values.shape
    standard = (values - mean) / deviation

    @tf.function(autograph=False, reduce_retracing=True)
    def sums(weights: tf.Tensor, bias: tf.Tensor, rows: tf.Tensor, targets: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        logits = tf.matmul(rows, weights) + bias
        wrong = tf.nn.softmax(logits) - tf.one_hot(targets, num_classes)
        loss = tf.nn.sparse_softmax_cross_entropy_with_logits(targets, logits)
        return tf.reduce_sum(loss), tf.matmul(rows, wrong, transpose_a=True), tf.reduce_sum(wrong, axis=0)

    chunks = [
        (tf.constant(standard[start : start + _ROWS_AT_ONCE]), tf.constant(labels[start : start + _ROWS_AT_ONCE]))
        for start in range(0, count, _ROWS_AT_ONCE)
    ]

    def objective(flat: np.ndarray, penalty: float) -> tuple[float, np.ndarray]:
        weights, bias = np.split(flat, [dim * num_classes])
        weights = weights.reshape(dim, num_classes)
        loss, by_weights, by_bias = 0.0, np.zeros_like(weights), np.zeros_like(bias)
        for rows, targets in chunks:
            parts = sums(tf.constant(weights, tf.float32), tf.constant(bias, tf.float32), rows, targets)
            loss, by_weights, by_bias = (
                total + part.numpy() for total, part in zip((loss, by_weights, by_bias), parts, strict=True)
            )
        gradient = np.concatenate([(by_weights / count + penalty * weights).ravel(), by_bias / count])
        return float(loss / count + penalty / 2 * np.sum(weights**2)), gradient

    solution = np.zeros(dim * num_classes + num_classes)
    classifiers = []
    for penalty in l2_penalties:
        solution = minimize(objective, solution, (penalty,), "L-BFGS-B", jac=True, options={"maxiter": 1000, "gtol": 1e-5}).x
        weights, bias = np.split(solution.astype(np.float32), [dim * num_classes])
        classifiers.append(LinearClassifier(mean, deviation, weights.reshape(dim, num_classes), bias, float(penalty)))
    return classifiers


def top_k_accuracy(logits: np.ndarray, labels: np.ndarray, k: int) -> float:
    """Returns the part of images whose label is among the `k` largest logits; ties count against it."""
    own = logits[np.arange(len(labels)), labels][:, None]
    return float(np.mean(np.sum(logits >= own, axis=1) <= k))

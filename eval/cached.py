"""The protocol `cached`: a linear classifier fitted exactly to features that are computed once.

The classifier is the optimum of a convex problem (logistic regression), whose one free number is chosen on held-out training
images.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import tensorflow as tf
from scipy.optimize import minimize

from eval.features import Features
from trainer.config import LinearEval

_ROWS_AT_ONCE = 1 << 16


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
    best = candidates[int(np.argmax(accuracies))]
    return fit(train.values, train.labels, num_classes, [best.l2_penalty], start=best)[0]


def fit(
    values: np.ndarray,
    labels: np.ndarray,
    num_classes: int,
    l2_penalties: Iterable[float],
    start: LinearClassifier | None = None,
) -> list[LinearClassifier]:
    """Minimises mean cross-entropy + penalty/2 |W|^2 on standardised features, once a penalty, each started from the one before.

    `values` is [n, F] float32, `labels` [n] int64. For a penalty above 0 the optimum is unique, and `start`, the weights to begin
    with (zeros if None), changes nothing but the time.
    """
    mean = values.mean(axis=0)
    deviation = np.maximum(values.std(axis=0), 1e-6)
    count, dim = values.shape
    standard = (values - mean) / deviation
    # Where all classes are as likely, the curvature of the cross-entropy is this multiple of the features' second moments.
    curvature = (1 - 1 / num_classes) / num_classes
    spread, axes = np.linalg.eigh((standard.T @ standard).astype(np.float64) / count)

    @tf.function(autograph=False, reduce_retracing=True)
    def sums(weights: tf.Tensor, bias: tf.Tensor, rows: tf.Tensor, targets: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        logits = tf.matmul(rows, weights) + bias
        wrong = tf.nn.softmax(logits) - tf.one_hot(targets, num_classes)
        loss = tf.nn.sparse_softmax_cross_entropy_with_logits(targets, logits)
        return tf.reduce_sum(loss), tf.matmul(rows, wrong, transpose_a=True), tf.reduce_sum(wrong, axis=0)

    chunks = [
        (tf.constant(standard[first : first + _ROWS_AT_ONCE]), tf.constant(labels[first : first + _ROWS_AT_ONCE]))
        for first in range(0, count, _ROWS_AT_ONCE)
    ]

    def objective(weights: np.ndarray, bias: np.ndarray, penalty: float) -> tuple[float, np.ndarray, np.ndarray]:
        loss, by_weights, by_bias = 0.0, np.zeros_like(weights), np.zeros_like(bias)
        for rows, targets in chunks:
            parts = sums(tf.constant(weights, tf.float32), tf.constant(bias, tf.float32), rows, targets)
            loss, by_weights, by_bias = (
                total + part.numpy() for total, part in zip((loss, by_weights, by_bias), parts, strict=True)
            )
        return float(loss / count + penalty / 2 * np.sum(weights**2)), by_weights / count + penalty * weights, by_bias / count

    def of_scaled(flat: np.ndarray, scaled: np.ndarray, penalty: float) -> tuple[float, np.ndarray]:
        ours, bias = np.split(flat, [dim * num_classes])
        loss, by_weights, by_bias = objective(scaled @ ours.reshape(dim, num_classes), bias, penalty)
        return loss, np.concatenate([(scaled.T @ by_weights).ravel(), by_bias])

    weights = np.zeros((dim, num_classes)) if start is None else start.weights
    bias = np.zeros(num_classes) if start is None else start.bias
    classifiers = []
    for penalty in l2_penalties:
        # The search goes along these axes, on which the problem is about as steep one way as another: a third of the steps.
        scale = np.sqrt(np.maximum(curvature * spread, 0) + penalty + 1e-12)
        scaled = axes / scale
        begin = np.concatenate([(scale[:, None] * (axes.T @ weights)).ravel(), bias])
        options = {"maxiter": 1000, "gtol": 1e-5}
        flat = minimize(of_scaled, begin, (scaled, penalty), "L-BFGS-B", jac=True, options=options).x
        ours, bias = np.split(flat, [dim * num_classes])
        weights = scaled @ ours.reshape(dim, num_classes)
        classifiers.append(LinearClassifier(mean, deviation, weights.astype(np.float32), bias.astype(np.float32), float(penalty)))
    return classifiers


def top_k_accuracy(logits: np.ndarray, labels: np.ndarray, k: int) -> float:
    """Returns the part of images whose label is among the `k` largest logits; ties count against it."""
    own = logits[np.arange(len(labels)), labels][:, None]
    return float(np.mean(np.sum(logits >= own, axis=1) <= k))

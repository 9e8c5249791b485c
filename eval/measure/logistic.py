"""Multinomial logistic regression, fitted to its optimum on all replicas. Reads the features in pieces.

The problem is convex: for the same examples and penalty every optimizer finds the same optimum. Features are standardised. The
variables of L-BFGS are the coordinates along the features' principal axes, scaled by the curvature, which takes a third of the
steps.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf
from scipy.optimize import minimize

from eval.measure.features import Examples
from trainer.layers import product

_ROWS = 1 << 14
"""Maximum rows of a piece, over all replicas."""
HELD_BYTES = 1 << 30
"""Maximum bytes of features per replica to hold in memory between passes. Larger sets are read from disk at every pass."""


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
        """Returns the logits, [n, C] float32, of `features`, [n, F] float32."""
        return (features - self.mean) / self.deviation @ self.weights + self.bias


def fit(
    examples: Examples, num_classes: int, l2_penalty: float, start: LinearClassifier | None = None, **how: Any
) -> LinearClassifier:
    """Returns the classifier for one penalty. `how` holds keyword arguments of `fit_path`."""
    return next(fit_path(examples, num_classes, [l2_penalty], start, **how))


def fit_path(
    examples: Examples,
    num_classes: int,
    l2_penalties: Iterable[float],
    start: LinearClassifier | None = None,
    *,
    tolerance: float = 5e-4,
    strategy: tf.distribute.Strategy | None = None,
    on_read: Callable[[int], None] = lambda rows: None,
    on_rows: Callable[[int], None] = lambda rows: None,
    on_evaluation: Callable[[float, float, float], None] = lambda penalty, loss, gradient: None,
) -> Iterator[LinearClassifier]:
    """Minimises mean cross-entropy + penalty/2 |W|^2 on standardised features, for one penalty after another.

    Each search starts from the previous optimum, the first from the weights `start` (zeros if None). Yields each classifier
    before the next search begins, so the caller can stop early. A search ends when no component of the gradient along the scaled
    axes exceeds `tolerance`. For a penalty above 0 the optimum is unique, and `start` affects only the duration. Calls
    `on_read(number)` after that many examples of the `passes_before` the first search. Calls `on_rows(number)` after that many
    examples of a pass of a search, and `on_evaluation(penalty, loss, gradient)` after the pass, with the largest component of the
    gradient.
    """
    problem = _Problem(examples, num_classes, strategy or tf.distribute.get_strategy(), on_read)
    dim = examples.dim
    # If all classes are equally likely, the curvature of the cross-entropy is this multiple of the features' second moments.
    curvature = (1 - 1 / num_classes) / num_classes
    bias_scale = np.sqrt(curvature)
    spread, axes = np.linalg.eigh(problem.second_moments)

    def of_scaled(flat: np.ndarray, scaled: np.ndarray, penalty: float) -> tuple[float, np.ndarray]:
        ours, of_bias = np.split(flat, [dim * num_classes])
        weights = scaled @ ours.reshape(dim, num_classes)
        loss, by_weights, by_bias = problem.evaluate(weights, of_bias / bias_scale, on_rows)
        loss += penalty / 2 * float(np.sum(weights**2))
        gradient = np.concatenate([(scaled.T @ (by_weights + penalty * weights)).ravel(), by_bias / bias_scale])
        on_evaluation(penalty, loss, float(np.abs(gradient).max()))
        return loss, gradient

    weights = np.zeros((dim, num_classes)) if start is None else start.weights
    bias = np.zeros(num_classes) if start is None else start.bias
    for penalty in l2_penalties:
        scale = np.sqrt(np.maximum(curvature * spread, 0) + penalty + 1e-12)
        scaled = axes / scale
        begin = np.concatenate([(scale[:, None] * (axes.T @ weights)).ravel(), bias_scale * bias])
        options = {"maxiter": 1000, "gtol": tolerance}
        flat = minimize(of_scaled, begin, (scaled, penalty), "L-BFGS-B", jac=True, options=options).x
        ours, of_bias = np.split(flat, [dim * num_classes])
        weights, bias = scaled @ ours.reshape(dim, num_classes), of_bias / bias_scale
        yield LinearClassifier(
            problem.mean, problem.deviation, weights.astype(np.float32), bias.astype(np.float32), float(penalty)
        )


def accuracies(classifiers: list[LinearClassifier], examples: Examples) -> list[float]:
    """Returns the top-1 accuracy of each classifier on `examples`."""
    correct = np.zeros(len(classifiers))
    for values, labels in examples.pieces():
        if len(labels):
            correct += [np.sum(one.logits(values).argmax(axis=1) == labels) for one in classifiers]
    return list(correct / examples.count)


def top_k_accuracy(logits: np.ndarray, labels: np.ndarray, k: int) -> float:
    """Returns the fraction of images whose label is among the `k` largest logits. Ties count as errors."""
    own = logits[np.arange(len(labels)), labels][:, None]
    return float(np.mean(np.sum(logits >= own, axis=1) <= k))


def cut(pieces: Iterable[tuple[np.ndarray, ...]], rows: int) -> Iterator[tuple[np.ndarray, ...]]:
    """Regroups pieces of arrays into pieces of `rows` rows. The last piece may be shorter."""
    held: list[tuple[np.ndarray, ...]] = []
    count = 0
    for piece in pieces:
        begin = 0
        while begin < len(piece[0]):
            taken = tuple(array[begin : begin + rows - count] for array in piece)
            held.append(taken)
            count += len(taken[0])
            begin += len(taken[0])
            if count == rows:
                yield _joined(held)
                held, count = [], 0
    if held:
        yield _joined(held)


def even_rows(count: int, most: int, replicas: int) -> int:
    """Returns the rows per piece, `most` or fewer rounded up to divide over the replicas, with little padding for `count`."""
    return -(-count // (-(-count // most) * replicas)) * replicas


def _joined(parts: list[tuple[np.ndarray, ...]]) -> tuple[np.ndarray, ...]:
    return parts[0] if len(parts) == 1 else tuple(np.concatenate(arrays) for arrays in zip(*parts, strict=True))


def padded(array: np.ndarray, rows: int) -> np.ndarray:
    """Appends rows of zeros to an array until it has `rows` rows."""
    missing = rows - len(array)
    return array if missing == 0 else np.concatenate([array, np.zeros((missing, *array.shape[1:]), array.dtype)])


def matrix_product() -> Callable[..., tf.Tensor]:
    """Returns a matrix product of float32's accuracy. The native products of TPUs and GPUs are less accurate."""
    return product if any(tf.config.list_physical_devices(kind) for kind in ("TPU", "GPU")) else tf.matmul


def over_replicas(strategy: tf.distribute.Strategy, array: np.ndarray) -> tf.Tensor:
    """Splits the rows of an array evenly over the replicas."""
    parts = np.split(array, strategy.num_replicas_in_sync)
    return strategy.experimental_distribute_values_from_function(
        lambda context: tf.constant(parts[context.replica_id_in_sync_group])
    )


def passes_before(examples: Examples, replicas: int) -> int:
    """Returns how often `fit_path` reads the examples before its first search: for their moments, and to hold them in memory."""
    return 2 if _fits_in_memory(examples, replicas) else 1


def _fits_in_memory(examples: Examples, replicas: int) -> bool:
    return 4 * examples.count * examples.dim <= HELD_BYTES * replicas


class _Problem:
    """The mean cross-entropy of a linear classifier on standardised examples, as a function of its weights."""

    def __init__(
        self, examples: Examples, num_classes: int, strategy: tf.distribute.Strategy, on_read: Callable[[int], None]
    ) -> None:
        self._examples, self._strategy = examples, strategy
        replicas = strategy.num_replicas_in_sync
        self._rows = even_rows(examples.count, _ROWS, replicas)
        self._read_moments(num_classes, on_read)
        self._standardised = self._make_standardised()
        self._held: list[tuple[tf.Tensor, tf.Tensor]] | None = None
        if _fits_in_memory(examples, replicas):
            held = []
            for piece in self._standard_pieces():
                held.append(piece)
                on_read(self._rows_of(len(held) - 1))
            self._held = held
        self._sums = self._make_sums()

    def _read_moments(self, num_classes: int, on_read: Callable[[int], None]) -> None:
        """Computes mean, deviation and second moments of the features, and their sums over each class, in one pass."""
        examples = self._examples
        shift = np.zeros(examples.dim, np.float32)
        total, second = np.zeros(examples.dim), np.zeros((examples.dim, examples.dim))
        by_class, counts = np.zeros((num_classes, examples.dim)), np.zeros(num_classes)
        for number, (values, labels) in enumerate(cut(examples.pieces(), self._rows)):
            if number == 0:
                # A shift near the mean keeps the squares small, so that float32 does not round their differences away.
                shift = values.mean(axis=0)
            centred = tf.constant(values - shift)
            total += tf.reduce_sum(centred, axis=0).numpy()
            second += tf.matmul(centred, centred, transpose_a=True).numpy()
            by_class += tf.math.unsorted_segment_sum(centred, labels, num_classes).numpy()
            counts += np.bincount(labels, minlength=num_classes)
            on_read(len(labels))
        offset = total / examples.count
        covariance = second / examples.count - np.outer(offset, offset)
        deviation = np.maximum(np.sqrt(np.maximum(np.diag(covariance), 0)), 1e-6)
        self.mean = (shift + offset).astype(np.float32)
        self.deviation = deviation.astype(np.float32)
        self.second_moments = covariance / np.outer(deviation, deviation)
        self._by_class = ((by_class - counts[:, None] * offset) / deviation).T
        self._counts = counts

    def evaluate(
        self, weights: np.ndarray, bias: np.ndarray, on_rows: Callable[[int], None]
    ) -> tuple[float, np.ndarray, np.ndarray]:
        """Returns the mean cross-entropy of `weights`, [F, C], and `bias`, [C], and its gradients by both, in float64."""
        count = self._examples.count
        # The term of the labels' logits is linear in the weights, so it follows from the sums over each class.
        loss = -float(np.sum(self._by_class * weights) + self._counts @ bias)
        by_weights, by_bias = -self._by_class, -self._counts
        now = tf.constant(weights, tf.float32), tf.constant(bias, tf.float32)
        for number, piece in enumerate(self._standard_pieces() if self._held is None else self._held):
            log_total, total_by_weights, total_by_bias = self._sums(*now, *piece)
            loss += float(log_total)
            by_weights += total_by_weights.numpy()
            by_bias += total_by_bias.numpy()
            on_rows(self._rows_of(number))
        return loss / count, by_weights / count, by_bias / count

    def _rows_of(self, number: int) -> int:
        """Returns how many examples a piece has, without the padding."""
        return min(self._rows, self._examples.count - number * self._rows)

    def _standard_pieces(self) -> Iterator[tuple[tf.Tensor, tf.Tensor]]:
        """Yields (standardised features, 1 for each real row and 0 for padding), both split over the replicas."""
        for values, _ in cut(self._examples.pieces(), self._rows):
            rows = over_replicas(self._strategy, padded(values, self._rows))
            real = over_replicas(self._strategy, padded(np.ones(len(values), np.float32), self._rows))
            yield self._standardised(rows, real), real

    def _make_standardised(self) -> Callable[[tf.Tensor, tf.Tensor], tf.Tensor]:
        mean, inverse = tf.constant(self.mean), tf.constant(1 / self.deviation)

        @tf.function(autograph=False)
        def standardised(rows: tf.Tensor, real: tf.Tensor) -> tf.Tensor:
            # Rows of padding become zero, so they do not contribute to the sums.
            return self._strategy.run(lambda rows, real: (rows - mean) * inverse * real[:, None], args=(rows, real))

        return standardised

    def _make_sums(self) -> Callable[..., tuple[tf.Tensor, tf.Tensor, tf.Tensor]]:
        strategy = self._strategy
        multiply = matrix_product()

        def on_replica(weights: tf.Tensor, bias: tf.Tensor, rows: tf.Tensor, real: tf.Tensor) -> tuple[tf.Tensor, ...]:
            logits = multiply(rows, weights) + bias
            probabilities = tf.nn.softmax(logits)
            log_total = tf.reduce_max(logits, axis=1) - tf.math.log(tf.reduce_max(probabilities, axis=1))
            by_weights = multiply(rows, probabilities, transpose_a=True)
            by_bias = tf.linalg.matvec(probabilities, real, transpose_a=True)
            return tf.reduce_sum(tf.cast(real * log_total, tf.float64)), by_weights, by_bias

        @tf.function(autograph=False)
        def sums(weights: tf.Tensor, bias: tf.Tensor, rows: tf.Tensor, real: tf.Tensor) -> tuple[tf.Tensor, ...]:
            found = strategy.run(on_replica, args=(weights, bias, rows, real))
            return tuple(strategy.reduce(tf.distribute.ReduceOp.SUM, one, axis=None) for one in found)

        return sums

"""Nearest neighbours by the cosine of features."""

from collections.abc import Callable

import numpy as np
import tensorflow as tf

from eval.measure.features import StoredFeatures
from eval.measure.logistic import cut, even_rows, matrix_product, over_replicas, padded

_QUERIES_AT_ONCE = 1 << 10
_BANK_AT_ONCE = 1 << 14


def nearest_neighbours(
    bank: StoredFeatures,
    queries: np.ndarray,
    k: int,
    *,
    strategy: tf.distribute.Strategy | None = None,
    on_progress: Callable[[float], None] = lambda done: None,
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the `k` nearest images of `bank` to each query by cosine, nearest first. Ties go to the image that is read first.

    `queries` is [m, F] float32; `k` is at most the number of images in the bank. Returns similarities, [m, k] float32 in [-1, 1],
    and image IDs, [m, k] int64. Reads the bank once, in pieces, and never holds it in memory as a whole. The replicas share the
    queries. Calls `on_progress(finished fraction)` after a piece's comparison with at most 1,024 queries a replica.
    """
    strategy = strategy or tf.distribute.get_strategy()
    replicas = strategy.num_replicas_in_sync
    at_once = even_rows(len(queries), _QUERIES_AT_ONCE * replicas, replicas)
    multiply = matrix_product()

    @tf.function(autograph=False)
    def normalized(bank: tf.Tensor) -> tf.Tensor:
        return strategy.run(lambda bank: tf.math.l2_normalize(bank, axis=1), args=(bank,))

    def on_replica(
        query: tf.Tensor, best: tf.Tensor, ids: tf.Tensor, bank: tf.Tensor, bank_ids: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor]:
        found = multiply(query, bank, transpose_b=True)
        found = tf.where(bank_ids[None, :] < 0, -np.inf, found)
        found, positions = tf.math.top_k(found, min(k, bank.shape[0]))
        best, order = tf.math.top_k(tf.concat([best, found], axis=1), k)
        return best, tf.gather(tf.concat([ids, tf.gather(bank_ids, positions)], axis=1), order, batch_dims=1)

    @tf.function(autograph=False)
    def merged(*arguments: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        return strategy.run(on_replica, args=arguments)

    unit = queries / np.maximum(np.linalg.norm(queries, axis=1, keepdims=True), 1e-12)
    blocks = [over_replicas(strategy, padded(unit[begin : begin + at_once], at_once)) for begin in range(0, len(unit), at_once)]
    none = over_replicas(strategy, np.full((at_once, k), -np.inf, np.float32)), over_replicas(strategy, np.full((at_once, k), -1))
    nearest = [none] * len(blocks)
    rows = even_rows(bank.count, _BANK_AT_ONCE, 1)
    done = 0
    for values, image_ids in cut(((part.values, part.image_ids) for part in bank.parts()), rows):
        # Padding gets the ID -1.
        piece = normalized(tf.constant(padded(values, rows))), tf.constant(padded(image_ids + 1, rows) - 1)
        for number, block in enumerate(blocks):
            nearest[number] = merged(block, *nearest[number], *piece)
            on_progress((done + len(image_ids) * (number + 1) / len(blocks)) / bank.count)
        done += len(image_ids)
    similarities, image_ids = (
        np.concatenate([part.numpy() for of_block in found for part in strategy.experimental_local_results(of_block)])
        for found in zip(*nearest, strict=True)
    )
    return similarities[: len(queries)], image_ids[: len(queries)]

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
    queries. Calls `on_progress(finished fraction)` after each piece.
    """
    strategy = strategy or tf.distribute.get_strategy()
    replicas = strategy.num_replicas_in_sync
    at_once = even_rows(len(queries), _QUERIES_AT_ONCE * replicas, replicas) // replicas
    blocks = -(-len(queries) // (at_once * replicas))
    shape = (replicas * blocks, at_once)
    multiply = matrix_product()

    def of_block(
        query: tf.Tensor, best: tf.Tensor, ids: tf.Tensor, bank: tf.Tensor, bank_ids: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor]:
        found = multiply(query, bank, transpose_b=True)
        found = tf.where(bank_ids[None, :] < 0, -np.inf, found)
        found, positions = tf.math.top_k(found, min(k, bank.shape[0]))
        best, order = tf.math.top_k(tf.concat([best, found], axis=1), k)
        return best, tf.gather(tf.concat([ids, tf.gather(bank_ids, positions)], axis=1), order, batch_dims=1)

    @tf.function(autograph=False)
    def merged(*arguments: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        def on_replica(
            query: tf.Tensor, best: tf.Tensor, ids: tf.Tensor, bank: tf.Tensor, bank_ids: tf.Tensor
        ) -> tuple[tf.Tensor, tf.Tensor]:
            bank = tf.math.l2_normalize(bank, axis=1)
            return tf.map_fn(
                # Maps over numbers, because mapping over the queries would copy them.
                lambda number: of_block(query[number], best[number], ids[number], bank, bank_ids),
                tf.range(blocks),
                parallel_iterations=1,
                fn_output_signature=(tf.float32, tf.int64),
            )

        return strategy.run(on_replica, args=arguments)

    unit = queries / np.maximum(np.linalg.norm(queries, axis=1, keepdims=True), 1e-12)
    query, best, ids = (
        over_replicas(strategy, array)
        for array in (
            padded(unit, shape[0] * at_once).reshape(*shape, -1),
            np.full((*shape, k), -np.inf, np.float32),
            np.full((*shape, k), -1, np.int64),
        )
    )
    rows = even_rows(bank.count, _BANK_AT_ONCE, 1)
    done = 0
    for values, image_ids in cut(((part.values, part.image_ids) for part in bank.parts()), rows):
        # Padding gets the ID -1.
        numbers = padded(image_ids + 1, rows) - 1
        best, ids = merged(query, best, ids, tf.constant(padded(values, rows)), tf.constant(numbers))
        done += len(image_ids)
        on_progress(done / bank.count)
    similarities, image_ids = (
        np.concatenate([part.numpy() for part in strategy.experimental_local_results(found)]).reshape(-1, k)[: len(queries)]
        for found in (best, ids)
    )
    return similarities, image_ids

"""The protocol `knn`: the training images most like an image vote for its class, with nothing fitted."""

import numpy as np
import tensorflow as tf

from eval.features import Features

_QUERIES_AT_ONCE = 1 << 10
_NEIGHBOURS_AT_ONCE = 1 << 15


def nearest_neighbours(bank: np.ndarray, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the `k` rows of `bank` most like each query by cosine, nearest first; of equals, the first.

    `bank` is [n, F] float32 and `queries` [m, F] float32, k at most n. Returns similarities, [m, k] float32 in [-1, 1], and rows,
    [m, k] int64. Works in pieces: at no time is there more than a piece of the m x n similarities.
    """
    similarities = np.full((len(queries), k), -np.inf, np.float32)
    rows = np.zeros((len(queries), k), np.int64)

    @tf.function(autograph=False, reduce_retracing=True)
    def merged(
        query: tf.Tensor, piece: tf.Tensor, first: tf.Tensor, best: tf.Tensor, rows: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor]:
        found = tf.matmul(tf.math.l2_normalize(query, 1), tf.math.l2_normalize(piece, 1), transpose_b=True)
        found, places = tf.math.top_k(found, tf.minimum(k, tf.shape(piece)[0]))
        best, order = tf.math.top_k(tf.concat([best, found], 1), k)
        return best, tf.gather(tf.concat([rows, first + tf.cast(places, tf.int64)], 1), order, batch_dims=1)

    for first in range(0, len(bank), _NEIGHBOURS_AT_ONCE):
        piece = tf.constant(bank[first : first + _NEIGHBOURS_AT_ONCE])
        for start in range(0, len(queries), _QUERIES_AT_ONCE):
            of = slice(start, start + _QUERIES_AT_ONCE)
            best, places = merged(
                tf.constant(queries[of]),
                piece,
                tf.constant(first, tf.int64),
                tf.constant(similarities[of]),
                tf.constant(rows[of]),
            )
            similarities[of], rows[of] = best.numpy(), places.numpy()
    return similarities, rows


def knn_scores(train: Features, queries: np.ndarray, num_classes: int, k: int, temperature: float) -> np.ndarray:
    """Returns how much the `k` nearest training images speak for each class, [m, C] float32, for `queries`, [m, F] float32.

    A neighbour of cosine s has the weight exp(s / temperature) (Wu et al. 2018, section 3.4), here relative to the nearest's.
    """
    similarities, rows = nearest_neighbours(train.values, queries, k)
    weights = np.exp((similarities - similarities[:, :1]) / np.float32(temperature))
    scores = np.zeros((len(queries), num_classes), np.float32)
    np.add.at(scores, (np.arange(len(queries))[:, None], train.labels[rows]), weights)
    return scores

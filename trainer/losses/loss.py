"""What a loss is, and the two measures of projections that do not depend on it."""

from collections.abc import Mapping
from typing import NamedTuple, Protocol

import numpy as np
import tensorflow as tf


class Projections(NamedTuple):
    """What a loss compares; the package's docstring says what each is."""

    z1: tf.Tensor
    z2: tf.Tensor
    all_z1: tf.Tensor
    all_z2: tf.Tensor
    positions: tf.Tensor


class Loss(Protocol):
    """A contrastive loss, with what it keeps of every image."""

    @property
    def vectors(self) -> Mapping[str, float]:
        """The vectors over the dataset, [N] float32, that it reads and changes: the value that each begins with, by name."""

    def __call__(self, projections: Projections, stored: Mapping[str, tf.Tensor]) -> tuple[tf.Tensor, Mapping[str, tf.Tensor]]:
        """Returns the loss, a scalar that has its gradient, and the anchors' new entries of each of `vectors`, [b] float32.

        `stored` has the entries of the whole global batch, [B] float32, by name.
        """

    def metrics(self, vectors: Mapping[str, np.ndarray]) -> dict[str, float]:
        """Returns what `vectors` look like, by metric name."""


def alignment(z1: tf.Tensor, z2: tf.Tensor) -> tf.Tensor:
    """Returns the mean squared distance of positives, in [0, 4]; less is better (Wang & Isola 2020)."""
    return tf.reduce_mean(tf.reduce_sum(tf.math.squared_difference(z1, z2), axis=1))


def uniformity_kernel(z: tf.Tensor, all_z: tf.Tensor, positions: tf.Tensor) -> tf.Tensor:
    """Returns the mean of exp(-2 |z_i - z_j|^2) over pairs of different images; its log is the uniformity (Wang & Isola 2020)."""
    others = 1.0 - tf.one_hot(positions, tf.shape(all_z)[0], dtype=z.dtype)
    kernel = tf.exp(4.0 * tf.matmul(z, all_z, transpose_b=True) - 4.0) * others
    return tf.reduce_sum(kernel) / tf.reduce_sum(others)

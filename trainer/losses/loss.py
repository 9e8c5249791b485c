"""The interface of a loss, and two metrics of projections that do not depend on the loss: alignment and uniformity."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import tensorflow as tf


class Projections(NamedTuple):
    """The input of a loss. The docstring of `trainer.losses` gives shapes and meaning."""

    z1: tf.Tensor
    z2: tf.Tensor
    all_z1: tf.Tensor
    all_z2: tf.Tensor
    positions: tf.Tensor


class Loss(Protocol):
    """A contrastive loss. It may keep values of every image between steps."""

    @property
    def vectors(self) -> Mapping[str, float]:
        """Initial value of each stored vector, by name. A vector, [N] float32, has one value for each image of the dataset."""

    def __call__(self, projections: Projections, stored: Mapping[str, tf.Tensor]) -> tuple[tf.Tensor, Mapping[str, tf.Tensor]]:
        """Returns (loss, a differentiable scalar; the anchors' new values for each of `vectors`, [b] float32, by name).

        `stored` holds the current values of the global batch, [B] float32, by name.
        """

    def metrics(self, vectors: Mapping[str, np.ndarray]) -> dict[str, float]:
        """Returns statistics of `vectors`, by metric name."""


@dataclass(frozen=True)
class InGroups:
    """The mean of a loss over groups of a replica's consecutive images, each of which is taken as a batch of its own.

    So the negatives, and the estimates of u, are those of batches of `size` images, while the step averages over all of them.
    """

    loss: Loss
    size: int

    @property
    def vectors(self) -> Mapping[str, float]:
        return self.loss.vectors

    def __call__(self, projections: Projections, stored: Mapping[str, tf.Tensor]) -> tuple[tf.Tensor, Mapping[str, tf.Tensor]]:
        def by_group(values: tf.Tensor) -> tf.Tensor:
            return tf.reshape(values, [-1, self.size, *values.shape[1:]])

        def loss_of_group(group: tuple[tf.Tensor, tf.Tensor, dict[str, tf.Tensor]]) -> tuple[tf.Tensor, Mapping[str, tf.Tensor]]:
            z1, z2, entries = group
            return self.loss(Projections(z1, z2, z1, z2, tf.range(self.size)), entries)

        own = {name: by_group(tf.gather(values, projections.positions)) for name, values in stored.items()}
        losses, entries = tf.vectorized_map(loss_of_group, (by_group(projections.z1), by_group(projections.z2), own))
        return tf.reduce_mean(losses), {name: tf.reshape(values, [-1]) for name, values in entries.items()}

    def metrics(self, vectors: Mapping[str, np.ndarray]) -> dict[str, float]:
        return self.loss.metrics(vectors)


def alignment(z1: tf.Tensor, z2: tf.Tensor) -> tf.Tensor:
    """Returns the mean squared distance of positive pairs, in [0, 4]; lower is better (Wang & Isola 2020)."""
    return tf.reduce_mean(tf.reduce_sum(tf.math.squared_difference(z1, z2), axis=1))


def uniformity_kernel(z: tf.Tensor, all_z: tf.Tensor, positions: tf.Tensor) -> tf.Tensor:
    """Returns the mean of exp(-2 |z_i - z_j|^2) over pairs of different images. Its log is the uniformity (Wang & Isola 2020)."""
    others = 1.0 - tf.one_hot(positions, tf.shape(all_z)[0], dtype=z.dtype)
    kernel = tf.exp(4.0 * tf.matmul(z, all_z, transpose_b=True) - 4.0) * others
    return tf.reduce_sum(kernel) / tf.reduce_sum(others)

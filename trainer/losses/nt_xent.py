"""NT-Xent, with or without the positive pair in the denominator. It depends on the current batch only."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import tensorflow as tf

from trainer.losses.loss import Projections
from trainer.settings import LossSettings


def make(settings: LossSettings) -> "NtXent":
    return NtXent(settings.temperature)


@dataclass(frozen=True)
class NtXent:
    """SimCLR's loss (Chen et al. 2020). It stores no vectors."""

    temperature: float
    decoupled: bool = False

    @property
    def vectors(self) -> Mapping[str, float]:
        return {}

    def __call__(self, projections: Projections, stored: Mapping[str, tf.Tensor]) -> tuple[tf.Tensor, Mapping[str, tf.Tensor]]:
        return nt_xent(*projections, self.temperature, self.decoupled), {}

    def metrics(self, vectors: Mapping[str, np.ndarray]) -> dict[str, float]:
        return {}


def nt_xent(
    z1: tf.Tensor,
    z2: tf.Tensor,
    all_z1: tf.Tensor,
    all_z2: tf.Tensor,
    positions: tf.Tensor,
    temperature: float,
    decoupled: bool = False,
) -> tf.Tensor:
    """Returns SimCLR's NT-Xent (Chen et al. 2020, eq. 1), a scalar: both views' cross-entropies, summed, averaged over anchors.

    `decoupled` omits the positive pair from the denominator (Yeh et al. 2022), as does the global contrastive loss at gamma = 1.
    """
    own = tf.one_hot(positions, tf.shape(all_z1)[0], dtype=z1.dtype)

    def cross_entropy(anchor: tf.Tensor, others: tf.Tensor, same_view: tf.Tensor) -> tf.Tensor:
        cross = tf.matmul(anchor, others, transpose_b=True) / temperature
        within = tf.matmul(anchor, same_view, transpose_b=True) / temperature - own * 1e9
        positive = tf.reduce_sum(cross * own, axis=1)
        denominator = tf.concat([cross - own * 1e9 if decoupled else cross, within], axis=1)
        return tf.reduce_logsumexp(denominator, axis=1) - positive

    return tf.reduce_mean(cross_entropy(z1, all_z2, all_z1) + cross_entropy(z2, all_z1, all_z2))

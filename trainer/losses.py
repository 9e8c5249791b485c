"""The contrastive losses: NT-Xent, with or without its positive in the denominator, and the global contrastive loss with u.

Conventions of all of them. `z1` and `z2`, [b, d] float32, are the L2-normalised projections of the two views of b anchors, which
are part of a global batch of B images; `all_z1` and `all_z2`, [B, d], are those of the whole batch, and `positions`, [b] int,
says where in it an anchor is. On one replica both are the same and positions is 0..B-1. An anchor's negatives are both views of
every OTHER image of the global batch, 2(B-1) of them. Gradients flow through anchors and negatives alike.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import tensorflow as tf

from trainer.config import Config


@dataclass(frozen=True)
class Variant:
    """What an implementation stores in u, and what it takes for an image never seen."""

    stored: Literal["mean", "sum"]
    """Of the two views' estimates."""
    first_visit: Literal["zero", "image", "batch"]
    """`zero`: u = 0 is an estimate too. `image`: an image with u = 0 takes gamma = 1. `batch`: all take it while all u are 0."""
    learns_temperature: bool = False
    """Whether every image has a temperature of its own (Qiu et al. 2023)."""


VARIANTS = {
    "paper": Variant(stored="mean", first_visit="image"),
    "tf_official": Variant(stored="sum", first_visit="zero"),
    "pt_official": Variant(stored="mean", first_visit="batch"),
    "isogclr": Variant(stored="mean", first_visit="image", learns_temperature=True),
}


def nt_xent(
    z1: tf.Tensor,
    z2: tf.Tensor,
    all_z1: tf.Tensor,
    all_z2: tf.Tensor,
    positions: tf.Tensor,
    temperature: float,
    decoupled: bool = False,
) -> tf.Tensor:
    """Returns SimCLR's NT-Xent, a scalar: the mean over anchors of both views' cross-entropies (Chen et al. 2020, eq. 1).

    `decoupled` leaves the positive out of the denominator (Yeh et al. 2022), which at gamma = 1 the global loss does too.
    """
    own = tf.one_hot(positions, tf.shape(all_z1)[0], dtype=z1.dtype)

    def cross_entropy(anchor: tf.Tensor, others: tf.Tensor, same_view: tf.Tensor) -> tf.Tensor:
        cross = tf.matmul(anchor, others, transpose_b=True) / temperature
        within = tf.matmul(anchor, same_view, transpose_b=True) / temperature - own * 1e9
        positive = tf.reduce_sum(cross * own, axis=1)
        denominator = tf.concat([cross - own * 1e9 if decoupled else cross, within], axis=1)
        return tf.reduce_logsumexp(denominator, axis=1) - positive

    return tf.reduce_mean(cross_entropy(z1, all_z2, all_z1) + cross_entropy(z2, all_z1, all_z2))


def gamma_of_visit(u: tf.Tensor, gamma: float, variant: Variant) -> tf.Tensor:
    """Returns the gamma of each image of the global batch, [B] float32, from its stored `u`, [B] float32."""
    constant = tf.fill(tf.shape(u), tf.constant(gamma, u.dtype))
    match variant.first_visit:
        case "zero":
            return constant
        case "image":
            return tf.where(u == 0.0, tf.ones_like(u), constant)
        case "batch":
            return tf.where(tf.reduce_sum(u) == 0.0, tf.ones_like(u), constant)


class GlobalContrastive(NamedTuple):
    """What the global contrastive loss gives for b anchors."""

    loss: tf.Tensor
    """Scalar: the surrogate whose gradient estimates that of the objective (about -1.5 when trained); not the objective."""
    u: tf.Tensor
    """[b] float32, to be stored; carries no gradient."""
    temperature_gradient: tf.Tensor
    """[b] float32: how each anchor's objective changes with its temperature, without rho; carries no gradient."""


def global_contrastive(
    z1: tf.Tensor,
    z2: tf.Tensor,
    all_z1: tf.Tensor,
    all_z2: tf.Tensor,
    positions: tf.Tensor,
    u: tf.Tensor,
    gamma: tf.Tensor,
    temperature: tf.Tensor | float,
    variant: Variant,
) -> GlobalContrastive:
    """Returns the surrogate of the global contrastive loss and what it learned of each anchor (Yuan et al. 2022, Algorithm 1).

    `u` and `gamma` are those of the anchors, [b] float32; `temperature` is a number, or each anchor's own, [b] float32.
    """
    batch = tf.shape(all_z1)[0]
    own = tf.one_hot(positions, batch, dtype=z1.dtype)
    negatives = tf.cast(2 * (batch - 1), z1.dtype)
    temperatures = tf.broadcast_to(tf.convert_to_tensor(temperature, z1.dtype), tf.shape(u))

    def surrogate(anchor: tf.Tensor, others: tf.Tensor, same_view: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        cross = tf.matmul(anchor, others, transpose_b=True)
        within = tf.matmul(anchor, same_view, transpose_b=True)
        cross_exp = tf.stop_gradient(tf.exp(cross / temperatures[:, None])) * (1.0 - own)
        within_exp = tf.stop_gradient(tf.exp(within / temperatures[:, None])) * (1.0 - own)
        contrast = tf.reduce_sum(cross_exp + within_exp, axis=1) / negatives
        new_u = (1.0 - gamma) * u + gamma * contrast
        weighted = tf.reduce_sum(cross_exp * cross + within_exp * within, axis=1) / (new_u * negatives)
        # Of tau log E exp(s/tau) by tau, with u in the place of the mean.
        by_temperature = tf.stop_gradient(tf.math.log(new_u) - weighted / temperatures)
        return weighted - tf.reduce_sum(cross * own, axis=1), new_u, by_temperature

    loss1, u1, by_temperature1 = surrogate(z1, all_z2, all_z1)
    loss2, u2, by_temperature2 = surrogate(z2, all_z1, all_z2)
    stored = u1 + u2 if variant.stored == "sum" else (u1 + u2) / 2.0
    return GlobalContrastive(tf.reduce_mean(loss1 + loss2), stored, (by_temperature1 + by_temperature2) / 2.0)


def next_temperature(
    temperature: tf.Tensor, velocity: tf.Tensor, gradient: tf.Tensor, settings: Config
) -> tuple[tf.Tensor, tf.Tensor]:
    """Returns the temperatures of images after a visit, and their velocities (Qiu et al. 2023, Algorithm 1).

    All are [b] float32; `gradient` is `GlobalContrastive.temperature_gradient`. The objective of an image is
    temperature * (log E exp(s / temperature) + rho), so a large rho asks for small temperatures.
    """
    beta = settings.temperature_momentum
    velocity = (1.0 - beta) * velocity + beta * (gradient + settings.temperature_rho)
    moved = temperature - settings.temperature_learning_rate * velocity
    return tf.clip_by_value(moved, settings.temperature_min, settings.temperature_max), velocity


def alignment(z1: tf.Tensor, z2: tf.Tensor) -> tf.Tensor:
    """Returns the mean squared distance of positives, in [0, 4]; less is better (Wang & Isola 2020)."""
    return tf.reduce_mean(tf.reduce_sum(tf.math.squared_difference(z1, z2), axis=1))


def uniformity_kernel(z: tf.Tensor, all_z: tf.Tensor, positions: tf.Tensor) -> tf.Tensor:
    """Returns the mean of exp(-2 |z_i - z_j|^2) over pairs of different images; its log is the uniformity (Wang & Isola 2020)."""
    others = 1.0 - tf.one_hot(positions, tf.shape(all_z)[0], dtype=z.dtype)
    kernel = tf.exp(4.0 * tf.matmul(z, all_z, transpose_b=True) - 4.0) * others
    return tf.reduce_sum(kernel) / tf.reduce_sum(others)


def global_objective(u: tf.Tensor, temperature: float) -> tf.Tensor:
    """Returns the estimate of the contrast's part of the global objective, mean of temperature * log(u) over images seen (u > 0).

    `u` is the vector over the whole dataset, [N] float32; 0 where no image was seen yet.
    """
    seen = tf.cast(u > 0.0, u.dtype)
    logs = tf.math.log(tf.where(u > 0.0, u, tf.ones_like(u)))
    return temperature * tf.math.divide_no_nan(tf.reduce_sum(logs), tf.reduce_sum(seen))

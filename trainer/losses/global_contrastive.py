"""The global contrastive losses of SogCLR (Yuan et al. 2022) and iSogCLR (Qiu et al. 2023).

Both keep a moving average u of every image's contrast with its negatives.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import tensorflow as tf

from trainer.losses.loss import Projections
from trainer.settings import LossSettings


def make(settings: LossSettings) -> "GlobalContrastive":
    return GlobalContrastive(settings, VARIANTS[settings.variant])


@dataclass(frozen=True)
class GlobalContrastive:
    """The loss of SogCLR or iSogCLR. It stores `u` of every image (0 before its first visit) and, if learned, its temperature."""

    settings: LossSettings
    variant: "Variant"

    @property
    def vectors(self) -> Mapping[str, float]:
        if not self.variant.learns_temperature:
            return {"u": 0.0}
        return {"u": 0.0, "temperature": self.settings.temperature, "temperature_velocity": 0.0}

    def __call__(self, projections: Projections, stored: Mapping[str, tf.Tensor]) -> tuple[tf.Tensor, Mapping[str, tf.Tensor]]:
        own = {name: tf.gather(values, projections.positions) for name, values in stored.items()}
        gamma = tf.gather(gamma_of_visit(stored["u"], self.settings.gamma, self.variant), projections.positions)
        temperature = own.get("temperature", self.settings.temperature)
        result = global_contrastive(*projections, own["u"], gamma, temperature, self.variant)
        if not self.variant.learns_temperature:
            return result.loss, {"u": result.u}
        moved, velocity = next_temperature(temperature, own["temperature_velocity"], result.temperature_gradient, self.settings)
        return result.loss, {"u": result.u, "temperature": moved, "temperature_velocity": velocity}

    def metrics(self, vectors: Mapping[str, np.ndarray]) -> dict[str, float]:
        """Returns statistics of u and of learned temperatures over the images seen so far; empty before the first."""
        u = vectors["u"]
        seen = u > 0
        if not seen.any():
            return {}
        quantiles = np.quantile(u[seen], (0.01, 0.1, 0.5, 0.9, 0.99))
        metrics = {
            "train/u_mean": float(u[seen].mean()),
            "train/u_seen": float(seen.mean()),
            "train/global_objective": float(global_objective(tf.constant(u), self.settings.temperature)),
        }
        metrics |= {
            f"train/u_p{name}": float(value) for name, value in zip(("01", "10", "50", "90", "99"), quantiles, strict=True)
        }
        if self.variant.learns_temperature:
            temperature = vectors["temperature"][seen]
            metrics |= {"train/temperature_mean": float(temperature.mean()), "train/temperature_std": float(temperature.std())}
            metrics["train/global_objective"] = float(np.mean(temperature * np.log(u[seen])))
        return metrics


@dataclass(frozen=True)
class Variant:
    """How u is stored, and how it is initialized."""

    stored: Literal["mean", "sum"]
    """Whether u is the mean or the sum of the two views' estimates."""
    first_visit: Literal["zero", "image", "batch"]
    """First update of u. `zero`: as any other, from u = 0. `image`: gamma = 1 for each image whose u is 0. `batch`: gamma = 1 for
    all images of a batch if u is 0 for all of them."""
    learns_temperature: bool = False
    """Whether every image learns its own temperature (Qiu et al. 2023)."""


VARIANTS = {
    "paper": Variant(stored="mean", first_visit="image"),
    "tf_official": Variant(stored="sum", first_visit="zero"),
    "pt_official": Variant(stored="mean", first_visit="batch"),
    "isogclr": Variant(stored="mean", first_visit="image", learns_temperature=True),
}


def gamma_of_visit(u: tf.Tensor, gamma: float, variant: Variant) -> tf.Tensor:
    """Returns the gamma of each image of the global batch, [B] float32. `u`, [B] float32, holds its stored value."""
    constant = tf.fill(tf.shape(u), tf.constant(gamma, u.dtype))
    match variant.first_visit:
        case "zero":
            return constant
        case "image":
            return tf.where(u == 0.0, tf.ones_like(u), constant)
        case "batch":
            return tf.where(tf.reduce_sum(u) == 0.0, tf.ones_like(u), constant)


class Surrogate(NamedTuple):
    """The surrogate loss of b anchors, with their new u and the gradients of their temperatures."""

    loss: tf.Tensor
    """Scalar, whose gradient estimates the objective's gradient. Its value is not the objective: about -1.5 when trained."""
    u: tf.Tensor
    """[b] float32, new values to store; without gradient."""
    temperature_gradient: tf.Tensor
    """[b] float32, derivative of each anchor's objective by its temperature, without the term rho; without gradient."""


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
) -> Surrogate:
    """Returns the surrogate of the global contrastive loss (Yuan et al. 2022, Algorithm 1).

    `u` and `gamma`, [b] float32, are the anchors'. `temperature` is a number, or [b] float32, one for each anchor.
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
        # The derivative of tau log E exp(s/tau) by tau, with u as the estimate of the mean.
        by_temperature = tf.stop_gradient(tf.math.log(new_u) - weighted / temperatures)
        return weighted - tf.reduce_sum(cross * own, axis=1), new_u, by_temperature

    loss1, u1, by_temperature1 = surrogate(z1, all_z2, all_z1)
    loss2, u2, by_temperature2 = surrogate(z2, all_z1, all_z2)
    stored = u1 + u2 if variant.stored == "sum" else (u1 + u2) / 2.0
    return Surrogate(tf.reduce_mean(loss1 + loss2), stored, (by_temperature1 + by_temperature2) / 2.0)


def next_temperature(
    temperature: tf.Tensor, velocity: tf.Tensor, gradient: tf.Tensor, settings: LossSettings
) -> tuple[tf.Tensor, tf.Tensor]:
    """Returns the new temperatures of images and their new velocities (Qiu et al. 2023, Algorithm 1).

    All are [b] float32; `gradient` is `Surrogate.temperature_gradient`. The objective of an image is
    temperature * (log E exp(s / temperature) + rho), so a larger rho lowers the temperatures.
    """
    beta = settings.temperature_momentum
    velocity = (1.0 - beta) * velocity + beta * (gradient + settings.temperature_rho)
    moved = temperature - settings.temperature_learning_rate * velocity
    return tf.clip_by_value(moved, settings.temperature_min, settings.temperature_max), velocity


def global_objective(u: tf.Tensor, temperature: float) -> tf.Tensor:
    """Estimates the contrast term of the global objective: the mean of temperature * log(u) over the images seen so far.

    `u`, [N] float32, covers the whole dataset. It is 0 for images not seen yet.
    """
    seen = tf.cast(u > 0.0, u.dtype)
    logs = tf.math.log(tf.where(u > 0.0, u, tf.ones_like(u)))
    return temperature * tf.math.divide_no_nan(tf.reduce_sum(logs), tf.reduce_sum(seen))

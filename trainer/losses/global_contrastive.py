"""The global contrastive loss of SogCLR (Yuan et al. 2022), whose memory of every image is u, and iSogCLR's (Qiu et al. 2023)."""

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
    """The loss with its vectors: `u`, 0 where an image was not seen yet, and where every image learns a temperature, those."""

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
        """Returns what u, and the temperatures if they are learned, look like over the images seen so far."""
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


class Surrogate(NamedTuple):
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
) -> Surrogate:
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
    return Surrogate(tf.reduce_mean(loss1 + loss2), stored, (by_temperature1 + by_temperature2) / 2.0)


def next_temperature(
    temperature: tf.Tensor, velocity: tf.Tensor, gradient: tf.Tensor, settings: LossSettings
) -> tuple[tf.Tensor, tf.Tensor]:
    """Returns the temperatures of images after a visit, and their velocities (Qiu et al. 2023, Algorithm 1).

    All are [b] float32; `gradient` is `Surrogate.temperature_gradient`. The objective of an image is
    temperature * (log E exp(s / temperature) + rho), so a large rho asks for small temperatures.
    """
    beta = settings.temperature_momentum
    velocity = (1.0 - beta) * velocity + beta * (gradient + settings.temperature_rho)
    moved = temperature - settings.temperature_learning_rate * velocity
    return tf.clip_by_value(moved, settings.temperature_min, settings.temperature_max), velocity


def global_objective(u: tf.Tensor, temperature: float) -> tf.Tensor:
    """Returns the estimate of the contrast's part of the global objective, mean of temperature * log(u) over images seen (u > 0).

    `u` is the vector over the whole dataset, [N] float32; 0 where no image was seen yet.
    """
    seen = tf.cast(u > 0.0, u.dtype)
    logs = tf.math.log(tf.where(u > 0.0, u, tf.ones_like(u)))
    return temperature * tf.math.divide_no_nan(tf.reduce_sum(logs), tf.reduce_sum(seen))

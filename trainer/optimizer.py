"""The optimizers (LARS, momentum SGD, AdamW) and the learning rate schedule (linear warm-up, then cosine).

`no_decay` says for each variable whether it is excluded from weight decay and from LARS's layer-wise rate, as variables of BN,
biases and the supervised head are. The caller passes it; it is never inferred from names.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Protocol

import tensorflow as tf

from trainer.settings import OptimizerSettings


def total_steps(settings: OptimizerSettings, num_images: int) -> int:
    """Returns the number of steps of a run over `num_images` training images, as the official code counts them."""
    return num_images * settings.epochs // settings.global_batch_size + 1


def peak_learning_rate(settings: OptimizerSettings) -> float:
    """Returns the peak learning rate: base * sqrt(B), or base * B / 256 (Chen et al. 2020, appendix B.1)."""
    if settings.learning_rate_scaling == "sqrt":
        return settings.base_learning_rate * math.sqrt(settings.global_batch_size)
    return settings.base_learning_rate * settings.global_batch_size / 256.0


def learning_rate(settings: OptimizerSettings, num_images: int, step: tf.Tensor) -> tf.Tensor:
    """Returns the learning rate of `step` (0-based), a float32 scalar: linear from 0 to the peak, then cosine to 0.

    Computes in float32 and in the official code's order of operations: near the end 1 + cos cancels, so the order matters.
    """
    peak = peak_learning_rate(settings)
    warmup = int(settings.warmup_epochs * num_images // settings.global_batch_size)
    total = total_steps(settings, num_images)
    now = tf.cast(step, tf.float32)
    rising = now / max(warmup, 1) * peak
    done = tf.clip_by_value((now - warmup) / max(total - warmup, 1), 0.0, 1.0)
    falling = 0.5 * (1.0 + tf.cos(math.pi * done)) * peak
    return tf.where(now < warmup, rising, falling)


class Optimizer(Protocol):
    @property
    def slots(self) -> Mapping[str, Sequence[tf.Variable]]:
        """Slot variables by kind, as in "momentum". Each kind has one for each optimized variable, in the same order."""

    def apply(self, gradients: Sequence[tf.Tensor], learning_rate: tf.Tensor, step: tf.Tensor) -> None:
        """Updates the variables once. `step` is the number of earlier updates, an int64 scalar."""


class Lars:
    """LARS with classic momentum: the learning rate is part of the momentum buffer (You et al. 2017, as in SimCLR)."""

    def __init__(
        self,
        variables: Sequence[tf.Variable],
        no_decay: Sequence[bool],
        momentum: float = 0.9,
        weight_decay: float = 1e-6,
        trust_coefficient: float = 0.001,
    ) -> None:
        self.variables = list(variables)
        self.no_decay = list(no_decay)
        self.slots: Mapping[str, Sequence[tf.Variable]] = {"momentum": _zeros_like(self.variables, "momentum")}
        self.momentum = momentum
        self.weight_decay = weight_decay
        self.trust_coefficient = trust_coefficient

    def apply(self, gradients: Sequence[tf.Tensor], learning_rate: tf.Tensor, step: tf.Tensor) -> None:
        slots = self.slots["momentum"]
        for variable, slot, no_decay, gradient in zip(self.variables, slots, self.no_decay, gradients, strict=True):
            rate = learning_rate
            if not no_decay:
                gradient = gradient + self.weight_decay * variable
                weight_norm = tf.norm(variable)
                gradient_norm = tf.norm(gradient)
                both = tf.logical_and(weight_norm > 0.0, gradient_norm > 0.0)
                rate *= tf.where(both, self.trust_coefficient * tf.math.divide_no_nan(weight_norm, gradient_norm), 1.0)
            slot.assign(self.momentum * slot + rate * gradient)
            variable.assign_sub(slot)


class Momentum:
    """SGD with Nesterov momentum, and weight decay of the variables that are not `no_decay`."""

    def __init__(
        self, variables: Sequence[tf.Variable], no_decay: Sequence[bool], momentum: float = 0.9, weight_decay: float = 0.0
    ) -> None:
        self.variables = list(variables)
        self.no_decay = list(no_decay)
        self.slots: Mapping[str, Sequence[tf.Variable]] = {"momentum": _zeros_like(self.variables, "momentum")}
        self.momentum = momentum
        self.weight_decay = weight_decay

    def apply(self, gradients: Sequence[tf.Tensor], learning_rate: tf.Tensor, step: tf.Tensor) -> None:
        slots = self.slots["momentum"]
        for variable, slot, no_decay, gradient in zip(self.variables, slots, self.no_decay, gradients, strict=True):
            if not no_decay:
                gradient = gradient + self.weight_decay * variable
            slot.assign(self.momentum * slot + learning_rate * gradient)
            variable.assign_sub(self.momentum * slot + learning_rate * gradient)


class AdamW:
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019) of the variables that are not `no_decay`."""

    def __init__(
        self,
        variables: Sequence[tf.Variable],
        no_decay: Sequence[bool],
        beta_1: float = 0.9,
        beta_2: float = 0.999,
        weight_decay: float = 0.0,
        epsilon: float = 1e-8,
    ) -> None:
        self.variables = list(variables)
        self.no_decay = list(no_decay)
        self.slots: Mapping[str, Sequence[tf.Variable]] = {
            name: _zeros_like(self.variables, name) for name in ("first_moment", "second_moment")
        }
        self.beta_1 = beta_1
        self.beta_2 = beta_2
        self.weight_decay = weight_decay
        self.epsilon = epsilon

    def apply(self, gradients: Sequence[tf.Tensor], learning_rate: tf.Tensor, step: tf.Tensor) -> None:
        visits = tf.cast(step + 1, tf.float32)
        unbias_1, unbias_2 = (1.0 / (1.0 - beta**visits) for beta in (self.beta_1, self.beta_2))
        firsts, seconds = self.slots["first_moment"], self.slots["second_moment"]
        for variable, first, second, no_decay, gradient in zip(
            self.variables, firsts, seconds, self.no_decay, gradients, strict=True
        ):
            first.assign(self.beta_1 * first + (1.0 - self.beta_1) * gradient)
            second.assign(self.beta_2 * second + (1.0 - self.beta_2) * gradient**2)
            change = first * unbias_1 / (tf.sqrt(second * unbias_2) + self.epsilon)
            if not no_decay:
                change += self.weight_decay * variable
            variable.assign_sub(learning_rate * change)


def make_optimizer(settings: OptimizerSettings, variables: Sequence[tf.Variable], no_decay: Sequence[bool]) -> Optimizer:
    match settings.name:
        case "lars":
            return Lars(variables, no_decay, momentum=settings.momentum, weight_decay=settings.weight_decay)
        case "momentum":
            return Momentum(variables, no_decay, momentum=settings.momentum, weight_decay=settings.weight_decay)
        case "adamw":
            return AdamW(
                variables, no_decay, beta_1=settings.momentum, beta_2=settings.adam_beta_2, weight_decay=settings.weight_decay
            )


def _zeros_like(variables: Sequence[tf.Variable], name: str) -> list[tf.Variable]:
    return [tf.Variable(tf.zeros(variable.shape), trainable=False, name=name) for variable in variables]

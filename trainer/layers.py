"""Batch normalisation, and initial values that do not depend on the order in which layers are made."""

import zlib
from typing import Any

import keras
import tensorflow as tf


def initializer(kind: str, seed: int, name: str) -> keras.initializers.Initializer:
    """Returns the initializer of the kernel called `name`: its values are a function of (kind, seed, name) alone.

    `kernel`: truncated normal of variance 1/fan_in, for convolutions; `head`: normal of standard deviation .01 (both SimCLR's).
    """
    own_seed = zlib.crc32(f"{seed}/{name}".encode()) & 0x7FFFFFFF
    if kind == "head":
        return keras.initializers.RandomNormal(stddev=0.01, seed=own_seed)
    return keras.initializers.VarianceScaling(scale=1.0, mode="fan_in", distribution="truncated_normal", seed=own_seed)


@keras.saving.register_keras_serializable(package="sogclr")
class BatchNorm(keras.layers.Layer):
    """Batch normalisation over all axes but the last, momentum .9, epsilon 1e-5, as in SimCLR.

    The moving variance is that of the batch itself, without Bessel's correction, so that it is the same however a batch is
    divided over replicas.
    """

    def __init__(
        self,
        center: bool = True,
        zero_scale: bool = False,
        momentum: float = 0.9,
        epsilon: float = 1e-5,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.center = center
        self.zero_scale = zero_scale
        self.momentum = momentum
        self.epsilon = epsilon

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        channels = (input_shape[-1],)
        self.gamma = self.add_weight(name="gamma", shape=channels, initializer="zeros" if self.zero_scale else "ones")
        self.beta = self.add_weight(name="beta", shape=channels, initializer="zeros") if self.center else None
        self.moving_mean = self.add_weight(name="moving_mean", shape=channels, initializer="zeros", trainable=False)
        self.moving_variance = self.add_weight(name="moving_variance", shape=channels, initializer="ones", trainable=False)

    def call(self, inputs: tf.Tensor, training: bool = False) -> tf.Tensor:
        channels = inputs.shape[-1]
        planes = inputs if len(inputs.shape) == 4 else tf.reshape(inputs, [-1, 1, 1, channels])
        gamma = tf.convert_to_tensor(self.gamma)
        beta = tf.convert_to_tensor(self.beta) if self.center else tf.zeros_like(gamma)
        if not training:
            mean, variance = tf.convert_to_tensor(self.moving_mean), tf.convert_to_tensor(self.moving_variance)
            scale = gamma * tf.math.rsqrt(variance + self.epsilon)
            return inputs * scale + (beta - mean * scale)
        outputs, mean, unbiased, *_ = tf.raw_ops.FusedBatchNormV3(
            x=planes, scale=gamma, offset=beta, mean=[], variance=[], epsilon=self.epsilon, is_training=True
        )
        count = tf.cast(tf.size(planes) // channels, tf.float32)
        variance = unbiased * (count - 1.0) / count
        self.moving_mean.assign(self.moving_mean * self.momentum + mean * (1.0 - self.momentum))
        self.moving_variance.assign(self.moving_variance * self.momentum + variance * (1.0 - self.momentum))
        return tf.reshape(outputs, tf.shape(inputs))

    def get_config(self) -> dict:
        own = {"center": self.center, "zero_scale": self.zero_scale, "momentum": self.momentum, "epsilon": self.epsilon}
        return {**super().get_config(), **own}

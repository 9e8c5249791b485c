"""Batch normalisation over all replicas, and initial values that do not depend on the order in which layers are made."""

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
    """Batch normalisation over all axes but the last and over all replicas, momentum .9, epsilon 1e-5, as in SimCLR.

    The moving variance is that of the batch itself, without Bessel's correction, so that it is the same however a batch is
    divided over replicas. Statistics are float32 whatever the inputs are.
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
        def weight(name: str, initial: str, trainable: bool = True) -> keras.Variable:
            return self.add_weight(
                name=name, shape=(input_shape[-1],), initializer=initial, trainable=trainable, autocast=False, dtype="float32"
            )

        self.gamma = weight("gamma", "zeros" if self.zero_scale else "ones")
        self.beta = weight("beta", "zeros") if self.center else None
        self.moving_mean = weight("moving_mean", "zeros", trainable=False)
        self.moving_variance = weight("moving_variance", "ones", trainable=False)

    def call(self, inputs: tf.Tensor, training: bool = False) -> tf.Tensor:
        gamma = tf.convert_to_tensor(self.gamma)
        beta = tf.convert_to_tensor(self.beta) if self.center else tf.zeros_like(gamma)
        if not training:
            return self._scaled(
                inputs, tf.convert_to_tensor(self.moving_mean), tf.convert_to_tensor(self.moving_variance), gamma, beta
            )
        context = tf.distribute.get_replica_context()
        if context is None or context.num_replicas_in_sync == 1:
            outputs, mean, variance = self._of_one_replica(inputs, gamma, beta)
        else:
            axes = list(range(len(inputs.shape) - 1))
            values = tf.cast(inputs, tf.float32)
            moments = tf.stack([tf.reduce_mean(values, axes), tf.reduce_mean(tf.square(values), axes)])
            mean, of_squares = tf.unstack(context.all_reduce(tf.distribute.ReduceOp.MEAN, moments))
            variance = tf.maximum(of_squares - tf.square(mean), 0.0)
            outputs = self._scaled(inputs, mean, variance, gamma, beta)
        self.moving_mean.value.assign(self.moving_mean * self.momentum + mean * (1.0 - self.momentum))
        self.moving_variance.value.assign(self.moving_variance * self.momentum + variance * (1.0 - self.momentum))
        return outputs

    def _scaled(self, inputs: tf.Tensor, mean: tf.Tensor, variance: tf.Tensor, gamma: tf.Tensor, beta: tf.Tensor) -> tf.Tensor:
        scale = gamma * tf.math.rsqrt(variance + self.epsilon)
        return inputs * tf.cast(scale, inputs.dtype) + tf.cast(beta - mean * scale, inputs.dtype)

    def _of_one_replica(self, inputs: tf.Tensor, gamma: tf.Tensor, beta: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        """Returns outputs, mean and variance by the one operation that every device has made fast."""
        channels = inputs.shape[-1]
        planes = inputs if len(inputs.shape) == 4 else tf.reshape(inputs, [-1, 1, 1, channels])
        outputs, mean, unbiased, *_ = tf.raw_ops.FusedBatchNormV3(
            x=planes, scale=gamma, offset=beta, mean=[], variance=[], epsilon=self.epsilon, is_training=True
        )
        count = tf.cast(tf.size(planes) // channels, tf.float32)
        return tf.reshape(outputs, tf.shape(inputs)), mean, unbiased * (count - 1.0) / count

    def get_config(self) -> dict:
        own = {"center": self.center, "zero_scale": self.zero_scale, "momentum": self.momentum, "epsilon": self.epsilon}
        return {**super().get_config(), **own}

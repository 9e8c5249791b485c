"""Batch normalisation over all replicas, and initializers that do not depend on the order in which layers are created."""

import zlib
from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from trainer.distribution import Alone, Replicas

OfBatch = Callable[[tf.Tensor, Replicas], tuple[tf.Tensor, tf.Tensor, tf.Tensor]]
"""Normalises rows over replicas. Returns outputs, mean and variance."""


def initializer(kind: str, seed: int, name: str) -> keras.initializers.Initializer:
    """Returns the initializer of the weight `name`. Its values depend only on (kind, seed, name).

    `kernel` is a truncated normal of variance 1/fan_in, for convolutions. `head` is a normal of standard deviation .01. Both are
    SimCLR's.
    """
    own_seed = zlib.crc32(f"{seed}/{name}".encode()) & 0x7FFFFFFF
    if kind == "head":
        return keras.initializers.RandomNormal(stddev=0.01, seed=own_seed)
    return keras.initializers.VarianceScaling(scale=1.0, mode="fan_in", distribution="truncated_normal", seed=own_seed)


@keras.saving.register_keras_serializable(package="sogclr")
class BatchNorm(keras.layers.Layer):
    """Batch normalisation over all axes but the last and over all replicas, with SimCLR's momentum .9 and epsilon 1e-5.

    If `relu`, a ReLU follows. `replicas` are by default those of tf.distribute.

    With `ghost_rows` above 0, every so many consecutive rows of a replica's batch are normalised by their own statistics in
    training, as a ghost batch (Hoffer et al. 2017). They must divide the batch. The moving averages then take the mean over all
    ghost batches of all replicas.

    The moving variance averages the batch variance without Bessel's correction, so it does not depend on how a batch is divided
    over replicas. Statistics are float32, whatever the type of the inputs.
    """

    def __init__(
        self,
        center: bool = True,
        zero_scale: bool = False,
        relu: bool = False,
        replicas: Replicas | None = None,
        momentum: float = 0.9,
        epsilon: float = 1e-5,
        ghost_rows: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.center = center
        self.zero_scale = zero_scale
        self.relu = relu
        self.replicas = replicas or Replicas()
        self.momentum = momentum
        self.epsilon = epsilon
        self.ghost_rows = ghost_rows

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
            scale, offset = self._of_moving_moments(gamma, beta)
            outputs = inputs * tf.cast(scale, inputs.dtype) + tf.cast(offset, inputs.dtype)
            return tf.nn.relu(outputs) if self.relu else outputs

        def of_batch(rows: tf.Tensor, replicas: Replicas) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
            if replicas.count == 1 and not self.replicas.recompute_in_backward:
                return self._of_one_replica(rows, gamma, beta)
            return normalized(rows, gamma, beta, self.epsilon, self.relu, replicas)

        return self._trained(inputs, of_batch)

    def _trained(self, inputs: tf.Tensor, of_batch: OfBatch) -> tf.Tensor:
        """Returns the outputs of `of_batch` on the global batch, or on each ghost batch, and moves the moving moments."""
        if self.ghost_rows == 0:
            outputs, mean, variance = of_batch(inputs, self.replicas)
        else:
            parts = [of_batch(rows, Alone()) for rows in tf.split(inputs, inputs.shape[0] // self.ghost_rows)]
            outputs = tf.concat([part for part, *_ in parts], axis=0)
            moments = tf.reduce_mean(tf.stack([part[1:] for part in parts]), axis=0)
            mean, variance = tf.unstack(self.replicas.mean(moments))
        self._move(mean, variance)
        return outputs

    def _of_moving_moments(self, gamma: tf.Tensor, beta: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        scale = gamma * tf.math.rsqrt(tf.convert_to_tensor(self.moving_variance) + self.epsilon)
        return scale, beta - tf.convert_to_tensor(self.moving_mean) * scale

    def _move(self, mean: tf.Tensor, variance: tf.Tensor) -> None:
        self.moving_mean.value.assign(self.moving_mean * self.momentum + mean * (1.0 - self.momentum))
        self.moving_variance.value.assign(self.moving_variance * self.momentum + variance * (1.0 - self.momentum))

    def _of_one_replica(self, inputs: tf.Tensor, gamma: tf.Tensor, beta: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        """Returns outputs, mean and variance, computed by TensorFlow's fused operation, which is fast on every device."""
        channels = inputs.shape[-1]
        planes = inputs if len(inputs.shape) == 4 else tf.reshape(inputs, [-1, 1, 1, channels])
        outputs, mean, unbiased, *_ = tf.raw_ops.FusedBatchNormV3(
            x=planes, scale=gamma, offset=beta, mean=[], variance=[], epsilon=self.epsilon, is_training=True
        )
        count = tf.cast(tf.size(planes) // channels, tf.float32)
        outputs = tf.reshape(tf.nn.relu(outputs) if self.relu else outputs, tf.shape(inputs))
        return outputs, mean, unbiased * (count - 1.0) / count

    def get_config(self) -> dict:
        names = ("center", "zero_scale", "relu", "momentum", "epsilon")
        return {**super().get_config(), **{name: getattr(self, name) for name in names}}


@keras.saving.register_keras_serializable(package="sogclr")
class PointwiseNorm(BatchNorm):
    """A 1x1 convolution to `filters` channels, without bias, followed by batch normalisation."""

    def __init__(self, filters: int, kernel_initializer: Any = "glorot_uniform", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.filters = filters
        self.kernel_initializer = keras.initializers.get(kernel_initializer)

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        shape = (1, 1, input_shape[-1], self.filters)
        self.kernel = self.add_weight(
            name="kernel", shape=shape, initializer=self.kernel_initializer, autocast=False, dtype="float32"
        )
        super().build((*input_shape[:-1], self.filters))

    def call(self, inputs: tf.Tensor, training: bool = False) -> tf.Tensor:
        kernel = tf.convert_to_tensor(self.kernel)
        if not training or not self.replicas.recompute_in_backward:
            outputs = tf.nn.conv2d(inputs, tf.cast(kernel, inputs.dtype), 1, "VALID")
            return super().call(outputs, training=training)
        gamma, beta = tf.convert_to_tensor(self.gamma), tf.convert_to_tensor(self.beta)
        return self._trained(
            inputs, lambda rows, replicas: pointwise_normalized(rows, kernel, gamma, beta, self.epsilon, replicas)
        )

    def compute_output_shape(self, input_shape: tuple[int | None, ...]) -> tuple[int | None, ...]:
        return (*input_shape[:-1], self.filters)

    def get_config(self) -> dict:
        serialized = keras.initializers.serialize(self.kernel_initializer)
        return {**super().get_config(), "filters": self.filters, "kernel_initializer": serialized}


def normalized(
    inputs: tf.Tensor, gamma: tf.Tensor, beta: tf.Tensor, epsilon: float, relu: bool, replicas: Replicas
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """Normalises `inputs` [..., C] by their mean and variance over all replicas. Returns (outputs, mean, variance), moments [C].

    The moments are float32. The gradient is explicit (Ioffe & Szegedy 2015), because memory traffic dominates the cost of a step
    on a TPU: the forward and the backward pass read `inputs` in their own type, and keep no other tensor of that size, not even
    the mask of the ReLU.
    """
    axes = list(range(len(inputs.shape) - 1))

    @tf.custom_gradient
    def forward(inputs: tf.Tensor, gamma: tf.Tensor, beta: tf.Tensor) -> Any:
        values = tf.cast(inputs, tf.float32)
        moments = replicas.mean(tf.stack([tf.reduce_mean(values, axes), tf.reduce_mean(tf.square(values), axes)]))
        mean, of_squares = tf.unstack(moments)
        variance = tf.maximum(of_squares - tf.square(mean), 0.0)
        inverse = tf.math.rsqrt(variance + epsilon)
        scale = gamma * inverse
        offset = beta - mean * scale
        outputs = values * scale + offset

        def backward(upstream: tf.Tensor, *_: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
            values, by_outputs = tf.cast(inputs, tf.float32), tf.cast(upstream, tf.float32)
            if relu:
                by_outputs = tf.where(values * scale + offset > 0.0, by_outputs, 0.0)
            standard = (values - mean) * inverse
            by_beta, by_gamma = tf.reduce_sum(by_outputs, axes), tf.reduce_sum(by_outputs * standard, axes)
            mean_by_beta, mean_by_gamma = tf.unstack(replicas.mean(tf.stack([by_beta, by_gamma]) / _count(values)))
            by_inputs = scale * (by_outputs - mean_by_beta - standard * mean_by_gamma)
            return tf.cast(by_inputs, inputs.dtype), by_gamma, by_beta

        return (tf.cast(tf.nn.relu(outputs) if relu else outputs, inputs.dtype), mean, variance), backward

    return forward(inputs, gamma, beta)


def pointwise_normalized(
    inputs: tf.Tensor, kernel: tf.Tensor, gamma: tf.Tensor, beta: tf.Tensor, epsilon: float, replicas: Replicas
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """Convolves `inputs` [n, h, w, C] with the 1x1 `kernel` [1, 1, C, K] and normalises the result over all replicas.

    Returns (outputs [n, h, w, K], mean [K], variance [K]), moments float32: the same as `normalized` of the convolution. But it
    neither writes the convolution's outputs to memory nor reads them again. The outputs are linear in `inputs`, so their moments
    and their part of the gradient follow from the mean [C] and the second moment [C, C] of `inputs`. With K = 4 C this saves a
    quarter of a ResNet step's memory traffic.
    """

    @tf.custom_gradient
    def forward(inputs: tf.Tensor, kernel: tf.Tensor, gamma: tf.Tensor, beta: tf.Tensor) -> Any:
        weights = kernel[0, 0]
        values = tf.cast(inputs, tf.float32)
        own_mean = tf.reduce_mean(values, [0, 1, 2])
        own_second = tf.einsum("nhwi,nhwj->ij", values, values) / _count(values)
        mean_in, second = tf.split(replicas.mean(tf.concat([own_mean[None], own_second], axis=0)), [1, own_mean.shape[0]])
        mean_in = mean_in[0]
        covariance = second - mean_in[:, None] * mean_in[None, :]
        mean = product(mean_in[None], weights)[0]
        variance = tf.maximum(tf.reduce_sum(weights * product(covariance, weights), axis=0), 0.0)
        inverse = tf.math.rsqrt(variance + epsilon)
        scale = gamma * inverse
        outputs = tf.cast(_pointwise(inputs, weights * scale) + (beta - mean * scale), inputs.dtype)

        def backward(upstream: tf.Tensor, *_: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor, tf.Tensor]:
            by_outputs = tf.cast(upstream, tf.float32)
            across = tf.einsum("nhwi,nhwj->ij", values, by_outputs)
            by_beta = tf.reduce_sum(by_outputs, [0, 1, 2])
            by_gamma = (tf.reduce_sum(weights * across, axis=0) - mean * by_beta) * inverse
            mean_by_beta, mean_by_gamma = tf.unstack(replicas.mean(tf.stack([by_beta, by_gamma]) / _count(values)))
            # The gradient by the convolution's outputs z = x W is scale * (dy - mean_by_beta - (z - mean) * along).
            along = mean_by_gamma * inverse
            towards = scale * (mean * along - mean_by_beta)
            by_inputs = (
                _pointwise(upstream, tf.transpose(weights * scale))
                - _pointwise(inputs, product(weights * (scale * along), weights, transpose_b=True))
                + product(towards[None], weights, transpose_b=True)
            )
            own = _count(values) * (own_mean[:, None] * towards - product(own_second, weights) * (scale * along))
            return tf.cast(by_inputs, inputs.dtype), (across * scale + own)[None, None], by_gamma, by_beta

        return (outputs, mean, variance), backward

    return forward(inputs, kernel, gamma, beta)


def _count(values: tf.Tensor) -> tf.Tensor:
    """Returns the number of values per channel, a float32 scalar."""
    return tf.cast(tf.size(values) // values.shape[-1], tf.float32)


def _pointwise(inputs: tf.Tensor, weights: tf.Tensor) -> tf.Tensor:
    """Returns the 1x1 convolution of `inputs` [n, h, w, C] with `weights` [C, K], computed in the inputs' type, as float32."""
    return tf.cast(tf.nn.conv2d(inputs, tf.cast(weights, inputs.dtype)[None, None], 1, "VALID"), tf.float32)


def product(a: tf.Tensor, b: tf.Tensor, transpose_a: bool = False, transpose_b: bool = False) -> tf.Tensor:
    """Returns a product of float32 matrices to nearly float32's accuracy, even if the device rounds the factors to bfloat16."""

    def rounded(values: tf.Tensor) -> tf.Tensor:
        # Masks bits, because a compiler may remove a cast to bfloat16 and back.
        return tf.bitcast(tf.bitwise.bitwise_and(tf.bitcast(values, tf.uint32), tf.constant(0xFFFF0000, tf.uint32)), tf.float32)

    def multiplied(a: tf.Tensor, b: tf.Tensor) -> tf.Tensor:
        return tf.matmul(a, b, transpose_a=transpose_a, transpose_b=transpose_b)

    first_a, first_b = rounded(a), rounded(b)
    return multiplied(first_a, first_b) + (multiplied(first_a, b - first_b) + multiplied(a - first_a, b))

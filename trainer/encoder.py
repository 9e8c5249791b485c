"""The encoder: SimCLR's ResNet (v1, He et al. 2016) as a functional Keras model."""

import keras
import tensorflow as tf

from trainer.layers import BatchNorm, initializer
from trainer.records import UserError

_BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3)}
_EXPANSION = {18: 1, 34: 1, 50: 4}


def make_encoder(depth: int, width_multiplier: float, image_size: int, cifar_stem: bool, seed: int = 0) -> keras.Model:
    """Returns a model from images, [B, S, S, 3] float32 in [0, 1], to features, [B, F] float32.

    F is 512 (depth 18, 34) or 2048 (depth 50), times `width_multiplier`. Initial weights depend on `seed` and on nothing
    else. Raises UserError for a depth that is not there.
    """
    if depth not in _BLOCKS:
        raise UserError(f"depth={depth} is not built yet: take one of {', '.join(map(str, _BLOCKS))}")
    images = keras.Input((image_size, image_size, 3), name="images")
    width = int(64 * width_multiplier)
    if cifar_stem:
        x = _conv(images, width, 3, 1, seed, "stem_conv")
        x = _relu(_norm(x, "stem_norm"))
    else:
        x = _conv(images, width, 7, 2, seed, "stem_conv")
        x = _relu(_norm(x, "stem_norm"))
        x = keras.layers.MaxPooling2D(3, strides=2, padding="same", name="stem_pool")(x)
    for group, blocks in enumerate(_BLOCKS[depth]):
        for block in range(blocks):
            stride = 2 if group > 0 and block == 0 else 1
            x = _residual_block(
                x, width * 2**group, _EXPANSION[depth], stride, block == 0, seed, f"group{group + 1}_block{block + 1}"
            )
    features = keras.layers.GlobalAveragePooling2D(name="features")(x)
    return keras.Model(images, features, name="encoder")


def _residual_block(x: tf.Tensor, width: int, expansion: int, stride: int, projected: bool, seed: int, name: str) -> tf.Tensor:
    """Two 3x3 convolutions, or 1x1, 3x3, 1x1 where `expansion` is above 1; the stride is in the (first) 3x3."""
    shortcut = x
    if projected:
        shortcut = _norm(_conv(x, width * expansion, 1, stride, seed, f"{name}_shortcut_conv"), f"{name}_shortcut_norm")
    kernels = [3, 3] if expansion == 1 else [1, 3, 1]
    strided = 0 if expansion == 1 else 1
    for index, kernel in enumerate(kernels):
        last = index == len(kernels) - 1
        filters = width * expansion if last else width
        x = _conv(x, filters, kernel, stride if index == strided else 1, seed, f"{name}_conv{index + 1}")
        x = _norm(x, f"{name}_norm{index + 1}", zero_scale=last)
        if not last:
            x = _relu(x)
    return _relu(keras.layers.Add(name=f"{name}_add")([x, shortcut]))


def _conv(x: tf.Tensor, filters: int, kernel: int, stride: int, seed: int, name: str) -> tf.Tensor:
    """A convolution without bias; where it strides, padded alike whatever the size of the image."""
    if stride > 1 and kernel > 1:
        before = (kernel - 1) // 2
        x = keras.layers.ZeroPadding2D(((before, kernel - 1 - before),) * 2, name=f"{name}_pad")(x)
    padding = "same" if stride == 1 else "valid"
    kernel_initializer = initializer("kernel", seed, name)
    return keras.layers.Conv2D(
        filters, kernel, strides=stride, padding=padding, use_bias=False, kernel_initializer=kernel_initializer, name=name
    )(x)


def _norm(x: tf.Tensor, name: str, zero_scale: bool = False) -> tf.Tensor:
    return BatchNorm(zero_scale=zero_scale, name=name)(x)


def _relu(x: tf.Tensor) -> tf.Tensor:
    return keras.layers.ReLU()(x)

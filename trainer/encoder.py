"""The encoder: SimCLR's ResNet (v1, He et al. 2016; selective kernels, Li et al. 2019) as a functional Keras model."""

from dataclasses import dataclass

import keras
import tensorflow as tf

from trainer.distribution import Replicas
from trainer.encoder_cost import BLOCKS, SMALLEST_SQUEEZE
from trainer.layers import BatchNorm, PointwiseNorm, initializer
from trainer.settings import EncoderSettings

IMAGENET_MEAN, IMAGENET_DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Mean and standard deviation of ImageNet's pixels, R, G and B in [0, 1], as torchvision has them."""


def make_encoder(
    settings: EncoderSettings, image_size: int, seed: int = 0, replicas: Replicas | None = None, ghost_rows: int = 0
) -> keras.Model:
    """Returns a model from images, [B, S, S, 3] float32 in [0, 1] with S = `image_size`, to features, [B, F] float32.

    F is `settings.feature_dim`. The initial value of a weight depends only on `seed` and its name. Convolutions compute in
    `settings.precision`. BN takes its statistics over `replicas`, by default those of tf.distribute, or, with `ghost_rows` above
    0, over that many rows of a replica's batch.
    """
    dtype = "float32" if settings.precision == "float32" else "mixed_bfloat16"
    build = _Builder(seed, settings.selective_kernel_ratio, dtype, replicas, ghost_rows)
    images = keras.Input((image_size, image_size, 3), name="images")
    width = int(64 * settings.width_multiplier)
    x = images if settings.input_normalization == "none" else build.normalized(images)
    x = build.stem(x, width, settings.cifar_stem)
    if not settings.cifar_stem:
        x = build.stem_pool(x, settings.pool_padding)
    for group, blocks in enumerate(BLOCKS[settings.depth]):
        for block in range(blocks):
            stride = 2 if group > 0 and block == 0 else 1
            make_block = build.basic_block if settings.depth < 50 else build.bottleneck_block
            x = make_block(x, width * 2**group, stride, block == 0, f"group{group + 1}_block{block + 1}")
    features = keras.layers.GlobalAveragePooling2D(name="features", dtype="float32")(x)
    return keras.Model(images, features, name="encoder")


@dataclass(frozen=True)
class _Builder:
    """Adds layers to a functional model. Every layer has a unique name, which determines its initial values."""

    seed: int
    selective_kernel_ratio: float
    dtype: str
    """Name of Keras's dtype policy."""
    replicas: Replicas | None
    ghost_rows: int

    def normalized(self, images: tf.Tensor) -> tf.Tensor:
        variance = [deviation**2 for deviation in IMAGENET_DEVIATION]
        return keras.layers.Normalization(mean=IMAGENET_MEAN, variance=variance, name="normalized", dtype="float32")(images)

    def stem(self, images: tf.Tensor, width: int, small: bool) -> tf.Tensor:
        """Adds the stem's convolutions. They halve the side of the image, or keep it if `small`."""
        if small or self.selective_kernel_ratio == 0:
            x = self.conv(images, width, 3 if small else 7, 1 if small else 2, "stem_conv")
            x = self.norm(x, "stem_norm", relu=True)
        else:
            x = images
            for number, filters in enumerate((width // 2, width // 2, width), 1):
                x = self.conv(x, filters, 3, 2 if number == 1 else 1, f"stem_conv{number}")
                x = self.norm(x, f"stem_norm{number}", relu=True)
        return x

    def stem_pool(self, x: tf.Tensor, padding: str) -> tf.Tensor:
        """Adds the pool after the stem, which halves the side. What it gets is not negative, so zeros pad it as PyTorch does."""
        if padding == "torch":
            x = keras.layers.ZeroPadding2D(1, name="stem_pool_pad", dtype=self.dtype)(x)
        same = "same" if padding == "tensorflow" else "valid"
        return keras.layers.MaxPooling2D(3, strides=2, padding=same, name="stem_pool", dtype=self.dtype)(x)

    def basic_block(self, x: tf.Tensor, width: int, stride: int, projected: bool, name: str) -> tf.Tensor:
        """Adds two 3x3 convolutions. The first has the stride."""
        shortcut = self.shortcut(x, width, stride, name) if projected else x
        x = self.norm(self.conv(x, width, 3, stride, f"{name}_conv1"), f"{name}_norm1", relu=True)
        x = self.norm(self.conv(x, width, 3, 1, f"{name}_conv2"), f"{name}_norm2", zero_scale=True)
        return self.joined(x, shortcut, name)

    def bottleneck_block(self, x: tf.Tensor, width: int, stride: int, projected: bool, name: str) -> tf.Tensor:
        """Adds convolutions of 1x1, 3x3 and 1x1. The 3x3 has the stride; the last has 4 * `width` channels."""
        shortcut = self.shortcut(x, 4 * width, stride, name) if projected else x
        x = self.norm(self.conv(x, width, 1, 1, f"{name}_conv1"), f"{name}_norm1", relu=True)
        if self.selective_kernel_ratio > 0:
            x = self.selective_kernel(x, width, stride, name)
        else:
            x = self.norm(self.conv(x, width, 3, stride, f"{name}_conv2"), f"{name}_norm2", relu=True)
        x = self.pointwise_norm(x, 4 * width, f"{name}_conv3", zero_scale=True)
        return self.joined(x, shortcut, name)

    def shortcut(self, x: tf.Tensor, filters: int, stride: int, name: str) -> tf.Tensor:
        if self.selective_kernel_ratio > 0:
            if stride > 1:
                x = keras.layers.ZeroPadding2D(((0, 1), (0, 1)), name=f"{name}_shortcut_pad", dtype=self.dtype)(x)
            padding = "same" if stride == 1 else "valid"
            x = keras.layers.AveragePooling2D(2, stride, padding, name=f"{name}_shortcut_pool", dtype=self.dtype)(x)
            stride = 1
        return self.pointwise_norm(x[:, ::stride, ::stride] if stride > 1 else x, filters, f"{name}_shortcut")

    def joined(self, x: tf.Tensor, shortcut: tf.Tensor, name: str) -> tf.Tensor:
        return self.relu(keras.layers.Add(name=f"{name}_add", dtype=self.dtype)([x, shortcut]))

    def selective_kernel(self, x: tf.Tensor, width: int, stride: int, name: str) -> tf.Tensor:
        """Adds two 3x3 paths and sums them, weighted per channel by attention over the whole image (Li et al. 2019)."""
        squeeze = max(int(width * self.selective_kernel_ratio), SMALLEST_SQUEEZE)
        x = self.norm(self.conv(x, 2 * width, 3, stride, f"{name}_conv2"), f"{name}_norm2", relu=True)
        paths = keras.layers.Reshape((x.shape[1], x.shape[2], 2, width), name=f"{name}_paths", dtype=self.dtype)(x)
        seen = keras.ops.mean(keras.ops.sum(paths, axis=3), axis=(1, 2), keepdims=True)
        seen = self.norm(self.conv(seen, squeeze, 1, 1, f"{name}_squeeze"), f"{name}_squeeze_norm", relu=True)
        logits = self.conv(seen, 2 * width, 1, 1, f"{name}_attend")
        logits = keras.layers.Reshape((1, 1, 2, width), name=f"{name}_logits", dtype=self.dtype)(logits)
        return keras.ops.sum(paths * keras.ops.softmax(logits, axis=3), axis=3)

    def conv(self, x: tf.Tensor, filters: int, kernel: int, stride: int, name: str) -> tf.Tensor:
        """Adds a convolution without bias. If it has a stride, its padding does not depend on the size of the image."""
        if stride > 1 and kernel > 1:
            before = (kernel - 1) // 2
            padding = ((before, kernel - 1 - before),) * 2
            x = keras.layers.ZeroPadding2D(padding, name=f"{name}_pad", dtype=self.dtype)(x)
        return keras.layers.Conv2D(
            filters,
            kernel,
            strides=stride,
            padding="same" if stride == 1 else "valid",
            use_bias=False,
            kernel_initializer=initializer("kernel", self.seed, name),
            name=name,
            dtype=self.dtype,
        )(x)

    def norm(self, x: tf.Tensor, name: str, zero_scale: bool = False, relu: bool = False) -> tf.Tensor:
        return BatchNorm(
            zero_scale=zero_scale, relu=relu, replicas=self.replicas, ghost_rows=self.ghost_rows, name=name, dtype=self.dtype
        )(x)

    def pointwise_norm(self, x: tf.Tensor, filters: int, name: str, zero_scale: bool = False) -> tf.Tensor:
        return PointwiseNorm(
            filters,
            kernel_initializer=initializer("kernel", self.seed, name),
            zero_scale=zero_scale,
            replicas=self.replicas,
            ghost_rows=self.ghost_rows,
            name=name,
            dtype=self.dtype,
        )(x)

    def relu(self, x: tf.Tensor) -> tf.Tensor:
        return keras.layers.ReLU(dtype=self.dtype)(x)

"""Compares an imported or exported encoder with its source: the features of a few images, computed in two ways.

The source's features come from PyTorch where it is installed and the source is PyTorch's. Otherwise they come from the plain
operations below, which read the source's arrays and share nothing with `trainer.encoder`.
"""

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf

from trainer.encoder_cost import BLOCKS
from trainer.importing.network import Layer, layers
from trainer.settings import EncoderSettings
from trainer.shared.errors import UserError

IMAGES = 16
TOLERANCE = 1e-4
"""Largest difference of two features, as a fraction of the largest feature."""
_SEED = 0
_MEAN, _DEVIATION = np.array((0.485, 0.456, 0.406), np.float32), np.array((0.229, 0.224, 0.225), np.float32)

Normalised = tuple[np.ndarray, Mapping[str, np.ndarray] | None]
"""A kernel, [height, width, inputs, outputs], and the arrays of its batch normalisation, named as in this project."""


@dataclass(frozen=True)
class Comparison:
    """How far the features of an encoder are from its source's."""

    images: int
    side: int
    """Side of the images in pixels."""
    by: str
    """What computed the source's features."""
    difference: float
    """Largest difference of two features."""
    largest: float
    """Largest feature."""

    def __str__(self) -> str:
        return (
            f"features of {self.images} seeded images of {self.side} px differ from the source's, computed with {self.by}, "
            f"by {self.difference:.1e} at most; the largest feature is {self.largest:.2f}"
        )


def seeded_images(side: int) -> np.ndarray:
    """Returns [16, side, side, 3] float32 in [0, 1]: coarse and fine noise. The same for every call."""
    random = np.random.default_rng(_SEED)
    coarse = random.random((IMAGES, 4, 4, 3), np.float32)
    smooth = np.asarray(tf.image.resize(coarse, (side, side), "bilinear"))
    return np.clip(0.7 * smooth + 0.3 * random.random((IMAGES, side, side, 3), np.float32), 0, 1)


def compare(features: np.ndarray, source: np.ndarray, side: int, by: str, path: str) -> Comparison:
    """Compares two arrays of features, [n, F]. Raises UserError if they differ, or if they say nothing about the images."""
    largest = float(np.abs(source).max())
    if not np.isfinite(source).all() or largest == 0 or float(np.ptp(source, axis=0).max()) <= 1e-6 * largest:
        what = "not finite" if not np.isfinite(source).all() else "all zero" if largest == 0 else "the same for all images"
        raise UserError(f"the features of {path} are {what}: its weights are not those of a trained encoder")
    found = Comparison(len(features), side, by, float(np.abs(features - source).max()), largest)
    if not found.difference <= TOLERANCE * largest:
        raise UserError(f"{path} is not translated exactly: {found}")
    return found


def torch_is_there() -> bool:
    return importlib.util.find_spec("torch") is not None


def features_by_torch(settings: EncoderSettings, arrays: Mapping[str, np.ndarray], images: np.ndarray) -> np.ndarray:
    """Returns the features, [n, F], of the network in `trainer.torch_encoder`.

    `arrays` are named and shaped as in PyTorch. Needs PyTorch. Raises UserError if an array is missing or has no place.
    """
    import torch

    from trainer.torch_encoder import Encoder

    first = any(name.startswith("layer1.0.downsample.") for name in arrays)
    encoder = Encoder(**(torch_arguments(settings) | {"first_shortcut": first}))
    missing, unexpected = encoder.load_state_dict(
        {name: torch.from_numpy(np.array(value, np.float32)) for name, value in arrays.items()}, strict=False
    )
    missing = [name for name in missing if not name.endswith("num_batches_tracked")]
    if missing or unexpected:
        raise UserError(f"the network in PyTorch lacks {missing[:3]} and has no place for {unexpected[:3]}")
    with torch.inference_mode():
        return np.asarray(encoder.eval()(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())))


def torch_arguments(settings: EncoderSettings) -> dict[str, Any]:
    """Returns the arguments of `trainer.torch_encoder.Encoder` for an encoder of this project."""
    return {
        "blocks": list(BLOCKS[settings.depth]),
        "bottleneck": settings.depth >= 50,
        "width": int(64 * settings.width_multiplier),
        "selective_kernel_ratio": settings.selective_kernel_ratio,
        "cifar_stem": settings.cifar_stem,
        "pool_padding": settings.pool_padding,
        "input_normalization": settings.input_normalization,
        "first_shortcut": True,
    }


def plain_features(settings: EncoderSettings, read: Callable[[Layer], Normalised | None], images: np.ndarray) -> np.ndarray:
    """Returns the features, [n, F], of the network of `settings` in plain operations of TensorFlow.

    `read` returns the arrays of a layer, or None if the network has no such layer and passes on what it gets.
    """
    by_place: dict[tuple[int, int], dict[str, Normalised | None]] = {}
    for layer in layers(settings):
        by_place.setdefault((layer.group, layer.block), {})[layer.role] = read(layer)
    x = tf.constant((images - _MEAN) / _DEVIATION if settings.input_normalization == "imagenet" else images)
    for number, one in enumerate(by_place.pop((0, 0)).values()):
        assert one is not None
        x = tf.nn.relu(_convolved(x, one, 2 if number == 0 and not settings.cifar_stem else 1))
    if not settings.cifar_stem:
        around = [[1, 1] if settings.pool_padding == "torch" or side % 2 else [0, 1] for side in x.shape[1:3]]
        x = tf.nn.max_pool2d(tf.pad(x, [[0, 0], *around, [0, 0]]), 3, 2, "VALID")
    for (group, block), roles in by_place.items():
        x = _block(x, roles, 2 if group > 1 and block == 0 else 1)
    return np.asarray(tf.reduce_mean(x, [1, 2]))


def _block(x: tf.Tensor, roles: Mapping[str, Normalised | None], stride: int) -> tf.Tensor:
    selective = "squeeze" in roles
    shortcut = x
    if roles.get("shortcut") is not None:
        if selective and stride > 1:
            shortcut = tf.nn.avg_pool2d(tf.pad(x, [[0, 0], [0, 1], [0, 1], [0, 0]]), 2, stride, "VALID")
        elif selective:
            shortcut = tf.nn.avg_pool2d(x, 2, 1, "SAME")
        shortcut = _convolved(shortcut, _there(roles, "shortcut"), 1 if selective else stride)
    if "conv3" not in roles:
        x = tf.nn.relu(_convolved(x, _there(roles, "conv1"), stride))
        return tf.nn.relu(_convolved(x, _there(roles, "conv2"), 1) + shortcut)
    x = tf.nn.relu(_convolved(x, _there(roles, "conv1"), 1))
    x = tf.nn.relu(_convolved(x, _there(roles, "conv2"), stride))
    if selective:
        one, other = tf.split(x, 2, axis=-1)
        seen = tf.reduce_mean(one + other, [1, 2], keepdims=True)
        logits = _convolved(tf.nn.relu(_convolved(seen, _there(roles, "squeeze"), 1)), _there(roles, "attend"), 1)
        weights = tf.nn.softmax(tf.stack(tf.split(logits, 2, axis=-1)), axis=0)
        x = one * weights[0] + other * weights[1]
    return tf.nn.relu(_convolved(x, _there(roles, "conv3"), 1) + shortcut)


def _there(roles: Mapping[str, Normalised | None], role: str) -> Normalised:
    found = roles[role]
    assert found is not None, role
    return found


def _convolved(x: tf.Tensor, one: Normalised, stride: int) -> tf.Tensor:
    """Convolves with padding of half the kernel on each side, then normalises by the moving statistics."""
    kernel, norm = one
    around = [kernel.shape[0] // 2] * 2
    x = tf.nn.conv2d(tf.pad(x, [[0, 0], around, around, [0, 0]]), kernel, stride, "VALID")
    if norm is None:
        return x
    standard = (x - norm["moving_mean"]) / np.sqrt(norm["moving_variance"] + 1e-5)
    return standard * norm["gamma"] + norm["beta"]

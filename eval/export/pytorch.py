"""Writes an encoder for PyTorch: encoder.safetensors, and encoder.py, which builds the network and loads it with PyTorch alone.

The names of the weights are torchvision's. torchvision's own ResNet computes the same features only if `exact_in_torchvision`.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from importlib import resources
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf
from safetensors.numpy import load_file, save_file

from trainer.config import Config
from trainer.encoder import make_encoder
from trainer.importing.check import (
    Comparison,
    Normalised,
    compare,
    features_by_torch,
    plain_features,
    seeded_images,
    torch_arguments,
    torch_is_there,
)
from trainer.importing.formats.torchvision import NORM_IN_TORCH
from trainer.importing.network import Layer, layers
from trainer.settings import EncoderSettings

WEIGHTS = "encoder.safetensors"
MODULE = "encoder.py"
_IN_TORCHVISION = (50, 101, 152)
"""Depths of bottleneck networks that torchvision has."""
_NETWORK = resources.files("trainer") / "torch_encoder.py"


def write_pytorch(encoder: keras.Model, config: Config, folder: str) -> Comparison:
    """Writes an encoder into a local folder, and compares the features of what was written with the encoder's own.

    Raises UserError if they differ.
    """
    about = {"encoder": json.dumps(torch_arguments(config.encoder)), "image_size": str(config.views.image_size)}
    arrays = weights(encoder, config.encoder)
    save_file(arrays, f"{folder}/{WEIGHTS}", about)
    (Path(folder) / MODULE).write_bytes(_NETWORK.read_bytes())
    return _compared(encoder, config, f"{folder}/{WEIGHTS}")


def weights(encoder: keras.Model, settings: EncoderSettings) -> dict[str, np.ndarray]:
    """Returns the encoder's weights by their names in torchvision, float32. Kernels are [outputs, inputs, height, width]."""
    values = {variable.path: variable.numpy() for variable in encoder.variables}
    named: dict[str, np.ndarray] = {}
    for layer in layers(settings):
        conv, norm = layer.torch_names
        named[f"{conv}.weight"] = np.ascontiguousarray(values[f"{layer.conv}/kernel"].transpose(3, 2, 0, 1), np.float32)
        if norm:
            named |= {f"{norm}.{theirs}": values[f"{layer.norm}/{ours}"] for ours, theirs in NORM_IN_TORCH.items()}
    return named


def exact_in_torchvision(settings: EncoderSettings, image_size: int) -> bool:
    """Returns whether torchvision's ResNet with these weights computes the same features from images of this side.

    It has one width, no selective kernels, no stem for small images, and no shortcut in the first group of ResNet-18 and -34. Its
    pool pads on all sides: TensorFlow's pads in the same way if the side of what the pool gets is odd.
    """
    usual = settings.width_multiplier == 1 and not settings.selective_kernel_ratio and not settings.cifar_stem
    if settings.depth not in _IN_TORCHVISION or not usual:
        return False
    return settings.pool_padding == "torch" or (image_size + 1) // 2 % 2 == 1


def _compared(encoder: keras.Model, config: Config, path: str) -> Comparison:
    side = config.views.image_size
    images = seeded_images(side)
    if config.encoder.precision != "float32":
        # The files are float32: the comparison is one of the translation, not of rounding.
        rounded, encoder = encoder, make_encoder(replace(config.encoder, precision="float32"), side)
        encoder.set_weights(rounded.get_weights())
    theirs = np.asarray(encoder(tf.constant(images), training=False))
    arrays = load_file(path)
    if torch_is_there():
        found, by = features_by_torch(config.encoder, arrays, images), "PyTorch"
    else:
        found, by = plain_features(config.encoder, lambda layer: _read(arrays, layer), images), "plain TensorFlow"
    return compare(found, theirs, side, by, path)


def _read(arrays: Mapping[str, np.ndarray], layer: Layer) -> Normalised:
    conv, norm = layer.torch_names
    kernel = arrays[f"{conv}.weight"].transpose(2, 3, 1, 0)
    return kernel, {ours: arrays[f"{norm}.{theirs}"] for ours, theirs in NORM_IN_TORCH.items()} if norm else None

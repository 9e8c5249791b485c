"""Weights of torchvision's and timm's ResNets, and what all formats of PyTorch share: torchvision's names of the layers.

Source: https://github.com/pytorch/vision, torchvision/models/resnet.py.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from trainer.importing.format import Format, Place
from trainer.importing.network import Layer
from trainer.importing.source import Source

NORM_IN_TORCH = {"gamma": "weight", "beta": "bias", "moving_mean": "running_mean", "moving_variance": "running_var"}
"""Names of the arrays of a batch normalisation."""


class PyTorchFormat(Format):
    """A format whose encoder has torchvision's names. A class of a format names the places where the encoder may be."""

    loss = "nt_xent"
    encoders: Sequence[str]
    """Prefixes of the encoder's names. The first that the checkpoint has counts."""

    def settings(self, source: Source) -> dict[str, Any]:
        return {"pool_padding": "torch", "input_normalization": "imagenet", "loss": self.loss}

    def prefix(self, source: Source) -> str | None:
        """Returns the prefix of the encoder's names, or None if the checkpoint has no encoder of this format."""
        return next((one for one in self.encoders if self.named(one, "conv1.weight") in source.arrays), None)

    def named(self, prefix: str, name: str) -> str:
        """Returns the name of an array in a checkpoint, from its name in torchvision."""
        return prefix + name

    def recognises(self, source: Source) -> bool:
        return self.prefix(source) is not None

    def encoder(self, source: Source, layers: Sequence[Layer]) -> Sequence[Place]:
        prefix = self.prefix(source) or ""
        places = [layer.torch_names for layer in layers]
        return [
            Place(
                self.named(prefix, f"{conv}.weight"),
                {one: self.named(prefix, f"{norm}.{name}") for one, name in NORM_IN_TORCH.items()} if norm else {},
            )
            for conv, norm in places
        ]

    def kernels(self, source: Source) -> int:
        prefix = self.prefix(source) or ""
        return sum(name.startswith(prefix) and len(one.shape) == 4 for name, one in source.arrays.items())

    def kernel(self, array: np.ndarray) -> np.ndarray:
        return array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T

    def kernel_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(np.array(shape)[[2, 3, 1, 0]].tolist()) if len(shape) == 4 else shape[::-1]

    def may_lack(self, layer: Layer) -> bool:
        return layer.role == "shortcut" and layer.shape[2] == layer.shape[3]

    def passed_over(self, name: str) -> str:
        if name.endswith(".num_batches_tracked"):
            return "step counter of batch normalisation"
        if re.match(r"optimizer(_states)?\.|optimizer\b|lr_schedulers\.|scaler\.|loops\.|callbacks\.|amp", name):
            return "state of the optimizer and of the training loop"
        return ""


def batch_norm(source: Source, name: str) -> Mapping[str, str]:
    """Returns the places of the arrays of a batch normalisation `name`, as far as it has them. Without weights it scales by 1."""
    return {one: f"{name}.{inner}" for one, inner in NORM_IN_TORCH.items() if f"{name}.{inner}" in source.arrays}


def sequential(source: Source, head: str) -> list[Place]:
    """Returns the places of the dense layers of a head, each with the batch normalisation that follows it.

    `head` is the prefix of numbered layers, as in `fc.`.
    """
    numbers = sorted(
        {int(name.removeprefix(head).split(".")[0]) for name in source.arrays if re.match(re.escape(head) + r"\d+\.", name)}
    )
    places: list[Place] = []
    for number in numbers:
        weight = f"{head}{number}.weight"
        bias = f"{head}{number}.bias"
        if len(source.shape(weight) or ()) == 2:
            places.append(Place(weight, {}, bias if bias in source.arrays else ""))
        elif places:
            places[-1] = Place(places[-1].kernel, batch_norm(source, f"{head}{number}"), places[-1].bias)
    return places


class Torchvision(PyTorchFormat):
    name = "torchvision or timm"
    encoders = ("", "module.", "model.", "state_dict.", "state_dict.module.", "state_dict.model.", "model.module.")

    def classifier(self, source: Source) -> Place | None:
        kernel = f"{self.prefix(source)}fc.weight"
        return Place(kernel, bias=f"{self.prefix(source)}fc.bias") if kernel in source.arrays else None

"""The interface of a checkpoint format: it finds the encoder, the heads and u in a checkpoint by the names of the arrays."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from trainer.importing.network import Layer
from trainer.importing.source import Source

NORM = ("gamma", "beta", "moving_mean", "moving_variance")
"""Arrays of a batch normalisation, by their names in this project."""


@dataclass(frozen=True)
class Place:
    """The names of a layer's arrays in a checkpoint."""

    kernel: str
    norm: Mapping[str, str] = field(default_factory=dict)
    """Name of each array of the batch normalisation, by its name in `NORM`. Empty if there is none."""
    bias: str = ""
    """Name of the bias of a dense layer; "" if there is none."""

    def names(self) -> Iterable[str]:
        return filter(None, (self.kernel, *self.norm.values(), self.bias))


class Format(ABC):
    """A format of checkpoints. Stateless. Names are those of `Source.arrays`."""

    name: str
    """Short name, for people."""

    def settings(self, source: Source) -> dict[str, Any]:
        """Returns the settings of this project that a checkpoint of the format implies, by key."""
        return {"loss": "nt_xent"}

    @abstractmethod
    def recognises(self, source: Source) -> bool:
        """Returns whether the names of the arrays are those of this format."""

    @abstractmethod
    def encoder(self, source: Source, layers: Sequence[Layer]) -> Sequence[Place]:
        """Returns the place of each layer of an encoder. It may name arrays that the checkpoint lacks."""

    @abstractmethod
    def kernels(self, source: Source) -> int:
        """Returns the number of the encoder's convolutions in a checkpoint."""

    def kernel(self, array: np.ndarray) -> np.ndarray:
        """Returns a kernel, [height, width, inputs, outputs] or [inputs, outputs], from an array of the checkpoint."""
        return array

    def kernel_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the shape of `kernel` of an array of this shape."""
        return shape

    def may_lack(self, layer: Layer) -> bool:
        """Returns whether a network of this format has no such layer, because it passes on what it gets."""
        return False

    def projection(self, source: Source) -> Sequence[Place]:
        """Returns the places of the projection head's layers, first to last; none if the checkpoint has no head."""
        return ()

    def classifier(self, source: Source) -> Place | None:
        """Returns the place of a linear classifier on the features, or None."""
        return None

    def u(self, source: Source) -> str:
        """Returns the name of the moving averages u, [N + 1, 1] float32 by image ID; "" if the checkpoint has none."""
        return ""

    def step(self, source: Source) -> int:
        """Returns the number of train steps behind the checkpoint; 0 if it is not known."""
        return 0

    def passed_over(self, name: str) -> str:
        """Returns what an array is that this project does not need; "" if it does not know."""
        return ""


def counted(source: Source, name: str) -> int:
    """Returns how many layers a head has whose names are `name` with the layer's number in place of {}."""
    number = 0
    while name.format(number) in source.arrays:
        number += 1
    return number

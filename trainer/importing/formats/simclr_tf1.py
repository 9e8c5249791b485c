"""The releases of SimCLR v1 and v2: TensorFlow 1 counts convolutions and batch normalisations in the order of computation.

Source: https://github.com/google-research/simclr, resnet.py and model_util.py.
"""

import itertools
import re
from collections.abc import Iterator, Sequence

from trainer.importing.format import NORM, Format, Place, counted
from trainer.importing.network import Layer
from trainer.importing.source import Source

_HEAD = "head_contrastive/nl_{}/"


class SimCLRTF1(Format):
    name = "SimCLR, TensorFlow 1"

    def recognises(self, source: Source) -> bool:
        return "base_model/conv2d/kernel" in source.arrays

    def encoder(self, source: Source, layers: Sequence[Layer]) -> Sequence[Place]:
        return list(in_order_of_computation(layers, "base_model/{}/{}"))

    def kernels(self, source: Source) -> int:
        return sum(bool(re.fullmatch(r"base_model/conv2d(_\d+)?/kernel", name)) for name in source.arrays)

    def projection(self, source: Source) -> Sequence[Place]:
        found = counted(source, f"{_HEAD}dense/kernel")
        return [_head(source, _HEAD.format(number)) for number in range(found)]

    def classifier(self, source: Source) -> Place | None:
        kernel = "head_supervised/linear_layer/dense/kernel"
        return Place(kernel, bias="head_supervised/linear_layer/dense/bias") if kernel in source.arrays else None

    def step(self, source: Source) -> int:
        return int(source.value("global_step")) if "global_step" in source.arrays else 0

    def passed_over(self, name: str) -> str:
        if name.endswith("/Momentum"):
            return "momentum of the optimizer"
        if "ema_model/" in name or name.endswith("/ExponentialMovingAverage"):
            return "moving average of the weights"
        return "step counter" if name == "global_step" else ""


def _head(source: Source, place: str) -> Place:
    norm = {one: f"{place}batch_normalization/{one}" for one in NORM}
    return Place(f"{place}dense/kernel", {one: name for one, name in norm.items() if name in source.arrays})


def in_order_of_computation(layers: Sequence[Layer], name: str) -> Iterator[Place]:
    """Yields the place of each layer, where layers of a kind are counted. `name` takes the layer's name and the array's."""
    convs, norms = _numbered("conv2d"), _numbered("batch_normalization")
    for layer in layers:
        kernel = name.format(next(convs), "kernel")
        norm = next(norms) if layer.norm else ""
        yield Place(kernel, {one: name.format(norm, one) for one in NORM} if norm else {})


def _numbered(kind: str) -> Iterator[str]:
    yield kind
    yield from (f"{kind}_{number}" for number in itertools.count(1))

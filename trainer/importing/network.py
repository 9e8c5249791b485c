"""The layers of this project's encoder in the order of computation, and the encoder that a checkpoint's layers make up."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

from trainer.encoder_cost import BLOCKS, SMALLEST_SQUEEZE
from trainer.settings import EncoderSettings

Shape = tuple[int, ...]
_RATIOS = (0.0, 0.0625, 0.125, 0.25, 0.5, 1.0)
"""Reductions of selective kernels to try. SimCLRv2 has 0.0625."""


@dataclass(frozen=True)
class Layer:
    """A convolution of the encoder, and the batch normalisation that follows it."""

    group: int
    """1 to 4; 0 for the stem."""
    block: int
    """Number of the block in its group, from 0."""
    role: str
    """conv1, conv2, conv3, shortcut, squeeze or attend; in the stem conv, or conv1 to conv3."""
    shape: Shape
    """Of the kernel: height, width, inputs, outputs."""

    @property
    def conv(self) -> str:
        """Name of the convolution in `trainer.encoder`."""
        return f"{self._place}_{self.role}"

    @property
    def norm(self) -> str:
        """Name of the batch normalisation in `trainer.encoder`; "" if there is none. A 1x1 convolution may hold its own."""
        if self.role in ("shortcut", "conv3") and self.group:
            return self.conv
        if self.role == "squeeze":
            return f"{self.conv}_norm"
        return "" if self.role == "attend" else f"{self._place}_{self.role.replace('conv', 'norm')}"

    @property
    def torch_names(self) -> tuple[str, str]:
        """Names of the convolution and of the batch normalisation in torchvision, or "", if there is none.

        Layers of selective kernels, which torchvision lacks, have the names that `trainer.torch_encoder` gives them.
        """
        place = f"layer{self.group}.{self.block}." if self.group else ""
        if self.role == "shortcut":
            return f"{place}downsample.0", f"{place}downsample.1"
        if self.role in ("squeeze", "attend"):
            return f"{place}{self.role}", f"{place}squeeze_bn" if self.norm else ""
        number = self.role.removeprefix("conv") or "1"
        return f"{place}conv{number}", f"{place}bn{number}"

    @property
    def _place(self) -> str:
        return f"group{self.group}_block{self.block + 1}" if self.group else "stem"


def layers(settings: EncoderSettings) -> list[Layer]:
    """Returns the layers of an encoder in the order of computation. A block's shortcut comes first."""
    width = int(64 * settings.width_multiplier)
    return [*_stem(settings, width), *_blocks(settings, width)]


def _stem(settings: EncoderSettings, width: int) -> Iterator[Layer]:
    if settings.cifar_stem or not settings.selective_kernel_ratio:
        side = 3 if settings.cifar_stem else 7
        yield Layer(0, 0, "conv", (side, side, 3, width))
        return
    inputs = 3
    for number, outputs in enumerate((width // 2, width // 2, width), 1):
        yield Layer(0, 0, f"conv{number}", (3, 3, inputs, outputs))
        inputs = outputs


def _blocks(settings: EncoderSettings, stem_width: int) -> Iterator[Layer]:
    bottleneck, inputs = settings.depth >= 50, stem_width
    for group, blocks in enumerate(BLOCKS[settings.depth], 1):
        width = stem_width * 2 ** (group - 1)
        outputs = 4 * width if bottleneck else width
        for block in range(blocks):
            if block == 0:
                yield Layer(group, block, "shortcut", (1, 1, inputs, outputs))
            if not bottleneck:
                yield Layer(group, block, "conv1", (3, 3, inputs, width))
                yield Layer(group, block, "conv2", (3, 3, width, width))
            else:
                yield Layer(group, block, "conv1", (1, 1, inputs, width))
                if settings.selective_kernel_ratio:
                    squeeze = max(int(width * settings.selective_kernel_ratio), SMALLEST_SQUEEZE)
                    yield Layer(group, block, "conv2", (3, 3, width, 2 * width))
                    yield Layer(group, block, "squeeze", (1, 1, width, squeeze))
                    yield Layer(group, block, "attend", (1, 1, squeeze, 2 * width))
                else:
                    yield Layer(group, block, "conv2", (3, 3, width, width))
                yield Layer(group, block, "conv3", (1, 1, width, outputs))
            inputs = outputs


@dataclass(frozen=True)
class Match:
    """How well an encoder fits the kernels of a checkpoint."""

    settings: EncoderSettings
    wrong: Sequence[tuple[Layer, Shape | None]]
    """Layers whose kernel is missing (None) or has another shape, in the order of computation."""
    fitting: int
    """Number of layers that fit."""


def best_match(shape_of: Callable[[Sequence[Layer]], Sequence[Shape | None]], kernels: int) -> Match | None:
    """Returns the encoder that fits the kernels of a checkpoint best, or None if no kernel has the place of a stem's.

    `shape_of` returns the shape of the kernel in each layer's place, or None if there is none. `kernels` is the number of
    kernels that the checkpoint has: of encoders that fit equally well, the one with as many layers is best.
    """
    found = []
    for depth, ratio, small in itertools.product(BLOCKS, _RATIOS, (False, True)):
        if ratio and depth < 50:
            continue
        settings = EncoderSettings(depth=cast(Any, depth), selective_kernel_ratio=ratio, cifar_stem=small)
        stem = list(_stem(settings, 64))
        last = shape_of(layers(settings))[len(stem) - 1]
        if last is None or len(last) != 4:
            continue
        settings = replace(settings, width_multiplier=last[3] / 64)
        expected = layers(settings)
        wrong = [
            (layer, shape)
            for layer, shape in zip(expected, shape_of(expected), strict=True)
            if shape is None or layer.shape != shape
        ]
        found.append(Match(settings, wrong, len(expected) - len(wrong)))
    return min(found, key=lambda one: (len(one.wrong) + abs(kernels - one.fitting - len(one.wrong)), -one.fitting), default=None)

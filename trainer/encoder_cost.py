"""The cost of an encoder's forward pass, counted from its convolutions. Does not need TensorFlow or a compiler.

The count is a lower bound: it omits batch normalisation and ReLU, because compilers fuse them into the convolutions.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from trainer.settings import EncoderSettings

BLOCKS = {
    10: (1, 1, 1, 1),
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
    200: (3, 24, 36, 3),
}
"""Blocks of each of the four groups, by depth."""
SMALLEST_SQUEEZE = 32
"""Minimum number of channels in the bottleneck of a selective kernel's attention."""
_BYTES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class Cost:
    """The cost of one image."""

    flops: float
    bytes: float
    """Bytes moved to and from memory."""


@dataclass(frozen=True)
class Convolution:
    """A convolution from [side_in, side_in, channels_in] to [side, side, channels]."""

    side_in: int
    channels_in: int
    side: int
    channels: int
    kernel: int

    @property
    def flops(self) -> float:
        return 2.0 * self.kernel**2 * self.channels_in * self.channels * self.side**2

    @property
    def values(self) -> int:
        """Number of values that it reads and writes per image. Excludes the kernel, which a batch shares."""
        return self.side_in**2 * self.channels_in + self.side**2 * self.channels


def forward_cost(settings: EncoderSettings, image_size: int) -> Cost:
    """Returns the cost of an image of `image_size` x `image_size` pixels in the encoder."""
    layers = list(convolutions(settings, image_size))
    return Cost(sum(one.flops for one in layers), float(_BYTES[settings.precision] * sum(one.values for one in layers)))


def convolutions(settings: EncoderSettings, image_size: int) -> Iterator[Convolution]:
    """Yields the convolutions of `trainer.encoder.make_encoder`, including the shortcuts'."""
    selective = settings.selective_kernel_ratio > 0
    width = int(64 * settings.width_multiplier)
    side, channels = image_size, width
    if settings.cifar_stem or not selective:
        kernel, stride = (3, 1) if settings.cifar_stem else (7, 2)
        yield Convolution(side, 3, _strided(side, stride), width, kernel)
    else:
        half = _strided(side, 2)
        yield Convolution(side, 3, half, width // 2, 3)
        yield Convolution(half, width // 2, half, width // 2, 3)
        yield Convolution(half, width // 2, half, width, 3)
    if not settings.cifar_stem:
        side = _strided(_strided(side, 2), 2)
    bottleneck = settings.depth >= 50
    for group, blocks in enumerate(BLOCKS[settings.depth]):
        inner = width * 2**group
        outer = 4 * inner if bottleneck else inner
        for block in range(blocks):
            after = _strided(side, 2 if group > 0 and block == 0 else 1)
            if block == 0:
                yield Convolution(after, channels, after, outer, 1)
            if not bottleneck:
                yield Convolution(side, channels, after, inner, 3)
                yield Convolution(after, inner, after, inner, 3)
            else:
                yield Convolution(side, channels, side, inner, 1)
                if selective:
                    squeeze = max(int(inner * settings.selective_kernel_ratio), SMALLEST_SQUEEZE)
                    yield Convolution(side, inner, after, 2 * inner, 3)
                    yield Convolution(1, inner, 1, squeeze, 1)
                    yield Convolution(1, squeeze, 1, 2 * inner, 1)
                else:
                    yield Convolution(side, inner, after, inner, 3)
                yield Convolution(after, inner, after, outer, 1)
            side, channels = after, outer


def _strided(side: int, stride: int) -> int:
    return -(-side // stride)

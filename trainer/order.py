"""The order of images: a plan in NumPy, a function of (seed, epoch), so that one can start at any step without reading the rest.

Images have places 0..N-1, in the order in which shards hold them. An epoch permutes the blocks of consecutive places, cuts them
into windows that fit in memory, and permutes the places of each window. Steps take B places at a time from the epochs strung
together, so a step can end one epoch and begin the next; there, places that it already has wait until after it. So every epoch
covers every image, and no step has an image twice.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Window:
    """Blocks that are read together."""

    epoch: int
    blocks: np.ndarray
    """Their numbers, int64, in the order of reading."""
    order: np.ndarray
    """The order to take their records in, as indices into what was read, int64."""
    skip: int
    """Records at the start of `order` that earlier steps took."""


@dataclass(frozen=True)
class Order:
    """The plan for a dataset whose block i holds `block_sizes[i]` images, consumed `batch_size` a step."""

    block_sizes: tuple[int, ...]
    batch_size: int
    window_size: int
    """Images shuffled among each other, at least; never fewer than two steps' worth."""
    seed: int

    def __post_init__(self) -> None:
        if self.num_images < self.batch_size:
            raise ValueError(f"{self.num_images} images do not fill one batch of {self.batch_size}")

    @property
    def num_images(self) -> int:
        return sum(self.block_sizes)

    def windows(self, first_step: int) -> Iterator[Window]:
        """Yields the windows from `first_step` on, without end."""
        epoch, skip = divmod(first_step * self.batch_size, self.num_images)
        tail = self._tail_before(epoch)
        while True:
            for window in self._epoch(epoch, tail):
                if skip < len(window.order):
                    yield Window(window.epoch, window.blocks, window.order, skip)
                skip = max(0, skip - len(window.order))
                last = window
            tail = self._tail(last)
            epoch += 1

    def _epoch(self, epoch: int, tail: np.ndarray) -> list[Window]:
        """The windows of an epoch, given the places that its first step already has from the one before."""
        random = np.random.Generator(np.random.Philox(key=[self.seed, epoch]))
        count = max(1, self.num_images // max(self.window_size, 2 * self.batch_size))
        windows = []
        for blocks in np.array_split(random.permutation(len(self.block_sizes)), count):
            windows.append(Window(epoch, blocks, random.permutation(len(self._places(blocks))), 0))
        if len(tail):
            first = windows[0]
            head = self.batch_size - len(tail)
            waits = np.isin(self._places(first.blocks)[first.order], tail)
            free = first.order[~waits]
            windows[0] = Window(epoch, first.blocks, np.concatenate([free[:head], first.order[waits], free[head:]]), 0)
        return windows

    def _tail(self, last: Window) -> np.ndarray:
        """The places at the end of an epoch, whose last window is given, that go into a step with the next epoch's first."""
        leftover = (last.epoch + 1) * self.num_images % self.batch_size
        return self._places(last.blocks)[last.order[len(last.order) - leftover :]]

    def _tail_before(self, epoch: int) -> np.ndarray:
        if epoch == 0:
            return np.array([], np.int64)
        if len(windows := self._epoch(epoch - 1, np.array([], np.int64))) > 1:
            return self._tail(windows[-1])
        # One window is an epoch's first and last: each epoch's end depends on its beginning, so on all epochs before.
        tail = np.array([], np.int64)
        for before in range(epoch):
            tail = self._tail(self._epoch(before, tail)[-1])
        return tail

    def _places(self, blocks: np.ndarray) -> np.ndarray:
        sizes = np.array(self.block_sizes)
        starts = np.cumsum(sizes) - sizes
        return np.concatenate([np.arange(starts[block], starts[block] + sizes[block]) for block in blocks])

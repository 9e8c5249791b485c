"""The sampler: the order in which training sees the images. It depends on the seed and the epoch, and can start at any step.

The position of an image, 0..N-1, is the index of its record when the shards are read one after another. Each epoch permutes the
blocks of records, splits them into windows that fit in memory, and permutes the positions of each window. The epochs form one
stream, and each step takes the next B positions of it. A step can therefore contain the end of one epoch and the start of the
next. If a position would occur twice in such a step, the second occurrence is exchanged with a position of the following step.
So every epoch covers every image once, and no step has an image twice.

Each of H hosts feeds 1/H of every step. Within a window, each host takes nearly all of its images from its own blocks, so it
reads about 1/H of the data. The sampler consists of TensorFlow operations only, so the hosts of a TPU slice can run it.
"""

from dataclasses import dataclass

import numpy as np
import tensorflow as tf

from trainer.shared import records

Window = dict[str, tf.Tensor]


@dataclass(frozen=True)
class Sampler:
    """The order of a dataset whose block i holds `block_sizes[i]` images, with `batch_size` images a step."""

    block_sizes: tuple[int, ...]
    batch_size: int
    window_size: int
    """Minimum number of images that are shuffled together. A window holds at least two batches regardless."""
    seed: int

    def __post_init__(self) -> None:
        if self.num_images < self.batch_size:
            raise ValueError(f"{self.num_images} images do not fill one batch of {self.batch_size}")

    @property
    def num_images(self) -> int:
        return sum(self.block_sizes)

    @property
    def windows_per_epoch(self) -> int:
        return max(1, self.num_images // max(self.window_size, 2 * self.batch_size))

    def windows(self, first_step: int, host: int = 0, hosts: int = 1) -> tf.data.Dataset:
        """Returns an infinite dataset of the windows that host `host` of `hosts` reads, from `first_step` on.

        A window has `epoch`, int64; `blocks`, [m] int64, the numbers of the blocks to read; `indices`, [k] int64, which of the
        records in these blocks to take, in order; and `positions`, [k] int64, the positions of the same records. Raises
        ValueError if `hosts` does not divide the batch size.
        """
        if self.batch_size % hosts:
            raise ValueError(f"{hosts} hosts do not divide a batch of {self.batch_size}")
        first = first_step * self.batch_size
        epoch = first // self.num_images

        def advance(tail: tf.Tensor, index: tf.Tensor) -> tuple[tf.Tensor, Window]:
            start, positions = self._window(index, tail, hosts)
            mine = tf.boolean_mask(
                positions,
                (start + tf.range(tf.size(positions, tf.int64)) >= first) & (self._host_of_each(start, positions, hosts) == host),
            )
            blocks, indices = self._locate(mine)
            window = {"epoch": index // self.windows_per_epoch, "blocks": blocks, "indices": indices, "positions": mine}
            return self._tail(index, positions), window

        indices = tf.data.Dataset.range(epoch * self.windows_per_epoch, np.iinfo(np.int64).max)
        windows = indices.scan(self._tail_before(epoch, hosts), advance)
        return windows.filter(lambda window: tf.size(window["indices"]) > 0)

    def _window(self, index: tf.Tensor, tail: tf.Tensor, hosts: int) -> tuple[tf.Tensor, tf.Tensor]:
        """Returns (start of window `index` in the stream of epochs, its positions in order).

        `tail` holds the positions that the epoch's first step already took from the previous epoch.
        """
        epoch, number = index // self.windows_per_epoch, index % self.windows_per_epoch
        sizes = tf.constant(self.block_sizes, tf.int64)
        permuted = _shuffle(tf.range(len(self.block_sizes), dtype=tf.int64), self.seed, epoch, 0)
        bounds = tf.constant(np.linspace(0, len(self.block_sizes), self.windows_per_epoch + 1).astype(np.int64))
        start = epoch * self.num_images + tf.reduce_sum(tf.gather(sizes, permuted[: bounds[number]]))
        blocks = permuted[bounds[number] : bounds[number + 1]]
        positions = self._positions_in(blocks)
        positions = _shuffle(positions, self.seed, epoch, 2 * number + 1)
        if hosts > 1:
            positions = self._deal_to_hosts(blocks, positions, self._host_of_each(start, positions, hosts), hosts)
        return start, tf.cond(number == 0, lambda: self._exchange_repeats(positions, tail), lambda: positions)

    def _deal_to_hosts(self, blocks: tf.Tensor, positions: tf.Tensor, host_at: tf.Tensor, hosts: int) -> tf.Tensor:
        """Reorders `positions` so that each host takes the images of its own blocks, and as few others as possible.

        Every host owns the same number of full blocks. The images of the remaining blocks fill the hosts' shares up.
        """
        whole = tf.gather(tf.constant(self.block_sizes, tf.int64), blocks) == records.RECORDS_PER_BLOCK
        wanted = tf.math.bincount(tf.cast(host_at, tf.int32), minlength=hosts, maxlength=hosts, dtype=tf.int64)
        each = tf.minimum(tf.reduce_min(wanted) // records.RECORDS_PER_BLOCK, tf.reduce_sum(tf.cast(whole, tf.int64)) // hosts)
        rank = tf.cumsum(tf.cast(whole, tf.int64)) - 1
        owner_of_block = tf.where(whole & (rank < each * hosts), rank % hosts, hosts)
        owner_by_number = tf.tensor_scatter_nd_update(
            tf.fill([len(self.block_sizes)], tf.constant(hosts, tf.int64)), blocks[:, None], owner_of_block
        )
        owner = tf.gather(owner_by_number, self._block_of(positions))
        unowned = tf.where(owner == hosts)
        short = tf.repeat(tf.range(hosts, dtype=tf.int64), wanted - each * records.RECORDS_PER_BLOCK)
        owner = tf.tensor_scatter_nd_update(owner, unowned, short)
        by_owner = tf.gather(positions, tf.argsort(owner, stable=True))
        return tf.scatter_nd(tf.argsort(host_at, stable=True)[:, None], by_owner, tf.shape(positions, tf.int32))

    def _exchange_repeats(self, positions: tf.Tensor, tail: tf.Tensor) -> tf.Tensor:
        """Returns the first window's `positions` without a repeat in the step that `tail` begins: repeats move to later steps."""
        head = tf.cast(self.batch_size - tf.size(tail), tf.int64) % self.batch_size
        repeated = tf.reduce_any(positions[:, None] == tail[None, :], axis=1)
        index = tf.range(tf.size(positions, tf.int64))
        out = tf.boolean_mask(index, repeated & (index < head))
        into = tf.boolean_mask(index, ~repeated & (index >= head))[: tf.size(out)]
        both, swapped = tf.concat([out, into], 0), tf.concat([into, out], 0)
        return tf.tensor_scatter_nd_update(positions, both[:, None], tf.gather(positions, swapped))

    def _tail(self, index: tf.Tensor, positions: tf.Tensor) -> tf.Tensor:
        """Returns the last positions of window `index` that share a step with the next epoch; none within an epoch."""
        epoch, number = index // self.windows_per_epoch, index % self.windows_per_epoch
        leftover = tf.where(number == self.windows_per_epoch - 1, (epoch + 1) * self.num_images % self.batch_size, 0)
        return positions[tf.size(positions, tf.int64) - leftover :]

    def _tail_before(self, epoch: int, hosts: int) -> tf.Tensor:
        # The exchange at the start of an epoch changes only its first B positions. So with 2B images or more, the end of an epoch
        # does not depend on earlier epochs. With fewer, it depends on all of them.
        tail = tf.zeros([0], tf.int64)
        for before in range(epoch if self.num_images < 2 * self.batch_size else min(epoch, 1)):
            last = before if self.num_images < 2 * self.batch_size else epoch - 1
            index = tf.constant((last + 1) * self.windows_per_epoch - 1, tf.int64)
            tail = self._tail(index, self._window(index, tail, hosts)[1])
        return tail

    def _host_of_each(self, start: tf.Tensor, positions: tf.Tensor, hosts: int) -> tf.Tensor:
        """Returns which host feeds each element of a window: the hosts take equal consecutive parts of every step."""
        return (start + tf.range(tf.size(positions, tf.int64))) % self.batch_size // (self.batch_size // hosts)

    def _positions_in(self, blocks: tf.Tensor) -> tf.Tensor:
        """Returns the positions of the images in `blocks`, block after block."""
        sizes = tf.gather(tf.constant(self.block_sizes, tf.int64), blocks)
        begins = tf.repeat(tf.cumsum(sizes, exclusive=True), sizes)
        return tf.repeat(tf.gather(self._starts(), blocks), sizes) + tf.range(tf.reduce_sum(sizes)) - begins

    def _locate(self, positions: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Returns (the distinct blocks that hold `positions`, the index of each position among the records of these blocks)."""
        blocks, nth = tf.unique(self._block_of(positions))
        sizes = tf.gather(tf.constant(self.block_sizes, tf.int64), blocks)
        within = positions - tf.gather(self._starts(), tf.gather(blocks, nth))
        return blocks, tf.gather(tf.cumsum(sizes, exclusive=True), nth) + within

    def _block_of(self, positions: tf.Tensor) -> tf.Tensor:
        return tf.searchsorted(self._starts(), positions, side="right", out_type=tf.int64) - 1

    def _starts(self) -> tf.Tensor:
        """Returns the first position of each block."""
        sizes = np.array(self.block_sizes, np.int64)
        return tf.constant(np.cumsum(sizes) - sizes)


def _shuffle(values: tf.Tensor, seed: int, epoch: tf.Tensor, purpose: tf.Tensor | int) -> tf.Tensor:
    key = tf.stack([tf.constant(seed, tf.int64) * 2**32 + epoch, tf.cast(purpose, tf.int64)])
    return tf.random.experimental.stateless_shuffle(values, seed=key, alg="philox")

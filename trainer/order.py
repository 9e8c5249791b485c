"""The order of images: a plan made by TensorFlow operations alone, a function of (seed, epoch), that can start at any step.

Images have places 0..N-1, in the order in which shards hold them. An epoch permutes the blocks of consecutive places, cuts them
into windows that fit in memory, and permutes the places of each window. Steps take B places at a time from the epochs strung
together, so a step can end one epoch and begin the next; there, a place that it already has is exchanged for one of the next
step. So every epoch covers every image, and no step has an image twice.

Each of H hosts feeds an H-th of every step, and within a window nearly all it takes comes from blocks of its own: it reads an
H-th of the data. No Python runs while the plan is made, so it can be made on the hosts of a TPU slice.
"""

from dataclasses import dataclass

import numpy as np
import tensorflow as tf

from trainer.shared import records

Window = dict[str, tf.Tensor]


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

    @property
    def windows_per_epoch(self) -> int:
        return max(1, self.num_images // max(self.window_size, 2 * self.batch_size))

    def windows(self, first_step: int, host: int = 0, hosts: int = 1) -> tf.data.Dataset:
        """Returns what host `host` of `hosts` has to read, window by window from `first_step` on, without end.

        A window has `epoch`, int64; `blocks`, [m] int64, the numbers of the blocks to read; `order`, [k] int64, the records to
        take, as indices into what was read; and `places`, [k] int64, the same records' places. Raises ValueError where hosts
        do not divide a batch.
        """
        if self.batch_size % hosts:
            raise ValueError(f"{hosts} hosts do not divide a batch of {self.batch_size}")
        first = first_step * self.batch_size
        epoch = first // self.num_images

        def advance(tail: tf.Tensor, index: tf.Tensor) -> tuple[tf.Tensor, Window]:
            start, places = self._window(index, tail, hosts)
            mine = tf.boolean_mask(
                places, (start + tf.range(tf.size(places, tf.int64)) >= first) & (self._hosts_of(start, places, hosts) == host)
            )
            blocks, order = self._located(mine)
            window = {"epoch": index // self.windows_per_epoch, "blocks": blocks, "order": order, "places": mine}
            return self._tail(index, places), window

        indices = tf.data.Dataset.range(epoch * self.windows_per_epoch, np.iinfo(np.int64).max)
        windows = indices.scan(self._tail_before(epoch, hosts), advance)
        return windows.filter(lambda window: tf.size(window["order"]) > 0)

    def _window(self, index: tf.Tensor, tail: tf.Tensor, hosts: int) -> tuple[tf.Tensor, tf.Tensor]:
        """Returns where in the string of epochs window `index` begins, and its places in their order.

        `tail` are the places that the epoch's first step already has from the epoch before.
        """
        epoch, number = index // self.windows_per_epoch, index % self.windows_per_epoch
        sizes = tf.constant(self.block_sizes, tf.int64)
        permuted = _shuffle(tf.range(len(self.block_sizes), dtype=tf.int64), self.seed, epoch, 0)
        bounds = tf.constant(np.linspace(0, len(self.block_sizes), self.windows_per_epoch + 1).astype(np.int64))
        start = epoch * self.num_images + tf.reduce_sum(tf.gather(sizes, permuted[: bounds[number]]))
        blocks = permuted[bounds[number] : bounds[number + 1]]
        places = self._places(blocks)
        places = _shuffle(places, self.seed, epoch, 2 * number + 1)
        if hosts > 1:
            places = self._dealt(blocks, places, self._hosts_of(start, places, hosts), hosts)
        return start, tf.cond(number == 0, lambda: self._without_repeats(places, tail), lambda: places)

    def _dealt(self, blocks: tf.Tensor, places: tf.Tensor, host_at: tf.Tensor, hosts: int) -> tf.Tensor:
        """Returns `places` in an order in which a host meets its own blocks' places, and as few others as possible.

        Every host owns equally many of the whole blocks; the places of the blocks left over are for whoever is short.
        """
        whole = tf.gather(tf.constant(self.block_sizes, tf.int64), blocks) == records.RECORDS_PER_BLOCK
        wanted = tf.math.bincount(tf.cast(host_at, tf.int32), minlength=hosts, maxlength=hosts, dtype=tf.int64)
        each = tf.minimum(tf.reduce_min(wanted) // records.RECORDS_PER_BLOCK, tf.reduce_sum(tf.cast(whole, tf.int64)) // hosts)
        rank = tf.cumsum(tf.cast(whole, tf.int64)) - 1
        owner_of_block = tf.where(whole & (rank < each * hosts), rank % hosts, hosts)
        owner_by_number = tf.tensor_scatter_nd_update(
            tf.fill([len(self.block_sizes)], tf.constant(hosts, tf.int64)), blocks[:, None], owner_of_block
        )
        owner = tf.gather(owner_by_number, self._block_of(places))
        unowned = tf.where(owner == hosts)
        short = tf.repeat(tf.range(hosts, dtype=tf.int64), wanted - each * records.RECORDS_PER_BLOCK)
        owner = tf.tensor_scatter_nd_update(owner, unowned, short)
        by_owner = tf.gather(places, tf.argsort(owner, stable=True))
        return tf.scatter_nd(tf.argsort(host_at, stable=True)[:, None], by_owner, tf.shape(places, tf.int32))

    def _without_repeats(self, places: tf.Tensor, tail: tf.Tensor) -> tf.Tensor:
        """Returns an epoch's first `places` with those of `tail` out of what completes the step that `tail` begins."""
        head = tf.cast(self.batch_size - tf.size(tail), tf.int64) % self.batch_size
        repeated = tf.reduce_any(places[:, None] == tail[None, :], axis=1)
        position = tf.range(tf.size(places, tf.int64))
        out = tf.boolean_mask(position, repeated & (position < head))
        into = tf.boolean_mask(position, ~repeated & (position >= head))[: tf.size(out)]
        both, swapped = tf.concat([out, into], 0), tf.concat([into, out], 0)
        return tf.tensor_scatter_nd_update(places, both[:, None], tf.gather(places, swapped))

    def _tail(self, index: tf.Tensor, places: tf.Tensor) -> tf.Tensor:
        """The places at the end of window `index` that go into a step with the next epoch's first, if it ends an epoch."""
        epoch, number = index // self.windows_per_epoch, index % self.windows_per_epoch
        leftover = tf.where(number == self.windows_per_epoch - 1, (epoch + 1) * self.num_images % self.batch_size, 0)
        return places[tf.size(places, tf.int64) - leftover :]

    def _tail_before(self, epoch: int, hosts: int) -> tf.Tensor:
        # An exchange at an epoch's beginning stays within its first B places; so only where fewer than 2B images make the
        # beginning touch the end does an epoch's end depend on all epochs before.
        tail = tf.zeros([0], tf.int64)
        for before in range(epoch if self.num_images < 2 * self.batch_size else min(epoch, 1)):
            last = before if self.num_images < 2 * self.batch_size else epoch - 1
            index = tf.constant((last + 1) * self.windows_per_epoch - 1, tf.int64)
            tail = self._tail(index, self._window(index, tail, hosts)[1])
        return tail

    def _hosts_of(self, start: tf.Tensor, places: tf.Tensor, hosts: int) -> tf.Tensor:
        """Which host feeds each position of a window: of every step, each an equal run."""
        return (start + tf.range(tf.size(places, tf.int64))) % self.batch_size // (self.batch_size // hosts)

    def _places(self, blocks: tf.Tensor) -> tf.Tensor:
        """The places of `blocks`, one block after the other."""
        sizes = tf.gather(tf.constant(self.block_sizes, tf.int64), blocks)
        begins = tf.repeat(tf.cumsum(sizes, exclusive=True), sizes)
        return tf.repeat(tf.gather(self._starts(), blocks), sizes) + tf.range(tf.reduce_sum(sizes)) - begins

    def _located(self, places: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Returns the blocks that hold `places`, each once, and where among their records the places are."""
        blocks, nth = tf.unique(self._block_of(places))
        sizes = tf.gather(tf.constant(self.block_sizes, tf.int64), blocks)
        within = places - tf.gather(self._starts(), tf.gather(blocks, nth))
        return blocks, tf.gather(tf.cumsum(sizes, exclusive=True), nth) + within

    def _block_of(self, places: tf.Tensor) -> tf.Tensor:
        return tf.searchsorted(self._starts(), places, side="right", out_type=tf.int64) - 1

    def _starts(self) -> tf.Tensor:
        """Each block's first place."""
        sizes = np.array(self.block_sizes, np.int64)
        return tf.constant(np.cumsum(sizes) - sizes)


def _shuffle(values: tf.Tensor, seed: int, epoch: tf.Tensor, purpose: tf.Tensor | int) -> tf.Tensor:
    key = tf.stack([tf.constant(seed, tf.int64) * 2**32 + epoch, tf.cast(purpose, tf.int64)])
    return tf.random.experimental.stateless_shuffle(values, seed=key, alg="philox")

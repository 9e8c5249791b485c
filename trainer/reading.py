"""Reads records of a split by their places in the shards: blocks of records, or single records."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from trainer.bad_records import by_shard, naming_bad_records, parse
from trainer.shared import records
from trainer.shared.blocks import FRAME_BYTES, block_extent
from trainer.shared.records import Manifest, Shard, Split

_LOCAL_AT_ONCE, _BLOCKS_AT_ONCE, _RECORDS_AT_ONCE = 4, 16, 64
"""Extents to read in parallel from a local disk, and, where a request takes tens of milliseconds, blocks and single records."""


class Extents(NamedTuple):
    """Pieces of a split's shards, each with whole records: the number of its file, its byte offset, its size, its records."""

    paths: np.ndarray
    """Path of each shard."""
    shards: np.ndarray
    """[m] int64, as are the next three: the shard of each extent."""
    offsets: np.ndarray
    sizes: np.ndarray
    counts: np.ndarray
    remote_at_once: int
    """Extents to read in parallel if the shards are not on a local disk."""

    def read(self, numbers: tf.Tensor) -> tf.Tensor:
        """Returns the serialized records of the extents `numbers`, extent after extent, [sum of counts] string."""

        def extent(path: tf.Tensor, offset: tf.Tensor, size: tf.Tensor, count: tf.Tensor) -> tf.data.Dataset:
            # The public TFRecordDataset cannot start in the middle of a file; the underlying op can. If the buffer has the size
            # of the extent, one request to Cloud Storage reads exactly the extent.
            variant = tf.raw_ops.TFRecordDatasetV2(
                filenames=path[None], compression_type="", buffer_size=size, byte_offsets=offset[None]
            )
            return tf.data.experimental.from_variant(variant, tf.TensorSpec([], tf.string)).take(count)

        paths = tf.gather(self.paths, tf.gather(self.shards, numbers))
        offsets, sizes, counts = (tf.gather(values, numbers) for values in (self.offsets, self.sizes, self.counts))
        parallel = self.remote_at_once if "://" in str(self.paths[0]) else _LOCAL_AT_ONCE
        serialized = tf.data.Dataset.from_tensor_slices((paths, offsets, sizes, counts)).interleave(
            extent,
            cycle_length=parallel,
            block_length=records.RECORDS_PER_BLOCK,
            num_parallel_calls=parallel,
            deterministic=True,
        )
        return tf.ensure_shape(serialized.batch(tf.reduce_sum(counts)).get_single_element(), [None])


def blocks_of(data_dir: str, split: Split) -> Extents:
    """Returns the blocks of a split, in the order of the shards."""
    of_shards = [(number, block) for number, shard in enumerate(split.shards) for block in range(len(shard.blocks))]
    offsets, sizes = zip(*(block_extent(split.shards[number], block) for number, block in of_shards), strict=True)
    counts = [count for shard in split.shards for count in block_sizes(shard)]
    columns = ([number for number, _ in of_shards], offsets, sizes, counts)
    return _extents(data_dir, split, columns, _BLOCKS_AT_ONCE)


def block_sizes(shard: Shard) -> list[int]:
    """Returns the number of records in each block of a shard."""
    starts = range(0, shard.records, records.RECORDS_PER_BLOCK)
    return [min(records.RECORDS_PER_BLOCK, shard.records - start) for start in starts]


def find_records(data_dir: str, manifest: Manifest, image_ids: np.ndarray, on_search: Callable[[int], None]) -> Extents:
    """Returns the records of the training images `image_ids`, [n] int64, each an extent, in the order of the shards.

    Reads all shards, several at a time, and calls `on_search(records read)` after each. Raises UserError at a record that is torn
    or has no image ID.
    """
    split = manifest.splits["train"]
    wanted = np.zeros(split.records, bool)
    wanted[image_ids] = True

    def about(serialized: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        image_id = parse(serialized, split.records, manifest.num_classes)[records.IMAGE_ID]
        return image_id, tf.cast(tf.strings.length(serialized), tf.int64) + FRAME_BYTES

    found: list[tuple[np.ndarray, ...]] = []
    read = 0
    on_search(read)
    for number, (ids, sizes) in enumerate(naming_bad_records(by_shard(data_dir, split, about), data_dir, manifest, "train")):
        chosen, sizes = np.flatnonzero(wanted[ids.numpy()]), sizes.numpy()
        found.append((np.full(len(chosen), number), (np.cumsum(sizes) - sizes)[chosen], sizes[chosen], np.ones(len(chosen), int)))
        read += len(sizes)
        on_search(read)
    columns = tuple(np.concatenate(values) for values in zip(*found, strict=True))
    return _extents(data_dir, split, columns, _RECORDS_AT_ONCE)


def _extents(data_dir: str, split: Split, columns: Sequence[Sequence[int] | np.ndarray], remote_at_once: int) -> Extents:
    paths = np.array([f"{data_dir.rstrip('/')}/{shard.file}" for shard in split.shards])
    shards, offsets, sizes, counts = (np.array(values, np.int64) for values in columns)
    return Extents(paths, shards, offsets, sizes, counts, remote_at_once)

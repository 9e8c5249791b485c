"""Blocks of records: locates an image's record, and splits the bytes of a block into records. Does not need TensorFlow.

A block is `RECORDS_PER_BLOCK` consecutive TFRecords of a shard; the last may have fewer. The manifest holds the blocks' offsets.
"""

import struct
from collections.abc import Iterator, Sequence

import numpy as np

from trainer.shared.records import Shard, Split, reading_positions

_LENGTH = struct.Struct("<Q")
_BEFORE, _AFTER = _LENGTH.size + 4, 4
"""Bytes before a record (its length, and the checksum of the length) and after it (its checksum)."""
FRAME_BYTES = _BEFORE + _AFTER


def block_extent(shard: Shard, block: int) -> tuple[int, int]:
    """Returns (offset of a block in its shard's file, size of the block), both in bytes."""
    start = shard.blocks[block]
    end = shard.blocks[block + 1] if block + 1 < len(shard.blocks) else shard.bytes
    return start, end - start


def framed_records(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Yields (offset of the record's frame in `data`, record) for each record of a block or of a whole shard.

    Does not verify checksums.
    """
    position = 0
    while position < len(data):
        (length,) = _LENGTH.unpack_from(data, position)
        begin = position + _BEFORE
        yield position, data[begin : begin + length]
        position = begin + length + _AFTER


def locate(split: Split, image_ids: Sequence[int]) -> list[tuple[int, int]]:
    """Returns (number of the shard, index of the record in that shard) of each image."""
    ends = np.cumsum([shard.records for shard in split.shards])
    positions = reading_positions(split.records)[np.asarray(image_ids, np.int64)]
    shards = np.searchsorted(ends, positions, side="right")
    within = positions - np.concatenate([[0], ends])[shards]
    return list(zip(shards.tolist(), within.tolist(), strict=True))

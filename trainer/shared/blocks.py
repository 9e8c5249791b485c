"""Blocks of records: where an image's record lies, and how a block's bytes are cut into records. Needs no TensorFlow.

A block is the bytes between two offsets that the manifest keeps of a shard: `RECORDS_PER_BLOCK` records, framed as TFRecords.
"""

import struct
from collections.abc import Iterator, Sequence

import numpy as np

from trainer.shared.records import Shard, Split, reading_places

_LENGTH = struct.Struct("<Q")
_BEFORE, _AFTER = _LENGTH.size + 4, 4
"""Bytes around a record: its length and the length's checksum, then its own checksum."""


def block_extent(shard: Shard, block: int) -> tuple[int, int]:
    """Returns the offset of a block in its shard's file and its size, both in bytes."""
    start = shard.blocks[block]
    end = shard.blocks[block + 1] if block + 1 < len(shard.blocks) else shard.bytes
    return start, end - start


def framed_records(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Yields the records of a block, or of a whole shard: where the frame of each begins in `data`, and the record itself.

    Verifies no checksum.
    """
    position = 0
    while position < len(data):
        (length,) = _LENGTH.unpack_from(data, position)
        begin = position + _BEFORE
        yield position, data[begin : begin + length]
        position = begin + length + _AFTER


def locate(split: Split, image_ids: Sequence[int]) -> list[tuple[int, int]]:
    """Returns where the conversion puts each image: the number of its shard, and its position among that shard's records."""
    ends = np.cumsum([shard.records for shard in split.shards])
    places = reading_places(split.records)[np.asarray(image_ids, np.int64)]
    shards = np.searchsorted(ends, places, side="right")
    within = places - np.concatenate([[0], ends])[shards]
    return list(zip(shards.tolist(), within.tolist(), strict=True))

"""One shard: a TFRecord file, with what a manifest and a proof need to know of it."""

import hashlib
import struct
from collections.abc import Iterable
from dataclasses import dataclass

import google_crc32c
import numpy as np

from beam_jobs import files
from trainer.records import RECORDS_PER_BLOCK, Shard, encode_example

FINGERPRINTS = 2**256
"""How many there are: sums of fingerprints are modulo this."""


@dataclass(frozen=True)
class WrittenShard:
    """A shard that is on disk."""

    shard: Shard
    contents: str
    """`contents_digest` of its records."""
    fingerprint: int
    """Sum of `fingerprint_term` over its records, modulo `FINGERPRINTS`."""


def write_shard(folder: str, file: str, split: str, images: Iterable[tuple[int, int, bytes]]) -> WrittenShard:
    """Writes `images`, each (image ID, label, JPEG), to `file` in `folder` in their order; whole or not at all."""
    image_ids: list[int] = []
    labels: list[int] = []
    blocks: list[int] = []
    size = fingerprint = 0
    sha256 = hashlib.sha256()
    with files.open_to_write(files.join(folder, file)) as out:
        for image_id, label, encoded in images:
            if len(image_ids) % RECORDS_PER_BLOCK == 0:
                blocks.append(size)
            record = frame(encode_example(encoded, label, image_id))
            out.write(record)
            sha256.update(record)
            size += len(record)
            fingerprint += fingerprint_term(split, image_id, label, encoded)
            image_ids.append(image_id)
            labels.append(label)
    shard = Shard(file, len(image_ids), size, sha256.hexdigest(), tuple(blocks))
    return WrittenShard(shard, contents_digest(image_ids, labels), fingerprint % FINGERPRINTS)


def frame(record: bytes) -> bytes:
    """Returns `record` as TFRecord files hold it: length, CRC of the length, the record, CRC of the record, little-endian."""
    length = struct.pack("<Q", len(record))
    return b"".join((length, _masked_crc(length), record, _masked_crc(record)))


def contents_digest(image_ids: Iterable[int], labels: Iterable[int]) -> str:
    """Returns a hex digest of which images are there under which labels, and in what order."""
    return hashlib.sha256(np.array([image_ids, labels], "<i8").tobytes()).hexdigest()


def fingerprint_term(split: str, image_id: int, label: int, encoded: bytes) -> int:
    """Returns what an image adds to the fingerprint of its dataset, which is a sum and so knows nothing of shards and order."""
    of_bytes = hashlib.sha256(encoded).digest()
    return int.from_bytes(hashlib.sha256(f"{split} {image_id} {label} ".encode() + of_bytes).digest())


def _masked_crc(data: bytes) -> bytes:
    crc = google_crc32c.value(data)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)

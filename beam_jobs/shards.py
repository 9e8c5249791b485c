"""Writes a shard as a TFRecord file, with the checksums and digests for the manifest and the verification."""

import base64
import hashlib
import struct
from collections.abc import Iterable
from dataclasses import dataclass

import google_crc32c
import numpy as np

from beam_jobs import files
from trainer.shared.records import RECORDS_PER_BLOCK, Shard, example_head

FINGERPRINTS = 2**256
"""Number of different fingerprints, the modulus of their sums."""
_PIECE = 2**20


@dataclass(frozen=True)
class Record:
    """An image with its ID and label, ready to be written."""

    image_id: int
    label: int
    framed: tuple[bytes, bytes, bytes]
    """The record in TFRecord format, in three parts. The second is the JPEG."""
    fingerprint: int
    """The record's `fingerprint_term`."""


@dataclass(frozen=True)
class WrittenShard:
    """A shard that is on disk."""

    shard: Shard
    contents: str
    """`contents_digest` of the shard's records."""
    fingerprint: int
    """Sum of the records' fingerprints, modulo `FINGERPRINTS`."""


def make_record(split: str, image_id: int, label: int, encoded: bytes) -> Record:
    """Returns the record of a JPEG. Several threads can make records: none depends on another."""
    return Record(image_id, label, frame(encoded, label, image_id), fingerprint_term(split, image_id, label, encoded))


def write_shard(folder: str, file: str, records: Iterable[Record]) -> WrittenShard:
    """Writes `records` in their order to `file` in `folder`, atomically."""
    image_ids: list[int] = []
    labels: list[int] = []
    blocks: list[int] = []
    size = fingerprint = crc = 0
    with files.open_to_write(files.join(folder, file)) as out:
        for record in records:
            if len(image_ids) % RECORDS_PER_BLOCK == 0:
                blocks.append(size)
            for part in record.framed:
                out.write(part)
                size += len(part)
                crc = google_crc32c.extend(crc, part)
            fingerprint += record.fingerprint
            image_ids.append(record.image_id)
            labels.append(record.label)
    shard = Shard(file, len(image_ids), size, _base64(crc), tuple(blocks))
    return WrittenShard(shard, contents_digest(image_ids, labels), fingerprint % FINGERPRINTS)


def frame(encoded: bytes, label: int, image_id: int) -> tuple[bytes, bytes, bytes]:
    """Returns a record in TFRecord format: length, CRC of the length, record, CRC of the record, little-endian."""
    head = example_head(len(encoded), label, image_id)
    length = struct.pack("<Q", len(head) + len(encoded))
    crc = google_crc32c.extend(google_crc32c.value(head), encoded)
    return length + _masked(google_crc32c.value(length)) + head, encoded, _masked(crc)


def file_crc32c(path: str) -> str:
    """Returns the checksum of a file in the form of `trainer.shared.records.Shard.crc32c`."""
    crc = 0
    with files.open_to_read(path) as file:
        while piece := file.read(_PIECE):
            crc = google_crc32c.extend(crc, piece)
    return _base64(crc)


def contents_digest(image_ids: Iterable[int], labels: Iterable[int]) -> str:
    """Returns a hex digest of image IDs and labels, in their order."""
    return hashlib.sha256(np.array([image_ids, labels], "<i8").tobytes()).hexdigest()


def fingerprint_term(split: str, image_id: int, label: int, encoded: bytes) -> int:
    """Returns an image's term in its dataset's fingerprint. The fingerprint is a sum, so shards and order do not matter."""
    of_bytes = hashlib.sha256(encoded).digest()
    return int.from_bytes(hashlib.sha256(f"{split} {image_id} {label} ".encode() + of_bytes).digest())


def _base64(crc: int) -> str:
    return base64.b64encode(struct.pack(">I", crc)).decode()


def _masked(crc: int) -> bytes:
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)

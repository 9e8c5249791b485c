"""The record schema, shared by the code that writes a dataset and the code that reads it.

A record is a serialized `tf.train.Example` with exactly three features, one image each:

    image/encoded      bytes   a JPEG
    image/class/label  int64   rank of the image's synset, 0-based
    image/ID           int64   the image's index in u: dense, 0..N-1 within its split

The dataset's folder also holds `manifest.json`, which is written last: a folder without it is not a finished dataset. Only
`parse_example` and `read_manifest` need TensorFlow, so Beam workers never import it.
"""

import functools
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from trainer.shared.errors import UserError
from trainer.shared.files import is_local

if TYPE_CHECKING:
    import numpy as np


ENCODED = "image/encoded"
LABEL = "image/class/label"
IMAGE_ID = "image/ID"

MANIFEST = "manifest.json"
RECORDS_PER_BLOCK = 64
"""Records of a block. The manifest holds the offset of every block, so a reader can seek to it."""


@dataclass(frozen=True)
class Shard:
    """One TFRecord file of a split."""

    file: str
    """File name within the dataset's folder."""
    records: int
    bytes: int
    crc32c: str
    """CRC32C of the whole file, in base64, the form in which Cloud Storage reports it."""
    blocks: tuple[int, ...]
    """Byte offset of every `RECORDS_PER_BLOCK`-th record, starting with 0."""


@dataclass(frozen=True)
class PassedOverFor:
    """What was passed over in the raw data for one reason."""

    reason: str
    entries: int
    """Number of files, members of tars, empty folders, and folders or tars of classes that were not opened."""
    bytes: int
    names: tuple[str, ...]
    """The first of their paths relative to the raw folder, at most 1,000."""


@dataclass(frozen=True)
class Seen:
    """All that a conversion saw of a split in the raw folder: the records, the rejected images and `passed_over`."""

    entries: int
    """Number of files, members of tars, and empty folders."""
    bytes: int
    """Size of all entries."""
    rejected_bytes: int
    """Size of the rejected images."""
    passed_over: tuple[PassedOverFor, ...]
    """What is no image, or was not chosen, sorted by reason."""


@dataclass(frozen=True)
class Split:
    """The images of `train` or `validation`. IDs are exactly 0..records-1, each once."""

    records: int
    records_per_class: tuple[int, ...]
    """Number of records of each class, in label order."""
    shards: tuple[Shard, ...]
    repaired: tuple[Mapping[str, Any], ...] = ()
    """For each image that was converted to a standard JPEG: its ID, its source and the repair."""
    rejected: tuple[Mapping[str, Any], ...] = ()
    """For each image that was left out: its source and the reason."""
    resized: int = 0
    """Number of images that were larger than the conversion's `max_side`."""
    seen: Seen | None = None
    """All that was seen in the raw data; None if the dataset was made before this was counted."""


@dataclass(frozen=True)
class Manifest:
    """The description of a dataset: its classes, splits and shards, and the options of the conversion.

    Names of raw files and classes are in the form of `trainer.shared.errors.printable`.
    """

    name: str
    fingerprint: str
    """Identifies the content: equal if and only if every split has the same (ID, label, sha256 of the bytes) of every image."""
    synsets: tuple[str, ...]
    """Synsets of the classes, in label order."""
    splits: Mapping[str, Split]
    tool_version: str
    options: Mapping[str, Any] = field(default_factory=dict)
    """Options of the conversion that change the output."""

    @property
    def num_classes(self) -> int:
        return len(self.synsets)


@functools.lru_cache(maxsize=2)
def reading_positions(num_images: int) -> "np.ndarray":
    """Returns the position of each image ID, int64 [N], in the order of the records: shard after shard.

    The positions are a fixed permutation of 0..N-1 that mixes the classes. They are the ranks of SplitMix64's outputs, which
    differ for different IDs (Steele et al. 2014, doi 10.1145/2714064.2660195).
    """
    import numpy as np

    keys = (np.arange(num_images, dtype=np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    keys = (keys ^ (keys >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    keys = (keys ^ (keys >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.argsort(np.argsort(keys ^ (keys >> np.uint64(31))))


def manifest_to_json(manifest: Manifest) -> str:
    return json.dumps(asdict(manifest), indent=1, sort_keys=True) + "\n"


def manifest_from_json(text: str) -> Manifest:
    """Parses the output of `manifest_to_json`. Raises ValueError or KeyError if `text` is something else."""
    raw = json.loads(text)
    splits = {
        name: Split(
            records=split["records"],
            records_per_class=tuple(split["records_per_class"]),
            shards=tuple(Shard(**{**shard, "blocks": tuple(shard["blocks"])}) for shard in split["shards"]),
            repaired=tuple(split["repaired"]),
            rejected=tuple(split["rejected"]),
            resized=split["resized"],
            seen=_seen_from_json(split.get("seen")),
        )
        for name, split in raw["splits"].items()
    }
    return Manifest(
        name=raw["name"],
        fingerprint=raw["fingerprint"],
        synsets=tuple(raw["synsets"]),
        splits=splits,
        tool_version=raw["tool_version"],
        options=raw["options"],
    )


def _seen_from_json(seen: Mapping[str, Any] | None) -> Seen | None:
    if seen is None:
        return None
    reasons = (PassedOverFor(**{**one, "names": tuple(one["names"])}) for one in seen["passed_over"])
    return Seen(**{**seen, "passed_over": tuple(reasons)})


def read_manifest(data_dir: str) -> Manifest:
    """Reads the manifest of the dataset in `data_dir`, a local or a gs:// folder.

    Raises UserError if the dataset is not complete: the manifest is missing or unreadable, a shard is missing or, on a local
    disk, has another size than the manifest records. On Cloud Storage, one listing shows which shards are there: an object is
    whole, and a request for the size of each would take a minute.
    """
    import tensorflow as tf

    path = f"{data_dir.rstrip('/')}/{MANIFEST}"
    if not tf.io.gfile.exists(path):
        raise UserError(
            f"{data_dir} holds no finished dataset: {MANIFEST} is missing; build one with python -m beam_jobs.build_tfrecords"
        )
    with tf.io.gfile.GFile(path) as file:
        text = file.read()
    try:
        manifest = manifest_from_json(text)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not a manifest of this version: {error!r}; build the dataset again") from error
    sizes = _sizes(data_dir)
    for split in manifest.splits.values():
        for shard in split.shards:
            shard_path = f"{data_dir.rstrip('/')}/{shard.file}"
            found = sizes.get(shard.file, 0)
            if found not in (shard.bytes, None):
                raise UserError(f"{shard_path} has {found} bytes, but {MANIFEST} says {shard.bytes}; build the dataset again")
    return manifest


def _sizes(folder: str) -> dict[str, int | None]:
    """Returns the size of each file in a folder in bytes, by name; None if the folder is remote. Takes one listing."""
    import tensorflow as tf

    if is_local(folder):
        return {entry.name: entry.stat().st_size for entry in os.scandir(folder) if entry.is_file()}
    return dict.fromkeys(tf.io.gfile.listdir(folder))


def encode_example(encoded: bytes, label: int, image_id: int) -> bytes:
    """Returns the record of an image, a serialized `tf.train.Example`. The same arguments always give the same bytes."""
    return example_head(len(encoded), label, image_id) + encoded


def example_head(size: int, label: int, image_id: int) -> bytes:
    """Returns the bytes of a record before its JPEG of `size` bytes. The JPEG is the end of the record.

    Writes the protobuf wire format directly (https://protobuf.dev/programming-guides/encoding/). This takes a tenth of the time
    of building the message, and does not copy the JPEG.
    """
    value = _header(1, size)  # of BytesList
    feature = _header(1, len(value) + size) + value
    entry = _ENCODED_KEY + _header(2, len(feature) + size) + feature
    entries = _label_entry(label) + _int64_entry(_IMAGE_ID_KEY, image_id) + _header(1, len(entry) + size) + entry
    return _header(1, len(entries) + size) + entries


@functools.lru_cache(maxsize=4096)
def _label_entry(label: int) -> bytes:
    return _int64_entry(_LABEL_KEY, label)


def _int64_entry(key: bytes, value: int) -> bytes:
    number = _varint(value)
    entry = key + _delimited(2, _delimited(3, _delimited(1, number)))
    return _delimited(1, entry)


def _delimited(field_number: int, payload: bytes) -> bytes:
    return _header(field_number, len(payload)) + payload


def _header(field_number: int, length: int) -> bytes:
    return bytes((field_number << 3 | 2,)) + _varint(length)


def _varint(value: int) -> bytes:
    if 0 <= value <= 0x7F:
        return bytes((value,))
    if value < 0:
        raise ValueError(f"labels and image IDs are 0 or more, got {value}")
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


_LABEL_KEY, _IMAGE_ID_KEY, _ENCODED_KEY = (_delimited(1, key.encode()) for key in (LABEL, IMAGE_ID, ENCODED))


def decode_example(serialized: bytes) -> tuple[bytes, int, int]:
    """Parses the output of `encode_example` into (JPEG, label, image ID). Raises ValueError if it is something else."""
    try:
        _, features = next(_fields(memoryview(serialized)))
        found: dict[str, Any] = {}
        for _, entry in _fields(features):
            (_, key), (_, feature) = _fields(entry)
            ((kind, values),) = _fields(feature)
            ((_, value),) = _fields(values)
            found[bytes(key).decode()] = bytes(value) if kind == 1 else _read_varint(value, 0)[0]
        return found[ENCODED], found[LABEL], found[IMAGE_ID]
    except (KeyError, IndexError, StopIteration, TypeError, UnicodeDecodeError) as error:
        raise ValueError("not a record of this schema") from error


def _fields(message: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Yields (number, bytes) of each field. Raises ValueError if a field is not length-delimited (wire type 2)."""
    position = 0
    while position < len(message):
        size, start = _read_varint(message, position + 1)
        if message[position] & 7 != 2 or start + size > len(message):
            raise ValueError("not a record of this schema")
        yield message[position] >> 3, message[start : start + size]
        position = start + size


def _read_varint(message: memoryview, position: int) -> tuple[int, int]:
    """Returns (value, position after it)."""
    value = shift = 0
    while message[position] & 0x80:
        value |= (message[position] & 0x7F) << shift
        shift += 7
        position += 1
    return value | message[position] << shift, position + 1


def parse_example(serialized: Any) -> dict[str, Any]:
    """Parses one record in a TensorFlow graph.

    Returns scalars by feature name: `image/encoded` string, `image/class/label` int64, `image/ID` int64. If a record lacks a
    feature, the graph fails with the feature's name.
    """
    import tensorflow as tf

    return tf.io.parse_single_example(
        serialized,
        {
            ENCODED: tf.io.FixedLenFeature([], tf.string),
            LABEL: tf.io.FixedLenFeature([], tf.int64),
            IMAGE_ID: tf.io.FixedLenFeature([], tf.int64),
        },
    )

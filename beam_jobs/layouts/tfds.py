"""ImageNet as TFDS prepares it (tfds.load("imagenet2012")), the folder of a version:

    imagenet2012-train.tfrecord-00000-of-01024    records with the features image, label and file_name
    imagenet2012-validation.tfrecord-00000-of-00064
    label.labels.txt                              the synset of each label
    dataset_info.json                             the number of records of each file

Images are read where they are. TFDS itself converted 22 training images in CMYK and a PNG to JPEG in RGB. Their bytes differ from
the archives'.
"""

import json
import posixpath
import re
import struct
from collections.abc import Iterator
from typing import BinaryIO, ClassVar

from beam_jobs import files
from beam_jobs.layouts.layout import Found, Stream, StreamedImage, StreamError
from beam_jobs.layouts.passed_over import TEST, PassedOver
from beam_jobs.listings import FileInfo

LABEL_NAMES, INFO = "label.labels.txt", "dataset_info.json"
_FILE = re.compile(r"\w+-(train|validation|test)\.tfrecord-(\d{5})-of-\d{5}")
_VARINT, _DELIMITED = 0, 2
"""Wire types: https://protobuf.dev/programming-guides/encoding/."""
_HEADER = 11
"""Bytes of a field's number and length, at most."""


class Tfds(Stream):
    """TFRecord files without an index."""

    in_place: ClassVar[bool] = True

    def expects(self, split: str) -> str:
        return f"imagenet2012-{split}.tfrecord-00000-of-N of TFDS"

    def recognise(self, folder: str, split: str) -> Found | None:
        labels = files.find(files.join(folder, LABEL_NAMES))
        if labels is None or not files.find(files.join(folder, INFO)):
            return None
        matches = [(match[1], info) for info in files.tree(folder, depth=0) if (match := _FILE.fullmatch(info.name))]
        found = tuple(info for of, info in matches if of == split)
        tests = tuple(PassedOver(info.name, TEST, info.size) for of, info in matches if of == "test" and split == "train")
        why = f"{LABEL_NAMES} and {len(found):,} files as {found[0].name} are there" if found else ""
        return Found(found, why, labels._replace(name=LABEL_NAMES), tests) if found else None

    def images(self, folder: str, name: str, labels: FileInfo | None) -> Iterator[StreamedImage | PassedOver]:
        synsets = files.read_lines(files.join(folder, LABEL_NAMES))
        size = (files.find(files.join(folder, name)) or FileInfo("", 0, 0)).size
        count = 0
        with files.open_to_read(files.join(folder, name)) as file:
            for start, end in _records(file, name, size):
                try:
                    yield _image(file, start, end, synsets)
                except (KeyError, IndexError, ValueError) as error:
                    lacks = "must be an image with file_name and label, as imagenet2012 of TFDS has them"
                    raise StreamError(f"{name} record {count}: it {lacks} ({error!r})") from error
                count += 1
        expected = _expected(folder, name)
        if expected is not None and count != expected:
            raise StreamError(f"{name} has {count:,} records where {INFO} says {expected:,}; prepare it again")


def _records(file: BinaryIO, name: str, size: int) -> Iterator[tuple[int, int]]:
    """Yields the first byte and the end of each record: a length, its CRC, the record, its CRC."""
    position = 0
    while position < size:
        file.seek(position)
        head = file.read(12)
        end = position + 12 + struct.unpack("<Q", head[:8])[0] if len(head) == 12 else size
        if end + 4 > size:
            raise StreamError(f"{name} is cut off; prepare it again")
        yield position + 12, end
        position = end + 4


def _image(file: BinaryIO, start: int, end: int, synsets: list[str]) -> StreamedImage:
    """Returns the image of a record, a serialized tf.train.Example. Reads no more than the record's headers, name and label.

    Raises KeyError, IndexError or ValueError if the record is something else.
    """
    places = {}
    ((_, features, features_end),) = _fields(file, start, end)
    for _, entry, entry_end in _fields(file, features, features_end):
        (_, key, key_end), (_, feature, feature_end) = _fields(file, entry, entry_end)
        ((_, values, values_end),) = _fields(file, feature, feature_end)
        ((_, value, value_end),) = _fields(file, values, values_end)
        places[_bytes(file, key, key_end)] = value, value_end
    label, _ = _varint(_bytes(file, *places[b"label"]), 0)
    image, image_end = places[b"image"]
    name = posixpath.basename(_bytes(file, *places[b"file_name"]).decode())
    return StreamedImage(name, synsets[label], b"", image, image_end - image)


def _fields(file: BinaryIO, position: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Yields the number, the first byte and the end of each field of a message in protobuf's wire format."""
    while position < end:
        head = _bytes(file, position, min(position + _HEADER, end))
        value, length = _varint(head, 1)
        kind = head[0] & 7
        if kind not in (_VARINT, _DELIMITED):
            raise ValueError(f"wire type {kind}")
        begin, stop = (position + 1, position + length) if kind == _VARINT else (position + length, position + length + value)
        if stop > end:
            raise ValueError("a field that ends too late")
        yield head[0] >> 3, begin, stop
        position = stop


def _varint(data: bytes, position: int) -> tuple[int, int]:
    """Returns a value and the position after it."""
    value = shift = 0
    while data[position] & 0x80:
        value |= (data[position] & 0x7F) << shift
        shift += 7
        position += 1
    return value | data[position] << shift, position + 1


def _bytes(file: BinaryIO, start: int, end: int) -> bytes:
    file.seek(start)
    return file.read(end - start)


def _expected(folder: str, name: str) -> int | None:
    """Returns the number of records that TFDS wrote to a file, or None if it does not say."""
    match = _FILE.fullmatch(name)
    for split in json.loads(files.read(files.join(folder, INFO)))["splits"]:
        lengths = split.get("shardLengths", ())
        if match and split["name"] == match[1] and int(match[2]) < len(lengths):
            return int(lengths[int(match[2])])
    return None


LAYOUT = Tfds()

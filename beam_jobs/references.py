"""References to images. Workers exchange these, never the bytes of images.

They are sent as plain tuples, which Beam and the processes that write shards encode many times faster than named tuples, even if
those have a coder of their own. Names are sent as bytes, because not all are UTF-8, and Beam encodes no other text. Only the
functions here know the order of the fields of such a tuple.
"""

from collections.abc import Iterable
from typing import NamedTuple

from beam_jobs.layouts.layout import RawImage

PackedImage = tuple
PackedReference = tuple


class Reference(NamedTuple):
    """An image with its ID and its place in reading order."""

    place: int
    image_id: int
    image: RawImage


def pack_images(images: Iterable[RawImage]) -> list[PackedImage]:
    return [(_encoded(name), label, _encoded(file), offset, size) for name, label, file, offset, size in images]


def pack_reference(place: int, image_id: int, image: PackedImage) -> PackedReference:
    return place, image_id, *image


def unpack_references(packed: Iterable[PackedReference]) -> list[Reference]:
    return [
        Reference(place, image_id, RawImage(_decoded(name), label, _decoded(file), offset, size))
        for place, image_id, name, label, file, offset, size in packed
    ]


def _encoded(name: str) -> bytes:
    return name.encode(errors="surrogateescape")


def _decoded(name: bytes) -> str:
    return name.decode(errors="surrogateescape")

"""What travels between workers: references to images, never their bytes.

They travel packed, as plain tuples: Beam and the processes that write shards encode those many times faster than named tuples,
even with a coder of their own. Only the functions here know the order of a packed tuple's fields.
"""

from collections.abc import Iterable
from typing import NamedTuple

from beam_jobs.layouts.layout import RawImage

PackedImage = tuple
PackedReference = tuple


class Reference(NamedTuple):
    """An image with its ID and its place in the order of reading."""

    place: int
    image_id: int
    image: RawImage


def pack_images(images: Iterable[RawImage]) -> list[PackedImage]:
    return list(map(tuple, images))


def pack_reference(place: int, image_id: int, image: PackedImage) -> PackedReference:
    return place, image_id, *image


def unpack_references(packed: Iterable[PackedReference]) -> list[Reference]:
    return [Reference(place, image_id, RawImage(*image)) for place, image_id, *image in packed]

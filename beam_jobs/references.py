"""References to images. Workers exchange these, never the bytes of images.

They are sent as plain tuples, which Beam and the processes that write shards encode many times faster than named tuples, even if
those have a coder of their own. Only the functions here know the order of the fields of such a tuple.
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
    return list(map(tuple, images))


def pack_reference(place: int, image_id: int, image: PackedImage) -> PackedReference:
    return place, image_id, *image


def unpack_references(packed: Iterable[PackedReference]) -> list[Reference]:
    return [Reference(place, image_id, RawImage(*image)) for place, image_id, *image in packed]

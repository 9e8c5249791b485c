"""One image: what its header says it is, and a JPEG that every decoder reads alike."""

import io
from dataclasses import dataclass

from PIL import Image, ImageChops, UnidentifiedImageError

QUALITY = 95
"""Of the JPEGs made here, which have full colour resolution."""

_BASELINE, _EXTENDED, _PROGRESSIVE = 0xC0, 0xC1, 0xC2
_START_OF_FRAME = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_WITHOUT_LENGTH = frozenset(range(0xD0, 0xD9)) | {0x01}
_END, _START_OF_SCAN, _ADOBE = 0xD9, 0xDA, 0xEE


class UnreadableImageError(Exception):
    """The bytes are no image that can be read; the message says why in a few words."""


@dataclass(frozen=True)
class JpegHeader:
    """What the header of a JPEG says of the image."""

    process: int
    """The start-of-frame marker: 0xC0 baseline, 0xC1 extended, 0xC2 progressive, else a kind that few decoders read."""
    precision: int
    """Bits a sample."""
    height: int
    width: int
    components: int
    adobe_transform: int | None
    """Of Adobe's marker: 0 none, 1 YCbCr, 2 YCCK; None where there is no such marker."""


def read_jpeg_header(data: bytes) -> JpegHeader | None:
    """Returns the header of a JPEG without decoding it, or None where `data` is not one that has any."""
    if data[:2] != b"\xff\xd8":
        return None
    adobe_transform = None
    position = 2
    while position + 4 <= len(data) and data[position] == 0xFF:
        marker = data[position + 1]
        if marker == 0xFF:  # fill byte
            position += 1
            continue
        if marker in _WITHOUT_LENGTH:
            position += 2
            continue
        if marker in (_START_OF_SCAN, _END):
            return None
        length = int.from_bytes(data[position + 2 : position + 4])
        segment = data[position + 4 : position + 2 + length]
        if marker in _START_OF_FRAME and len(segment) >= 6:
            height, width = int.from_bytes(segment[1:3]), int.from_bytes(segment[3:5])
            return JpegHeader(marker, segment[0], height, width, segment[5], adobe_transform)
        if marker == _ADOBE and segment[:5] == b"Adobe" and len(segment) >= 12:
            adobe_transform = segment[11]
        position += 2 + length
    return None


def repair(data: bytes) -> tuple[bytes, str]:
    """Returns JPEG bytes, grey or RGB, and what was done to get them, "" where they are the image's own.

    Own bytes stay what they are where the header is that of a usual JPEG of one or three components. Anything else that
    Pillow reads becomes an RGB JPEG, the same bytes for the same image. Raises UnreadableImageError.
    """
    if not data:
        raise UnreadableImageError("is empty")
    header = read_jpeg_header(data)
    if header and _is_usual(header):
        return data, ""
    try:
        with Image.open(io.BytesIO(data)) as image:
            was = f"{image.format} {image.mode}"
            rgb = _to_rgb(image, header)
    except UnidentifiedImageError:
        raise UnreadableImageError("is not an image") from None
    except Exception as error:  # decoders raise errors of all kinds on damaged bytes
        raise UnreadableImageError(f"cannot be decoded ({error})") from error
    out = io.BytesIO()
    rgb.save(out, "jpeg", quality=QUALITY, subsampling=0)
    return out.getvalue(), f"{was} to JPEG RGB"


def _is_usual(header: JpegHeader) -> bool:
    return (
        header.process in (_BASELINE, _EXTENDED, _PROGRESSIVE)
        and header.precision == 8
        and header.components in (1, 3)
        and header.height > 0
        and header.width > 0
    )


def _to_rgb(image: Image.Image, header: JpegHeader | None) -> Image.Image:
    if image.mode == "CMYK" and header and header.adobe_transform is None:
        # Pillow takes every CMYK JPEG for one of Adobe's, whose inks are inverted; without Adobe's marker they are not.
        return ImageChops.invert(image).convert("RGB")
    return image.convert("RGB")

"""Turns an image into a JPEG that all decoders read alike."""

import io
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageChops, ImageCms, UnidentifiedImageError, features
from PIL import __version__ as pillow_version

from beam_jobs.jpeg import BASELINE, EXTENDED, PROGRESSIVE, JpegHeader, read_jpeg_header

REPAIRED_QUALITY = 100
"""JPEG quality of repaired images, with almost no loss. There are few of them."""
RESIZED_QUALITY = 95
"""JPEG quality of resized images. All images may be resized."""
MAX_PIXELS = 2**30 // 12
"""89 million pixels, Pillow's own limit and more than any of ImageNet's images has. A larger image may exhaust memory."""
HEAD_BYTES = 2**12
"""Bytes that usually hold a JPEG's header. If they do not, the whole file is read."""
TAIL_BYTES = 2

_END_OF_IMAGE = b"\xff\xd9"
CODECS = f"Pillow {pillow_version}, libjpeg {features.version_codec('jpg')}"
"""The versions on which the bytes of repaired and resized images depend."""
_SRGB = ImageCms.createProfile("sRGB")


class UnreadableImageError(Exception):
    """The bytes are not a readable image. The message says why in a few words."""


@dataclass(frozen=True)
class Prepared:
    """An image for a record."""

    encoded: bytes
    """A JPEG, grey or RGB."""
    repaired: str
    """How the image was repaired; "" if it was not."""
    resized: bool


@dataclass(frozen=True)
class Options:
    """How images are treated."""

    decode: bool = False
    """Whether to decode every image to find damage. Without it, only images whose header or end looks odd are decoded."""
    max_side: int | None = None
    """Pixels of the longer side. Larger images are resized to it; None resizes none."""


def keeps_its_bytes(head: bytes, tail: bytes, options: Options) -> bool:
    """Returns whether the first `HEAD_BYTES` and last `TAIL_BYTES` of an image show that `prepare` keeps its bytes."""
    if options.decode or tail != _END_OF_IMAGE:
        return False
    header = read_jpeg_header(head)
    usual = header is not None and _is_usual(header) and not header.fault
    return header is not None and usual and not _is_larger(header.width, header.height, options.max_side)


def prepare(data: bytes, options: Options) -> Prepared:
    """Returns the JPEG that goes into an image's record.

    A usual whole JPEG, grey or RGB, keeps its own bytes. Anything else that Pillow reads becomes an RGB JPEG; the same image
    always gives the same bytes. Its colours follow its ICC profile, or the common convention if it has none. Raises
    UnreadableImageError if the image cannot be read.
    """
    if not data:
        raise UnreadableImageError("is empty")
    header = read_jpeg_header(data)
    if header and header.height * header.width > MAX_PIXELS:
        raise _too_large(header.width, header.height)
    usual = header is not None and _is_usual(header)
    larger = header is not None and _is_larger(header.width, header.height, options.max_side)
    # A JPEG without its end marker may be cut off. Bytes after the marker do no harm.
    whole = header is not None and not header.fault and data.rfind(_END_OF_IMAGE, header.scan) >= 0
    if usual and whole and not larger and not options.decode:
        return Prepared(data, "", False)
    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.width * image.height > MAX_PIXELS:
                raise _too_large(image.width, image.height)
            if usual and not larger:
                # Reads every bit but makes few pixels. Raises for an image that is cut off.
                image.draft(None, (1, 1))
                image.load()
                return Prepared(data, "", False)
            was = f"{image.format} {image.mode}"
            pixels, by = (image, "") if usual else _to_rgb(image, header)
            resized = _is_larger(*pixels.size, options.max_side)
            if resized and options.max_side:
                pixels.thumbnail((options.max_side, options.max_side), Image.Resampling.LANCZOS, reducing_gap=3.0)
            return Prepared(
                _to_jpeg(pixels, RESIZED_QUALITY if resized else REPAIRED_QUALITY),
                "" if usual else f"{was} to JPEG RGB{by}",
                resized,
            )
    except UnreadableImageError:
        raise
    except UnidentifiedImageError:
        raise UnreadableImageError("is not an image") from None
    except Image.DecompressionBombError as error:
        raise UnreadableImageError(f"has more than {MAX_PIXELS:,} pixels ({error})") from error
    except Exception as error:  # decoders raise errors of all kinds on damaged bytes
        why = header.fault if header and header.fault else " ".join(str(error).split())
        raise UnreadableImageError(f"cannot be decoded ({why})") from error


def _is_usual(header: JpegHeader) -> bool:
    """Returns whether every decoder gives the same pixels: grey or YCbCr, eight bits, of a common kind and size."""
    return (
        header.process in (BASELINE, EXTENDED, PROGRESSIVE)
        and header.precision == 8
        and header.components in (1, 3)
        and 0 < header.height * header.width <= MAX_PIXELS
    )


def _too_large(width: int, height: int) -> UnreadableImageError:
    return UnreadableImageError(f"claims to be {width} x {height} pixels, more than the limit of {MAX_PIXELS:,}")


def _is_larger(width: int, height: int, max_side: int | None) -> bool:
    return max_side is not None and max(width, height) > max_side


def _to_rgb(image: Image.Image, header: JpegHeader | None) -> tuple[Image.Image, str]:
    """Returns an image in RGB, and " by its ICC profile" if that gave the colours, else ""."""
    if image.mode == "CMYK" and header and header.adobe_transform is None:
        # Pillow inverts the inks of every CMYK JPEG. Adobe's are stored inverted; without Adobe's marker they are not.
        inks = ImageChops.invert(image)
        inks.info = image.info
        image = inks
    if image.mode.startswith("I"):
        # Pillow would clip 16-bit values at 255.
        grey = (np.clip(np.asarray(image).astype(np.int64), 0, 0xFFFF) >> 8).astype(np.uint8)
        return Image.fromarray(grey).convert("RGB"), ""
    profile = image.info.get("icc_profile")
    if profile:
        pixels = image if image.mode in ("CMYK", "L") else image.convert("RGB")
        try:
            of_image = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            managed = ImageCms.profileToProfile(pixels, of_image, _SRGB, outputMode="RGB")
            assert managed is not None
            return managed, " by its ICC profile"
        except (ImageCms.PyCMSError, OSError):
            pass  # the profile is broken or for another colour space
    return image.convert("RGB"), ""


def _to_jpeg(image: Image.Image, quality: int) -> bytes:
    out = io.BytesIO()
    image.save(out, "jpeg", quality=quality, subsampling=0, icc_profile=None)
    return out.getvalue()

"""Names in raw data: which two are the same, their order, and which are no images.

A name's bytes are UTF-8. Bytes that are not are kept as lone surrogates (PEP 383), so each name can be opened again.
"""

import re
import unicodedata

_OF_FILE_MANAGERS = (".ds_store", "thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r")
_OF_ANNOTATIONS = (".xml", "_boxes.txt")
_TEXT = (
    ".txt",
    ".csv",
    ".tsv",
    ".json",
    ".jsonl",
    ".md",
    ".html",
    ".htm",
    ".mat",
    ".yaml",
    ".yml",
    ".log",
    ".md5",
    ".sha256",
    ".py",
)
IMAGES = (".jpeg", ".jpg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm")
"""Endings of names of images, in small letters."""


def canonical(name: str) -> str:
    """Returns the composed form (NFC) of a name. A name has it in common with its decomposed form, which macOS writes (NFD)."""
    return name if name.isascii() else unicodedata.normalize("NFC", name)


def base_name(name: str) -> str:
    return name.rpartition("/")[2]


def base_name_first(name: str) -> tuple[str, str]:
    """Returns a sort key for validation images: the name without its folder first, like in the flat validation archive."""
    folder, _, base = canonical(name).rpartition("/")
    return base, folder


def why_passed_over(name: str) -> str:
    """Returns why a file of raw data is no image, judged by its path within the split; "" if it may be one."""
    *folders, base = name.split("/")
    lower = base.lower()
    if lower in _OF_FILE_MANAGERS:
        return "left by a file manager"
    if base.startswith("._") or "__MACOSX" in folders:
        return "metadata of macOS"
    if base.startswith(".") or any(folder.startswith(".") for folder in folders):
        return "hidden"
    if lower.endswith(_OF_ANNOTATIONS):
        return "an annotation"
    if lower.endswith(_TEXT):
        return "not an image by its name"
    return ""


def out_of_order(names: list[str]) -> tuple[str, str] | None:
    """Returns two of the sorted `names` whose numbers have the other order, such as val_10 and val_2; None if there are none."""
    by_number = sorted(names, key=_numbers_as_numbers)
    return next(((name, other) for name, other in zip(names, by_number, strict=True) if name != other), None)


def _numbers_as_numbers(name: str) -> list[tuple[int, str]]:
    """Returns a sort key that compares runs of digits by value."""
    parts = re.split("([0-9]+)", name)
    return [(len(part.lstrip("0")), part.lstrip("0")) if place % 2 else (0, part) for place, part in enumerate(parts)]

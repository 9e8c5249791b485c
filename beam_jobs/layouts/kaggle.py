"""ImageNet as Kaggle has it:

    ILSVRC/Data/CLS-LOC/train/SYNSET/*    the training images
    ILSVRC/Data/CLS-LOC/val/*             the validation images, whose labels are in LOC_val_solution.csv
    LOC_val_solution.csv                  a line for each image: its name and its boxes, each a synset and four numbers

The raw folder holds ILSVRC, or is ILSVRC, Data or CLS-LOC itself. The file of labels lies beside ILSVRC.
"""

import os
import posixpath
import sys
from collections.abc import Set
from dataclasses import replace

from beam_jobs import files
from beam_jobs.layouts.folders import Folders
from beam_jobs.layouts.layout import Archive, Contents, Found, Listing
from beam_jobs.layouts.pairs import synsets_by_name
from trainer.shared.files import is_local

LABELS = "LOC_val_solution.csv"
_BASES = ("ILSVRC/Data/CLS-LOC", "Data/CLS-LOC", "CLS-LOC", "")
"""Where the folders of the splits lie in the raw folder. In the nth, the file of labels lies n levels above the raw folder."""


class Kaggle(Folders):
    """Extracted folders, deep within Kaggle's, with labels by name."""

    def expects(self, split: str) -> str:
        return f"{_BASES[0]}/{super().expects(split)}"

    def recognise(self, folder: str, split: str) -> Found | None:
        for levels, base in enumerate(_BASES):
            labels = _find_labels(folder, levels)
            if not base and not labels:
                return None  # without Kaggle's labels, these are any extracted folders
            if found := super().recognise(files.join(folder, base) if base else folder, split):
                inner = tuple(info._replace(name=posixpath.join(base, info.name)) for info in found.files)
                why = posixpath.join(base, found.why) + (f", {labels.name} is there" if labels else "")
                return Found(inner, why, found.labels if split == "train" else labels or found.labels)
        return None

    def training_archives(self, folder: str, found: Found) -> Contents:
        base = _base_of(found.files[0].name)
        return _outside(super().training_archives(files.join(folder, base), _inside(found, base)), base)

    def validation_archives(self, folder: str, found: Found, known: Set[str] | None) -> Contents:
        base = _base_of(found.files[0].name)
        inner = _inside(found, base)
        if not found.labels or not found.labels.name.endswith(LABELS) or any(info.name.count("/") > 1 for info in inner.files):
            return _outside(super().validation_archives(files.join(folder, base), inner, known), base)
        name = inner.files[0].name.partition("/")[0]
        names = [info.name.rpartition("/")[2].partition(".")[0] for info in inner.files]
        synsets, problems = synsets_by_name(found.labels.name, _read_labels(folder, found.labels.name), names, known)
        size = sum(info.size for info in inner.files)
        return _outside(Contents((Archive("validation", name, "", 0, size, synsets=synsets),), problems), base)

    def list_images(self, folder: str, archive: Archive) -> Listing:
        base = _base_of(archive.name)
        inner = replace(archive, name=posixpath.relpath(archive.name, base or "."), file=archive.file.removeprefix(f"{base}/"))
        listing = super().list_images(files.join(folder, base), inner)
        return replace(listing, images=tuple(one._replace(file=posixpath.join(base, one.file)) for one in listing.images))


def _base_of(name: str) -> str:
    """Returns the one of `_BASES` that holds a file or a folder."""
    return next(base for base in _BASES if not base or name.startswith(f"{base}/"))


def _inside(found: Found, base: str) -> Found:
    return replace(found, files=tuple(info._replace(name=posixpath.relpath(info.name, base or ".")) for info in found.files))


def _outside(contents: Contents, base: str) -> Contents:
    archives = tuple(
        replace(one, name=posixpath.join(base, one.name), file=one.file and posixpath.join(base, one.file))
        for one in contents.archives
    )
    return replace(contents, archives=archives)


def _find_labels(folder: str, levels: int) -> files.FileInfo | None:
    """Returns the file of labels in the raw folder or up to `levels` above it, or None."""
    for up in range(levels + 1):
        name = "../" * up + LABELS
        if found := files.find(_path(folder, name)):
            return found._replace(name=name)
    return None


def _read_labels(folder: str, name: str) -> dict[str, str]:
    """Returns the synset of each image by its name without ending."""
    lines = files.read(_path(folder, name)).decode("utf-8-sig", errors="replace").splitlines()
    pairs = (line.partition(",")[::2] for line in lines[1:] if line.strip())
    return {image: sys.intern(boxes.split()[0]) if boxes.split() else "" for image, boxes in pairs}


def _path(folder: str, name: str) -> str:
    """Returns the path of a file in a folder or above it. In a bucket, ".." is a name like any other."""
    up = name.count("../")
    if is_local(folder):
        return os.path.join(os.path.abspath(folder), name)
    return files.join("/".join(folder.rstrip("/").split("/")[: -up or None]), name[3 * up :])


LAYOUT = Kaggle()

"""The raw data in a folder: the layout of each split, the archives of images, and the images in each archive.

Image IDs are the same in every layout: training images are ordered by (synset, name), validation images by name.
"""

import hashlib
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from beam_jobs import files
from beam_jobs.layouts import LAYOUTS
from beam_jobs.layouts.layout import Archive, Found, Layout, RawImage
from trainer.shared.errors import UserError
from trainer.shared.files import is_local

SPLITS = ("train", "validation")

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Raw:
    """A folder of raw data, known from outer headers, file names and labels."""

    folder: str
    layouts: Mapping[str, Layout]
    """The layout of each split."""
    synsets: tuple[str, ...]
    """The chosen synsets, in label order."""
    images_per_class: int | None
    """The most training images of a class, the first by name; None for all."""
    archives: tuple[Archive, ...]
    """Training archives, then validation archives, each in the order of their image IDs."""
    problems: tuple[str, ...]
    """Faults that stop the conversion."""
    identity: str
    """Digest of the raw files. Changes when a file changes."""

    def of_split(self, split: str) -> list[int]:
        """Returns the numbers of a split's archives."""
        return [number for number, archive in enumerate(self.archives) if archive.split == split]

    def read(self, split: str, image: RawImage, start: int, size: int) -> bytes:
        """Returns `size` bytes of an image from byte `start`; fewer if the file ends before. Thread-safe."""
        return self.layouts[split].read(self.folder, image, start, size)


@dataclass(frozen=True)
class Index:
    """The images in an archive."""

    images: list[RawImage]
    """Images of the chosen synsets, in the order of their IDs."""
    found: int
    """Number of images of the chosen synsets, including those above a class's limit and unreadable ones."""
    rejected: list[dict[str, Any]]
    """Images that are not plain files, in the form of `trainer.shared.records.Split`."""
    problems: list[str]
    """Faults of the archive as a whole."""


def open_raw(
    folder: str,
    *,
    synsets: Sequence[str] | None = None,
    images_per_class: int | None = None,
    validation_labels: str | None = None,
) -> Raw:
    """Returns the raw data in `folder` of the given synsets, or of all. Reads outer headers, file names and labels, but no image.

    `validation_labels` is the path of the file of labels, by default the one in `folder`. Raises UserError if training images,
    validation images, labels or one of `synsets` are missing, or if no image needs `validation_labels`. Other faults are in
    `problems`, so that a user sees all of them at once.
    """
    by_split = _recognise(folder)
    if validation_labels:
        layout, found = by_split["validation"]
        by_split["validation"] = layout, replace(found, labels=_labels_file(validation_labels))
    for split, (_, found) in by_split.items():
        _log.info("%s: %s", split, found.why)
    layout, found = by_split["train"]
    train = layout.training_archives(folder, found)
    if not train.archives:
        raise UserError("; ".join(train.problems))
    classes = {archive.synset for archive in train.archives}
    chosen = set(synsets or classes)
    if missing := sorted(chosen - classes):
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise UserError(
            f"{folder} has no training images of {', '.join(missing[:3])}{more}, which the subset has; "
            "to take all classes, omit --subset, or say --set data.subset= in sogclr"
        )
    # If the training images are exactly the subset's, validation images may have any synset. Only the subset's are used.
    known = None if synsets and len(chosen) == len(classes) else classes
    layout, found = by_split["validation"]
    validation = layout.validation_archives(folder, found, known)
    if validation_labels and not any(archive.synsets for archive in validation.archives):
        raise UserError(f"validation_labels={validation_labels} has no effect: the folders of validation images are their labels")
    return Raw(
        folder,
        {split: layout for split, (layout, _) in by_split.items()},
        tuple(sorted(chosen)),
        images_per_class,
        (*(archive for archive in train.archives if archive.synset in chosen), *validation.archives),
        train.problems + validation.problems,
        _identity([found for _, found in by_split.values()]),
    )


def _labels_file(path: str) -> files.FileInfo:
    info = files.find(path)
    if info is None:
        raise UserError(f"validation_labels={path} is not a file")
    return info._replace(name=path if not is_local(path) else os.path.abspath(path))


def index(raw: Raw, archive: Archive) -> Index:
    """Returns the images of an archive that have a chosen synset. Reads headers only."""
    listing = raw.layouts[archive.split].list_images(raw.folder, archive)
    ranks = {synset: label for label, synset in enumerate(raw.synsets)}
    images, rejected = [], []
    found = 0
    for name, file, offset, size, synset, fault in listing.images:
        # A missing label stops the conversion. Until then any label will do: the image is still checked.
        label = ranks.get(synset) if synset else 0
        if label is None:
            continue
        found += 1
        image = RawImage(name, label, file, offset, size)
        if fault:
            rejected.append({"source": image.source, "reason": fault})
        else:
            images.append(image)
    limit = raw.images_per_class if archive.split == "train" else None
    return Index(images[:limit], found, rejected, list(listing.problems))


def raw_identity(raw: str, beside: Iterable[str] = ()) -> str:
    """Returns a short hex digest of the names, sizes and times of the raw files in the folder `raw`.

    It also depends on the contents of the files `beside`, if there are any. Raises UserError naming what is missing if the folder
    holds no raw data, or if one of those files does not exist.
    """
    identity = _identity([found for _, found in _recognise(raw).values()])
    for path in beside:
        if not files.find(path):
            raise UserError(f"there is no file {path}")
        identity = hashlib.sha256(identity.encode() + files.read(path)).hexdigest()[:16]
    return identity


def _recognise(folder: str) -> dict[str, tuple[Layout, Found]]:
    """Returns the layout of each split with its files. Raises UserError if no layout recognises a split."""
    by_split, missing = {}, []
    for split in SPLITS:
        for layout in LAYOUTS:
            if found := layout.recognise(folder, split):
                by_split[split] = layout, found
                break
        else:
            first, *others = (layout.expects(split) for layout in LAYOUTS)
            missing.append(f"{first} (or {', '.join(others)})")
    if missing:
        raise UserError(f"{folder} holds no raw ImageNet: it lacks {' and '.join(missing)}")
    return by_split


def _identity(found: Sequence[Found]) -> str:
    digest = hashlib.sha256()
    for info in (*(info for one in found for info in one.files), *(one.labels for one in found if one.labels)):
        digest.update(repr(tuple(info)).encode())
    return digest.hexdigest()[:16]

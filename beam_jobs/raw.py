"""The raw data in a folder: the layout of each split, the archives of images, and the images in each archive.

Image IDs are the same in every layout: training images are ordered by (synset, name), validation images by name.
"""

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from beam_jobs.catalogue import Unpacked, read_summary
from beam_jobs.layouts import LAYOUTS, name_of
from beam_jobs.layouts.layout import Archive, Contents, Found, Layout, RawImage, Reader, Stream
from trainer.shared.errors import UserError

SPLITS = ("train", "validation")
Recognised = dict[str, tuple[Layout | Stream, Found]]
"""The layout of each split, with its files."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Raw:
    """A folder of raw data, known from outer headers, file names and labels."""

    folder: str
    layouts: Mapping[str, Reader]
    """What reads the images of each split."""
    why: Mapping[str, str]
    """The layout of each split, and why it was recognised."""
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

    @property
    def splits(self) -> tuple[str, ...]:
        return tuple(self.layouts)

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
    repaired: list[dict[str, Any]] | None = None
    """Source and repair of each image that will be repaired; None if the images were not checked yet."""


def open_raw(
    folder: str,
    *,
    synsets: Sequence[str] | None = None,
    images_per_class: int | None = None,
    unpacked: str = "",
    recognised: Recognised | None = None,
) -> Raw:
    """Returns the raw data in `folder` of the given synsets, or of all. Reads outer headers, file names and labels, but no image.

    unpacked: the folder to which `beam_jobs.unpack` wrote the images of a `Stream`
    recognised: the layout of each split, if it is known already

    Raises UserError if training images, validation images, labels or one of `synsets` are missing. Other faults are in
    `problems`, so that a user sees all of them at once.
    """
    by_split = recognised or recognise(folder)
    for split, (_, found) in by_split.items():
        _log.info("%s: %s", split, found.why)
    readers = {
        split: Unpacked(unpacked, split, read_summary(unpacked).identity, layout.in_place)
        if isinstance(layout, Stream)
        else layout
        for split, (layout, _) in by_split.items()
    }
    train = readers["train"].training_archives(folder, by_split["train"][1])
    if not train.archives:
        raise UserError("; ".join(train.problems))
    classes = {archive.synset for archive in train.archives}
    chosen = set(synsets or classes)
    if missing := sorted(chosen - classes):
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise UserError(f"{folder} has no training images of {', '.join(missing[:3])}{more}, which the subset has")
    # If the training images are exactly the subset's, validation images may have any synset. Only the subset's are used.
    known = None if synsets and len(chosen) == len(classes) else classes
    contents = [Contents(tuple(archive for archive in train.archives if archive.synset in chosen), train.problems)]
    if "validation" in by_split:
        contents.append(readers["validation"].validation_archives(folder, by_split["validation"][1], known))
    return Raw(
        folder,
        readers,
        {split: f"{name_of(layout)}: {found.why}" for split, (layout, found) in by_split.items()},
        tuple(sorted(chosen)),
        images_per_class,
        tuple(archive for one in contents for archive in one.archives),
        tuple(problem for one in contents for problem in one.problems),
        _identity([found for _, found in by_split.values()]),
    )


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
    images = images[:limit]
    repaired = None
    if listing.repaired is not None:
        taken = {image.source for image in images}
        repaired = [one for one in listing.repaired if one["source"] in taken]
    return Index(images, found, rejected, list(listing.problems), repaired)


def raw_identity(raw: str, *, validation: bool = True) -> str:
    """Returns a short hex digest of the names, sizes and times of the raw files in the folder `raw`.

    Raises UserError naming what is missing if the folder holds no raw data.
    """
    return _identity([found for _, found in recognise(raw, validation=validation).values()])


def recognise(folder: str, *, validation: bool = True) -> Recognised:
    """Returns the layout of each split with its files. Raises UserError if no layout recognises a split."""
    by_split: Recognised = {}
    missing = []
    for split in SPLITS if validation else SPLITS[:1]:
        for layout in LAYOUTS:
            if found := layout.recognise(folder, split):
                by_split[split] = layout, found
                break
        else:
            missing.append(split)
    if missing:
        advice = "; give --no-validation for pretraining without linear eval" if by_split.keys() == {"train"} else ""
        # The layout of the other split comes first. Without one, the two that most people have stand for all.
        likely = dict.fromkeys((*(layout for layout, _ in by_split.values()), LAYOUTS[0], LAYOUTS[-1]))
        lacks = []
        for split in missing:
            first, *others = (layout.expects(split) for layout in likely)
            lacks.append(f"{first} (or {', '.join(others)})")
        raise UserError(
            f"{folder} holds no raw ImageNet: it lacks {' and '.join(lacks)}; docs/conversion.md lists every layout{advice}"
        )
    return by_split


def _identity(found: Sequence[Found]) -> str:
    digest = hashlib.sha256()
    for info in (*(info for one in found for info in one.files), *(one.labels for one in found if one.labels)):
        digest.update(repr(tuple(info)).encode())
    return digest.hexdigest()[:16]

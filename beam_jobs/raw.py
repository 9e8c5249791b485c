"""The raw data in a folder: the layout of each split, the archives of images, and the images in each archive.

Image IDs are the same in every layout: training images are ordered by (synset, name), validation images by name.
"""

import hashlib
import itertools
import logging
import os
import pickle
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from typing import Any

from beam_jobs import files
from beam_jobs.catalogue import Unpacked, read_summary
from beam_jobs.layouts import LAYOUTS, name_of
from beam_jobs.layouts.folders import Folders
from beam_jobs.layouts.layout import Archive, Contents, Found, Layout, RawImage, Reader, Stream
from beam_jobs.layouts.names import canonical
from beam_jobs.layouts.passed_over import PassedOver, Tallies, merge, tally
from beam_jobs.listings import FileInfo
from beam_jobs.origin import digest_of
from trainer.shared.errors import UserError, first_few, printable
from trainer.shared.files import is_local

SPLITS = ("train", "validation")
NOT_CHOSEN = "its class is not in the subset"
BESIDE = "a file beside the images, which is not read"
FOLDER_BESIDE = "a folder beside the images, which is not read"
"""Reasons of a `PassedOver`."""
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
    """Digest of the raw files' names, sizes and times."""
    names: str
    """Digest of their names and sizes."""
    passed_over: Mapping[str, Tallies]
    """What each split has outside of `archives`."""
    without_validation: tuple[str, ...]
    """Chosen synsets of which no validation image is known to be there."""
    notes: tuple[str, ...]
    """What the user should know, although it stops nothing."""
    found: Mapping[str, Found]
    """The files of each split; empty on a worker, which lists the folders of its archives again."""

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
    account: dict[str, Any]
    """What was seen in the archive, in the form that `account.seen_of` takes."""
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
        raise UserError(first_few(train.problems))
    classes = {archive.synset for archive in train.archives}
    chosen = set(synsets or classes)
    if missing := sorted(chosen - classes):
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise UserError(
            f"{folder} has no training images of {', '.join(missing[:3])}{more}, which the subset has; "
            "to take all classes, omit --subset, or say --set data.subset= in sogclr"
        )
    _refuse_same_printable(classes)
    # If the training images are exactly the subset's, validation images may have any synset. Only the subset's are used.
    known = None if synsets and len(chosen) == len(classes) else classes
    validation = Contents((), ())
    if "validation" in by_split:
        layout, found = by_split["validation"]
        validation = readers["validation"].validation_archives(folder, found, known)
        _refuse_unused_labels(layout, found, validation)
    absent = sorted(chosen - validation.synsets) if validation.synsets is not None else []
    if len(absent) == len(chosen) and not (train.problems or validation.problems):
        raise UserError(_no_validation(absent, validation))
    not_chosen = (
        PassedOver(archive.name, NOT_CHOSEN, archive.size) for archive in train.archives if archive.synset not in chosen
    )
    beside = tally(_beside(folder, [found for _, found in by_split.values()]))
    passed_over = {"train": merge((train.passed_over, tally(not_chosen), beside)), "validation": validation.passed_over}
    return Raw(
        folder,
        readers,
        {split: f"{name_of(layout)}: {found.why}" for split, (layout, found) in by_split.items()},
        tuple(sorted(chosen)),
        images_per_class,
        (*(archive for archive in train.archives if archive.synset in chosen), *validation.archives),
        train.problems + validation.problems,
        digest_of([found for _, found in by_split.values()], times=True),
        digest_of([found for _, found in by_split.values()], times=False),
        {split: passed_over[split] for split in by_split},
        tuple(absent),
        _notes(folder, by_split),
        {split: found for split, (_, found) in by_split.items()},
    )


def _labels_file(path: str) -> FileInfo:
    info = files.find(path)
    if info is None:
        raise UserError(f"validation_labels={path} is not a file")
    return info._replace(name=path if not is_local(path) else os.path.abspath(path))


def _refuse_unused_labels(layout: Layout | Stream, found: Found, validation: Contents) -> None:
    """Raises UserError if a file of labels outside the raw folder was given, and the images have other labels."""
    given = found.labels.name if found.labels else ""
    if is_local(given) and not os.path.isabs(given):
        return
    if isinstance(layout, Stream):
        uses, why = layout.takes_labels, "the validation images have labels of their own"
    else:
        uses = any(archive.synsets for archive in validation.archives)
        why = "the folders of validation images are their labels"
    if not uses:
        raise UserError(f"validation_labels={given} has no effect: {why}")


def index(raw: Raw, archive: Archive) -> Index:
    """Returns the images of an archive that have a chosen synset. Reads headers only."""
    layout, found_before = raw.layouts[archive.split], raw.found.get(archive.split)
    if found_before and found_before.tree and not archive.file:
        within = archive.name.removeprefix(found_before.top).strip("/")
        listing = layout.list_tree(archive, found_before.tree.below(within) if within else found_before.tree)
    else:
        listing = layout.list_images(raw.folder, archive)
    ranks = {synset: label for label, synset in enumerate(raw.synsets)}
    images, rejected = [], []
    passed_over = list(listing.passed_over)
    seen = len(listing.images) + len(passed_over)
    seen_bytes = sum(image.size for image in listing.images) + sum(one.size for one in passed_over)
    if listing.seen not in (None, seen):
        raise UserError(f"{archive.name} has {listing.seen} entries, of which {seen} were listed: it changed meanwhile")
    found = rejected_bytes = 0
    for name, file, offset, size, synset, fault in listing.images:
        # A missing label stops the conversion. Until then any label will do: the image is still checked.
        label = ranks.get(synset) if synset else 0
        image = RawImage(name, label or 0, file, offset, size)
        if label is None:
            passed_over.append(PassedOver(image.source, NOT_CHOSEN, size))
            continue
        found += 1
        if fault:
            rejected.append({"source": image.source, "reason": fault})
            rejected_bytes += size
        else:
            images.append(image)
    if archive.split == "train" and raw.images_per_class:
        beyond = images[raw.images_per_class :]
        passed_over += (PassedOver(image.source, "beyond the number of images per class", image.size) for image in beyond)
        images = images[: raw.images_per_class]
    account = {"entries": seen, "bytes": seen_bytes, "rejected_bytes": rejected_bytes, "passed_over": tally(passed_over)}
    repaired = None
    if listing.repaired is not None:
        taken = {image.source for image in images}
        repaired = [one for one in listing.repaired if one["source"] in taken]
    return Index(images, found, rejected, list(listing.problems), account, repaired)


def raw_identity(raw: str, beside: Iterable[str] = (), *, validation: bool = True, listing: str = "") -> str:
    """Returns a short hex digest of the names, sizes and times of the raw files in the folder `raw`.

    beside: files on whose contents the identity depends, too
    validation: whether there must be a validation split
    listing: a local file that gets what was listed, so that a conversion in another process does without

    Raises UserError naming what is missing if the folder holds no raw data, or if one of the files `beside` does not exist.
    """
    by_split = recognise(raw, validation=validation)
    identity = digest_of([found for _, found in by_split.values()], times=True)
    for path in beside:
        if not files.find(path):
            raise UserError(f"there is no file {path}")
        identity = hashlib.sha256(identity.encode() + files.read(path)).hexdigest()[:16]
    if listing:
        kept = {split: (LAYOUTS.index(layout), found) for split, (layout, found) in by_split.items()}
        with open(listing, "wb") as file:
            pickle.dump((raw, kept), file, pickle.HIGHEST_PROTOCOL)
    return identity


def recognise(folder: str, *, validation: bool = True, validation_labels: str | None = None, listing: str = "") -> Recognised:
    """Returns the layout of each split with its files.

    validation: whether there must be a validation split
    validation_labels: the path of the file of validation labels, by default one in `folder`
    listing: the file in which `raw_identity` kept what it listed; "" to list the folder

    Raises UserError if no layout recognises a split, or if there is no file `validation_labels`.
    """
    splits = SPLITS if validation else SPLITS[:1]
    if validation_labels and not validation:
        raise UserError(f"validation_labels={validation_labels} has no effect: no validation images are converted; omit it")
    by_split = _kept(listing, folder, splits) or _searched(folder, splits)
    if validation_labels:
        layout, found = by_split["validation"]
        by_split["validation"] = layout, replace(found, labels=_labels_file(validation_labels))
    return by_split


def _kept(listing: str, folder: str, splits: Sequence[str]) -> Recognised:
    """Returns what a file of `raw_identity` holds, or nothing if that is of another folder or of other splits."""
    if not os.path.exists(listing):
        return {}
    with open(listing, "rb") as file:
        of_folder, kept = pickle.load(file)
    if (of_folder, [*kept]) != (folder, [*splits]):
        return {}
    return {split: (LAYOUTS[number], found) for split, (number, found) in kept.items()}


def _searched(folder: str, splits: Sequence[str]) -> Recognised:
    """Returns the layout of each split with its files. Raises UserError if no layout recognises a split."""
    by_split: Recognised = {}
    missing = []
    for split in splits:
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
        hint = _where_else(folder, splits) or f"; docs/conversion.md lists every layout{advice}"
        raise UserError(f"{folder} holds no raw ImageNet: it lacks {' and '.join(lacks)}{hint}")
    return by_split


def _where_else(folder: str, splits: Sequence[str]) -> str:
    """Returns the end of a message that names a folder above or below `folder` that holds raw data; "" if there is none."""
    if not is_local(folder):
        return ""
    try:
        below = sorted(entry.path for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))
    except OSError:
        below = []
    for other in (*below, os.path.dirname(os.path.abspath(folder))):
        if all(any(layout.recognise(other, split) for layout in LAYOUTS) for split in splits):
            return f"; {other} has them: give --raw {other}"
    return ""


def _beside(folder: str, by_split: Sequence[Found]) -> Iterator[PassedOver]:
    """Yields what lies in the raw folder itself and belongs to no split. A folder counts as one, and is not looked into.

    A bucket has no folders to list: of those, only files count.
    """
    others = (other.name for found in by_split for other in found.others)
    labels = (found.labels.name for found in by_split if found.labels)
    in_no_folder = (info.name for found in by_split if not found.top for info in found.files)
    names = itertools.chain(others, labels, in_no_folder, (found.top for found in by_split))
    tops = {name.strip("/").partition("/")[0] for name in names}
    for name in files.names(folder):
        if name not in tops:
            info = files.find(files.join(folder, name))
            yield PassedOver(name, BESIDE, info.size if info else 0)
    for name in files.folders(folder) if is_local(folder) else ():
        if name not in tops:
            yield PassedOver(name, FOLDER_BESIDE, 0)


def _refuse_same_printable(classes: Set[str]) -> None:
    """Raises UserError if two classes would have the same name in the dataset."""
    by_name: dict[str, str] = {}
    for synset in sorted(classes):
        if by_name.setdefault(printable(synset), synset) != synset:
            raise UserError(f"two classes are written as {printable(synset)}, one by bytes that are not UTF-8: rename one")


def _no_validation(absent: Sequence[str], validation: Contents) -> str:
    there = sorted(validation.synsets or ())
    return (
        f"no validation image has one of the chosen classes {first_few(absent, ', ')}: the validation images have the classes "
        f"{first_few(there, ', ')}; name them as the training images' folders or archives are named"
    )


def _notes(folder: str, by_split: Recognised) -> tuple[str, ...]:
    notes = [
        f"{split}: {found.why}, and {layout.expects(split)} is there too, which is not read"
        for split, (taken, found) in by_split.items()
        for layout in LAYOUTS[LAYOUTS.index(taken) + 1 :]
        if not (isinstance(layout, Folders) and layout.shares_folder(found, split))
        if (other := layout.recognise(folder, split)) and not {*other.files} & {*found.files}
    ]
    names = (info.name for _, found in by_split.values() for info in found.files if not info.name.isascii())
    if decomposed := [name for name in names if canonical(name) != name]:
        notes.append(
            f"{len(decomposed):,} names are decomposed (NFD), the first is {decomposed[0]}: they are taken as the same names "
            "composed (NFC)"
        )
    return tuple(notes)

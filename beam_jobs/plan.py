"""The plan of a conversion: its checked options, and each image's ID, place in reading order, and shard."""

import hashlib
import importlib.metadata
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, get_args

import numpy as np

from beam_jobs import files, images, subsets
from beam_jobs.origin import Origin
from beam_jobs.raw import Raw, Recognised, open_raw, recognise
from trainer.shared.data import ALLOWING, DATASETS, DataSettings, Expect, OnBadImage, Verify, other_classes
from trainer.shared.errors import UserError, first_few

EXPECT, VERIFY, ON_BAD_IMAGE = get_args(Expect), get_args(Verify), get_args(OnBadImage)
WORK = ".building"
"""Folder within the output; it exists until the dataset is finished."""
UNPACKED = ".unpacked"
"""Folder within the output for images that `beam_jobs.unpack` writes; it exists until the dataset is finished."""
SHARD_BYTES = 128 * 2**20
"""Approximate size of a shard if the number of shards is not given."""

_NAME = re.compile(r"[a-z][a-z0-9_]*")
_VERSION = re.compile(r"\d+\.\d+\.\d+")


@dataclass(frozen=True)
class Plan:
    """The plan of a conversion before any image is read. Workers need nothing but `for_workers()`."""

    raw: Raw
    output: str
    work: str
    """The folder of the workers' reports."""
    name: str
    version: str
    """The dataset's version in TFDS."""
    num_shards: Mapping[str, int]
    """Number of shards by split. A split with fewer images than that has fewer shards, so none is empty."""
    images: images.Options
    check_first: bool
    """Whether images are checked when they are indexed, so that unreadable images get no ID."""
    expected: Mapping[str, int] | None
    """Number of images that each split must have; None if it is unknown."""
    options: Mapping[str, str | int]
    """The options that change the contents of the dataset."""
    tool_version: str
    expected_of: str = "ImageNet"
    """The dataset that has the `expected` numbers of images."""
    pieces: str = ""
    """`Origin.pieces` of the raw data; "" if they were not read yet."""

    def for_workers(self) -> "Plan":
        """Returns the plan without the listing of the raw folder, which grows with the number of images."""
        return replace(self, raw=replace(self.raw, found={}))

    @property
    def rejected(self) -> str:
        """The file that lists all faults of the raw data if an error message cannot."""
        return files.join(self.output, f"{self.name}-rejected.txt")

    @property
    def identity(self) -> str:
        """A hex digest. It differs between plans that may write different shards."""
        raw = self.raw.identity, self.raw.synsets, self.raw.images_per_class
        rest = self.name, sorted(self.num_shards.items()), self.images, self.check_first, images.CODECS, self.tool_version
        return hashlib.sha256(repr((raw, rest)).encode()).hexdigest()

    @property
    def origin(self) -> Origin:
        """What a dataset of this plan is made of."""
        options = {
            "subset": hashlib.sha256(repr(self.raw.synsets).encode()).hexdigest()[:16],
            "images_per_class": self.raw.images_per_class,
            "name": self.name,
            "num_shards": dict(self.num_shards),
            "verify": "decode" if self.images.decode else "headers",
            "max_side": self.images.max_side,
            "on_bad_image": "skip" if self.check_first else "fail",
        }
        software = f"sogclr {self.tool_version}, {images.CODECS}"
        return Origin(self.raw.identity, self.raw.names, self.pieces, options, software)


@dataclass(frozen=True)
class SplitPlan:
    """The IDs and shards of a split's images. Known once the images of each archive are counted."""

    first_ids: Mapping[int, int]
    """ID of an archive's first image, by the archive's number. The other images follow in the order of their names."""
    num_images: int
    shard_files: tuple[str, ...]

    def shards_of(self, places: np.ndarray) -> np.ndarray:
        """Returns the shard number of each of `places`. Shards divide the reading order into equal parts."""
        return places * len(self.shard_files) // max(self.num_images, 1)


def make_plan(
    raw: str,
    output: str,
    *,
    name: str | None = None,
    num_shards: int | None = None,
    expect: str = "any",
    subset: str | None = None,
    images_per_class: int | None = None,
    on_bad_image: str = "fail",
    verify: str = "headers",
    max_side: int | None = None,
    validation_labels: str | None = None,
    allow_other_counts: bool = False,
    validation: bool = True,
    listing: str = "",
    unpack: Callable[[Recognised, Sequence[str] | None], str] | None = None,
) -> Plan:
    """Returns the plan of converting the raw images in the folder `raw` to a dataset in the folder `output`.

    name: the dataset's name in TFDS; by default NAME if `output` is ROOT/NAME/VERSION, else images
    num_shards: shards of each split; by default as many as make shards of 128 MiB
    expect: the dataset that `raw` must be, by its classes and numbers of images, unless there is a subset; any for any
    subset: one of `subsets.SUBSETS` or a file with a synset a line
    images_per_class: the most training images of a class, the first by name
    on_bad_image: fail, or skip to give unreadable images no ID and list them in the manifest
    verify: how deep to look for damage: headers, or decode to decode every image
    max_side: pixels of the longer side; larger images are resized to it
    validation_labels: the file of labels of flat validation images; by default the one in `raw`
    allow_other_counts: whether ImageNet's synsets may have other numbers of images than ImageNet, and `expect` other classes
    validation: whether there is a validation split; linear eval needs one, pretraining does not
    listing: the file in which `raw_identity` kept what it listed; "" to list the raw files
    unpack: called with the layouts and the chosen synsets once the other arguments are known to be valid; returns the folder of
        unpacked images

    Raises UserError for invalid arguments, and if there are no raw images.
    """
    for argument, value in (("num_shards", num_shards), ("images_per_class", images_per_class), ("max_side", max_side)):
        if value is not None and value < 1:
            raise UserError(f"{argument}={value} makes no sense: it must be at least 1")
    chosen = (("expect", expect, EXPECT), ("on_bad_image", on_bad_image, ON_BAD_IMAGE), ("verify", verify, VERIFY))
    for argument, text, choices in chosen:
        if text not in choices:
            raise UserError(f"{argument}={text} is unknown: it must be {' or '.join(choices)}")
    parts = output.rstrip("/").split("/")
    versioned = len(parts) > 1 and _VERSION.fullmatch(parts[-1]) is not None
    name = name or (parts[-2] if versioned else "images")
    if not _NAME.fullmatch(name):
        raise UserError(f"name={name} cannot name a dataset: use small letters, digits and underscores, a letter first")
    synsets = subsets.synsets_of(subset) if subset else None
    recognised = recognise(raw, validation=validation, validation_labels=validation_labels, listing=listing)
    unpacked = unpack(recognised, synsets) if unpack else files.join(output, UNPACKED)
    opened = open_raw(raw, synsets=synsets, images_per_class=images_per_class, unpacked=unpacked, recognised=recognised)
    known = None if subset or allow_other_counts else DATASETS.get(expect)
    if known and (wrong := other_classes(known, opened.synsets)):
        raise UserError(f"{raw} has {wrong}: give {known.title}, or allow any dataset with {ALLOWING}")
    expected = known.images if known else None if allow_other_counts else subsets.known_counts(opened.synsets)
    if synsets and opened.without_validation and not allow_other_counts and not expected:
        raise UserError(
            f"{raw} has no validation images of {first_few(opened.without_validation, ', ')}, which the subset has: get them, or "
            f"allow this with {ALLOWING}"
        )
    sizes = {split: sum(opened.archives[number].size for number in opened.of_split(split)) for split in opened.splits}
    options = {
        "subset": subset if subset in subsets.SUBSETS else subset and os.path.basename(subset),
        "images_per_class": images_per_class,
        "on_bad_image": on_bad_image if on_bad_image != "fail" else None,
        "verify": verify if on_bad_image != "fail" and verify != "headers" else None,
        "max_side": max_side,
        "validation_labels": validation_labels and os.path.basename(validation_labels),
    }
    return Plan(
        raw=opened,
        output=output,
        work=files.join(output, WORK),
        name=name,
        version=parts[-1] if versioned else "1.0.0",
        num_shards={split: num_shards or shards_for(size) for split, size in sizes.items()},
        images=images.Options(decode=verify == "decode", max_side=max_side),
        check_first=on_bad_image == "skip",
        expected=expected,
        options={option: value for option, value in options.items() if value is not None},
        tool_version=_tool_version(),
        expected_of=known.source if known else "ImageNet",
    )


def options_of(data: DataSettings) -> dict[str, Any]:
    """Returns the arguments of `make_plan` that the settings of the conversion stand for."""
    absent = {name: getattr(data, name) or None for name in ("subset", "images_per_class", "max_side", "validation_labels")}
    return {**asdict(data), **absent}


def shards_for(num_bytes: int) -> int:
    """Returns the number of shards that have about `SHARD_BYTES`."""
    return max(-(-num_bytes // SHARD_BYTES), 1)


def plan_split(plan: Plan, split: str, counts: Mapping[int, int]) -> SplitPlan:
    """Returns the plan of a split from the number of images in each archive."""
    first_ids, num_images = {}, 0
    for number in plan.raw.of_split(split):
        first_ids[number] = num_images
        num_images += counts[number]
    num_shards = min(plan.num_shards[split], num_images)
    names = (f"{plan.name}-{split}.tfrecord-{number:05d}-of-{num_shards:05d}" for number in range(num_shards))
    return SplitPlan(first_ids, num_images, tuple(names))


def _tool_version() -> str:
    try:
        return importlib.metadata.version("sogclr")
    except importlib.metadata.PackageNotFoundError:
        return "source"

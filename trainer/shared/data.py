"""The settings of the conversion, and the datasets that presets are named after: their classes and numbers of images."""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Ge

from trainer.shared.errors import UserError
from trainer.shared.records import Manifest
from trainer.shared.settings import Group, fields_of

DATA = "data."
"""Prefix of the keys of the conversion's settings."""
ALLOW_OTHER_COUNTS = f"{DATA}allow_other_counts"
ALLOWING = f"--allow-other-counts, or with --set {ALLOW_OTHER_COUNTS}=true in sogclr"
"""How a user allows other classes and numbers of images."""


@dataclass(frozen=True)
class KnownDataset:
    """A published dataset."""

    title: str
    classes: int
    images: Mapping[str, int]
    """Number of images of each split."""
    synsets: str = ""
    """`digest_of` its synsets; empty if its classes have no fixed names."""
    source: str = "ImageNet"
    """The dataset that its images are from."""


DATASETS = {
    "imagenet": KnownDataset(
        "ImageNet",
        1_000,
        {"train": 1_281_167, "validation": 50_000},
        "791ce0333040dd249d13133f90d28ef0263ffc01e5de0afd85b3e32048d7d456",
    ),
    "imagenet_s": KnownDataset(
        "ImageNet-S",
        100,
        {"train": 129_395, "validation": 5_000},
        "cce5c11f9aebcd78c756f04562c57b0aa65e96343f1a027973ef87fb848a2d1e",
    ),
    "imagenet100_cmc": KnownDataset(
        "ImageNet-100",
        100,
        {"train": 126_689, "validation": 5_000},
        "469d277522bc36e827b1bc5121a8d837f7c0fe14737e8326ce34c6e5553f75af",
    ),
    "cifar10": KnownDataset("CIFAR-10", 10, {"train": 50_000, "validation": 10_000}, source="CIFAR-10"),
}
NAMED_SUBSETS = ("imagenet_s", "imagenet100_cmc")
"""The datasets that are subsets of ImageNet's classes. `beam_jobs.subsets` has their synsets."""


Expect = Literal["any", "imagenet", "cifar10"]
OnBadImage = Literal["fail", "skip"]
Verify = Literal["headers", "decode"]


@dataclass(frozen=True)
class DataSettings(Group):
    """What the conversion makes of the raw data."""

    GROUP: ClassVar[str] = "data"
    PREFIX: ClassVar[str] = DATA
    expect: Expect = "any"
    """The dataset that the raw data must be. Its classes and numbers of images are checked, unless a subset is chosen."""
    subset: str = ""
    """Classes to take: imagenet_s, imagenet100_cmc, or the path of a file with a synset a line. Empty for all."""
    images_per_class: Annotated[int, Ge(0)] = 0
    """Most training images of a class, the first by name; 0 for all."""
    on_bad_image: OnBadImage = "fail"
    """What to do about images that cannot be read: fail, or leave them out and list them in the manifest."""
    verify: Verify = "headers"
    """How deep to look for damage: at headers and ends, or decode every image."""
    max_side: Annotated[int, Ge(0)] = 0
    """Pixels of the longer side. Larger images are resized to it; 0 resizes none."""
    validation_labels: str = ""
    """Path of the file with the labels of validation images that lie flat. Empty for the one in the raw folder."""
    validation: bool = True
    """Whether there must be a validation split. Linear eval needs one; pretraining does not."""
    allow_other_counts: bool = False
    """Whether other classes and numbers of images than the expected ones are accepted."""

    @property
    def dataset(self) -> KnownDataset | None:
        """The dataset whose classes and numbers of images are required; None if any are accepted, or the subset is a file."""
        if self.allow_other_counts:
            return None
        if self.subset:
            return DATASETS[self.subset] if self.subset in NAMED_SUBSETS else None
        return DATASETS.get(self.expect)

    @property
    def files(self) -> dict[str, str]:
        """The paths of files that the conversion reads beside the raw data, by key."""
        chosen = {
            f"{DATA}subset": "" if self.subset in NAMED_SUBSETS else self.subset,
            f"{DATA}validation_labels": self.validation_labels,
        }
        return {key: path for key, path in chosen.items() if path}


def values_of_data(data: DataSettings) -> dict[str, Any]:
    """Returns the value of every setting of the conversion, by key."""
    return {one.key: getattr(data, one.name) for one in fields_of(DataSettings)}


def as_overrides(data: DataSettings) -> list[str]:
    """Returns the settings that differ from their defaults as "key=value", in the order of the fields."""
    values = [(one, getattr(data, one.name)) for one in fields_of(DataSettings)]
    return [
        f"{one.key}={str(value).lower() if isinstance(value, bool) else value}" for one, value in values if value != one.default
    ]


def digest_of(synsets: Iterable[str]) -> str:
    """Returns a hex digest of a set of synsets."""
    return hashlib.sha256(" ".join(sorted(synsets)).encode(errors="surrogateescape")).hexdigest()


def other_classes(known: KnownDataset, synsets: Iterable[str]) -> str:
    """Returns how `synsets` differ from a dataset's classes, as in "3 classes where ImageNet has 1,000"; "" if they do not."""
    names = set(synsets)
    if len(names) != known.classes:
        return f"{len(names):,} classes where {known.title} has {known.classes:,}"
    if known.synsets and digest_of(names) != known.synsets:
        return f"{len(names):,} classes that are not those of {known.title}"
    return ""


def require_dataset(data: DataSettings, manifest: Manifest, folder: str) -> None:
    """Raises UserError if the dataset in `folder` is not the one that `data` asks for.

    Images that the conversion left out count as there. With images_per_class there may be fewer training images.
    """
    known = data.dataset
    if known is None:
        return
    wrong = other_classes(known, manifest.synsets)
    for split, wanted in known.images.items():
        if wrong or split not in manifest.splits:
            continue
        found = manifest.splits[split].records + len(manifest.splits[split].rejected)
        if found > wanted or (found < wanted and not (split == "train" and "images_per_class" in manifest.options)):
            wrong = f"{found:,} {split} images where {known.title} has {wanted:,}"
    if wrong:
        raise UserError(
            f"{folder} has {wrong}, which this preset is for: give {known.title}, or allow any dataset with "
            f"--set {ALLOW_OTHER_COUNTS}=true"
        )

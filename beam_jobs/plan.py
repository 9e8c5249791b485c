"""The plan of a conversion: which image gets which ID, which place in the order of reading, which shard."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from beam_jobs import archives, files, images

SPLITS = ("train", "validation")
WORK = ".building"
"""Folder within the output that is there while it is not finished."""
SHARD_BYTES = 128 * 2**20
"""What a shard has, about, where the number of shards is not given."""


@dataclass(frozen=True)
class Plan:
    """What is known before any image is: all that the workers have to be told."""

    raw: archives.Raw
    output: str
    work: str
    """The folder of the workers' reports."""
    name: str
    version: str
    """Of the dataset in TFDS."""
    num_shards: Mapping[str, int]
    """By split, at most: no shard is empty."""
    images: images.Options
    look_first: bool
    """Whether images are looked at when they are indexed: those that cannot be read get no ID."""
    expected: Mapping[str, int] | None
    """How many images of each split there must be, where that is known."""
    options: Mapping[str, str | int]
    """Those of the conversion that change what is written."""
    tool_version: str

    @property
    def rejected(self) -> str:
        """The file that lists all that is wrong with the raw data, where that is much."""
        return files.join(self.output, f"{self.name}-rejected.txt")

    @property
    def identity(self) -> str:
        """A hex digest that differs where a shard could."""
        raw = self.raw.identity, self.raw.synsets, self.raw.images_per_class
        rest = self.name, sorted(self.num_shards.items()), self.images, self.look_first, images.CODECS, self.tool_version
        return hashlib.sha256(repr((raw, rest)).encode()).hexdigest()


@dataclass(frozen=True)
class SplitPlan:
    """The images of a split, known once those of each archive are counted."""

    first_ids: Mapping[int, int]
    """By archive: the ID of its first image. The others follow in the order of their names."""
    num_images: int
    shard_files: tuple[str, ...]

    def shards_of(self, places: np.ndarray) -> np.ndarray:
        """Returns the number of the shard that holds each of `places`: shards cut the order of reading into equal parts."""
        return places * len(self.shard_files) // max(self.num_images, 1)


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

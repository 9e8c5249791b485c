"""The conversion and the unpacking on this machine, in this process and its workers, without a runner. Does not import Beam.

The steps are those of `beam_jobs.transforms`. References to images wait in arrays, not in objects.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from beam_jobs import convert, unpack, verify
from beam_jobs.plan import Plan, plan_split
from beam_jobs.pooled import Writers, in_parallel
from beam_jobs.references import PackedImage, PackedReference, ReferenceTable, pack_reference
from trainer.shared.progress import OnProgress
from trainer.shared.records import reading_positions

CHECKING, LISTING = "checking images, MB", "listing images, MB"
"""Phases of progress that go through the archives."""


class Steps(Protocol):
    """What runs the steps of a conversion."""

    @property
    def going_on(self) -> bool:
        """Whether an earlier attempt's job still runs. The next step then waits for it and starts none."""

    def index(self, plan: Plan, on_progress: OnProgress) -> None:
        """Lists the images of every archive; the workers' reports hold the result."""

    def unpack(self, work: unpack.Work) -> None:
        """Unpacks every source file."""

    def convert(self, plan: Plan, on_progress: OnProgress) -> None:
        """Lists the images of every archive, writes every shard, and publishes the dataset."""


@dataclass(frozen=True)
class OnThisMachine:
    """Runs the steps in this process and its workers."""

    writers: Writers
    going_on: bool = False

    def index(self, plan: Plan, on_progress: OnProgress) -> None:
        for _ in _indexed(plan, on_progress):
            pass

    def unpack(self, work: unpack.Work) -> None:
        for _ in in_parallel(self.writers, unpack.unpack_source, ((work, number) for number in range(len(work.sources)))):
            pass

    def convert(self, plan: Plan, on_progress: OnProgress) -> None:
        tables = [ReferenceTable.of(images) for images in _indexed(plan, on_progress)]
        counts = dict(enumerate(map(len, tables)))
        reported = verify.reported_shards(plan)
        shards = [shard for split in plan.raw.splits for shard in _shards(plan, split, counts, tables)]
        self._write(plan, "verifying finished shards", [one for one in shards if one.file in reported], on_progress)
        self._write(plan, "writing images", [one for one in shards if one.file not in reported], on_progress)
        on_progress("verifying the dataset")
        convert.publish_written((None, ()), plan)

    def _write(self, plan: Plan, phase: str, shards: list["_Shard"], on_progress: OnProgress) -> None:
        done, total = 0, sum(len(shard.image_ids) for shard in shards)
        if not total:
            return
        on_progress(phase, 0, total)
        for_workers = plan.for_workers()
        calls = ((for_workers, shard.split, shard.file, shard.references()) for shard in shards)
        written = in_parallel(self.writers, convert.write_references, calls)
        for shard, _ in zip(shards, written, strict=True):
            done += len(shard.image_ids)
            on_progress(phase, done, total)


@dataclass(frozen=True)
class _Shard:
    """A shard that is to be written."""

    split: str
    file: str
    first_place: int
    image_ids: np.ndarray
    """int64 [n], in the order of their places"""
    images: ReferenceTable
    """The images of the whole split, by ID."""

    def references(self) -> list[PackedReference]:
        images = zip(itertools.count(self.first_place), self.image_ids.tolist(), self.images.take(self.image_ids), strict=False)
        return [pack_reference(place, image_id, image) for place, image_id, image in images]


def _indexed(plan: Plan, on_progress: OnProgress) -> Iterator[list[PackedImage]]:
    """Yields the images of each archive. Counts bytes, because one archive may have fifty times as many images as another."""
    phase = CHECKING if plan.check_first else LISTING
    ends = np.cumsum([archive.size for archive in plan.raw.archives])
    total = int(ends[-1]) // 10**6 + 1
    position = 0

    def move(to: int) -> None:
        nonlocal position
        before, position = position, to
        if to // 10**6 > before // 10**6:
            on_progress(phase, to // 10**6, total)

    on_progress(phase, 0, total)
    for number, end in enumerate(ends.tolist()):
        yield convert.index_archive(number, plan, lambda size: move(position + size))[1]
        move(end)
    on_progress(phase, total, total)


def _shards(plan: Plan, split: str, counts: dict[int, int], tables: list[ReferenceTable]) -> list[_Shard]:
    """Returns the shards of a split. Empties the tables of its archives."""
    numbers = plan.raw.of_split(split)
    images = ReferenceTable.joined([tables[number] for number in numbers])
    for number in numbers:
        tables[number] = ReferenceTable.of([])
    of_split = plan_split(plan, split, counts)
    files = of_split.shard_files
    order = np.argsort(reading_positions(of_split.num_images))
    begins = np.searchsorted(of_split.shards_of(np.arange(len(order))), np.arange(len(files) + 1)).tolist()
    return [
        _Shard(split, file, begin, order[begin:end], images)
        for file, (begin, end) in zip(files, itertools.pairwise(begins), strict=True)
    ]

"""The conversion and the unpacking on this machine, in this process and its workers, without a runner. Does not import Beam.

The steps are those of `beam_jobs.transforms`. References to images wait in arrays, not in objects.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from beam_jobs import convert, unpack
from beam_jobs.plan import Plan, plan_split
from beam_jobs.pooled import Writers, in_parallel
from beam_jobs.references import PackedReference, ReferenceTable, pack_reference
from trainer.shared.records import reading_positions


class Steps(Protocol):
    """What runs the steps of a conversion."""

    @property
    def going_on(self) -> bool:
        """Whether an earlier attempt's job still runs. The next step then waits for it and starts none."""

    def index(self, plan: Plan) -> None:
        """Lists the images of every archive; the workers' reports hold the result."""

    def unpack(self, work: unpack.Work) -> None:
        """Unpacks every source file."""

    def convert(self, plan: Plan) -> None:
        """Lists the images of every archive, writes every shard, and publishes the dataset."""


@dataclass(frozen=True)
class OnThisMachine:
    """Runs the steps in this process and its workers."""

    writers: Writers
    going_on: bool = False

    def index(self, plan: Plan) -> None:
        for number in range(len(plan.raw.archives)):
            convert.index_archive(number, plan)

    def unpack(self, work: unpack.Work) -> None:
        for _ in in_parallel(self.writers, unpack.unpack_source, ((work, number) for number in range(len(work.sources)))):
            pass

    def convert(self, plan: Plan) -> None:
        tables = [ReferenceTable.of(convert.index_archive(number, plan)[1]) for number in range(len(plan.raw.archives))]
        counts = dict(enumerate(map(len, tables)))
        for split in plan.raw.splits:
            of_split = ReferenceTable.joined([tables[number] for number in plan.raw.of_split(split)])
            for number in plan.raw.of_split(split):
                tables[number] = ReferenceTable.of([])
            calls = ((plan, split, file, packed) for file, packed in _shards(plan, split, counts, of_split))
            for _ in in_parallel(self.writers, convert.write_references, calls):
                pass
        convert.publish_written((None, ()), plan)


def _shards(
    plan: Plan, split: str, counts: dict[int, int], images: ReferenceTable
) -> Iterator[tuple[str, list[PackedReference]]]:
    """Yields each shard's file with references to its images."""
    of_split = plan_split(plan, split, counts)
    order = np.argsort(reading_positions(of_split.num_images))
    ends = np.searchsorted(of_split.shards_of(np.arange(len(order))), np.arange(len(of_split.shard_files)), side="right")
    begin = 0
    for file, end in zip(of_split.shard_files, ends.tolist(), strict=True):
        image_ids = order[begin:end]
        packed = zip(range(begin, end), image_ids.tolist(), images.take(image_ids), strict=True)
        yield file, [pack_reference(place, image_id, image) for place, image_id, image in packed]
        begin = end

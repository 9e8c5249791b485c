"""The conversion and the unpacking as Beam's transforms, for runners that have workers of their own.

    IndexHeaders      a worker lists the images of an archive by its headers
    AssignIDs         the image counts of all archives, a side input, make the IDs dense
    GroupByShard      references to images are grouped by shard; no image's bytes go through Beam
    WriteShards       a worker reads the images of a shard from the raw data, and writes the shard
    VerifyAndPublish   when all shards are written, one worker checks them and publishes the dataset

A runner may do any step twice, even at the same time: the files are the same, and each appears whole or not at all.
`beam_jobs.local` does the same steps on this machine without a runner.
"""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future
from typing import Any

import apache_beam as beam
from apache_beam.metrics.metric import Metrics

from beam_jobs import convert, unpack
from beam_jobs.plan import Plan
from beam_jobs.pooled import Writers, make_pool
from beam_jobs.references import PackedReference


class Convert(beam.PTransform):
    """Turns a plan into a dataset.

    The steps form one line, apart from the side input, because some runners drop other branches.
    """

    def __init__(self, plan: Plan, writers: Writers) -> None:
        super().__init__()
        self.plan = plan.for_workers()
        self.writers = writers

    def expand(self, pbegin: Any) -> Any:
        indexed = pbegin | Index(self.plan)
        counts = indexed | "CountImages" >> beam.Map(convert.count_images)
        return (
            indexed
            | "AssignIDs" >> beam.FlatMap(convert.assign_ids, self.plan, beam.pvalue.AsDict(counts))
            | "GroupByShard" >> beam.GroupByKey()
            | "WriteShards" >> beam.ParDo(WriteShards(self.plan, self.writers))
            | "WaitForAll" >> beam.GroupByKey()
            | "VerifyAndPublish" >> beam.Map(convert.publish_written, self.plan)
        )


class Index(beam.PTransform):
    """Turns a plan into the images of each archive."""

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.plan = plan.for_workers()

    def expand(self, pbegin: Any) -> Any:
        numbers = range(len(self.plan.raw.archives))
        return pbegin | "Archives" >> beam.Create(numbers) | "IndexHeaders" >> beam.Map(convert.index_archive, self.plan)


class Unpack(beam.PTransform):
    """Unpacks all source files of a raw folder."""

    def __init__(self, work: unpack.Work, writers: Writers) -> None:
        super().__init__()
        self.work = work
        self.writers = writers

    def expand(self, pbegin: Any) -> Any:
        sources = pbegin | "Sources" >> beam.Create(range(len(self.work.sources)))
        return sources | "UnpackSources" >> beam.ParDo(UnpackSources(self.work, self.writers))


class Pooled(beam.DoFn):
    """A step whose calls run as many at the same time as there are writers. A bundle ends when all its calls are done."""

    def __init__(self, writers: Writers) -> None:
        self.writers = writers
        self._pool: Executor | None = None
        self._pending: list[Future] = []

    def setup(self) -> None:
        self._pool = make_pool(self.writers)

    def call(self, function: Callable[..., Any], *arguments: Any) -> None:
        """Calls `function`, at once or later."""
        if self._pool:
            self._pending.append(self._pool.submit(function, *arguments))
        else:
            self.called(function(*arguments))

    def called(self, result: Any) -> None:
        """Takes the result of a call."""

    def finish_bundle(self) -> None:
        pending, self._pending = self._pending, []
        try:
            for one in pending:
                self.called(one.result())
        finally:  # after a failure or an interrupt, cancel the calls that have not begun
            for one in pending:
                one.cancel()

    def teardown(self) -> None:
        if self._pool:
            self._pool.shutdown(cancel_futures=True)


class WriteShards(Pooled):
    """Writes shards, as many at the same time as there are writers."""

    def __init__(self, plan: Plan, writers: Writers) -> None:
        super().__init__(writers)
        self.plan = plan

    def process(self, grouped: tuple[convert.ShardKey, Iterable[list[PackedReference]]]) -> Iterator[tuple[None, str]]:
        (split, shard_file), groups = grouped
        packed = [reference for group in groups for reference in group]
        self.call(convert.write_references, self.plan, split, shard_file, packed)
        yield None, shard_file

    def called(self, result: dict[str, int]) -> None:
        for fate, count in result.items():
            Metrics.counter("images", fate).inc(count)


class UnpackSources(Pooled):
    """Unpacks source files, as many at the same time as there are writers."""

    def __init__(self, work: unpack.Work, writers: Writers) -> None:
        super().__init__(writers)
        self.work = work

    def process(self, number: int) -> None:
        self.call(unpack.unpack_source, self.work, number)

"""What runs on workers: from a plan to a published dataset, as one Beam transform.

Only references to images go through Beam, never their bytes. A worker indexes an archive by its headers; the counts of all
archives, as a side input, make the IDs dense; references are grouped by shard; a worker reads the images of a shard where
they lie and writes it; when all are written, one worker proves and publishes. Every step may be done twice, or twice at a
time: it leaves the same files, and those are there whole or not at all.
"""

import multiprocessing
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import apache_beam as beam
from apache_beam.metrics.metric import Metrics

from beam_jobs import archives, files, images, proof
from beam_jobs.plan import Plan, plan_split
from beam_jobs.publish import publish
from beam_jobs.shards import Record, make_record, write_shard
from trainer.shared.files import is_local
from trainer.shared.records import reading_places

_BATCH = 32
"""Images that a thread takes at a time."""
_REMOTE_THREADS = 16
"""A request for an image takes long, and little of the machine."""

Reference = tuple
"""Place, image ID and the fields of a `RawImage`: Beam encodes plain tuples faster than named ones."""
Group = tuple[tuple[str, str], Iterable[list[Reference]]]
"""(split, shard's file) and the references to its images."""
Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Writers:
    """How many shards one worker of the runner writes side by side. Runners that have workers of their own need one."""

    processes: int = 1
    threads: int = 1
    """In the worker's own process, where there is no other."""


def local_writers(processes: int) -> Writers:
    """Returns what uses this machine: threads in one process, since hashing, reading and writing do not hold each other up."""
    return Writers(processes, min(os.cpu_count() or 1, 8))


class Convert(beam.PTransform):
    """From a plan to a dataset.

    A single line of steps; what branches off is a side input and nothing else, since not every runner keeps other branches.
    """

    def __init__(self, plan: Plan, writers: Writers) -> None:
        super().__init__()
        self.plan = plan
        self.writers = writers

    def expand(self, pbegin: Any) -> Any:
        indexed = pbegin | Index(self.plan)
        counts = indexed | "CountImages" >> beam.Map(count_images)
        return (
            indexed
            | "AssignIDs" >> beam.FlatMap(assign_ids, self.plan, beam.pvalue.AsDict(counts))
            | "GroupByShard" >> beam.GroupByKey()
            | "WriteShards" >> beam.ParDo(WriteShards(self.plan, self.writers))
            | "WaitForAll" >> beam.GroupByKey()
            | "ProveAndPublish" >> beam.Map(publish_written, self.plan)
        )


class Index(beam.PTransform):
    """From a plan to the references in each archive."""

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.plan = plan

    def expand(self, pbegin: Any) -> Any:
        numbers = range(len(self.plan.raw.archives))
        return pbegin | "Archives" >> beam.Create(numbers) | "IndexHeaders" >> beam.Map(index_archive, self.plan)


Indexed = tuple[int, list[tuple]]
"""The number of an archive and the fields of each `RawImage` in it."""


def index_archive(number: int, plan: Plan) -> Indexed:
    """Returns what is in an archive that gets IDs, in their order, and reports it."""
    found = archives.index(plan.raw, plan.raw.archives[number])
    repaired: proof.Listed = []
    if plan.look_first:
        found, repaired = _look_at(plan, found)
    proof.report_archive(plan, number, found, repaired)
    return number, [tuple(image) for image in found.images]


def count_images(indexed: Indexed) -> tuple[int, int]:
    number, found = indexed
    return number, len(found)


def assign_ids(indexed: Indexed, plan: Plan, counts: dict[int, int]) -> list[tuple[tuple[str, str], list[Reference]]]:
    """Returns ((split, shard's file), references) for each shard that has images of an archive."""
    number, found = indexed
    split = plan.raw.archives[number].split
    of_split = plan_split(plan, split, counts)
    first_id = of_split.first_ids[number]
    places = reading_places(of_split.num_images)[first_id : first_id + len(found)]
    by_shard: dict[int, list[Reference]] = {}
    for image_id, (place, shard, image) in enumerate(
        zip(places.tolist(), of_split.shards_of(places).tolist(), found, strict=True), start=first_id
    ):
        by_shard.setdefault(shard, []).append((place, image_id, *image))
    return [((split, of_split.shard_files[shard]), references) for shard, references in by_shard.items()]


class WriteShards(beam.DoFn):
    """Writes shards, as many at a time as there are writers; a bundle ends when all of its own are written."""

    def __init__(self, plan: Plan, writers: Writers) -> None:
        self.plan = plan
        self.writers = writers
        self._pool: Executor | None = None
        self._pending: list[Future[dict[str, int]]] = []

    def setup(self) -> None:
        if self.writers.processes > 1:
            # Forked, they start at once and share memory; elsewhere forking is not safe.
            context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
            self._pool = ProcessPoolExecutor(self.writers.processes, context, _end_with, (os.getpid(),))
        elif self.writers.threads > 1:
            self._pool = ThreadPoolExecutor(self.writers.threads)

    def process(self, grouped: Group) -> Iterator[tuple[None, str]]:
        (split, shard_file), groups = grouped
        references = [reference for group in groups for reference in group]
        if self._pool:
            self._pending.append(self._pool.submit(write_references, self.plan, split, shard_file, references))
        else:
            _count(write_references(self.plan, split, shard_file, references))
        yield None, shard_file

    def finish_bundle(self) -> None:
        pending, self._pending = self._pending, []
        try:
            for written in pending:
                _count(written.result())
        finally:  # where one fails, or someone interrupts, the others need not begin
            for written in pending:
                written.cancel()

    def teardown(self) -> None:
        if self._pool:
            self._pool.shutdown(cancel_futures=True)


def _end_with(parent: int) -> None:
    """Ends this process soon after `parent`, which may be killed without a word."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def write_references(plan: Plan, split: str, shard_file: str, references: list[Reference]) -> dict[str, int]:
    """Writes the shard of the images that are referred to, in the order of their places, reading each where it lies.

    Does nothing where it is there already. Returns how many images were written, repaired and rejected.
    """
    references.sort()
    if proof.is_finished(
        plan, shard_file, [reference[1] for reference in references], [reference[3] for reference in references]
    ):
        return {}
    repaired: proof.Listed = []
    rejected: proof.Listed = []
    resized = 0

    def records() -> Iterator[Record]:
        nonlocal resized
        for image_id, image, outcome in _threaded(plan, references, lambda reference: _make(plan, split, reference)):
            if isinstance(outcome, images.UnreadableImageError):
                rejected.append({"source": image.source, "reason": str(outcome)})
                continue
            record, done, was_resized = outcome
            resized += was_resized
            if done:
                repaired.append({"id": image_id, "source": image.source, "done": done})
            yield record

    written = write_shard(plan.output, shard_file, records())
    proof.report_shard(plan, written, resized, repaired, rejected)
    return {"written": written.shard.records, "repaired": len(repaired), "rejected": len(rejected)}


def _count(images_by_fate: dict[str, int]) -> None:
    for fate, count in images_by_fate.items():
        Metrics.counter("images", fate).inc(count)


def publish_written(_: tuple[None, Iterable[str]], plan: Plan) -> str:
    """Proves and publishes the dataset once all shards are written; returns its fingerprint."""
    return publish(plan).fingerprint


def _make(
    plan: Plan, split: str, reference: Reference
) -> tuple[int, archives.RawImage, tuple[Record, str, bool] | images.UnreadableImageError]:
    _, image_id, *fields = reference
    image = archives.RawImage(*fields)
    # What was looked at need not be decoded again.
    options = replace(plan.images, decode=False) if plan.look_first and plan.images.decode else plan.images
    try:
        prepared = images.prepare(_read(plan, image), options)
    except images.UnreadableImageError as error:
        return image_id, image, error
    return image_id, image, (make_record(split, image_id, image.label, prepared.encoded), prepared.repaired, prepared.resized)


def _look_at(plan: Plan, found: archives.Index) -> tuple[archives.Index, proof.Listed]:
    """Returns an index without the images that cannot be read, and those of the others that will be repaired."""

    def look(image: archives.RawImage) -> tuple[archives.RawImage, str, str]:
        if image.size > images.HEAD_BYTES:
            path = files.join(plan.raw.folder, image.file)
            head = files.read_range(path, image.offset, images.HEAD_BYTES)
            tail = files.read_range(path, image.offset + image.size - images.TAIL_BYTES, images.TAIL_BYTES)
            if images.keeps_its_bytes(head, tail, plan.images):
                return image, "", ""
        try:
            return image, images.prepare(_read(plan, image), plan.images).repaired, ""
        except images.UnreadableImageError as error:
            return image, "", str(error)

    readable, rejected, repaired = [], list(found.rejected), []
    for image, done, reason in _threaded(plan, found.images, look):
        if reason:
            rejected.append({"source": image.source, "reason": reason})
            continue
        readable.append(image)
        if done:
            repaired.append({"source": image.source, "done": done})
    return replace(found, images=readable, rejected=rejected), repaired


def _read(plan: Plan, image: archives.RawImage) -> bytes:
    """Returns an image's bytes. Raises UnreadableImageError where a local disk does not give them; a remote one may yet."""
    if not image.size:
        return b""
    path = files.join(plan.raw.folder, image.file)
    try:
        data = files.read_range(path, image.offset, image.size)
    except OSError as error:
        if not is_local(path):
            raise
        raise images.UnreadableImageError(f"cannot be read ({error.strerror})") from error
    if len(data) < image.size:
        raise images.UnreadableImageError(f"has {len(data)} bytes where there were {image.size}: the raw data changed meanwhile")
    return data


def _threaded(plan: Plan, items: Sequence[Item], function: Callable[[Item], Result]) -> Iterator[Result]:
    """Yields the function of each item in their order; of remote ones several at a time, as a request mostly waits."""
    if is_local(plan.raw.folder):
        yield from map(function, items)
        return
    threads = _REMOTE_THREADS
    ahead: deque[Future[list[Result]]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        for start in range(0, len(items), _BATCH):
            ahead.append(pool.submit(lambda start: [function(item) for item in items[start : start + _BATCH]], start))
            if len(ahead) > threads:
                yield from ahead.popleft().result()
        while ahead:
            yield from ahead.popleft().result()

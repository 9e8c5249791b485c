"""Unpacks raw data whose files can only be read from beginning to end. The first pipeline of a conversion that needs it.

A conversion reads images by class and name, and then by shard. Gzip, Parquet and TFRecord files have no index of names, so each
is read once: its images go to a file that can be read in any order, and their places to an index. `beam_jobs.catalogue` describes
these files. They lie in one folder beside the output, which takes as much room as the images, until the dataset is finished.

A source file is the unit of work. If the job is killed, the next one goes on from the source files that are finished.
"""

import hashlib
import time
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import BinaryIO

import pyarrow as pa

from beam_jobs import catalogue, files, images
from beam_jobs.catalogue import SourceIndex, Summary
from beam_jobs.layouts.layout import Stream, StreamedImage, StreamError
from beam_jobs.layouts.names import canonical
from beam_jobs.layouts.passed_over import PassedOver, Tallies, add
from beam_jobs.listings import FileInfo
from beam_jobs.raw import Recognised
from beam_jobs.texts import encoded

_FORMAT = 1
"""Changes when the unpacked files change, so that those of an earlier version are not used."""


@dataclass(frozen=True)
class Source:
    """A file that must be unpacked."""

    split: str
    stream: Stream
    name: str
    """Path relative to the raw folder."""
    size: int
    """Size in bytes."""
    labels: FileInfo | None
    """The file of labels, if the split has one."""
    key: str
    """Name of what is unpacked from it. It changes when the file or the chosen classes change."""


@dataclass(frozen=True)
class Work:
    """What has to be unpacked. Workers need nothing else."""

    folder: str
    """The folder of the raw data."""
    unpacked: str
    """The folder to write to."""
    synsets: frozenset[str] | None
    """The chosen classes; None for all. Images of others are listed, but not unpacked."""
    sources: tuple[Source, ...]
    """The files to unpack; none if no layout needs it."""
    check: images.Options | None
    """How to check the images. Then nothing but their index is written: a dry run. None for a conversion."""

    @property
    def names(self) -> str:
        """Digest of the sources' names and sizes and of the chosen classes."""
        sources = [(source.split, source.name, source.size) for source in self.sources]
        return hashlib.sha256(repr((_FORMAT, sources, sorted(self.synsets or ()))).encode()).hexdigest()[:32]

    @property
    def identity(self) -> str:
        """Digest of the sources, with their times, and of the chosen classes."""
        return hashlib.sha256(repr([source.key for source in self.sources]).encode()).hexdigest()[:32]


def make_work(
    raw: str, recognised: Recognised, unpacked: str, synsets: Sequence[str] | None, check: images.Options | None = None
) -> Work:
    """Returns what has to be unpacked of the raw data in the folder `raw`."""
    chosen = frozenset(synsets) if synsets else None
    sources = []
    for split, (layout, found) in recognised.items():
        if isinstance(layout, Stream):
            for number, info in enumerate(found.files):
                about = repr((_FORMAT, tuple(info), found.labels and tuple(found.labels), sorted(chosen or ())))
                key = f"{split}-{number:05d}-{hashlib.sha256(about.encode()).hexdigest()[:16]}"
                sources.append(Source(split, layout, info.name, info.size, found.labels, key))
    return Work(raw, unpacked, chosen, tuple(sources), check)


def unpack_source(work: Work, number: int) -> None:
    """Unpacks one source file. Does nothing if that is done already."""
    source = work.sources[number]
    if _is_done(work, source):
        return
    begun = time.perf_counter()
    names: list[bytes] = []
    synsets: list[bytes] = []
    faults: list[str] = []
    repairs: list[str] = []
    offsets, sizes = array("q"), array("q")
    passed_over: Tallies = {}
    problems: tuple[str, ...] = ()
    with _images_file(work, source) as out:
        position = 0
        try:
            for image in source.stream.images(work.folder, source.name, source.labels):
                if isinstance(image, PassedOver):
                    add(passed_over, image)
                    continue
                synset = canonical(image.synset)
                chosen = work.synsets is None or synset in work.synsets
                repair, fault = _check(image, work) if work.check and chosen else ("", "")
                if source.stream.in_place:
                    offset, size = image.offset, image.size
                else:
                    offset, size = position, len(image.data)
                    position += size if chosen else 0
                if out and chosen:
                    out.write(image.data)
                names.append(encoded(image.name))
                synsets.append(encoded(synset))
                faults.append(image.fault or fault)
                repairs.append(repair)
                offsets.append(offset)
                sizes.append(size)
        except StreamError as error:
            problems = (str(error),)
    columns = [names, synsets, offsets, sizes, faults, repairs]
    rows = pa.table([pa.array(one, field.type) for one, field in zip(columns, catalogue.ROWS, strict=True)], catalogue.ROWS)
    index = SourceIndex(source.name, rows, problems, passed_over, position, time.perf_counter() - begun)
    catalogue.write_source(work.unpacked, source.key, index)


def prepare(work: Work) -> None:
    """Deletes what earlier jobs left in the folder, apart from the source files that are unpacked already."""
    expected = {source.key for source in work.sources}
    files.delete_temporary(work.unpacked)
    files.delete(
        [files.join(work.unpacked, name) for name in files.names(work.unpacked) if name.partition(".")[0] not in expected]
    )


def bytes_done(work: Work) -> int:
    """Returns about how many bytes of the source files are unpacked. Counts files that are being unpacked by what is written."""
    infos = files.tree(work.unpacked, depth=0)
    finished = {info.name.removesuffix(".index") for info in infos if info.name.endswith(".index")}
    begun: dict[str, int] = {}
    for info in infos:
        key, _, rest = info.name.partition(".")
        if rest.startswith("images"):
            begun[key] = max(begun.get(key, 0), info.size)
    return sum(source.size if source.key in finished else min(begun.get(source.key, 0), source.size) for source in work.sources)


def is_whole(work: Work) -> bool:
    """Returns whether all that was unpacked is still there."""
    splits = {source.split for source in work.sources}
    return all(_is_done(work, source) for source in work.sources) and all(
        files.find(catalogue.index_file(work.unpacked, split)) for split in splits
    )


def finish(work: Work) -> None:
    """Joins the indexes of the source files to one of each split, and writes the summary."""
    splits = {}
    for split in dict.fromkeys(source.split for source in work.sources):
        of_split = [source for source in work.sources if source.split == split]
        indexes = {source.key: catalogue.read_source(work.unpacked, source.key) for source in of_split}
        checked = work.check is not None and not of_split[0].stream.in_place
        splits[split] = catalogue.write_split(work.unpacked, split, indexes, checked=checked)
    catalogue.write_summary(work.unpacked, Summary(work.identity, work.names, splits))


def _is_done(work: Work, source: Source) -> bool:
    if not files.find(catalogue.index_file(work.unpacked, source.key)):
        return False
    if work.check or source.stream.in_place:
        return True
    found = files.find(catalogue.images_file(work.unpacked, source.key))
    return found is not None and found.size == catalogue.read_source(work.unpacked, source.key).bytes


@contextmanager
def _images_file(work: Work, source: Source) -> Iterator[BinaryIO | None]:
    if work.check or source.stream.in_place:
        yield None
        return
    with files.open_to_write(catalogue.images_file(work.unpacked, source.key)) as file:
        yield file


def _check(image: StreamedImage, work: Work) -> tuple[str, str]:
    """Returns how an image would be repaired, and why it cannot be read; "" for neither."""
    if not work.check or not image.data:
        return "", "is empty" if work.check and not image.size else ""
    try:
        return images.prepare(image.data, work.check).repaired, ""
    except images.UnreadableImageError as error:
        return "", str(error)

"""The images of a streamed layout: where each lies once its file was read.

`beam_jobs.unpack` writes these files to a folder, here called `unpacked`:

    KEY.images      the images of one source file, one after another; not written if the layout is read in place
    KEY.index       an Arrow file with a row for each of them
    SPLIT.index     the rows of all source files of a split: a record batch for each archive, sorted by name

and beside the folder a small `unpacked.json`, the `Summary`, which is written last and is kept when the folder is deleted.
"""

import functools
import itertools
import json
import re
from collections.abc import Mapping, Sequence, Set
from dataclasses import asdict, dataclass, fields
from typing import Any

import pyarrow as pa

from beam_jobs import files
from beam_jobs.layouts.layout import Archive, Contents, Found, ListedImage, Listing, RawImage, Reader, and_more, name_problems
from beam_jobs.layouts.names import base_name_first, canonical
from beam_jobs.layouts.passed_over import Tallies, merge, tally
from beam_jobs.texts import decoded

ROWS = pa.schema(
    [
        ("name", pa.binary()),
        ("synset", pa.binary()),
        ("offset", pa.int64()),
        ("size", pa.int64()),
        ("fault", pa.string()),
        ("repaired", pa.string()),
    ]
)
"""An image of a source file. Names and synsets are `encoded`. `fault` and `repaired` are empty unless the images were checked."""
_PART = re.compile(r"-(\d{5})-of-(\d{5})")
_SOURCE = "source"
_CLASSES, _SOURCES, _CHECKED = b"classes", b"sources", b"checked"


@dataclass(frozen=True)
class SplitSummary:
    """What a split's streamed files hold."""

    classes: tuple[tuple[str, int, int], ...]
    """Synset, number of images and bytes of each class, sorted by synset."""
    problems: tuple[str, ...]
    """Faults of the source files; they stop the conversion."""
    passed_over: Tallies
    """What is in the source files and no image."""
    bytes: int
    """Bytes that unpacking writes."""
    seconds: float
    """Time that reading the source files took, in seconds."""


@dataclass(frozen=True)
class Summary:
    """What the streamed files of a raw folder hold, by split."""

    identity: str
    """Digest of the source files, with their times, and of the chosen classes."""
    names: str
    """Digest of the source files, without times, and of the chosen classes."""
    splits: Mapping[str, SplitSummary]


@dataclass(frozen=True)
class SourceIndex:
    """The index of one source file."""

    source: str
    """Path of the source file relative to the raw folder."""
    rows: pa.Table
    problems: tuple[str, ...]
    passed_over: Tallies
    bytes: int
    seconds: float


def images_file(unpacked: str, key: str) -> str:
    return files.join(unpacked, f"{key}.images")


def index_file(unpacked: str, key: str) -> str:
    return files.join(unpacked, f"{key}.index")


def write_source(unpacked: str, key: str, index: SourceIndex) -> None:
    about = {one.name: getattr(index, one.name) for one in fields(index) if one.name != "rows"}
    table = index.rows.replace_schema_metadata({"about": json.dumps(about)})
    _write(index_file(unpacked, key), table.schema, table.to_batches())


def read_source(unpacked: str, key: str) -> SourceIndex:
    with files.open_to_read(index_file(unpacked, key)) as file, pa.ipc.open_file(file) as reader:
        table = reader.read_all()
    about = json.loads(table.schema.metadata[b"about"])
    return SourceIndex(**about | {"rows": table, "problems": tuple(about["problems"])})


def write_split(unpacked: str, split: str, indexes: Mapping[str, SourceIndex], *, checked: bool) -> SplitSummary:
    """Writes the index of a split from the indexes of its source files by key, and returns the split's summary.

    checked: whether `fault` and `repaired` say what a check of each image found
    """
    tables = [
        one.rows.replace_schema_metadata(None).append_column(_SOURCE, pa.array([number] * len(one.rows), pa.int32()))
        for number, one in enumerate(indexes.values())
    ]
    rows = pa.concat_tables(tables)
    keys = _sort_keys(rows, split)
    rows = rows.take(pa.array(sorted(range(len(rows)), key=keys.__getitem__), pa.int64())).combine_chunks()
    counts = rows.group_by("synset").aggregate([("size", "count"), ("size", "sum")]).to_pylist()
    classes = tuple(sorted((decoded(one["synset"]), one["size_count"], one["size_sum"]) for one in counts))
    ends = [0]
    for _, count, _ in classes if split == "train" else (("", len(rows), 0),):
        ends.append(ends[-1] + count)
    batches = [rows.slice(begin, end - begin).to_batches() for begin, end in itertools.pairwise(ends)]
    metadata = {
        _CLASSES: json.dumps([synset for synset, _, _ in classes] if split == "train" else [""]),
        _SOURCES: json.dumps([[key, one.source] for key, one in indexes.items()]),
        _CHECKED: json.dumps(checked),
    }
    _write(index_file(unpacked, split), rows.schema.with_metadata(metadata), [batch for one in batches for batch in one])
    return SplitSummary(
        classes,
        tuple(problem for one in indexes.values() for problem in one.problems),
        merge(one.passed_over for one in indexes.values()),
        sum(one.bytes for one in indexes.values()),
        sum(one.seconds for one in indexes.values()),
    )


def write_summary(unpacked: str, summary: Summary) -> None:
    files.write(_summary_file(unpacked), json.dumps(asdict(summary)).encode())


def has_summary(unpacked: str) -> bool:
    """Returns whether images were unpacked to a folder. They may have been deleted since."""
    return files.find(_summary_file(unpacked)) is not None


def read_summary(unpacked: str) -> Summary:
    """Returns the summary of what was unpacked to a folder."""
    content = json.loads(files.read(_summary_file(unpacked)))
    splits = {
        split: SplitSummary(**one | {"classes": tuple(map(tuple, one["classes"])), "problems": tuple(one["problems"])})
        for split, one in content["splits"].items()
    }
    return Summary(content["identity"], content["names"], splits)


@dataclass(frozen=True)
class Unpacked(Reader):
    """Reads the images of a split whose files were streamed."""

    unpacked: str
    split: str
    identity: str
    """`Summary.identity` of what was unpacked."""
    in_place: bool
    """Whether images are read from the source files."""

    def training_archives(self, folder: str, found: Found) -> Contents:
        summary = self._summary()
        archives = (Archive("train", f"train/{synset}", "", 0, size, synset) for synset, _, size in summary.classes)
        problems = (summary.problems or _no_images("training", summary)) + _missing_parts(found)
        return Contents(tuple(archives), problems, _passed_over(summary, found))

    def validation_archives(self, folder: str, found: Found, known: Set[str] | None) -> Contents:
        summary = self._summary()
        size = sum(size for _, _, size in summary.classes)
        unknown = [synset for synset, _, _ in summary.classes if known is not None and synset not in known]
        of_labels = tuple(
            f"validation images have the class {synset}, which is not a synset of the training images{and_more(unknown)}"
            for synset in unknown[:1]
        )
        problems = (summary.problems or _no_images("validation", summary)) + _missing_parts(found) + of_labels
        archive = Archive("validation", "validation", "", 0, size)
        synsets = frozenset(synset for synset, _, _ in summary.classes)
        return Contents((archive,), problems, _passed_over(summary, found), synsets)

    def list_images(self, folder: str, archive: Archive) -> Listing:
        with files.open_to_read(index_file(self.unpacked, self.split)) as file, pa.ipc.open_file(file) as reader:
            metadata = reader.schema.metadata
            number = json.loads(metadata[_CLASSES]).index(archive.synset)
            rows = (reader.get_batch(number) if reader.num_record_batches else reader.read_all()).to_pydict()
        sources = [source for _, source in json.loads(metadata[_SOURCES])]
        names, synsets = ([*map(decoded, rows[column])] for column in ("name", "synset"))
        images = tuple(
            ListedImage(name, sources[source], offset, size, synset, fault)
            for name, synset, source, offset, size, fault in zip(
                names, synsets, *(rows[column] for column in (_SOURCE, "offset", "size", "fault")), strict=True
            )
        )
        repaired = tuple(
            {"source": f"{image.file}/{image.name}", "done": done}
            for image, done in zip(images, rows["repaired"], strict=True)
            if done
        )
        problems = name_problems(archive.name, names)
        return Listing(images, problems, repaired=repaired if json.loads(metadata[_CHECKED]) else None)

    def read(self, folder: str, image: RawImage, start: int, size: int) -> bytes:
        path = (
            files.join(folder, image.file)
            if self.in_place
            else _unpacked_files(self.unpacked, self.split, self.identity)[image.file]
        )
        return files.read_range(path, image.offset + start, size)

    def _summary(self) -> SplitSummary:
        return read_summary(self.unpacked).splits[self.split]


@functools.lru_cache(maxsize=8)
def _unpacked_files(unpacked: str, split: str, identity: str) -> Mapping[str, str]:
    """Returns the file of unpacked images by source file. `identity` tells one unpacking from an earlier one."""
    with files.open_to_read(index_file(unpacked, split)) as file, pa.ipc.open_file(file) as reader:
        sources = json.loads(reader.schema.metadata[_SOURCES])
    return {source: images_file(unpacked, key) for key, source in sources}


def _sort_keys(rows: pa.Table, split: str) -> list[tuple[str, str]]:
    """Returns a key for each image that gives the order of image IDs in every layout."""
    names = map(decoded, rows["name"].to_pylist())
    if split != "train":
        return [*map(base_name_first, names)]
    return [*zip(map(decoded, rows["synset"].to_pylist()), map(canonical, names), strict=True)]


def _passed_over(summary: SplitSummary, found: Found) -> Tallies:
    return merge((summary.passed_over, tally(found.others)))


def _no_images(kind: str, summary: SplitSummary) -> tuple[str, ...]:
    return () if summary.classes else (f"there are no {kind} images",)


def _missing_parts(found: Found) -> tuple[str, ...]:
    """Returns a problem if files are missing of those whose names say how many there are."""
    parts = [(info.name, match) for info in found.files if (match := _PART.search(info.name))]
    if not parts:
        return ()
    there = {int(match[1]) for _, match in parts}
    name, match = parts[0]
    missing = sorted(set(range(int(match[2]))) - there)
    if not missing:
        return ()
    absent = f"{name[: match.start()]}-{missing[0]:05d}-of-{match[2]}"
    more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
    return (f"{absent}{more} of {match[2].lstrip('0')} files are missing: get them again",)


def _summary_file(unpacked: str) -> str:
    return f"{unpacked}.json"


def _write(path: str, schema: pa.Schema, batches: Sequence[Any]) -> None:
    with files.open_to_write(path) as file, pa.ipc.new_file(pa.PythonFile(file, "w"), schema) as writer:
        for batch in batches:
            writer.write_batch(batch.replace_schema_metadata(schema.metadata))

"""A dataset at a glance: a page with its counts, pictures and sizes, and whether its shards are what its manifest says.

python -m beam_jobs.inspect_dataset DIR           writes DIR's page to dataset.html
python -m beam_jobs.inspect_dataset DIR --full    reads every byte: checksums, IDs, labels, fingerprint
python -m beam_jobs.inspect_dataset DIR --image ID [--split validation]    names an image's class, record and raw file
"""

import argparse
import io
import itertools
import json
import logging
import struct
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from beam_jobs import files, sources
from beam_jobs.jpeg import read_jpeg_header
from beam_jobs.shards import FINGERPRINTS, file_crc32c, fingerprint_term, frame
from trainer.shared.blocks import block_extent, framed_records, locate
from trainer.shared.errors import UserError, first_few, print_in_any_locale
from trainer.shared.page import Picture, Section, data_uri, render
from trainer.shared.progress import OnProgress, ProgressBars, silent
from trainer.shared.records import (
    MANIFEST,
    RECORDS_PER_BLOCK,
    Manifest,
    Shard,
    Split,
    decode_example,
    manifest_from_json,
)

_SAMPLED_BLOCKS = 32
"""Number of blocks of each split whose images are measured: about 2,000 images."""
_SHOWN_CLASSES = 40
_SHOWN_IMAGES = 8
"""Number of images of each class that the page shows."""
_THUMBNAIL = 72
"""Longer side of a thumbnail in pixels."""
_SEEN = np.dtype([("image_id", "i8"), ("label", "i4"), ("bytes", "i4"), ("width", "i4"), ("height", "i4"), ("grey", "?")])
"""What is kept of a record, 25 bytes. The width is 0 if the image has no header of a JPEG."""
_READING = "reading shards, MB"
"""A phase of progress."""
_LISTED = 200
"""Number of repaired or rejected images that the page lists."""


class Record(NamedTuple):
    image_id: int
    label: int
    encoded: bytes


@dataclass(frozen=True)
class Statistics:
    """Statistics of a split's images, or of a sample. A tuple has the smallest value, median, mean and largest value."""

    images: int
    width: tuple[float, ...]
    height: tuple[float, ...]
    kilobytes: tuple[float, ...]
    grey: float
    """Fraction of grey images."""


@dataclass(frozen=True)
class Report:
    """The result of an inspection."""

    folder: str
    full: bool
    """Whether every byte was read."""
    problems: tuple[str, ...]
    """Differences between the shards and the manifest; empty if there are none."""
    statistics: dict[str, Statistics]


def load(folder: str) -> Manifest:
    """Returns the manifest of a dataset. Raises UserError if there is no valid manifest."""
    path = files.join(folder, MANIFEST)
    if not files.find(path):
        raise UserError(f"{folder} holds no finished dataset: {MANIFEST} is missing")
    try:
        return manifest_from_json(files.read(path).decode(errors="replace"))
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not a manifest of this version ({error!r}); build the dataset again") from error


def inspect(folder: str, *, full: bool = False, on_progress: OnProgress = silent) -> Report:
    """Checks the shards of a dataset against its manifest, and measures images.

    Checks the size of every file and TFDS's counts. With `full`, reads every record and checks checksums, labels, fingerprint,
    and that the IDs are exactly 0..N-1. It then keeps 25 bytes an image of one split.
    """
    manifest = load(folder)
    problems: list[str] = []
    measured = {}
    fingerprint = done = 0
    on_progress("listing the dataset")
    found = {info.name: info.size for info in files.tree(folder, depth=0)}
    total = sum(shard.bytes for split in manifest.splits.values() for shard in split.shards) // 10**6 + 1
    for name, split in manifest.splits.items():
        for shard in split.shards:
            if found.get(shard.file) != shard.bytes:
                there = f"has {found[shard.file]:,} bytes" if shard.file in found else "is missing"
                problems.append(f"{shard.file} {there}, and the manifest says {shard.bytes:,} bytes")
        if sum(shard.records for shard in split.shards) != split.records or sum(split.records_per_class) != split.records:
            problems.append(
                f"{name} has {split.records} records in the manifest, but its shards or classes add up to another number"
            )
        readable = [shard for shard in split.shards if found.get(shard.file) == shard.bytes]
        seen = np.empty(split.records if full else _SAMPLED_BLOCKS * RECORDS_PER_BLOCK, _SEEN)
        count = 0
        if full:
            for shard in readable:
                on_progress(_READING, done // 10**6, total)
                of_shard, wrong = _read_whole(folder, shard)
                problems += wrong
                for record in of_shard:
                    fingerprint += fingerprint_term(name, record.image_id, record.label, record.encoded)
                    count = _note(seen, count, record)
                done += shard.bytes
            problems += _check_records(name, split, seen[:count], count)
            problems += sources.wrong_sources(folder, manifest, name)
        else:
            for shard, block in _evenly([(one, block) for one in readable for block in range(len(one.blocks))]):
                try:
                    for record in _read_block(folder, shard, block):
                        count = _note(seen, count, record)
                except ValueError as error:
                    problems.append(f"{shard.file} is damaged: {error}")
        sized = seen[:count][seen["width"][:count] > 0]
        if len(sized):
            measured[name] = _statistics(sized)
    if full:
        on_progress(_READING, total, total)
    if full and not problems and f"{fingerprint % FINGERPRINTS:064x}" != manifest.fingerprint:
        problems.append(f"the records have the fingerprint {fingerprint % FINGERPRINTS:064x}, not the manifest's")
    problems += _check_tfds(folder, manifest)
    return Report(folder, full, tuple(problems), measured)


def find_image(folder: str, split: str, image_id: int) -> dict[str, Any]:
    """Returns the ID, class, size, record and raw file of an image. Raises UserError if there is no such image."""
    manifest = load(folder)
    source = sources.source_of(folder, manifest, split, image_id)
    of_split = manifest.splits[split]
    ((number, within),) = locate(of_split, [image_id])
    shard = of_split.shards[number]
    try:
        records = _read_block(folder, shard, within // RECORDS_PER_BLOCK)
        record = next(itertools.islice(records, within % RECORDS_PER_BLOCK, None))
    except (ValueError, StopIteration, struct.error) as error:
        raise UserError(f"{shard.file} is damaged at record {within}, image {image_id}, which is from {source}") from error
    return {
        "split": split,
        "image_id": image_id,
        "label": record.label,
        "synset": manifest.synsets[record.label],
        "bytes": len(record.encoded),
        "shard": shard.file,
        "record": within,
        "source": source,
    }


def page(folder: str, *, full: bool = False, on_progress: OnProgress = silent) -> str:
    """Returns the page of a dataset as HTML that needs no other file."""
    return to_html(inspect(folder, full=full, on_progress=on_progress))


def to_html(found: Report) -> str:
    """Returns a report as a page, with the dataset's pictures."""
    manifest = load(found.folder)
    splits = manifest.splits
    checked = "Every byte was read." if found.full else "Sizes and a sample were read."
    counts = " and ".join(f"{split.records:,} {name}" for name, split in splits.items())
    shown = f"{_SHOWN_CLASSES} of the {manifest.num_classes:,} classes" if manifest.num_classes > _SHOWN_CLASSES else "each class"
    repaired = [(image["source"], image["done"]) for split in splits.values() for image in split.repaired]
    left_out = [(image["source"], image["reason"]) for split in splits.values() for image in split.rejected]
    passed_over = [
        (first_few(one.names, ", "), f"{one.entries:,} {one.reason}")
        for split in splits.values()
        for one in (split.seen.passed_over if split.seen else ())
    ]
    options = ", ".join(f"{name}={value}" for name, value in manifest.options.items()) or "none"
    facts = [("fingerprint", (manifest.fingerprint,)), ("options", options), ("made by", f"sogclr {manifest.tool_version}")]
    bars = {"splits": [_bars(name, split.records_per_class, manifest.synsets) for name, split in splits.items()]}
    pictures = {"columns": _SHOWN_IMAGES, "rows": [] if found.problems else _pictures(found.folder, manifest)}
    return render(
        Path(__file__).with_name("dataset.html.jinja"),
        title=f"{manifest.name} {manifest.fingerprint[:12]}",
        name=manifest.name,
        about=f"{manifest.num_classes:,} classes, {counts} images",
        sections=[
            Section("checks", "Checks", checked, {"problems": found.problems, "full": found.full}),
            Section("counts", "Counts", "", {"rows": [_counts(name, split) for name, split in splits.items()]}),
            Section("classes", "Images of each class", "A bar a class, in the order of labels.", bars),
            Section("sizes", "Sizes", "", {"rows": [row for name, one in found.statistics.items() for row in _sizes(name, one)]}),
            Section("images", "Images", f"At most {_SHOWN_IMAGES} training images of {shown}.", pictures),
            Section("repaired", "Repaired", "", _listed(repaired)),
            Section("left-out", "Left out", "", _listed(left_out)),
            Section("passed-over", "Passed over", "What is no image, or was not chosen.", _listed(passed_over)),
            Section("provenance", "Where it comes from", "", {"facts": facts}),
        ],
    )


def _read_whole(folder: str, shard: Shard) -> tuple[Iterator[Record], list[str]]:
    """Returns the records of a shard and its problems. Returns no records if its checksum is wrong."""
    crc = file_crc32c(files.join(folder, shard.file))
    if crc != shard.crc32c:
        return iter(()), [f"{shard.file} has the checksum {crc}, and the manifest says {shard.crc32c}"]
    blocks = (_read_block(folder, shard, block) for block in range(len(shard.blocks)))
    return itertools.chain.from_iterable(blocks), []


def _read_block(folder: str, shard: Shard, block: int) -> Iterator[Record]:
    """Yields the records of a block. Raises ValueError if one is damaged."""
    start, size = block_extent(shard, block)
    data = files.read_range(files.join(folder, shard.file), start, size)
    for position, record in framed_records(data):
        encoded, label, image_id = decode_example(record)
        framed = b"".join(frame(encoded, label, image_id))
        if framed != data[position : position + len(framed)]:
            raise ValueError(f"the record at byte {start + position} has a wrong checksum")
        yield Record(image_id, label, encoded)


def _check_records(name: str, split: Split, seen: np.ndarray, count: int) -> list[str]:
    """Returns what is wrong with the IDs and labels of a split's records. There may be more records than `seen` has room for."""
    problems = []
    if count != split.records or not np.array_equal(np.sort(seen["image_id"]), np.arange(split.records)):
        problems.append(f"the image IDs of {name} are not exactly 0..{split.records - 1}, each once")
    counts = np.bincount(seen["label"], minlength=len(split.records_per_class)).tolist()
    if counts != list(split.records_per_class):
        problems.append(f"the labels of {name} do not occur as often as the manifest says")
    return problems


def _check_tfds(folder: str, manifest: Manifest) -> list[str]:
    path = files.join(folder, "dataset_info.json")
    if not files.find(path):
        return ["dataset_info.json is missing, which TFDS needs to read the dataset"]
    told = {split["name"]: [int(length) for length in split["shardLengths"]] for split in json.loads(files.read(path))["splits"]}
    meant = {name: [shard.records for shard in split.shards] for name, split in manifest.splits.items()}
    return [] if told == meant else ["dataset_info.json has other numbers of records than the manifest"]


def _images_by_class(folder: str, manifest: Manifest, split: str, labels: Sequence[int]) -> Iterator[tuple[int, list[bytes]]]:
    """Yields each label with some of its images. Finds them by ID, because IDs of `train` are in the order of labels."""
    of_split = manifest.splits[split]
    first_ids = np.concatenate([[0], np.cumsum(of_split.records_per_class)])
    for label in labels:
        chosen = _evenly([(image_id,) for image_id in range(first_ids[label], first_ids[label + 1])], _SHOWN_IMAGES)
        shown = []
        for number, within in locate(of_split, [image_id for (image_id,) in chosen]):
            records = _read_block(folder, of_split.shards[number], within // RECORDS_PER_BLOCK)
            shown.append(next(itertools.islice(records, within % RECORDS_PER_BLOCK, None)).encoded)
        yield label, shown


def _note(seen: np.ndarray, count: int, record: Record) -> int:
    """Notes the `count`th record in `seen`, [n] of `_SEEN`, if there is room. Returns the number of records."""
    if count < len(seen):
        header = read_jpeg_header(record.encoded)
        shape = (header.width, header.height, header.components == 1) if header else (0, 0, False)
        seen[count] = (record.image_id, record.label, len(record.encoded), *shape)
    return count + 1


def _statistics(seen: np.ndarray) -> Statistics:
    def of(values: np.ndarray) -> tuple[float, ...]:
        return tuple(float(one) for one in (values.min(), np.median(values), values.mean(), values.max()))

    return Statistics(len(seen), of(seen["width"]), of(seen["height"]), of(seen["bytes"] / 1000), float(seen["grey"].mean()))


def _evenly(items: list, most: int = _SAMPLED_BLOCKS) -> list:
    return [items[number * len(items) // most] for number in range(most)] if len(items) > most else items


def _counts(name: str, split: Split) -> tuple[str, ...]:
    numbers = split.records, len(split.shards)
    treated = len(split.repaired), len(split.rejected), split.resized
    size = f"{sum(shard.bytes for shard in split.shards) / 1e6:,.1f} MB"
    return name, *(f"{number:,}" for number in numbers), size, *(f"{number:,}" for number in treated)


def _sizes(name: str, measured: Statistics) -> Iterator[tuple[str, ...]]:
    of = {"width, px": measured.width, "height, px": measured.height, "size, kB": measured.kilobytes}
    for what, values in of.items():
        yield name, what, *(f"{value:,.1f}" for value in values), f"{measured.images:,}", f"{measured.grey:.1%}"


def _bars(name: str, counts: Sequence[int], synsets: Sequence[str]) -> dict[str, Any]:
    """Returns a bar for each class: its synset, its number of images, and its height in [0, 1]."""
    most = max(counts, default=0) or 1
    bars = [(synset, count, count / most) for synset, count in zip(synsets, counts, strict=True)]
    return {"name": name, "range": f"{min(counts, default=0):,} to {max(counts, default=0):,}", "bars": bars}


def _pictures(folder: str, manifest: Manifest) -> list[tuple[str, list[Picture]]]:
    """Returns pictures of images by synset. If there are many classes, shows evenly spaced ones."""
    labels = _evenly(list(range(manifest.num_classes)), _SHOWN_CLASSES)
    return [
        (manifest.synsets[label], [one for encoded in shown if (one := _picture(encoded, manifest.synsets[label]))])
        for label, shown in _images_by_class(folder, manifest, "train", labels)
    ]


def _picture(encoded: bytes, synset: str) -> Picture | None:
    """Returns a thumbnail of a JPEG, or None if it cannot be decoded. --verify=headers lets such images through."""
    try:
        with Image.open(io.BytesIO(encoded)) as image:
            image.draft("RGB", (_THUMBNAIL, _THUMBNAIL))
            thumbnail = image.convert("RGB")
    except (OSError, SyntaxError):
        return None
    thumbnail.thumbnail((_THUMBNAIL, _THUMBNAIL))
    return Picture(data_uri(thumbnail), f"an image of class {synset}")


def _listed(rows: list[tuple[str, str]]) -> dict[str, Any]:
    more = f"and {len(rows) - _LISTED:,} more, in {MANIFEST}" if len(rows) > _LISTED else ""
    return {"rows": rows[:_LISTED], "more": more}


def _print_image(found: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(found))
        return
    shown = found["source"].encode(errors="backslashreplace").decode()
    print(
        f"{found['split']} image {found['image_id']}: {shown}\n"
        f"label {found['label']}, {found['synset']}; {found['bytes']:,} bytes; record {found['record']} of {found['shard']}"
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m beam_jobs.inspect_dataset",
        description="A dataset at a glance, and whether it is whole.",
        allow_abbrev=False,
    )
    parser.add_argument("folder", metavar="DIR", help="the dataset, local or gs://")
    parser.add_argument("--full", action="store_true", help="read every byte: checksums, IDs, labels, fingerprint")
    parser.add_argument("--image", type=int, metavar="ID", help="print an image's class, record and raw file; write no page")
    parser.add_argument("--split", default="train", metavar="NAME", help="split of --image (default: %(default)s)")
    parser.add_argument("--output", default="dataset.html", metavar="FILE", help="file for the page (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    print_in_any_locale()
    args = parser.parse_args(argv)
    logging.getLogger().setLevel(logging.CRITICAL)
    if not args.debug:
        warnings.simplefilter("ignore")

    try:
        if args.image is not None:
            _print_image(find_image(args.folder, args.split, args.image), args.json)
            return 0
        with ProgressBars() as bars:
            on_progress = bars.of("inspect")
            found = inspect(args.folder, full=args.full, on_progress=on_progress)
            on_progress("drawing the page")
            files.write(args.output, to_html(found).encode())
    except UserError as error:
        if args.debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2
    if args.json:
        print(json.dumps({**asdict(found), "page": args.output}))
    else:
        manifest = load(args.folder)
        for name, split in manifest.splits.items():
            print(f"{name}: {split.records:,} images in {len(split.shards)} shards, {len(split.repaired)} repaired")
        print(f"classes: {manifest.num_classes}\nfingerprint: {manifest.fingerprint}\npage: {args.output}")
        for problem in found.problems:
            print(f"wrong: {problem}")
        if not found.problems:
            print(
                "whole: "
                + ("every byte is as it was written" if found.full else "sizes and a sample are right; --full reads all")
            )
    return 1 if found.problems else 0


if __name__ == "__main__":
    sys.exit(main())

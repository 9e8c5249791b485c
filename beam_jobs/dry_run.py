"""The dry run of a conversion: what it would do, without doing it."""

import itertools
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import Any

from beam_jobs import files, images, verify
from beam_jobs.account import seen_of
from beam_jobs.catalogue import SplitSummary, Unpacked
from beam_jobs.layouts.layout import RawImage
from beam_jobs.plan import Plan, plan_split
from beam_jobs.pooled import in_parallel, local_writers
from beam_jobs.raw import index
from beam_jobs.shards import make_record
from trainer.shared.errors import UserError, first_few, printable
from trainer.shared.records import Seen

_SAMPLE, _ARCHIVES = 256, 8
"""Number of images that are prepared to measure the time of one, and of archives that they are taken from."""
_SHOWN = 20


@dataclass(frozen=True)
class SplitDryRun:
    images: int
    bytes: int
    """Total size of the raw images."""
    shards: int
    repaired: tuple[dict[str, Any], ...]
    """Source of each image that would be repaired, and what would be done."""
    rejected: tuple[dict[str, Any], ...]
    """Source of each image that cannot be read, and why."""
    seen: Seen
    """All that is in the raw data, and what is passed over."""


@dataclass(frozen=True)
class DryRun:
    """The result of a dry run."""

    output: str
    name: str
    classes: int
    layouts: dict[str, str]
    """The layout of each split, and why it was recognised."""
    splits: dict[str, SplitDryRun]
    unpacked: int
    """Bytes that the conversion writes beside the output and deletes at its end. Not 0 if a layout must be unpacked."""
    seconds: float
    """Estimated duration of the conversion on this machine in one process."""
    problems: tuple[str, ...]
    """Reasons why the conversion would fail."""
    notes: tuple[str, ...]
    """What the user should know, although it stops nothing."""


def check_only_plan(plan: Plan, work: str) -> Plan:
    """Returns a plan that only indexes and checks images, with its reports in the folder `work`."""
    return replace(plan, work=work, check_first=True)


def summarise(plan: Plan, of_archives: Sequence[Any], unpacked: Mapping[str, SplitSummary]) -> DryRun:
    """Returns the result of a dry run from the reports of the plan's archives, whose images were checked.

    unpacked: the summary of each split that the conversion unpacks
    """
    problems, rejected = verify.faults(plan, list(of_archives))
    if rejected and not plan.check_first:
        problems = [*problems, f"{len(rejected)} of the images cannot be read: give --on-bad-image=skip to leave them out"]
    counts = {number: len(verify.labels_of(report)) for number, report in enumerate(of_archives)}
    splits = {}
    for split in plan.raw.splits:
        numbers = plan.raw.of_split(split)
        of_split = plan_split(plan, split, counts)
        splits[split] = SplitDryRun(
            images=of_split.num_images,
            bytes=sum(of_archives[number]["bytes"] for number in numbers),
            shards=len(of_split.shard_files),
            repaired=tuple(image for number in numbers for image in of_archives[number]["repaired"]),
            rejected=tuple(image for number in numbers for image in of_archives[number]["rejected"]),
            seen=seen_of(plan.raw.passed_over[split], (of_archives[number]["account"] for number in numbers)),
        )
    seconds = _seconds_an_image(plan) * sum(splits[split].images for split in _readable(plan))
    # Converting what was unpacked takes about as long as unpacking it.
    seconds += sum(one.seconds if split in _readable(plan) else 2 * one.seconds for split, one in unpacked.items())
    return DryRun(
        output=plan.output,
        name=plan.name,
        classes=len(plan.raw.synsets),
        layouts=dict(plan.raw.why),
        splits=splits,
        unpacked=sum(one.bytes for one in unpacked.values()),
        seconds=seconds,
        problems=tuple(problems),
        notes=plan.raw.notes,
    )


def to_dict(found: DryRun) -> dict[str, Any]:
    return asdict(found)


def to_text(found: DryRun) -> str:
    lines = [f"plan for {found.output}: dataset {found.name}, {found.classes} classes"]
    lines += [f"{split} is read as {layout}" for split, layout in found.layouts.items()]
    for name, split in found.splits.items():
        megabytes = split.bytes / 1e6
        lines.append(
            f"{name}: {split.images:,} images, {megabytes:,.1f} MB, {split.shards} shards, "
            f"{len(split.repaired)} to repair, {len(split.rejected)} that cannot be read"
        )
    if found.unpacked:
        lines.append(
            f"disk: {found.unpacked / 1e6:,.1f} MB beside the output while it runs, for unpacked images, as well as the output"
        )
    lines.append(f"time: about {_clock(found.seconds)} on this machine in one process")
    listed = [f"would repair {image['source']}: {image['done']}" for split in found.splits.values() for image in split.repaired]
    listed += [f"cannot read {image['source']}: {image['reason']}" for split in found.splits.values() for image in split.rejected]
    lines += listed[:_SHOWN]
    if len(listed) > _SHOWN:
        lines.append(f"and {len(listed) - _SHOWN} more; --json lists them all")
    lines += [f"passed over in {text}" for text in passed_over_lines({name: split.seen for name, split in found.splits.items()})]
    lines += [f"note: {note}" for note in found.notes]
    lines += [f"would fail: {problem}" for problem in found.problems[:_SHOWN]]
    if len(found.problems) > _SHOWN:
        lines.append(f"would fail: and {len(found.problems) - _SHOWN} more; --json lists them all")
    return "\n".join(map(printable, lines))


def passed_over_lines(seen: Mapping[str, Seen | None]) -> list[str]:
    """Returns a line for each reason for which something of a split was passed over."""
    return [
        f"{name}: {one.entries:,} {one.reason}: {first_few(one.names, ', ')}"
        for name, account in seen.items()
        for one in (account.passed_over if account else ())
    ]


def _clock(seconds: float) -> str:
    minutes, rest = divmod(max(round(seconds), 1), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _readable(plan: Plan) -> list[str]:
    """Returns the splits whose images a dry run can read again: it keeps no unpacked images."""
    return [split for split, reader in plan.raw.layouts.items() if not isinstance(reader, Unpacked) or reader.in_place]


def _seconds_an_image(plan: Plan) -> float:
    """Returns the seconds that reading and preparing an image takes, measured on a sample of each split.

    The sample is scattered as the images of a shard are, is not in the system's cache, and is read by as many threads.
    """
    seconds = []
    for split in _readable(plan):
        sample = _sample(plan, split)
        for image in sample:
            files.forget(files.join(plan.raw.folder, image.file), image.offset, image.size)
        begun = time.perf_counter()
        for _ in in_parallel(local_writers(1), _prepare, ((plan, split, image) for image in sample)):
            pass
        seconds += [(time.perf_counter() - begun) / len(sample)] if sample else []
    return max(seconds, default=0.0)


def _sample(plan: Plan, split: str) -> list[RawImage]:
    """Returns images from all over a split: one of each of some archives, then the next of each."""
    of_split = [plan.raw.archives[number] for number in plan.raw.of_split(split)]
    archives = of_split[:: -(-len(of_split) // _ARCHIVES)]
    listed = [index(plan.raw, archive).images for archive in archives]
    each = _SAMPLE // len(archives)
    scattered = [images[:: -(-len(images) // each)] for images in listed if images]
    return [image for images in itertools.zip_longest(*scattered) for image in images if image]


def _prepare(plan: Plan, split: str, image: RawImage) -> None:
    with suppress(images.UnreadableImageError, UserError, OSError):
        data = plan.raw.read(split, image, 0, image.size)
        make_record(split, 0, image.label, images.prepare(data, plan.images).encoded)

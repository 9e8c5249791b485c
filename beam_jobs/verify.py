"""Verifies that every indexed image was written, from reports that the workers leave.

A report is a small JSON file about an indexed archive or a written shard. Reports do not go through the runner, so they show
what the runner lost.
"""

import json
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from beam_jobs import files
from beam_jobs.account import seen_of
from beam_jobs.plan import Plan, SplitPlan, plan_split
from beam_jobs.raw import Index
from beam_jobs.shards import FINGERPRINTS, WrittenShard, contents_digest, file_crc32c
from trainer.shared.data import ALLOWING
from trainer.shared.errors import LISTED_IN_A_LINE, UserError, first_few, printable
from trainer.shared.records import Manifest, Seen, Shard, Split, reading_positions

_ADVICE = "; nothing was published, run the job again"

Listed = list[dict[str, Any]]
"""Repaired or rejected images, in the form of `trainer.shared.records.Split`."""


class LostRecordsError(Exception):
    """The runner did not write exactly the planned images. Nothing was published."""


class FaultsError(UserError):
    """The raw data has faults. All of it was read, and nothing was published."""


def report_archive(plan: Plan, number: int, index: Index, repaired: Listed) -> None:
    """Reports an archive's images. `repaired` lists the images that will be repaired, if the images were checked."""
    labels = [image.label for image in index.images]
    content = {
        "found": index.found,
        "labels": labels if len(set(labels)) > 1 else {"label": labels[0] if labels else 0, "count": len(labels)},
        "bytes": sum(image.size for image in index.images),
        "problems": index.problems,
        "rejected": index.rejected,
        "repaired": repaired,
        "account": index.account,
    }
    _report(plan, _archive_report(number), content)


def report_shard(plan: Plan, written: WrittenShard, resized: int, repaired: Listed, rejected: Listed) -> None:
    """Reports a written shard."""
    _report(plan, written.shard.file, {**asdict(written), "resized": resized, "repaired": repaired, "rejected": rejected})


def bytes_done(plan: Plan) -> tuple[int, int]:
    """Returns how many bytes of the raw images the reported archives have, and how many the reported shards, about."""
    names = {name.removesuffix(".json") for name in _report_names(plan)}
    listed = sum(archive.size for number, archive in enumerate(plan.raw.archives) if _archive_report(number) in names)
    written = 0
    for split, num_shards in plan.num_shards.items():
        size = sum(plan.raw.archives[number].size for number in plan.raw.of_split(split))
        written += sum(name.startswith(f"{plan.name}-{split}.tfrecord-") for name in names) * size // num_shards
    return listed, written


def reported_shards(plan: Plan) -> set[str]:
    """Returns the files of the shards that an earlier attempt reported as written."""
    return {name.removesuffix(".json") for name in _report_names(plan)}


def is_finished(plan: Plan, file: str, image_ids: Iterable[int], labels: Iterable[int]) -> bool:
    """Returns whether a shard of exactly these images is on disk with the checksum in its report."""
    report_file = files.join(plan.work, f"{file}.json")
    if not files.find(report_file):
        return False
    report = json.loads(files.read(report_file))
    path = files.join(plan.output, file)
    return (
        not report["rejected"]
        and report["contents"] == contents_digest(image_ids, labels)
        and files.find(path) is not None
        and report["shard"]["crc32c"] == file_crc32c(path)
    )


def verify_dataset(plan: Plan) -> Manifest:
    """Checks that the shards on disk are exactly the planned ones, and returns their manifest.

    Checks that each archive was indexed, and that each shard has its full length and holds the planned images in order, each with
    its ID and label. So the IDs of a split are 0..N-1, each once. Raises FaultsError with all faults if the input is at fault,
    and LostRecordsError if the runner is.
    """
    reports = _read_reports(plan)
    of_archives = archive_reports(plan, reports)
    refuse_faults(plan, of_archives, reports)
    labels = [labels_of(report) for report in of_archives]
    of_splits = {split: plan_split(plan, split, dict(enumerate(map(len, labels)))) for split in plan.raw.splits}
    splits = {
        split: _verify_split(plan, of_split, [labels[n] for n in of_split.first_ids], reports)
        for split, of_split in of_splits.items()
    }
    for split in plan.raw.splits:
        numbers = plan.raw.of_split(split)
        rejected = _printable_sources(image for number in numbers for image in of_archives[number]["rejected"])
        splits[split] = replace(
            splits[split],
            rejected=tuple(sorted(rejected, key=lambda image: image["source"])),
            seen=_account(plan, split, of_archives),
        )
    fingerprint = sum(reports[file]["fingerprint"] for of_split in of_splits.values() for file in of_split.shard_files)
    fingerprint_hex = f"{fingerprint % FINGERPRINTS:064x}"
    synsets = tuple(map(printable, plan.raw.synsets))
    return Manifest(plan.name, fingerprint_hex, synsets, splits, plan.tool_version, plan.options)


def _account(plan: Plan, split: str, of_archives: list[Any]) -> Seen:
    """Returns the account of a split. Raises LostRecordsError if an archive's does not add up."""
    for number in plan.raw.of_split(split):
        report = of_archives[number]
        account = report["account"]
        passed_over = account["passed_over"].values()
        entries = len(labels_of(report)) + len(report["rejected"]) + sum(one["entries"] for one in passed_over)
        size = report["bytes"] + account["rejected_bytes"] + sum(one["bytes"] for one in passed_over)
        if (entries, size) != (account["entries"], account["bytes"]):
            raise LostRecordsError(
                f"{plan.raw.archives[number].name} has {account['entries']} entries of {account['bytes']} bytes, and {entries} "
                f"of {size} bytes are accounted for{_ADVICE}"
            )
    return seen_of(plan.raw.passed_over[split], (of_archives[number]["account"] for number in plan.raw.of_split(split)))


def _printable_sources(listed: Iterable[Mapping[str, Any]]) -> Listed:
    return [{**image, "source": printable(image["source"])} for image in listed]


def archive_reports(plan: Plan, reports: Mapping[str, Any] | None = None) -> list[Any]:
    """Returns the reports of all archives, by number. Raises LostRecordsError if one is missing."""
    reports = _read_reports(plan) if reports is None else reports
    for number, archive in enumerate(plan.raw.archives):
        if _archive_report(number) not in reports:
            raise LostRecordsError(f"the runner lost {archive.name}{_ADVICE}")
    return [reports[_archive_report(number)] for number in range(len(plan.raw.archives))]


def labels_of(report: Any) -> list[int]:
    """Returns the labels of an archive's images in the order of their IDs, from its report."""
    labels = report["labels"]
    return labels if isinstance(labels, list) else [labels["label"]] * labels["count"]


def faults(plan: Plan, of_archives: list[Any]) -> tuple[list[str], Listed]:
    """Returns the faults of the raw data that indexing shows: problems, and images that cannot be read."""
    problems = [*plan.raw.problems, *(problem for report in of_archives for problem in report["problems"])]
    rejected = [image for report in of_archives for image in report["rejected"]]
    for split in plan.raw.splits:
        numbers = plan.raw.of_split(split)
        found = sum(of_archives[number]["found"] for number in numbers)
        if plan.expected and found != plan.expected[split]:
            problems.append(
                f"{split} has {found:,} images where {plan.expected_of} has {plan.expected[split]:,} of these "
                f"{len(plan.raw.synsets)} classes: get the missing images, or allow this with {ALLOWING}"
            )
        if not found and not problems:
            problems.append(f"no {split} image has one of the chosen classes, the first of which is {plan.raw.synsets[0]}")
    if not problems and plan.check_first:
        counts = np.bincount(
            np.array([label for number in plan.raw.of_split("train") for label in labels_of(of_archives[number])], int),
            minlength=len(plan.raw.synsets),
        )
        problems += [f"no training image of {plan.raw.synsets[label]} can be read" for label in np.flatnonzero(counts == 0)]
        if (numbers := plan.raw.of_split("validation")) and not sum(len(labels_of(of_archives[number])) for number in numbers):
            problems.append("no validation image can be read")
    return problems, rejected


def refuse_faults(plan: Plan, of_archives: list[Any], reports: Mapping[str, Any]) -> None:
    """Raises FaultsError if the raw data has faults. Writes them to a file if the error cannot name them all."""
    problems, rejected = faults(plan, of_archives)
    if plan.check_first:
        rejected = []  # they are left out
    rejected += [image for report in reports.values() if "shard" in report for image in report["rejected"]]
    if not problems and not rejected:
        return
    lines = sorted(printable(f"{image['source']} {image['reason']}") for image in rejected)
    parts = [first_few(problems)] if problems else []
    if rejected:
        parts.append(f"{len(lines)} of the images cannot be read: {first_few(lines)}")
    if rejected or len(problems) > LISTED_IN_A_LINE:
        files.write(plan.rejected, "".join(f"{line}\n" for line in (*map(printable, problems), *lines)).encode())
        parts.append(f"{plan.rejected} lists them all")
    raise FaultsError("; ".join(parts))


def _verify_split(plan: Plan, of_split: SplitPlan, labels_by_archive: list[list[int]], reports: Mapping[str, Any]) -> Split:
    labels = np.concatenate([np.array(labels, np.int64) for labels in labels_by_archive])
    order = np.argsort(reading_positions(of_split.num_images))
    cuts = np.flatnonzero(np.diff(of_split.shards_of(np.arange(len(order))))) + 1
    shards, repaired = [], []
    resized = 0
    for file, image_ids in zip(of_split.shard_files, np.split(order, cuts), strict=True):
        if file not in reports:
            raise LostRecordsError(f"the runner lost the shard {file}{_ADVICE}")
        report = reports[file]
        shard = Shard(**report["shard"])
        found = files.find(files.join(plan.output, file))
        if report["contents"] != contents_digest(image_ids, labels[image_ids]):
            raise LostRecordsError(
                f"{file} holds {shard.records} images, which are not the {len(image_ids)} planned ones{_ADVICE}"
            )
        if found is None or found.size != shard.bytes:
            raise LostRecordsError(f"{file} does not have the {shard.bytes} bytes that were written{_ADVICE}")
        shards.append(replace(shard, blocks=tuple(shard.blocks)))
        repaired += report["repaired"]
        resized += report["resized"]
    per_class = np.bincount(labels, minlength=len(plan.raw.synsets)).tolist()
    in_order = tuple(sorted(_printable_sources(repaired), key=lambda image: image["id"]))
    return Split(of_split.num_images, tuple(per_class), tuple(shards), in_order, resized=resized)


def _archive_report(number: int) -> str:
    return f"archive-{number:05d}"


def _report(plan: Plan, name: str, content: Mapping[str, Any]) -> None:
    files.write(files.join(plan.work, f"{name}.json"), json.dumps(content).encode())


def _read_reports(plan: Plan) -> dict[str, Any]:
    def read(name: str) -> Any:
        return json.loads(files.read(files.join(plan.work, name)))

    names = _report_names(plan)
    with ThreadPoolExecutor(16) as pool:
        return {name.removesuffix(".json"): report for name, report in zip(names, pool.map(read, names), strict=True)}


def _report_names(plan: Plan) -> list[str]:
    return [name for name in files.names(plan.work) if name.endswith(".json")]

"""The proof that what was indexed was written: the reports that the workers leave, and what follows from them.

A report is a small JSON file, of an archive that was indexed or of a shard that was written. Reports do not go through the
runner, so they show what it lost.
"""

import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from beam_jobs import files
from beam_jobs.plan import SPLITS, Plan, SplitPlan, plan_split, reading_places
from beam_jobs.shards import FINGERPRINTS, WrittenShard, contents_digest
from trainer.records import Manifest, Shard, Split, UserError

_SHOWN = 3
"""Problems that an error's one line spells out."""
_ADVICE = "; nothing was published, run the job again"


class LostRecordsError(Exception):
    """The runner did not write exactly what it was given to write; nothing was published."""


def report_archive(plan: Plan, number: int, *, num_images: int, problem: str) -> None:
    """Tells that an archive was indexed, or why it could not be."""
    _report(plan, _archive_report(number), {"num_images": num_images, "problem": problem})


def report_shard(plan: Plan, written: WrittenShard, repaired: list[dict[str, Any]], rejected: list[dict[str, Any]]) -> None:
    """Tells that a shard was written; `repaired` and `rejected` are as `trainer.records.Split` has them."""
    _report(plan, written.shard.file, {**asdict(written), "repaired": repaired, "rejected": rejected})


def count_reports(plan: Plan) -> int:
    """Returns how many archives are indexed and shards written."""
    return len(_report_names(plan))


def prove(plan: Plan, tool_version: str) -> Manifest:
    """Returns the manifest of what is on disk, having checked that it is exactly what the plan says.

    Each archive was indexed; each shard is there in its whole length and holds the images of the plan, each with its ID and
    label, in their order. So the IDs of a split are 0..N-1, each once. Raises UserError where the input is at fault, for
    all of it that is, and LostRecordsError where the runner is.
    """
    reports = _read_reports(plan)
    counts = _image_counts(plan, reports)
    of_splits = {split: plan_split(plan, split, counts) for split in SPLITS}
    for of_split in of_splits.values():
        for file in of_split.shard_files:
            if file not in reports:
                raise LostRecordsError(f"the runner lost the shard {file}{_ADVICE}")
    _refuse_rejected(plan, [image for report in reports.values() for image in report.get("rejected", ())])
    splits = {split: _prove_split(plan, split, of_split, counts, reports) for split, of_split in of_splits.items()}
    fingerprint = sum(reports[file]["fingerprint"] for of_split in of_splits.values() for file in of_split.shard_files)
    return Manifest(plan.name, f"{fingerprint % FINGERPRINTS:064x}", plan.raw.synsets, splits, tool_version)


def _image_counts(plan: Plan, reports: Mapping[str, Any]) -> dict[int, int]:
    for number, archive in enumerate(plan.raw.archives):
        if _archive_report(number) not in reports:
            raise LostRecordsError(f"the runner lost {archive.name}{_ADVICE}")
    of_archives = [reports[_archive_report(number)] for number in range(len(plan.raw.archives))]
    if problems := [report["problem"] for report in of_archives if report["problem"]]:
        raise UserError(_some(problems))
    return {number: report["num_images"] for number, report in enumerate(of_archives)}


def _refuse_rejected(plan: Plan, rejected: list[dict[str, Any]]) -> None:
    if rejected:
        lines = sorted(f"{image['source']} {image['reason']}" for image in rejected)
        with files.open_to_write(plan.rejected) as file:
            file.write("".join(f"{line}\n" for line in lines).encode())
        raise UserError(f"{len(lines)} of the images cannot be read: {_some(lines)}; {plan.rejected} lists them all")


def _prove_split(plan: Plan, split: str, of_split: SplitPlan, counts: Mapping[int, int], reports: Mapping[str, Any]) -> Split:
    labels = np.concatenate([plan.raw.archives[number].labels_of(counts[number]) for number in of_split.first_ids])
    order = np.argsort(reading_places(of_split.num_images))
    cuts = np.flatnonzero(np.diff(of_split.shards_of(np.arange(len(order))))) + 1
    shards, repaired = [], []
    for file, image_ids in zip(of_split.shard_files, np.split(order, cuts), strict=True):
        shard = Shard(**reports[file]["shard"])
        found = files.find(files.join(plan.output, file))
        if reports[file]["contents"] != contents_digest(image_ids, labels[image_ids]):
            raise LostRecordsError(
                f"{file} must hold {len(image_ids)} certain images, and holds {shard.records} that are not those{_ADVICE}"
            )
        if found is None or found.size_in_bytes != shard.bytes:
            raise LostRecordsError(f"{file} has not the {shard.bytes} bytes that were written{_ADVICE}")
        shards.append(replace(shard, blocks=tuple(shard.blocks)))
        repaired += reports[file]["repaired"]
    per_class = np.bincount(labels, minlength=len(plan.raw.synsets)).tolist()
    return Split(of_split.num_images, tuple(per_class), tuple(shards), tuple(sorted(repaired, key=lambda image: image["id"])))


def _archive_report(number: int) -> str:
    return f"archive-{number:05d}"


def _report(plan: Plan, name: str, content: Mapping[str, Any]) -> None:
    with files.open_to_write(files.join(plan.work, f"{name}.json")) as file:
        file.write(json.dumps(content).encode())


def _read_reports(plan: Plan) -> dict[str, Any]:
    def read(name: str) -> Any:
        with files.open_to_read(files.join(plan.work, name)) as file:
            return json.loads(file.read())

    names = _report_names(plan)
    with ThreadPoolExecutor(16) as pool:
        return {name.removesuffix(".json"): report for name, report in zip(names, pool.map(read, names), strict=True)}


def _report_names(plan: Plan) -> list[str]:
    return [name for name in files.names(plan.work) if name.endswith(".json")]


def _some(problems: list[str]) -> str:
    more = len(problems) - _SHOWN
    return "; ".join(problems[:_SHOWN]) + (f"; and {more} more" if more > 0 else "")

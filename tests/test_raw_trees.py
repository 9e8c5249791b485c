"""Random raw data is converted as a naive reader reads it, with all that was seen accounted for, or is refused in one line."""

import gzip
import shutil
from collections import Counter
from functools import partial
from pathlib import Path
from random import Random

import pytest
from support.raw_data import picture
from support.raw_trees import NotWholeError, Truth, read_naively, write_tree

from beam_jobs import unpack
from beam_jobs.account import seen_of
from beam_jobs.job import build
from beam_jobs.layouts.archives import TRAIN_ARCHIVE, VALIDATION_ARCHIVE
from beam_jobs.plan import Plan, make_plan, plan_split
from beam_jobs.raw import SPLITS, Recognised, index
from trainer.shared.blocks import framed_records
from trainer.shared.errors import UserError, first_few
from trainer.shared.records import Seen, decode_example


def naively(folder: Path) -> Truth | None:
    try:
        return read_naively(folder)
    except NotWholeError:
        return None


def check_account(seen: Seen, truth: Truth, split: str, rejected: int) -> None:
    passed_over = sum(one.entries for one in seen.passed_over)
    assert seen.entries == truth.seen[split] == len(getattr(truth, split)) + rejected + passed_over
    assert passed_over == truth.junk[split]
    assert sum(len(one.names) for one in seen.passed_over) == passed_over


def check_plan(plan: Plan, truth: Truth) -> None:
    """Compares IDs, labels and bytes of the planned images with the truth, and their account."""
    for split in SPLITS:
        numbers = plan.raw.of_split(split)
        found = {number: index(plan.raw, plan.raw.archives[number]) for number in numbers}
        assert [problem for one in found.values() for problem in one.problems] == []
        of_split = plan_split(plan, split, {number: len(one.images) for number, one in found.items()})
        by_id = {
            image_id: (image.label, plan.raw.read(split, image, 0, image.size))
            for number in numbers
            for image_id, image in enumerate(found[number].images, start=of_split.first_ids[number])
        }
        assert [by_id[image_id] for image_id in range(of_split.num_images)] == getattr(truth, split)
        rejected = sum(len(one.rejected) for one in found.values())
        assert rejected == truth.links[split]
        check_account(seen_of(plan.raw.passed_over[split], (one.account for one in found.values())), truth, split, rejected)


def refusal(folder: Path, **options) -> tuple[Plan | None, str]:
    """The plan of a raw folder, and the line in which a conversion would refuse it; "" if it would not."""
    try:
        plan = make_plan(str(folder), str(folder / "output"), **options)
        problems = [*plan.raw.problems, *(fault for archive in plan.raw.archives for fault in index(plan.raw, archive).problems)]
    except UserError as error:
        return None, str(error)
    return plan, str(UserError(first_few(problems))) if problems else ""


def check_tree(folder: Path, seed: int) -> str:
    """Writes a random tree, and returns the fault that made a conversion of it refuse; "" if it was taken."""
    fault = write_tree(folder, Random(seed), lambda number: b"image %d" % number)
    truth = naively(folder)
    plan, line = refusal(folder)
    if truth is None or line:
        assert fault, f"seed {seed}: whole data was refused: {line or 'by the naive reader'}"
        assert line, f"seed {seed}: {fault} was not refused"
        assert truth is None, f"seed {seed}: the naive reader reads it, and it was refused: {line}"
        assert "\n" not in line
        assert len(line) < 2000
        return fault
    check_plan(plan, truth)
    return ""


@pytest.mark.parametrize("count", [200, pytest.param(10_000, marks=pytest.mark.slow)])
def test_random_raw_data_is_taken_as_a_naive_reader_takes_it_or_refused(count, tmp_path):
    refused: Counter[str] = Counter()
    for seed in range(count):
        refused[check_tree(tmp_path / "raw", seed)] += 1
        shutil.rmtree(tmp_path / "raw")
    assert refused[""] > count // 2
    assert len(refused) > 12


def compressed(folder: Path) -> bool:
    """Compresses the official archives of a raw folder. Returns whether there are any."""
    there = [folder / name for name in (TRAIN_ARCHIVE, VALIDATION_ARCHIVE) if (folder / name).exists()]
    for path in there:
        (folder / f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes(), 1))
        path.unlink()
    return bool(there)


def unpacked_to(to: Path, folder: Path, recognised: Recognised, synsets) -> str:
    work = unpack.make_work(str(folder), recognised, str(to), synsets)
    for number in range(len(work.sources)):
        unpack.unpack_source(work, number)
    unpack.finish(work)
    return work.unpacked


@pytest.mark.parametrize("count", [60, pytest.param(2_000, marks=pytest.mark.slow)])
def test_compressed_archives_are_taken_or_refused_as_they_are_without(count, tmp_path):
    taken = 0
    for seed in range(count):
        folder = tmp_path / str(seed)
        fault = write_tree(folder, Random(seed), lambda number: b"image %d" % number)
        truth = naively(folder)
        if compressed(folder):
            plan, line = refusal(folder, unpack=partial(unpacked_to, tmp_path / f"{seed}-unpacked", folder))
            assert (truth is None) == bool(line), f"seed {seed}: {fault}: {line}"
            if truth is not None:
                check_plan(plan, truth)
                taken += 1
        shutil.rmtree(folder)
    assert taken > count // 5


@pytest.mark.parametrize("seed", range(5))
def test_whole_conversions_hold_what_the_naive_reader_reads(seed, tmp_path):
    bad = {3, 9001}
    fault = write_tree(tmp_path / "raw", Random(1000 + seed), lambda number: b"bad" if number in bad else picture(number))
    truth = naively(tmp_path / "raw")
    if truth is None:
        assert fault
        with pytest.raises(UserError):
            build(str(tmp_path / "raw"), str(tmp_path / "output"), on_bad_image="skip")
        return
    manifest = build(str(tmp_path / "raw"), str(tmp_path / "output"), on_bad_image="skip")
    for split in SPLITS:
        shards = (tmp_path / "output" / shard.file for shard in manifest.splits[split].shards)
        records = [decode_example(record) for shard in shards for _, record in framed_records(shard.read_bytes())]
        by_id = {image_id: (label, encoded) for encoded, label, image_id in records}
        kept = [one for one in getattr(truth, split) if one[1] != b"bad"]
        assert [by_id[image_id] for image_id in range(len(records))] == kept
        found = manifest.splits[split]
        assert len(found.rejected) == truth.links[split] + len(getattr(truth, split)) - len(kept)
        assert found.seen.entries == truth.seen[split] == found.records + len(found.rejected) + truth.junk[split]
        assert sum(one.entries for one in found.seen.passed_over) == truth.junk[split]

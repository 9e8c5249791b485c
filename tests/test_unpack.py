"""Layouts that are read from beginning to end first: interrupted, given again, in processes, in a bucket."""

import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from support.layouts import TRAINING, VALIDATING, write_all, zipped
from support.raw_data import LABELS, SYNSETS, picture, write_raw

from beam_jobs import unpack
from beam_jobs.build_tfrecords import main
from beam_jobs.job import build, plan_only
from beam_jobs.layouts.hugging_face_parquet import HuggingFaceParquet
from beam_jobs.pooled import Writers
from beam_jobs.raw import NOT_CHOSEN, recognise
from trainer.shared.errors import UserError

ROOT = Path(__file__).parents[1]


def test_a_dry_run_checks_the_images_of_a_stream(tmp_path):
    images = {
        "n01000001_1_n01000001.JPEG": picture(1),
        "n01000001_2_n01000001.JPEG": picture(2, kind="png"),
        "n01000001_3_n01000001.JPEG": b"not an image",
    }
    write_all({tmp_path / "raw" / "train_images_0.tar.gz": zipped(images)})
    planned = plan_only(str(tmp_path / "raw"), str(tmp_path / "output"), validation=False)
    split = planned.splits["train"]
    assert split.images == 2
    within = "train_images_0.tar.gz/n01000001_"
    assert split.repaired == ({"source": f"{within}2.JPEG", "done": "PNG RGB to JPEG RGB"},)
    assert split.rejected == ({"source": f"{within}3.JPEG", "reason": "is not an image"},)
    assert planned.unpacked == sum(map(len, images.values()))
    manifest = build(str(tmp_path / "raw"), str(tmp_path / "output"), validation=False, on_bad_image="skip")
    assert manifest.splits["train"].rejected == split.rejected


def test_progress_of_unpacking_counts_bytes_of_files_that_are_not_finished_too(tmp_path):
    raw, unpacked = tmp_path / "raw", tmp_path / "unpacked"
    members = [{f"n01000001_{part}{number}_n01000001.JPEG": picture(number) for number in range(9)} for part in range(2)]
    write_all({raw / f"train_images_{part}.tar.gz": zipped(members[part]) for part in range(2)})
    sizes = [(raw / f"train_images_{part}.tar.gz").stat().st_size for part in range(2)]
    work = unpack.make_work(str(raw), recognise(str(raw), validation=False), str(unpacked), None)
    assert unpack.bytes_done(work) == 0
    unpack.unpack_source(work, 1)
    assert unpack.bytes_done(work) == sizes[1]
    begun = unpacked / f"{work.sources[0].key}.images.{'0' * 32}.tmp"
    begun.write_bytes(bytes(100))
    assert unpack.bytes_done(work) == sizes[1] + 100
    begun.write_bytes(bytes(10**6))
    assert unpack.bytes_done(work) == sum(sizes)


def test_a_killed_job_unpacks_only_the_files_that_are_left(as_layout, fingerprint, tmp_path, monkeypatch):
    raw, output = as_layout("hugging face parquet"), tmp_path / "output"
    unpacked: list[str] = []
    images = HuggingFaceParquet.images

    def dies_in(last):
        def dying(self, folder, name, labels):
            unpacked.append(name)
            for number, image in enumerate(images(self, folder, name, labels)):
                if name == last and number == 20:
                    raise KeyboardInterrupt
                yield image

        return dying

    monkeypatch.setattr("beam_jobs.job.local_writers", lambda processes: Writers())
    stream = "beam_jobs.layouts.hugging_face_parquet.HuggingFaceParquet.images"
    monkeypatch.setattr(stream, dies_in("data/train-00002-of-00003-0a1b2c3d4e5f.parquet"))
    with pytest.raises(KeyboardInterrupt):
        build(str(raw), str(output))
    first = unpacked[:]
    assert first
    assert not (output / "manifest.json").exists()
    unpacked.clear()
    monkeypatch.setattr(stream, dies_in("no file"))
    assert build(str(raw), str(output)).fingerprint == fingerprint
    assert sorted({*first, *unpacked}) == sorted(path.relative_to(raw).as_posix() for path in raw.glob("data/[tv][ra]*.parquet"))
    assert set(first) & set(unpacked) == {first[-1]}


def test_the_finished_dataset_is_not_unpacked_again(as_layout, tmp_path, monkeypatch):
    raw, output = as_layout("hugging face archives"), tmp_path / "output"
    build(str(raw), str(output))
    monkeypatch.setattr(unpack, "unpack_source", lambda work, number: pytest.fail("it was read again"))
    build(str(raw), str(output))
    copy = Path(shutil.copytree(raw, tmp_path / "raw"))
    write_all({copy / "data" / "train_images_1.tar.gz": zipped({"n01000001_1_n01000001.JPEG": picture(1)})})
    with pytest.raises(UserError, match="has a finished dataset"):
        build(str(copy), str(output))


def test_a_subset_is_unpacked_alone(as_layout, tmp_path, monkeypatch):
    (tmp_path / "subset.txt").write_text(f"{SYNSETS[0]}\n{SYNSETS[2]}\n")
    wholes = {}
    for name, options in {"some": {"subset": str(tmp_path / "subset.txt")}, "all": {}}.items():
        planned = plan_only(str(as_layout("hugging face parquet")), str(tmp_path / "output"), **options)
        wholes[name] = planned.unpacked
    assert wholes["some"] < 0.8 * wholes["all"]
    raw = write_raw(tmp_path / "raw", TRAINING, {name: one for name, (_, one) in VALIDATING.items()}, LABELS)
    found = [
        build(str(folder), str(tmp_path / f"of-{number}"), subset=str(tmp_path / "subset.txt"))
        for number, folder in enumerate((raw, as_layout("hugging face parquet"), as_layout("tfds")))
    ]
    assert len({manifest.fingerprint for manifest in found}) == 1
    for manifest in found:
        (train,) = [one for one in manifest.splits["train"].seen.passed_over if one.reason == NOT_CHOSEN]
        (validation,) = manifest.splits["validation"].seen.passed_over
        assert (train.entries, validation.entries) == (1, LABELS.count(SYNSETS[1]))


@pytest.mark.parametrize("processes", [1, 2])
def test_processes_unpack_alike(processes, as_layout, fingerprint, tmp_path):
    raw = as_layout("hugging face archives")
    assert build(str(raw), str(tmp_path / "output"), processes=processes).fingerprint == fingerprint


def counted(monkeypatch) -> list[str]:
    """Gives a list that gets the name of each source file that is read."""
    read: list[str] = []
    _images_file = unpack._images_file

    def counting(work, source):
        read.append(source.name)
        return _images_file(work, source)

    monkeypatch.setattr(unpack, "_images_file", counting)
    return read


KILLED = """
import os, signal
from beam_jobs import {module}
from beam_jobs.job import build
calls = 0
function = {module}.{name}
def dying(*arguments):
    global calls
    calls += 1
    if calls == {at}:
        os.kill(os.getpid(), signal.SIGKILL)
    return function(*arguments)
{module}.{name} = dying
build({raw!r}, {output!r})
"""


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("module", "name", "at", "left"),
    [("catalogue", "write_source", 3, None), ("catalogue", "write_summary", 1, 0), ("convert", "write_references", 1, 0)],
    ids=["in the third source file", "before the summary", "in the first shard"],
)
def test_after_a_kill_finished_source_files_are_not_read_again(
    module, name, at, left, as_layout, fingerprint, tmp_path, monkeypatch
):
    raw, output = as_layout("hugging face parquet"), tmp_path / "output"
    code = KILLED.format(module=module, name=name, at=at, raw=str(raw), output=str(output))
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == -signal.SIGKILL
    finished = len(list((output / ".unpacked").glob("*-*.index")))
    read = counted(monkeypatch)
    assert build(str(raw), str(output)).fingerprint == fingerprint
    assert len(read) == 4 - finished
    assert left is None or len(read) == left
    assert not (output / ".unpacked").exists()


@pytest.mark.thorough
@pytest.mark.parametrize("layout", ["hugging face parquet", "hugging face archives", "tfds", "kaggle"])
def test_layouts_in_a_bucket(layout, as_layout, fingerprint, bucket):
    raw = as_layout(layout)
    for path in raw.rglob("*"):
        if path.is_file():
            bucket.blob(f"raw/{path.relative_to(raw).as_posix()}").upload_from_filename(str(path))
    within = "raw/ILSVRC/Data" if layout == "kaggle" else "raw"
    assert build(f"gs://bucket/{within}", "gs://bucket/out/1.0.0").fingerprint == fingerprint
    assert not list(bucket.list_blobs(prefix="out/1.0.0/.unpacked/"))


def test_a_template_of_a_layout_that_must_be_unpacked_is_refused(as_layout, tmp_path, capsys):
    template = ["--runner=DataflowRunner", f"--template_location={tmp_path / 'template.json'}"]
    arguments = ["--raw", str(as_layout("hugging face parquet")), "--output", str(tmp_path / "output")]
    assert main([*arguments, *template]) == 2
    assert "must be unpacked first, which no template does: run the job itself" in capsys.readouterr().err

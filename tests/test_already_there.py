"""A conversion to a folder that has a finished dataset: of the same raw data, however they came there, or of others."""

import os
import re
import shutil
import tarfile
from pathlib import Path

import pytest
from support.layouts import write_all, zipped
from support.raw_data import LABELS, OF_VALIDATION, SYNSETS, TRAIN, VALIDATION, picture, raw_as_usual, train_images

from beam_jobs import convert, images, job, origin, plan
from beam_jobs.build_tfrecords import main
from beam_jobs.publish import CONVERSION


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A raw folder of archives, one of folders, and a finished dataset of each."""
    folder = tmp_path_factory.mktemp("already")
    archives = raw_as_usual(folder / "archives", train=train_images(4))
    extracted = folder / "extracted"
    extract(archives, extracted)
    for raw in (archives, extracted):
        assert main(["--raw", str(raw), "--output", str(folder / f"of-{raw.name}"), "--num-shards", "2"]) == 0
    return folder


def extract(archives: Path, folder: Path) -> None:
    for synset, content in train_images(4).items():
        (folder / "train" / synset).mkdir(parents=True)
        for name, data in content.items():
            (folder / "train" / synset / name).write_bytes(data)
    with tarfile.open(archives / VALIDATION) as tar:
        tar.extractall(folder / "val", filter="data")
    shutil.copy(archives / OF_VALIDATION, folder)


@pytest.fixture(params=["archives", "extracted"])
def raw(world, request, tmp_path) -> Path:
    """A copy of the raw data on another disk, whose files have other times."""
    folder = tmp_path / "other" / "disk"
    shutil.copytree(world / request.param, folder, copy_function=shutil.copyfile)
    for path in folder.rglob("*"):
        os.utime(path, (1, 1))
    return folder


def again(world: Path, raw: Path, capsys, *options: str) -> tuple[int, str]:
    capsys.readouterr()
    kind = "extracted" if (raw / "train").exists() else "archives"
    code = main(["--raw", str(raw), "--output", str(world / f"of-{kind}"), "--num-shards", "2", *options])
    return code, next(line for line in capsys.readouterr().err.splitlines() if "already there" in line or "error:" in line)


def test_raw_data_copied_or_touched_or_extracted_again_are_the_same(world, raw, capsys):
    code, said = again(world, raw, capsys)
    assert code == 0
    assert said.endswith("finished before; its raw files have other times since, but the same names, sizes and bytes")
    os.utime(next(raw.rglob("*_2.JPEG"), raw / TRAIN), (2, 2))
    assert again(world, raw, capsys) == (0, said)


def test_of_much_raw_data_pieces_are_compared_and_the_line_says_so(world, raw, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(origin, "PIECES", 7)
    monkeypatch.setattr(origin, "PIECE_BYTES", 16)
    output = tmp_path / "output"
    command = ["--raw", str(raw), "--output", str(output)]
    assert main(command) == 0
    for path in raw.rglob("*"):
        os.utime(path, (2, 2))
    capsys.readouterr()
    assert main(command) == 0
    assert "the same names, sizes and bytes in 7 pieces of 16 bytes" in capsys.readouterr().err


def test_a_slow_disk_is_named_before_the_images_are_read(world, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(origin, "PIECES", 7)
    monkeypatch.setattr(origin, "PIECE_BYTES", 16)
    monkeypatch.setattr(job, "_SLOW_DISK", float("inf"))
    assert main(["--raw", str(world / "archives"), "--output", str(tmp_path / "output")]) == 0
    assert re.search(r"note: \S+ answers about \d+ reads a second, .* to an SSD first\n", capsys.readouterr().err)


def test_an_interrupted_conversion_that_begins_anew_says_so(world, tmp_path, capsys, monkeypatch):
    raw, output = tmp_path / "raw", tmp_path / "output"
    shutil.copytree(world / "archives", raw)
    command = ["--raw", str(raw), "--output", str(output), "--num-shards", "2"]
    with monkeypatch.context() as patched:
        patched.setattr(convert, "publish", {}.__getitem__)
        with pytest.raises(TypeError):
            main(command)
    os.utime(raw / TRAIN, (1, 1))
    assert main(command) == 0
    said = f"note: the raw files, options or versions changed since {output} was interrupted: its 4 shards are written again"
    assert said in capsys.readouterr().err


def test_labels_in_another_file_of_the_same_content_are_the_same(world, capsys, tmp_path):
    raw, labels = tmp_path / "raw", tmp_path / "labels.txt"
    shutil.copytree(world / "archives", raw)
    (raw / OF_VALIDATION).rename(labels)
    assert again(world, raw, capsys, "--validation-labels", str(labels))[0] == 0
    labels.write_text("".join(f"{label}\n" for label in reversed(LABELS)))
    code, said = again(world, raw, capsys, "--validation-labels", str(labels))
    assert (code, "of other raw data (the same names and sizes, but other bytes)" in said) == (2, True)


@pytest.mark.parametrize(
    ("module", "name", "says"),
    [
        (images, "CODECS", "; it was made with sogclr {0}, " + images.CODECS + ", this is sogclr {0}, newer"),
        (plan, "_tool_version", "; it was made with sogclr {0}, " + images.CODECS + ", this is sogclr newer, " + images.CODECS),
    ],
)
def test_a_newer_version_of_this_tool_or_of_pillow_leaves_the_dataset_what_it_is(module, name, says, world, capsys, monkeypatch):
    version = plan._tool_version()
    monkeypatch.setattr(module, name, "newer" if name == "CODECS" else lambda: "newer")
    code, said = again(world, world / "archives", capsys)
    assert code == 0
    assert said.endswith(f"finished before{says.format(version)}")


def other_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda raw: other_byte(next(raw.rglob("*_2.JPEG"), raw / TRAIN)), "the same names and sizes, but other bytes"),
        (lambda raw: (raw / OF_VALIDATION).write_text("".join(f"{label}\n" for label in reversed(LABELS))), "but other bytes"),
        (lambda raw: (next(raw.rglob("*_2.JPEG"), raw / TRAIN)).open("ab").write(bytes(512)), "other names or sizes"),
    ],
)
def test_other_raw_data_are_an_error_that_says_how_they_differ(change, says, world, raw, capsys):
    change(raw)
    code, said = again(world, raw, capsys)
    assert code == 2
    assert "has a finished dataset, fingerprint" in said
    assert "of other raw data (" in said
    assert says in said


def test_other_options_are_an_error_that_names_the_first(world, raw, capsys):
    code, said = again(world, raw, capsys, "--max-side", "16", "--images-per-class", "3")
    assert (code, "of other options (images_per_class was None, now 3)" in said) == (2, True)
    code, said = again(world, raw, capsys, "--num-shards", "3")
    assert (code, "of other options (num_shards was " in said) == (2, True)


@pytest.mark.parametrize("content", [None, "0123456789abcdef", '{"raw": 1}'])
def test_a_dataset_that_does_not_say_what_it_was_made_of_is_an_error_that_says_so(content, world, capsys, tmp_path):
    output = tmp_path / "output"
    shutil.copytree(world / "of-archives", output)
    (output / CONVERSION).unlink()
    if content:
        (output / CONVERSION).write_text(content)
    assert main(["--raw", str(world / "archives"), "--output", str(output), "--num-shards", "2"]) == 2
    assert f"and no usable {CONVERSION} that says of what" in capsys.readouterr().err


def test_raw_data_that_must_be_unpacked_are_known_again_without_unpacking(tmp_path, capsys):
    raw, output = tmp_path / "raw", tmp_path / "output"
    members = {f"{synset}_{number}_{synset}.JPEG": picture(number) for synset in SYNSETS for number in range(3)}
    write_all({raw / "train_images_0.tar.gz": zipped(members)})
    command = ["--raw", str(raw), "--output", str(output), "--no-validation"]
    assert main(command) == 0
    os.utime(raw / "train_images_0.tar.gz", (1, 1))
    capsys.readouterr()
    assert main(command) == 0
    said = capsys.readouterr().err
    assert "other times since, but the same names, sizes and bytes" in said
    assert "unpacking" not in said
    other_byte(raw / "train_images_0.tar.gz")
    assert main(command) == 2
    assert "of other raw data (the same names and sizes, but other bytes)" in capsys.readouterr().err

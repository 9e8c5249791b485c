"""The labels of validation images, and names: joined by what is sure, in any encoding, in any form of Unicode."""

import json
import os
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
from support.raw_data import LABELS, SYNSETS, picture, raw_as_usual, read_records, train_images, validation_images, write_raw

from beam_jobs import inspect_dataset
from beam_jobs.job import build, plan_only
from beam_jobs.layouts.labels import parse_labels
from trainer.shared.errors import UserError
from trainer.shared.records import read_manifest

UNPADDED = [f"val_{number}.JPEG" for number in range(12)]
PROJECT = Path(__file__).parents[1]
COMPOSED, DECOMPOSED = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
LATIN_1 = os.fsdecode("café".encode("latin-1"))


def flat(folder: Path, lines: str | bytes) -> Path:
    """Flat validation images with names whose order is not that of their numbers; the label of val_N is that of LABELS[N]."""
    for synset, images in train_images(3).items():
        (folder / "train" / synset).mkdir(parents=True)
        for name, content in images.items():
            (folder / "train" / synset / name).write_bytes(content)
    (folder / "val").mkdir()
    for number, name in enumerate(UNPADDED):
        (folder / "val" / name).write_bytes(picture(number))
    (folder / "validation_labels.txt").write_bytes(lines if isinstance(lines, bytes) else lines.encode())
    return folder


PAIRS = {
    "tab": [f"{name}\t{synset}" for name, synset in zip(UNPADDED, LABELS, strict=False)],
    "comma": [f"{name},{synset}" for name, synset in zip(UNPADDED, LABELS, strict=False)],
    "last space": [f"{name} {synset}" for name, synset in zip(UNPADDED, LABELS, strict=False)],
    "boxes as in Tiny-ImageNet": [f"{name}\t{synset}\t0\t32\t44\t62" for name, synset in zip(UNPADDED, LABELS, strict=False)],
    "as Kaggle": ["ImageId,PredictionString"]
    + [f"{name[:-5]},{synset} 85 1 499 272" for name, synset in zip(UNPADDED, LABELS, strict=False)],
    "paths, in any order": [f"val/{name} {synset}" for name, synset in reversed(list(zip(UNPADDED, LABELS, strict=False)))],
}


def labels_by_name(pairs: list[str]) -> list[str]:
    labels = parse_labels(pairs, set(SYNSETS))
    by_name = dict(zip(labels.names, labels.synsets, strict=True))
    return [by_name.get(name) or by_name[name.removesuffix(".JPEG")] for name in UNPADDED]


@pytest.mark.parametrize("pairs", PAIRS.values(), ids=PAIRS)
def test_lines_with_names_are_taken(pairs):
    assert labels_by_name(pairs) == LABELS[:12]


@pytest.mark.parametrize("pairs", [PAIRS["tab"], PAIRS["as Kaggle"]], ids=["tab", "as Kaggle"])
def test_each_image_gets_the_label_of_its_name(pairs, tmp_path):
    raw = flat(tmp_path / "raw", "\n".join(pairs))
    build(str(raw), str(tmp_path / "output"))
    found = {encoded: label for _, label, encoded in read_records(tmp_path / "output", "validation")}
    assert found == {picture(number): SYNSETS.index(LABELS[number]) for number in range(12)}


def test_labels_without_names_are_refused_where_two_orders_are_possible(tmp_path):
    raw = flat(tmp_path / "raw", "\n".join(LABELS[:12]))
    for action in (build, plan_only):
        try:
            problems = action(str(raw), str(tmp_path / "output")).problems
        except UserError as error:
            problems = (str(error),)
        (problem,) = problems
        assert "val_10.JPEG, which comes before val_2.JPEG by name and after it by number" in problem
        assert "give validation_labels.txt the lines NAME SYNSET" in problem


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        (PAIRS["tab"][:-1], "has no line for val_11.JPEG of val"),
        ([*PAIRS["tab"], f"val_99.JPEG\t{SYNSETS[0]}"], "has val_99.JPEG, of which val has no image"),
        ([*PAIRS["tab"], PAIRS["tab"][3]], "has val_3.JPEG twice"),
        ([*PAIRS["tab"][:-1], "val_11.JPEG\tn09999999"], "line 12: n09999999 is not a synset"),
    ],
)
def test_pairs_that_do_not_fit_the_images_are_refused(lines, says, tmp_path):
    with pytest.raises(UserError, match=says):
        build(str(flat(tmp_path / "raw", "\n".join(lines))), str(tmp_path / "output"))


@pytest.mark.parametrize(
    "encode",
    [
        lambda text: text.encode("utf-8-sig"),
        lambda text: text.encode("utf-16"),
        lambda text: b"\xfe\xff" + text.encode("utf-16-be"),
        lambda text: text.replace("\n", "\r\n").encode(),
        lambda text: text.replace("\n", "\r").encode(),
        lambda text: f"\n{text}\n\n  \n".encode(),
    ],
    ids=["BOM", "UTF-16", "UTF-16 BE", "CRLF", "CR", "empty lines"],
)
def test_labels_are_read_as_editors_write_them(encode, tmp_path):
    raw = raw_as_usual(tmp_path / "raw", train=train_images(3))
    (raw / "validation_labels.txt").write_bytes(encode("\n".join(LABELS)))
    planned = plan_only(str(raw), str(tmp_path / "output"))
    assert planned.problems == ()
    assert planned.splits["validation"].images == 20


# ---- Unicode


def test_composed_and_decomposed_names_are_the_same_and_that_is_said(tmp_path, capsys):
    train = dict(zip((DECOMPOSED, "n2", "n3"), train_images(3).values(), strict=True))
    raw = write_raw(tmp_path / "archives", train, validation_images(2), [COMPOSED, "n2"])
    (tmp_path / "subset.txt").write_text(f"{COMPOSED}\nn3\n")
    assert build(str(raw), str(tmp_path / "output")).synsets == (COMPOSED, "n2", "n3")
    folder = tmp_path / "folders"
    for synset, images in train.items():
        (folder / "train" / synset).mkdir(parents=True)
        for name, content in images.items():
            (folder / "train" / synset / name).write_bytes(content)
    for name, synset in zip(validation_images(2), (COMPOSED, "n2"), strict=True):
        (folder / "val" / synset).mkdir(parents=True)
        (folder / "val" / synset / name).write_bytes(validation_images(2)[name])
    capsys.readouterr()
    of_folders = build(str(folder), str(tmp_path / "of folders"))
    assert of_folders.fingerprint == read_manifest(str(tmp_path / "output")).fingerprint
    assert "3 names are decomposed (NFD)" in capsys.readouterr().err
    (folder / "train" / COMPOSED).mkdir()
    (folder / "train" / COMPOSED / "more.JPEG").write_bytes(picture(1))
    with pytest.raises(UserError, match=rf"holds {COMPOSED} twice, composed \(NFC\) and decomposed \(NFD\)"):
        build(str(folder), str(tmp_path / "twice"))


def test_the_order_of_images_does_not_depend_on_the_form_of_their_names(tmp_path):
    fingerprints = set()
    for form in ("NFC", "NFD"):
        train = {
            synset: {unicodedata.normalize(form, name): images[f"{synset}_{number}.JPEG"] for number, name in enumerate(names)}
            for (synset, images), names in zip(train_images(3).items(), [("éa", "fa", "ez")] * 3, strict=True)
        }
        raw = raw_as_usual(tmp_path / form, train=train)
        fingerprints.add(build(str(raw), str(tmp_path / f"output {form}")).fingerprint)
    assert len(fingerprints) == 1


def latin_1(folder: Path) -> Path:
    """A class and images whose names are bytes of Latin-1."""
    for synset, images in zip((LATIN_1, "n2"), train_images(3).values(), strict=False):
        (folder / "train" / synset).mkdir(parents=True)
        (folder / "val" / synset).mkdir(parents=True)
        for number, content in enumerate(images.values()):
            (folder / "train" / synset / f"{LATIN_1}{number}.JPEG").write_bytes(content)
        (folder / "val" / synset / f"{LATIN_1}-{synset}.JPEG").write_bytes(picture(1))
    (folder / "train" / LATIN_1 / f"._{LATIN_1}").write_bytes(b"x")
    (folder / "train" / "n2" / f"bad{LATIN_1}.JPEG").write_bytes(b"x")
    return folder


def test_names_that_are_not_utf_8_are_converted_and_shown_escaped(tmp_path):
    raw = latin_1(tmp_path / "raw")
    manifest = build(str(raw), str(tmp_path / "output"), on_bad_image="skip")
    assert manifest.synsets == ("caf\\xe9", "n2")
    train = manifest.splits["train"]
    assert train.records_per_class == (3, 3)
    assert [one["source"] for one in train.rejected] == ["train/n2/badcaf\\xe9.JPEG"]
    assert train.seen.passed_over[0].names == ("train/caf\\xe9/._caf\\xe9",)
    assert read_manifest(str(tmp_path / "output")) == manifest
    assert "caf\\xe9" in inspect_dataset.page(str(tmp_path / "output"), full=True)
    with pytest.raises(UserError, match=r"badcaf\\xe9.JPEG is not an image"):
        build(str(raw), str(tmp_path / "other"))
    for synset in ("train", "val"):
        (raw / synset / "caf\\xe9").mkdir()
        (raw / synset / "caf\\xe9" / "image.JPEG").write_bytes(picture(1))
    with pytest.raises(UserError, match="two classes are written as caf"):
        build(str(raw), str(tmp_path / "other"))


def test_no_locale_changes_what_is_converted_or_breaks_a_command(tmp_path):
    raw = latin_1(tmp_path / "raw")
    (raw / "train" / "n2").rename(raw / "train" / "né")
    (raw / "val" / "n2").rename(raw / "val" / "né")
    output = tmp_path / "output"
    commands = (
        "from beam_jobs import build_tfrecords, inspect_dataset\n"
        f"raw = ['--raw', {str(raw)!r}, '--output', {str(output)!r}]\n"
        "assert build_tfrecords.main([*raw, '--dry-run']) == 2\n"
        "assert build_tfrecords.main([*raw, '--on-bad-image=skip']) == 0\n"
        f"assert inspect_dataset.main([{str(output)!r}, '--full', '--output', {str(tmp_path / 'page.html')!r}]) == 0\n"
    )
    ascii_only = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    command = [sys.executable, "-c", commands]
    done = subprocess.run(command, env=os.environ | ascii_only, cwd=PROJECT, capture_output=True, text=True, check=False)
    assert (done.returncode, "Traceback" in done.stderr) == (0, False), done.stderr
    assert "cannot read train/n\\xe9/badcaf\\xe9.JPEG" in done.stdout
    assert json.loads((output / "manifest.json").read_text())["synsets"] == ["caf\\xe9", "né"]

"""ImageNet as people have it: every layout gives the dataset that the official archives of the same images give."""

import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import scipy.io
from support.layouts import LAYOUTS, STREAMED, VALIDATING, write_all, write_training, zipped
from support.raw_data import LABELS, SYNSETS, TRAIN, VALIDATION, picture

from beam_jobs import inspect_dataset
from beam_jobs.build_tfrecords import main
from beam_jobs.job import build, plan_only
from trainer.shared.errors import UserError
from trainer.shared.records import read_manifest


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_fingerprint_of_the_archives(layout, as_layout, fingerprint, tmp_path):
    raw, output = as_layout(layout), tmp_path / "output"
    for _ in range(2):  # the second finds that the dataset is there
        manifest = build(str(raw), str(output))
        assert manifest.fingerprint == fingerprint
    assert manifest.synsets == SYNSETS
    assert manifest == read_manifest(str(output))
    assert not (output / ".unpacked").exists()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_dry_run_says_the_layout_and_leaves_nothing(layout, as_layout, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert main(["--raw", str(as_layout(layout)), "--output", str(tmp_path / "output"), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert f"train is read as {layout}: " in said
    assert "train: 150 images" in said
    assert "validation: 20 images" in said
    assert ("disk: " in said) == (layout in STREAMED and layout != "tfds")
    assert list(tmp_path.iterdir()) == []


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


@pytest.mark.parametrize(
    ("layout", "spoil", "says"),
    [
        (
            "gzip archives",
            lambda raw: (raw / "validation_labels.txt").write_text("\n".join(LABELS[1:])),
            f"{VALIDATION}.gz has 20 images and there are 19 labels for them",
        ),
        (
            "hugging face archives",
            lambda raw: cut(raw / "data/train_images_0.tar.gz", -2_000),
            "_0.tar.gz cannot be read to its end",
        ),
        (
            "hugging face archives",
            lambda raw: cut(raw / "data/val_images.tar.gz", -1),
            "val_images.tar.gz cannot be read to its end",
        ),
        (
            "hugging face archives",
            lambda raw: (raw / "data/val_images.tar.gz").write_bytes(zipped({"a.JPEG": picture(1)})),
            "val_images.tar.gz has an image named 'a.JPEG': names must end in the synset",
        ),
        (
            "hugging face parquet",
            lambda raw: cut(next(raw.glob("data/train-00001*")), 20_000),
            "cannot be read as ImageNet's Parquet",
        ),
        (
            "hugging face parquet",
            lambda raw: next(raw.glob("data/train-00001*")).unlink(),
            "train-00001-of-00003 of 3 files are mis",
        ),
        ("tfds", lambda raw: cut(raw / "imagenet2012-train.tfrecord-00001-of-00002", 40_000), "00001-of-00002 is cut off"),
        ("tfds", lambda raw: (raw / "imagenet2012-train.tfrecord-00000-of-00002").unlink(), "train.tfrecord-00000-of-00002 of 2"),
        (
            "tfds",
            lambda raw: (raw / "imagenet2012-train.tfrecord-00000-of-00002").write_bytes(b""),
            "has 0 records where dataset_info",
        ),
        (
            "tiny imagenet",
            lambda raw: shutil.rmtree(raw / "train" / SYNSETS[0]),
            f"train/{SYNSETS[0]}/images/ has no images, and wnids",
        ),
        ("tiny imagenet", lambda raw: write_all({raw / "train" / "a.JPEG": b"x"}), "train/ holds a.JPEG: it must hold a folder"),
        (
            "tiny imagenet",
            lambda raw: write_all({raw / "val/images/a.JPEG": b"x"}),
            "val_annotations.txt has no line for a.JPEG of val/images",
        ),
        (
            "kaggle",
            lambda raw: (raw / "ILSVRC/Data/CLS-LOC/val/ILSVRC2012_val_00000003.JPEG").unlink(),
            "LOC_val_solution.csv has ILSVRC2012_val_00000003, of which ILSVRC/Data/CLS-LOC/val has no image",
        ),
    ],
)
def test_what_is_missing_or_cut_off_is_named(layout, spoil, says, as_layout, tmp_path):
    raw = Path(shutil.copytree(as_layout(layout), tmp_path / "raw"))
    spoil(raw)
    planned = plan_only(str(raw), str(tmp_path / "output"))
    assert any(says in problem for problem in planned.problems), planned.problems
    with pytest.raises(UserError) as caught:
        build(str(raw), str(tmp_path / "output"))
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "output").glob("*.tfrecord-*"))


def test_an_archive_of_which_nothing_can_be_read_is_named(as_layout, tmp_path):
    raw = Path(shutil.copytree(as_layout("gzip archives"), tmp_path / "raw"))
    cut(raw / f"{TRAIN}.gz", 100)
    for convert in (plan_only, build):
        with pytest.raises(UserError, match=f"{TRAIN}.gz cannot be read to its end"):
            convert(str(raw), str(tmp_path / "output"))


@pytest.mark.parametrize("within", ["ILSVRC", "ILSVRC/Data", "ILSVRC/Data/CLS-LOC"])
def test_kaggles_folder_is_found_from_any_of_its_levels(within, as_layout, fingerprint, tmp_path, monkeypatch):
    monkeypatch.chdir(as_layout("kaggle"))
    assert build(within, str(tmp_path / "output")).fingerprint == fingerprint


META = [("WNID", "O"), ("ILSVRC2012_ID", "f8"), ("num_children", "f8")]


def write_devkit(folder: Path, packed: bool) -> None:
    """The devkit numbers the classes in an order of its own, and has inner nodes of the hierarchy after them."""
    numbers = {SYNSETS[2]: 1, SYNSETS[0]: 2, SYNSETS[1]: 3}
    data = folder / "ILSVRC2012_devkit_t12" / "data"
    data.mkdir(parents=True)
    table = np.array([(synset, number, 0) for synset, number in numbers.items()] + [("n00000001", 4, 3)], META)
    scipy.io.savemat(data / "meta.mat", {"synsets": table.reshape(-1, 1)})
    (data / "ILSVRC2012_validation_ground_truth.txt").write_text("".join(f"{numbers[synset]}\n" for synset in LABELS))
    if packed:
        with tarfile.open(folder / "ILSVRC2012_devkit_t12.tar.gz", "w:gz") as archive:
            archive.add(data.parent, "ILSVRC2012_devkit_t12")
        shutil.rmtree(data.parent)


def without_labels(folder: Path, raw: Path) -> Path:
    folder.mkdir()
    for name in (TRAIN, VALIDATION):
        (folder / name).symlink_to(raw / name)
    return folder


@pytest.mark.parametrize("packed", [False, True])
def test_the_devkit_has_the_labels(packed, raw, fingerprint, tmp_path):
    folder = without_labels(tmp_path / "raw", raw)
    write_devkit(folder, packed)
    assert build(str(folder), str(tmp_path / "output")).fingerprint == fingerprint


def test_a_ground_truth_that_does_not_fit_is_refused(raw, tmp_path):
    folder = without_labels(tmp_path / "raw", raw)
    write_devkit(folder, packed=False)
    data = folder / "ILSVRC2012_devkit_t12" / "data"
    truth = data / "ILSVRC2012_validation_ground_truth.txt"
    truth.write_text("1\n4\n")
    with pytest.raises(UserError, match="line 2: 4 is not an ILSVRC2012_ID"):
        build(str(folder), str(tmp_path / "output"))
    (data / "meta.mat").unlink()
    with pytest.raises(UserError, match=r"meta.mat is missing"):
        build(str(folder), str(tmp_path / "output"))


@pytest.mark.parametrize("name", ["valid", "validation"])
def test_the_folder_of_validation_images_has_other_names_too(name, fingerprint, tmp_path):
    write_training(tmp_path / "raw" / "train")
    write_all({tmp_path / "raw" / name / synset / image: one for image, (synset, one) in VALIDATING.items()})
    assert build(str(tmp_path / "raw"), str(tmp_path / "output")).fingerprint == fingerprint


def test_training_images_alone_are_converted_when_asked_for(as_layout, built, tmp_path, capsys):
    raw = tmp_path / "raw"
    write_training(raw / "train")
    arguments = ["--raw", str(raw), "--output", str(tmp_path / "output"), "--num-shards", "2"]
    assert main(arguments) == 2
    assert "give --no-validation for pretraining without linear eval" in capsys.readouterr().err
    assert main([*arguments, "--no-validation", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["splits"].keys() == {"train"}
    manifest, whole = read_manifest(str(tmp_path / "output")), read_manifest(str(built))
    assert manifest.splits == {"train": whole.splits["train"]}


def test_a_dataset_of_training_images_alone_is_inspected(tmp_path):
    write_training(tmp_path / "raw" / "train")
    build(str(tmp_path / "raw"), str(tmp_path / "output"), validation=False)
    assert inspect_dataset.inspect(str(tmp_path / "output"), full=True).problems == ()
    assert "train" in inspect_dataset.page(str(tmp_path / "output"))

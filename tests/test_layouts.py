"""ImageNet as people have it: every layout gives the dataset that the official archives of the same images give."""

import gzip
import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import scipy.io
from support.layouts import LAYOUTS, STREAMED, VALIDATING, write_all, write_training, zipped
from support.raw_data import (
    LABELS,
    SYNSETS,
    TRAIN,
    VALIDATION,
    picture,
    raw_as_usual,
    tar,
    train_images,
    validation_images,
)

from beam_jobs import inspect_dataset
from beam_jobs.build_tfrecords import main
from beam_jobs.job import build, plan_only
from beam_jobs.layouts.hugging_face_archives import HuggingFaceArchives
from beam_jobs.raw import BESIDE, raw_identity
from trainer.shared.errors import UserError
from trainer.shared.records import read_manifest

TEST = "test images, which have no labels"
PASSED_OVER = {
    "kaggle": {
        TEST: ("ILSVRC/Data/CLS-LOC/test/ILSVRC2012_test_00000001.JPEG",),
        "not an image by its name": ("LOC_synset_mapping.txt",),
    },
    "tiny imagenet": {
        TEST: ("test/images/test_0.JPEG",),
        "an annotation": tuple(f"train/{synset}/{synset}_boxes.txt" for synset in SYNSETS),
    },
    "hugging face parquet": {TEST: ("data/test-00000-of-00001.parquet",)},
    "hugging face archives": {TEST: ("data/test_images.tar.gz",)},
    "tfds": {BESIDE: ("dataset_info.json", "features.json")},
}


def relabel(file, change):
    """Gives the images of a Parquet file other labels: `change(row, label)`."""
    table = pq.read_table(file)
    labels = [change(row, label) for row, label in enumerate(table["label"].to_pylist())]
    pq.write_table(table.set_column(1, "label", pa.array(labels, pa.int64())), file, row_group_size=10)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_fingerprint_of_the_archives(layout, as_layout, fingerprint, tmp_path):
    raw, output = as_layout(layout), tmp_path / "output"
    for _ in range(2):  # the second finds that the dataset is there
        manifest = build(str(raw), str(output))
        assert manifest.fingerprint == fingerprint
    assert manifest.synsets == SYNSETS
    assert manifest == read_manifest(str(output))
    assert not (output / ".unpacked").exists()
    for split, one in manifest.splits.items():
        passed_over = {passed.reason: passed.names for passed in one.seen.passed_over}
        assert passed_over == (PASSED_OVER.get(layout, {}) if split == "train" else {})
        assert one.seen.entries == one.records + sum(map(len, passed_over.values()))


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
            lambda raw: relabel(next(raw.glob("data/train-00001*")), lambda row, label: label + (row == 20)),
            "0a1b2c3d4e5f.parquet has 1 images whose label is not that of most of their synset, n0",
        ),
        (
            "hugging face parquet",
            lambda raw: relabel(next(raw.glob("data/validation*")), lambda row, label: 0),
            "parquet has label 0 for n0",
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
    identity = raw_identity(str(folder))
    with (data / "meta.mat").open("ab") as file:
        file.write(b"0")
    assert raw_identity(str(folder)) != identity
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


@pytest.mark.parametrize("layout", ["kaggle", "tiny imagenet"])
def test_labels_have_names_where_the_subset_is_all_there_is(layout, as_layout, tmp_path):
    """Then validation images may have any synset, so the synsets do not tell how a line is divided."""
    (tmp_path / "subset.txt").write_text("\n".join(SYNSETS))
    manifest = build(str(as_layout(layout)), str(tmp_path / "output"), subset=str(tmp_path / "subset.txt"))
    assert manifest.splits["validation"].records_per_class == tuple(map(LABELS.count, SYNSETS))


def small(folder: Path, lines: list[str], **changed: dict[str, bytes]) -> Path:
    """The official archives, compressed, with 4 training images a class."""
    tars = {f"{synset}.tar": tar(images) for synset, images in train_images(4).items()}
    validation = changed.get("validation", validation_images())
    write_all(
        {
            folder / f"{TRAIN}.gz": zipped(tars | changed.get("train", {})),
            folder / f"{VALIDATION}.gz": zipped(validation),
            folder / "validation_labels.txt": "\n".join(lines).encode(),
        }
    )
    return folder


def test_what_is_no_image_is_passed_over_in_compressed_archives(tmp_path):
    junk = {"._n01000001.tar": b"of macOS", ".DS_Store": b"x"}
    images = {f"deeper/{name}": one for name, one in train_images(4)[SYNSETS[1]].items()}
    junk[f"{SYNSETS[1]}.tar"] = tar(images | {"n_boxes.txt": b"x", "deeper/Thumbs.db": b"x"})
    raw = small(tmp_path / "raw", LABELS, train=junk, validation=validation_images() | {"./._v.JPEG": b"x"})
    manifest = build(str(raw), str(tmp_path / "output"))
    plain = raw_as_usual(tmp_path / "plain", train=train_images(4))
    assert manifest.fingerprint == build(str(plain), str(tmp_path / "of plain")).fingerprint
    train, validation = (manifest.splits[split].seen for split in ("train", "validation"))
    within = f"{TRAIN}.gz/{SYNSETS[1]}.tar"
    assert {one.reason: one.names for one in train.passed_over} == {
        "an annotation": (f"{within}/n_boxes.txt",),
        "left by a file manager": (f"{within}/deeper/Thumbs.db", f"{TRAIN}.gz/.DS_Store"),
        "metadata of macOS": (f"{TRAIN}.gz/._n01000001.tar",),
    }
    assert train.entries == 12 + 4
    assert [one.names for one in validation.passed_over] == [(f"{VALIDATION}.gz/._v.JPEG",)]


def test_names_that_are_not_utf_8_have_the_order_of_the_archives(tmp_path):
    names = ("caf\udce9.JPEG", "cafe\u0301.JPEG", "caf\u00ea.JPEG", "cafz.JPEG")
    train = {"caf\udce9": {name: picture(number) for number, name in enumerate(names)}}
    plain = raw_as_usual(tmp_path / "plain", train=train, labels=None)
    (tmp_path / "raw").mkdir()
    for folder in (plain, tmp_path / "raw"):
        (folder / "validation_labels.txt").write_bytes(b"caf\xe9\n" * 20)
    for name in (TRAIN, VALIDATION):
        (tmp_path / "raw" / f"{name}.gz").write_bytes(gzip.compress((plain / name).read_bytes(), 1))
    manifests = [build(str(tmp_path / name), str(tmp_path / f"of {name}")) for name in ("plain", "raw")]
    assert len({manifest.fingerprint for manifest in manifests}) == 1
    assert manifests[1].synsets == ("caf\\xe9",)


def test_labels_by_name_and_labels_from_elsewhere_fit_compressed_archives(tmp_path):
    pairs = [f"{name} {label}" for name, label in zip(validation_images(), LABELS, strict=True)]
    fingerprint = build(str(small(tmp_path / "plain", LABELS)), str(tmp_path / "of plain")).fingerprint
    assert build(str(small(tmp_path / "pairs", pairs[::-1])), str(tmp_path / "of pairs")).fingerprint == fingerprint
    (tmp_path / "labels.txt").write_text("\n".join(LABELS))
    given = {"validation_labels": str(tmp_path / "labels.txt")}
    assert build(str(small(tmp_path / "wrong", ["x"])), str(tmp_path / "of given"), **given).fingerprint == fingerprint


@pytest.mark.parametrize("layout", ["hugging face parquet", "tfds"])
def test_labels_that_a_layout_does_not_take_are_refused(layout, as_layout, tmp_path):
    (tmp_path / "labels.txt").write_text("x")
    with pytest.raises(UserError, match="has no effect: the validation images have labels of their own"):
        build(str(as_layout(layout)), str(tmp_path / "output"), validation_labels=str(tmp_path / "labels.txt"))


TWICE = tar(dict(list(train_images(4)[SYNSETS[1]].items())[:2])) * 2


@pytest.mark.parametrize(
    ("inner", "says"),
    [
        (TWICE, f"{TRAIN}.gz/{SYNSETS[1]}.tar has a second archive at byte 10,240, after its end"),
        (TWICE[:2500], f"{TRAIN}.gz/{SYNSETS[1]}.tar is cut off"),
        (zipped({"a.JPEG": picture(1)}), f"{TRAIN}.gz/{SYNSETS[1]}.tar is a gzip file"),
    ],
)
def test_a_tar_in_a_compressed_archive_that_is_not_whole_is_refused(inner, says, tmp_path):
    with pytest.raises(UserError) as caught:
        build(str(small(tmp_path / "raw", LABELS, train={f"{SYNSETS[1]}.tar": inner})), str(tmp_path / "output"))
    assert says in str(caught.value)


def test_a_compressed_archive_that_is_two_or_ends_too_early_is_refused(tmp_path):
    raw = small(tmp_path / "raw", LABELS)
    whole = gzip.decompress((raw / f"{TRAIN}.gz").read_bytes())
    for content, says in ((whole * 2, "has a second archive"), (whole[:30_000], "is cut off")):
        (raw / f"{TRAIN}.gz").write_bytes(gzip.compress(content, 1))
        with pytest.raises(UserError, match=f"{TRAIN}.gz.* {says}"):
            build(str(raw), str(tmp_path / "output"))


def test_a_compressed_archive_is_read_forwards_once(tmp_path, monkeypatch):
    """Long names have headers of several blocks. Seeking back in gzip would begin at the beginning."""
    images = {f"{'long' * 40}{number}_n01000001.JPEG": picture(number % 3) * (1 + number % 7) for number in range(300)}
    write_all({tmp_path / "train_images_0.tar.gz": zipped(images)})
    monkeypatch.setattr("gzip._GzipReader._rewind", lambda self: pytest.fail("it was read again"))
    found = list(HuggingFaceArchives().images(str(tmp_path), "train_images_0.tar.gz", None))
    assert {one.name: one.data for one in found} == {name.replace("_n01000001", ""): one for name, one in images.items()}

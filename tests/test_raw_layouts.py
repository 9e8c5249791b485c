"""Raw images as people have them: archives, extracted folders, subsets of classes, several versions side by side."""

import logging
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support.raw_data import (
    CIFAR10,
    LABELS,
    SYNSETS,
    TRAIN,
    VALIDATION,
    contents,
    picture,
    read_records,
    train_images,
    validation_images,
    write_raw,
)

from beam_jobs import files, subsets, verify
from beam_jobs.job import build
from beam_jobs.layouts.layout import Archive, Contents, Found, Layout, ListedImage, Listing
from beam_jobs.plan import make_plan
from beam_jobs.raw import index
from trainer.shared.errors import UserError
from trainer.shared.records import ENCODED, IMAGE_ID, LABEL, manifest_to_json, read_manifest


def extract(raw: Path, folder: Path, *, flat_validation: bool = False, keep_tars: bool = False) -> Path:
    """What people make of the two archives before they use them."""
    with tarfile.open(raw / TRAIN) as outer:
        for member in outer:
            synset = member.name.removesuffix(".tar")
            if keep_tars:
                outer.extract(member, folder / "train", filter="data")
            else:
                with tarfile.open(fileobj=outer.extractfile(member)) as inner:
                    inner.extractall(folder / "train" / synset, filter="data")
    with tarfile.open(raw / VALIDATION) as archive:
        for synset, member in zip(LABELS, archive, strict=True):
            archive.extract(member, folder / "val" if flat_validation else folder / "val" / synset, filter="data")
    if flat_validation:
        (folder / "validation_labels.txt").write_text("\n".join(LABELS))
    (folder / "train" / ".DS_Store").write_bytes(b"left by a file manager")
    return folder


@pytest.mark.parametrize(
    "how", [{}, {"flat_validation": True}, {"keep_tars": True}], ids=["folders", "flat validation", "tars in a folder"]
)
def test_an_extracted_folder_gives_the_same_bytes_as_the_archives(how, raw, built, tmp_path):
    folder = extract(raw, tmp_path / "raw", **how)
    manifest = build(str(folder), str(tmp_path / "output"), num_shards=2)
    written, of_archives = contents(tmp_path / "output"), contents(built)
    # The manifest names what the file manager left, and nothing else is different.
    passed_over = '"names": [\n       "train/.DS_Store"\n      ],\n      "reason": "left by a file manager"'
    assert passed_over.encode() in written["manifest.json"]
    clean = replace(manifest.splits["train"], seen=read_manifest(str(built)).splits["train"].seen)
    written["manifest.json"] = manifest_to_json(replace(manifest, splits={**manifest.splits, "train": clean})).encode()
    assert written == of_archives


def test_folders_that_are_links_are_followed(raw, built, tmp_path):
    folder = extract(raw, tmp_path / "elsewhere")
    for synset in SYNSETS:
        (tmp_path / "raw" / "train").mkdir(parents=True, exist_ok=True)
        (tmp_path / "raw" / "train" / synset).symlink_to(folder / "train" / synset)
    (tmp_path / "raw" / "val").symlink_to(folder / "val")
    assert build(str(tmp_path / "raw"), str(tmp_path / "output")).fingerprint == read_manifest(str(built)).fingerprint


class Backwards(Layout):
    """SPLIT-SYNSET.NAME, each a file that holds an image's bytes from the last to the first."""

    def expects(self, split):
        return f"{split}-SYNSET.NAME"

    def recognise(self, folder, split):
        found = tuple(info for info in files.tree(folder, depth=0) if info.name.startswith(f"{split}-"))
        return Found(found, "the names say so") if found else None

    def training_archives(self, folder, found):
        synsets = sorted({info.name[6:15] for info in found.files})
        return Contents(tuple(Archive("train", f"train-{synset}", "", 0, 1, synset) for synset in synsets), ())

    def validation_archives(self, folder, found, known):
        return Contents((Archive("validation", "validation-", "", 0, 1),), ())

    def list_images(self, folder, archive):
        infos = [info for info in files.tree(folder, depth=0) if info.name.startswith(archive.name)]
        infos.sort(key=lambda info: info.name.partition(".")[2])
        images = (ListedImage("", info.name, 0, info.size, info.name.split("-")[1].partition(".")[0], "") for info in infos)
        return Listing(tuple(images), ())

    def read(self, folder, image, start, size):
        return (Path(folder) / image.file).read_bytes()[::-1][start : start + size]


def test_a_new_layout_is_one_class_and_one_entry_of_the_list(raw, built, tmp_path, monkeypatch):
    from beam_jobs import raw as room

    monkeypatch.setattr(room, "LAYOUTS", (*room.LAYOUTS, Backwards()))
    folder = tmp_path / "raw"
    folder.mkdir()
    for synset, images in train_images().items():
        for name, content in images.items():
            (folder / f"train-{synset}.{name}").write_bytes(content[::-1])
    for synset, (name, content) in zip(LABELS, validation_images().items(), strict=True):
        (folder / f"validation-{synset}.{name}").write_bytes(content[::-1])
    for options in ({}, {"on_bad_image": "skip"}):
        manifest = build(str(folder), str(tmp_path / f"output{len(options)}"), **options)
        assert manifest.fingerprint == read_manifest(str(built)).fingerprint


def test_a_layout_says_why_it_was_taken(raw, tmp_path, caplog):
    folder = extract(raw, tmp_path / "raw")
    (folder / TRAIN).symlink_to(raw / TRAIN)
    with caplog.at_level(logging.INFO, "beam_jobs"):
        make_plan(str(folder), "output")
    assert f"train: {TRAIN} is there" in caplog.messages
    assert "validation: val/ holds 20 files" in caplog.messages


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda raw: (raw / "train" / "notes.JPEG").write_text("x"), "train/ holds notes.JPEG"),
        (lambda raw: (raw / "val" / "stray.JPEG").write_bytes(b"x"), "val/stray.JPEG is beside folders"),
        (lambda raw: (raw / "val" / SYNSETS[0]).rename(raw / "val" / "n09999999"), "val/n09999999 is not a synset"),
        (lambda raw: (raw / "train" / SYNSETS[1] / "gone.JPEG").symlink_to("/nowhere"), "n01000002/gone.JPEG is empty"),
        (lambda raw: (raw / "train" / f"{SYNSETS[1]}.tar").write_bytes(b"x"), "both as a folder and as a tar"),
    ],
)
def test_an_extracted_folder_that_is_not_right_is_refused(spoil, says, raw, tmp_path):
    folder = extract(raw, tmp_path / "raw")
    spoil(folder)
    with pytest.raises(UserError, match=says):
        build(str(folder), str(tmp_path / "output"))


def test_a_subset_has_dense_ids_and_labels_and_its_own_validation_images(raw, tmp_path):
    (tmp_path / "subset.txt").write_text(f"{SYNSETS[2]}\n{SYNSETS[0]}\n")
    manifest = build(str(raw), str(tmp_path / "output"), subset=str(tmp_path / "subset.txt"))
    assert manifest.synsets == (SYNSETS[0], SYNSETS[2])
    assert manifest.options == {"subset": "subset.txt"}
    for split, of_class in (("train", (50, 50)), ("validation", (LABELS.count(SYNSETS[0]), LABELS.count(SYNSETS[2])))):
        found = sorted(read_records(tmp_path / "output", split))
        assert manifest.splits[split].records_per_class == of_class
        assert [image_id for image_id, _, _ in found] == list(range(sum(of_class)))
    assert [label for _, label, _ in sorted(read_records(tmp_path / "output", "train"))] == [0] * 50 + [1] * 50
    images = train_images()[SYNSETS[2]]
    assert sorted(read_records(tmp_path / "output", "train"))[50][2] == images[min(images)]


def test_images_per_class_takes_the_first_by_name(raw, tmp_path):
    manifest = build(str(raw), str(tmp_path / "output"), images_per_class=3)
    assert manifest.splits["train"].records_per_class == (3, 3, 3)
    assert manifest.splits["validation"].records == 20
    expected = [images[name] for _, images in sorted(train_images().items()) for name in sorted(images)[:3]]
    assert [encoded for _, _, encoded in sorted(read_records(tmp_path / "output", "train"))] == expected


@pytest.mark.parametrize(
    ("subset", "says"),
    [
        ("imagenet_x", "subset=imagenet_x is neither imagenet_s nor imagenet100_cmc, nor a file"),
        ("imagenet_s", "no training images of n01440764, n01443537, n01484850 and 97 more"),
    ],
)
def test_a_subset_that_is_not_there_is_refused(subset, says, raw, tmp_path):
    with pytest.raises(UserError, match=says):
        build(str(raw), str(tmp_path / "output"), subset=subset)


def imagenets_synsets() -> list[str]:
    import tensorflow_datasets as tfds

    return (Path(tfds.__file__).parent / "datasets" / "imagenet2012" / "labels.txt").read_text().split()


def test_named_subsets_are_those_of_the_papers():
    synsets = sorted(imagenets_synsets())
    assert list(subsets.IMAGENET_S) == synsets[:100]
    assert len(set(subsets.IMAGENET100_CMC)) == 100
    assert set(subsets.IMAGENET100_CMC) < set(synsets)
    assert len(set(subsets.IMAGENET100_CMC) & set(subsets.IMAGENET_S)) == 8


def test_what_claims_to_be_imagenet_must_have_all_its_images(tmp_path):
    synsets = imagenets_synsets()
    assert subsets.known_counts(synsets) == {"train": 1_281_167, "validation": 50_000}
    assert subsets.known_counts(synsets[1:]) is None
    one = {synset: {f"{synset}_1.JPEG": picture(0)} for synset in subsets.IMAGENET_S}
    raw = write_raw(tmp_path / "raw", one, {"1.JPEG": picture(1)}, [subsets.IMAGENET_S[0]])
    with pytest.raises(
        UserError, match=r"train has 100 images where ImageNet has 129,395 of these 100.*validation has 1 .* 5,000"
    ):
        build(str(raw), str(tmp_path / "output"), subset="imagenet_s")
    manifest = build(str(raw), str(tmp_path / "output"), subset="imagenet_s", allow_other_counts=True)
    assert manifest.splits["train"].records == 100


def test_the_known_counts_are_let_pass(raw):
    plan = replace(make_plan(str(raw), "output"), expected={"train": 150, "validation": 20})
    of_archives = [{"found": index(plan.raw, archive).found, "problems": [], "rejected": []} for archive in plan.raw.archives]
    assert verify.faults(plan, of_archives) == ([], [])


def test_versions_side_by_side_are_read_by_tfds_load(raw, tmp_path):
    import tensorflow_datasets as tfds

    root = tmp_path / "root"
    build(str(raw), str(root / "birds" / "1.0.0"), images_per_class=2)
    build(str(raw), str(root / "birds" / "1.1.0"), images_per_class=4)
    build(str(raw), str(root / "others" / "1.0.0"))
    for name, count in (("birds:1.0.0", 6), ("birds:1.1.0", 12), ("birds", 12), ("others", 150)):
        dataset, info = tfds.load(name, data_dir=str(root), split="train", with_info=True)
        assert info.splits["train"].num_examples == count
        found = list(dataset.as_numpy_iterator())
        assert len(found) == count
        assert set(found[0]) == {ENCODED, LABEL, IMAGE_ID}
        assert sorted(int(item[IMAGE_ID]) for item in found) == list(range(count))


def test_metadata_are_what_tfds_itself_would_write(built, tmp_path):
    import tensorflow_datasets as tfds

    manifest = read_manifest(str(built))
    for path in built.glob("*.tfrecord-*"):
        (tmp_path / path.name).symlink_to(path)
    template = tfds.core.ShardedFileTemplate(data_dir=str(tmp_path), dataset_name="images", filetype_suffix="tfrecord")
    tfds.folder_dataset.write_metadata(
        data_dir=str(tmp_path),
        features=tfds.features.FeaturesDict(
            {
                ENCODED: tfds.features.Image(shape=(None, None, 3), encoding_format="jpeg"),
                LABEL: tfds.features.ClassLabel(names=list(manifest.synsets)),
                IMAGE_ID: np.int64,
            }
        ),
        split_infos=[
            tfds.core.SplitInfo(
                name=name,
                shard_lengths=[shard.records for shard in split.shards],
                num_bytes=sum(shard.bytes for shard in split.shards),
                filename_template=template.replace(split=name),
            )
            for name, split in manifest.splits.items()
        ],
        filename_template=template,
        description=f"Made by beam_jobs.build_tfrecords; its fingerprint is {manifest.fingerprint}.",
    )
    theirs = {path.name: path.read_bytes() for path in tmp_path.iterdir() if not path.is_symlink()}
    assert set(theirs) == {"dataset_info.json", "features.json", "image.class.label.labels.txt"}
    assert {name: content for name, content in contents(built).items() if name in theirs} == theirs


@pytest.mark.skipif(not CIFAR10.is_dir(), reason="no ../shared/data/cifar10")
def test_cifar10_converts_as_it_is(tmp_path):
    manifest = build(str(CIFAR10), str(tmp_path / "output"))
    assert manifest.splits["train"].records_per_class == (2000,) * 10
    assert manifest.splits["validation"].records_per_class == (500,) * 10
    assert not any(split.repaired for split in manifest.splits.values())

"""What lies in raw data besides plain images: deeper images are taken, junk is named, and nothing is lost unsaid."""

import json
import re
import tarfile
from pathlib import Path

import pytest
from support.raw_data import (
    LABELS,
    SYNSETS,
    TRAIN,
    VALIDATION,
    raw_as_usual,
    read_records,
    tar,
    train_images,
    validation_images,
)

from beam_jobs.build_tfrecords import main
from beam_jobs.job import build, plan_only
from trainer.shared.errors import UserError
from trainer.shared.records import manifest_from_json, manifest_to_json, read_manifest


def folders(folder: Path, train: dict | None = None) -> Path:
    """The usual images as folders, 4 a class; validation images in folders too."""
    for synset, images in (train or train_images(4)).items():
        for name, content in images.items():
            path = folder / "train" / synset / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    for synset, (name, content) in zip(LABELS, validation_images().items(), strict=True):
        path = folder / "val" / synset / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


def passed_over(manifest, split: str = "train") -> dict[str, tuple[str, ...]]:
    return {one.reason: one.names for one in manifest.splits[split].seen.passed_over}


def refused(raw: Path, output: Path, **options) -> str:
    """The one line of the refusal. Nothing is left, except the list of all faults."""
    with pytest.raises(UserError) as caught:
        build(str(raw), str(output), **options)
    said = str(caught.value)
    assert "\n" not in said
    assert len(said) < 1500
    assert all(path.name.endswith("-rejected.txt") for path in output.glob("*"))
    return said


def test_what_lies_beside_the_images_is_named(tmp_path):
    raw = folders(tmp_path / "raw")
    (raw / "notes.txt").write_text("mine")
    (raw / "ILSVRC2012_img_val.tar.part").write_bytes(bytes(100))
    (raw / "Annotations" / "n01440764").mkdir(parents=True)
    (raw / "Annotations" / "n01440764" / "box.xml").write_text("<box/>")
    (raw / ".DS_Store").write_text("")
    manifest = build(str(raw), str(tmp_path / "output"))
    beside = {reason: names for reason, names in passed_over(manifest).items() if "beside" in reason}
    assert beside == {
        "a file beside the images, which is not read": (".DS_Store", "ILSVRC2012_img_val.tar.part", "notes.txt"),
        "a folder beside the images, which is not read": ("Annotations",),
    }
    assert passed_over(manifest, "validation") == {}
    seen = manifest.splits["train"].seen
    assert seen.entries == 12 + 4
    assert manifest.fingerprint == build(str(folders(tmp_path / "clean")), str(tmp_path / "other")).fingerprint


def test_images_in_deeper_folders_are_taken_in_the_order_of_their_paths(tmp_path):
    train = train_images(4)
    train[SYNSETS[1]] = {f"{'more/' * (number % 3)}{name}": data for number, (name, data) in enumerate(train[SYNSETS[1]].items())}
    manifest = build(str(folders(tmp_path / "raw", train)), str(tmp_path / "output"))
    assert manifest.splits["train"].records_per_class == (4, 4, 4)
    in_order = [data for _, images in sorted(train.items()) for _, data in sorted(images.items())]
    assert [data for _, _, data in sorted(read_records(tmp_path / "output", "train"))] == in_order
    archives = raw_as_usual(tmp_path / "archives", train=train)
    assert build(str(archives), str(tmp_path / "of archives")).fingerprint == manifest.fingerprint


def test_what_is_no_image_is_passed_over_and_named_with_its_reason(tmp_path):
    raw = folders(tmp_path / "raw")
    clean = build(str(raw), str(tmp_path / "clean"))
    assert clean.splits["train"].seen.entries == 12
    assert clean.splits["train"].seen.passed_over == ()
    for name in ("Thumbs.db", "desktop.ini", ".DS_Store", f"._{SYNSETS[0]}_0.JPEG", "0_boxes.txt", "0.xml", ".hidden/0.JPEG"):
        path = raw / "train" / SYNSETS[0] / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"12345")
    (raw / "train" / "notes.txt").write_text("x")
    (raw / "train" / SYNSETS[1] / "nothing").mkdir()
    (raw / "val" / "val_annotations.txt").write_text("x")
    manifest = build(str(raw), str(tmp_path / "output"))
    assert manifest.fingerprint == clean.fingerprint
    within = f"train/{SYNSETS[0]}"
    assert passed_over(manifest) == {
        "an annotation": (f"{within}/0.xml", f"{within}/0_boxes.txt"),
        "an empty folder": (f"train/{SYNSETS[1]}/nothing",),
        "hidden": (f"{within}/.hidden/0.JPEG",),
        "left by a file manager": (f"{within}/.DS_Store", f"{within}/Thumbs.db", f"{within}/desktop.ini"),
        "metadata of macOS": (f"{within}/._{SYNSETS[0]}_0.JPEG",),
        "not an image by its name": ("train/notes.txt",),
    }
    assert passed_over(manifest, "validation") == {"not an image by its name": ("val/val_annotations.txt",)}
    seen = manifest.splits["train"].seen
    assert seen.entries == 12 + 9
    assert seen.bytes == clean.splits["train"].seen.bytes + 7 * 5 + 1


def test_what_macos_adds_to_tars_is_passed_over(tmp_path):
    train = {synset: images | {f"._{name}": b"of macOS" for name in images} for synset, images in train_images(4).items()}
    validation = validation_images() | {f"./._{name}": b"of macOS" for name in validation_images()}
    raw = raw_as_usual(tmp_path / "raw", train=train, validation=validation)
    inner = {f"{synset}.tar": tar(images) for synset, images in train.items()}
    (raw / TRAIN).write_bytes(tar(inner | {f"._{SYNSETS[0]}.tar": b"of macOS"}))
    manifest = build(str(raw), str(tmp_path / "output"))
    clean = build(str(raw_as_usual(tmp_path / "clean", train=train_images(4))), str(tmp_path / "of clean"))
    assert manifest.fingerprint == clean.fingerprint
    assert len(passed_over(manifest)["metadata of macOS"]) == 13
    assert len(passed_over(manifest, "validation")["metadata of macOS"]) == 20


def test_names_are_bounded_and_their_number_is_exact(tmp_path):
    images = train_images(4)
    images[SYNSETS[0]] |= {f"._{number}": b"" for number in range(1500)}
    manifest = build(str(raw_as_usual(tmp_path / "raw", train=images)), str(tmp_path / "output"))
    (one,) = manifest.splits["train"].seen.passed_over
    assert one.entries == 1500
    assert len(one.names) == 1000


def test_images_that_were_not_chosen_are_counted(tmp_path):
    raw = raw_as_usual(tmp_path / "raw")
    (tmp_path / "subset.txt").write_text(f"{SYNSETS[0]}\n{SYNSETS[2]}\n")
    manifest = build(str(raw), str(tmp_path / "output"), subset=str(tmp_path / "subset.txt"), images_per_class=3)
    train, validation = manifest.splits["train"], manifest.splits["validation"]
    assert {one.reason: one.entries for one in train.seen.passed_over} == {
        "beyond the number of images per class": 94,
        "its class is not in the subset": 1,
    }
    assert train.seen.entries == train.records + 95
    assert [one.entries for one in validation.seen.passed_over] == [LABELS.count(SYNSETS[1])]
    assert validation.seen.entries == 20


def test_rejected_images_are_in_the_account(tmp_path):
    train = train_images(4)
    train[SYNSETS[0]]["bad.JPEG"] = b"no image"
    manifest = build(str(raw_as_usual(tmp_path / "raw", train=train)), str(tmp_path / "output"), on_bad_image="skip")
    assert manifest.splits["train"].seen.entries == 13
    assert manifest.splits["train"].seen.rejected_bytes == 8


def test_the_dry_run_and_the_command_say_what_is_passed_over(tmp_path, capsys):
    raw = folders(tmp_path / "raw")
    (raw / "train" / SYNSETS[0] / "Thumbs.db").write_bytes(b"x")
    command = ["--raw", str(raw), "--output", str(tmp_path / "output")]
    for more in (["--dry-run"], []):
        assert main([*command, *more]) == 0
        assert f"passed over in train: 1 left by a file manager: train/{SYNSETS[0]}/Thumbs.db" in capsys.readouterr().out


def test_a_second_layout_that_is_not_read_is_named(tmp_path, capsys):
    raw = folders(raw_as_usual(tmp_path / "raw"))
    planned = plan_only(str(raw), str(tmp_path / "output"))
    assert planned.notes == (
        f"train: {TRAIN} is there, and train/ with images is there too, which is not read",
        f"validation: {VALIDATION} is there, and val/ with images is there too, which is not read",
    )
    build(str(raw), str(tmp_path / "output"))
    assert f"note: train: {TRAIN} is there" in capsys.readouterr().err


def test_a_manifest_without_an_account_is_read(built, tmp_path):
    content = json.loads((built / "manifest.json").read_text())
    for split in content["splits"].values():
        del split["seen"]
    old = manifest_from_json(json.dumps(content))
    assert old.splits["train"].seen is None
    assert old.fingerprint == read_manifest(str(built)).fingerprint
    assert manifest_from_json(manifest_to_json(old)) == old


@pytest.mark.parametrize("split", ["train", "val"])
def test_an_empty_class_folder_is_refused(split, tmp_path):
    raw = folders(tmp_path / "raw")
    (raw / split / "n03000001").mkdir()
    assert "n03000001" in refused(raw, tmp_path / "output")
    (raw / split / "n03000001" / ".DS_Store").write_bytes(b"x")
    assert "n03000001" in refused(raw, tmp_path / "output")


def test_a_link_to_a_folder_above_is_refused(tmp_path):
    raw = folders(tmp_path / "raw")
    (raw / "train" / SYNSETS[0] / "again").symlink_to(raw / "train")
    assert "is a link to a folder that holds it" in refused(raw, tmp_path / "output")


# ---- Tars that are not what their names say


def second_half(images: dict[str, bytes]) -> bytes:
    """Two tars one after the other, each with half of the images."""
    names = sorted(images)
    return tar({name: images[name] for name in names[:2]}) + tar({name: images[name] for name in names[2:]})


def with_inner(raw: Path, inner: bytes) -> None:
    tars = {f"{synset}.tar": tar(images) for synset, images in train_images(4).items()}
    (raw / TRAIN).write_bytes(tar(tars | {f"{SYNSETS[1]}.tar": inner}))


def sparse_member() -> bytes:
    """A tar whose one image is stored as by `tar -S`."""
    member = tarfile.TarInfo("sparse.JPEG")
    member.type = tarfile.GNUTYPE_SPARSE
    header = bytearray(member.tobuf(tarfile.GNU_FORMAT))
    header[386:398], header[398:410] = b"%011o\0" % 1024, b"%011o\0" % 0
    header[483:495] = b"%011o\0" % 4096
    header[148:156] = b"        "
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + bytes(1024)


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (
            lambda raw: with_inner(raw, second_half(train_images(4)[SYNSETS[1]])),
            "n01000002.tar has a second archive at byte 10,240, after its end: extract both with tar --ignore-zeros",
        ),
        (lambda raw: (raw / TRAIN).write_bytes((raw / TRAIN).read_bytes() * 2), f"{TRAIN} has a second archive at byte"),
        (
            lambda raw: (raw / VALIDATION).write_bytes((raw / VALIDATION).read_bytes() + b"\0" * 100 + b"junk"),
            f"{VALIDATION} has other bytes at byte 41,060",
        ),
        (
            lambda raw: (raw / VALIDATION).write_bytes((raw / VALIDATION).read_bytes() + bytes(2**21)),
            "its download stopped there",
        ),
        (lambda raw: (raw / TRAIN).write_bytes(bytes(2**21)), f"{TRAIN} has nothing but zeros from byte 0"),
        (lambda raw: (raw / TRAIN).write_bytes(b"\x1f\x8b\x08" + bytes(600)), f"is a gzip file .* gunzip {TRAIN}.gz"),
        (lambda raw: with_inner(raw, b"\x1f\x8b\x08" + bytes(600)), "n01000002.tar is a gzip file"),
        (lambda raw: (raw / VALIDATION).write_bytes(b"PK\x03\x04" + bytes(600)), f"is a zip file .* unzip {VALIDATION}"),
        (lambda raw: (raw / TRAIN).write_bytes(b"<html>" + b" " * 600), "is a web page"),
        (lambda raw: with_inner(raw, sparse_member() + bytes(1024)), "sparse.JPEG is stored as a sparse file"),
        (
            lambda raw: (raw / TRAIN).write_bytes(tar({f"n1_{number}.JPEG": b"x" for number in range(20_000)})),
            r"holds n1_0.JPEG, n1_1.JPEG, n1_2.JPEG, and 19,997 more: .*train/SYNSET",
        ),
        (
            lambda raw: (raw / TRAIN).write_bytes(tar({f"{one}/a.JPEG": b"x" for one in SYNSETS})),
            r"holds n01000001/a.JPEG.*mkdir -p .*train && tar -xf .* --strip-components=0",
        ),
    ],
)
def test_a_tar_that_is_something_else_is_named_with_what_helps(spoil, says, tmp_path):
    raw = raw_as_usual(tmp_path / "raw", train=train_images(4))
    spoil(raw)
    said = refused(raw, tmp_path / "output")
    assert re.search(says, said), said


# ---- Folders that are not where they should be


def moved(raw: Path, what: str, to: str) -> None:
    (raw / to).parent.mkdir(parents=True, exist_ok=True)
    (raw / what).rename(raw / "moving")
    (raw / to).parent.mkdir(parents=True, exist_ok=True)
    (raw / "moving").rename(raw / to)


def test_images_one_folder_deeper_are_named_with_the_command_that_helps(tmp_path):
    raw = folders(tmp_path / "raw")
    moved(raw, "train", "train/train")
    assert "mv train/train/* train/ && rmdir train/train" in refused(raw, tmp_path / "output")
    raw = folders(tmp_path / "other")
    moved(raw, "val", "val/images")
    assert "mv val/images/* val/ && rmdir val/images" in refused(raw, tmp_path / "output")
    assert f"{raw.parent}/raw" not in refused(tmp_path / "nowhere", tmp_path / "output")


def test_a_raw_folder_above_or_below_is_named(tmp_path):
    raw = folders(tmp_path / "above" / "imagenet")
    for wrong in (tmp_path / "above", raw / "train"):
        assert f"{raw} has them: give --raw {raw}" in refused(wrong, tmp_path / "output")


def test_classes_that_were_not_extracted_are_named_with_what_helps(tmp_path):
    train = {synset: images for synset, images in train_images(4).items() if synset != SYNSETS[1]}
    said = refused(raw_as_usual(tmp_path / "raw", train=train), tmp_path / "output")
    assert f"{SYNSETS[1]} is not a synset of the training images, nor are" in said
    assert "get the training images of all classes, or give the classes that are there with --subset FILE" in said


def test_packed_files_in_folders_are_named_with_the_command_that_unpacks_them(tmp_path):
    raw = folders(tmp_path / "raw")
    (raw / "train" / "n04000001.tar.gz").write_bytes(b"\x1f\x8b")
    assert "cd train && tar -xzf n04000001.tar.gz && rm n04000001.tar.gz" in refused(raw, tmp_path / "output")
    raw = folders(tmp_path / "other")
    (raw / "val" / "val.tar").write_bytes(tar(validation_images()))
    assert "val/val.tar is packed; unpack it: cd val && tar -xf val.tar" in refused(raw, tmp_path / "output")


# ---- Subsets


def test_a_subset_without_validation_images_is_refused_before_any_work(tmp_path, capsys):
    raw = raw_as_usual(tmp_path / "raw", labels=["1", "2"] * 10)
    (tmp_path / "all.txt").write_text("\n".join(SYNSETS))
    command = ["--raw", str(raw), "--output", str(tmp_path / "output"), "--subset", str(tmp_path / "all.txt")]
    for more in ([], ["--dry-run"], ["--allow-other-counts"]):
        assert main([*command, *more]) == 2
        said = capsys.readouterr().err
        assert "no validation image has one of the chosen classes n01000001, n01000002, n02000001" in said
        assert "have the classes 1, 2" in said
    in_folders = folders(tmp_path / "folders")
    for number, synset in enumerate(SYNSETS):
        (in_folders / "val" / synset).rename(in_folders / "val" / str(number + 1))
    for action in (build, plan_only):
        with pytest.raises(UserError, match=r"have the classes 1, 2, 3;"):
            action(str(in_folders), str(tmp_path / "output"), subset=str(tmp_path / "all.txt"))


def test_a_subsets_class_without_validation_images_is_refused_unless_other_counts_are_allowed(tmp_path):
    raw = raw_as_usual(tmp_path / "raw", labels=[SYNSETS[0], SYNSETS[1]] * 10)
    (tmp_path / "two.txt").write_text(f"{SYNSETS[1]}\n{SYNSETS[2]}\n")
    for action in (build, plan_only):
        with pytest.raises(UserError, match=f"no validation images of {SYNSETS[2]}, which the subset has"):
            action(str(raw), str(tmp_path / "output"), subset=str(tmp_path / "two.txt"))
    manifest = build(str(raw), str(tmp_path / "output"), subset=str(tmp_path / "two.txt"), allow_other_counts=True)
    assert manifest.splits["validation"].records_per_class == (10, 0)
    (tmp_path / "one.txt").write_text(f"{SYNSETS[2]}\n")
    said = refused(raw, tmp_path / "other", subset=str(tmp_path / "one.txt"), allow_other_counts=True)
    assert "no validation image has one of the chosen classes" in said


def test_classes_whose_names_have_spaces_are_lines(tmp_path):
    train = dict(zip(("great white", "mud puppy", "n3"), train_images(4).values(), strict=True))
    labels = ["great white", "mud puppy"] * 10
    raw = raw_as_usual(tmp_path / "raw", train=train, labels=labels)
    assert build(str(raw), str(tmp_path / "all")).synsets == ("great white", "mud puppy", "n3")
    (tmp_path / "subset.txt").write_bytes(b"\xef\xbb\xbfmud puppy\r\ngreat white\r\n")
    manifest = build(str(raw), str(tmp_path / "output"), subset=str(tmp_path / "subset.txt"))
    assert manifest.synsets == ("great white", "mud puppy")
    assert manifest.splits["validation"].records_per_class == (10, 10)

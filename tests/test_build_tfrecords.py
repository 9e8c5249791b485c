"""The conversion, on raw archives made here: what comes out, and what is refused."""

import base64
import io
import itertools
import json
import os
import struct
import subprocess
import sys
from collections import Counter
from pathlib import Path

import google_crc32c
import numpy as np
import pytest
from PIL import Image
from support.raw_data import (
    LABELS,
    OF_VALIDATION,
    SYNSETS,
    TRAIN,
    VALIDATION,
    contents,
    expected,
    parse,
    picture,
    raw_as_usual,
    read_records,
    tar,
    train_images,
    validation_images,
    write_raw,
)

from beam_jobs import convert, files, runners, shards, verify
from beam_jobs.build_tfrecords import main
from beam_jobs.convert import index_archive
from beam_jobs.job import build
from beam_jobs.plan import make_plan
from beam_jobs.publish import CONVERSION
from beam_jobs.raw import open_raw, raw_identity
from beam_jobs.references import pack_images, pack_reference, unpack_references
from beam_jobs.verify import LostRecordsError
from trainer.shared.errors import UserError
from trainer.shared.records import ENCODED, IMAGE_ID, LABEL, RECORDS_PER_BLOCK, read_manifest, reading_positions

BEAM = ("--runner=FnApiRunner",)
"""Beam's options that run a conversion in this process."""


def test_stock_tfds_gives_back_every_image_with_its_id_and_label(built):
    import tensorflow_datasets as tfds

    builder = tfds.builder_from_directory(str(built))
    assert {name: feature.dtype for name, feature in builder.info.features.items()} == {
        ENCODED: np.uint8,
        LABEL: np.int64,
        IMAGE_ID: np.int64,
    }
    assert builder.info.features[LABEL].names == list(SYNSETS)
    assert {name: split.num_examples for name, split in builder.info.splits.items()} == {"train": 150, "validation": 20}
    for split in ("train", "validation"):
        raw_bytes = builder.as_dataset(split=split, decoders={ENCODED: tfds.decode.SkipDecoding()})
        found = {int(item[IMAGE_ID]): (SYNSETS[item[LABEL]], item[ENCODED]) for item in raw_bytes.as_numpy_iterator()}
        assert [found[image_id] for image_id in range(len(found))] == expected(split)


def test_stock_tfds_decodes_grey_and_coloured_images_to_three_channels(built):
    import tensorflow_datasets as tfds

    for item in tfds.builder_from_directory(str(built)).as_dataset(split="train").as_numpy_iterator():
        with Image.open(io.BytesIO(expected("train")[item[IMAGE_ID]][1])) as source:
            np.testing.assert_allclose(item[ENCODED].astype(int), np.asarray(source.convert("RGB"), int), atol=4)


def test_manifest_tells_what_is_in_the_dataset(built):
    manifest = read_manifest(str(built))
    assert manifest.synsets == SYNSETS
    assert manifest.splits["train"].records_per_class == (50, 50, 50)
    assert manifest.splits["validation"].records_per_class == tuple(LABELS.count(synset) for synset in SYNSETS)
    assert sorted(path.name for path in built.iterdir() if ".tfrecord" in path.name) == [
        f"images-{split}.tfrecord-{number:05d}-of-00002" for split in ("train", "validation") for number in (0, 1)
    ]
    for split in manifest.splits.values():
        for shard in split.shards:
            crc = google_crc32c.Checksum((built / shard.file).read_bytes()).digest()
            assert base64.b64encode(crc).decode() == shard.crc32c
        assert not split.repaired
        assert not split.rejected


def test_block_offsets_are_where_records_start(built):
    manifest = read_manifest(str(built))
    in_order = [record[0] for record in read_records(built, "train")]
    done = 0
    for shard in manifest.splits["train"].shards:
        content = (built / shard.file).read_bytes()
        assert len(shard.blocks) == -(-shard.records // RECORDS_PER_BLOCK) > 1
        for block, offset in enumerate(shard.blocks):
            (length,) = struct.unpack_from("<Q", content, offset)
            record = content[offset + 12 : offset + 12 + length]
            image_id, label, encoded = parse(record)
            assert content[offset : offset + length + 16] == b"".join(shards.frame(encoded, label, image_id))
            assert image_id == in_order[done + block * RECORDS_PER_BLOCK]
        done += shard.records


def test_reading_in_order_is_mixed_over_classes(built):
    labels = [label for _, label, _ in read_records(built, "train")]
    assert sum(a == b for a, b in itertools.pairwise(labels)) < 75  # a third of 149 by chance, 147 if sorted


@pytest.mark.parametrize("num_images", [1, 2, 1000])
def test_every_place_is_taken_once(num_images):
    assert sorted(reading_positions(num_images)) == list(range(num_images))


def test_reading_order_never_changes():
    """It decides the bytes of every dataset that exists."""
    assert reading_positions(8).tolist() == [6, 4, 0, 7, 1, 3, 2, 5]


def test_ids_and_bytes_do_not_depend_on_the_order_in_the_archives(built, tmp_path):
    backwards = {synset: dict(reversed(images.items())) for synset, images in reversed(train_images().items())}
    raw = raw_as_usual(tmp_path / "raw", train=backwards, validation=dict(reversed(validation_images().items())))
    build(str(raw), str(tmp_path / "output"), num_shards=2)
    assert contents(tmp_path / "output") == contents(built)


def test_fingerprint_does_not_depend_on_the_number_of_shards(raw, built, tmp_path):
    manifest = build(str(raw), str(tmp_path / "output"), num_shards=7)
    assert manifest.fingerprint == read_manifest(str(built)).fingerprint
    assert [shard.records for shard in manifest.splits["train"].shards] == [22, 21, 22, 21, 22, 21, 21]
    assert read_records(tmp_path / "output", "train") == read_records(built, "train")


def with_two_images_exchanged() -> dict[str, dict[str, bytes]]:
    """The training images, the first two of a class under each other's names."""
    train = train_images()
    images = train[SYNSETS[0]]
    first, second = sorted(images)[:2]
    images[first], images[second] = images[second], images[first]
    return train


@pytest.mark.parametrize(
    "changed",
    [
        {"labels": LABELS[1:] + LABELS[:1]},
        {"validation": validation_images() | {"ILSVRC2012_val_00000003.JPEG": picture(1)}},
        {"train": with_two_images_exchanged()},
    ],
    ids=["labels", "bytes", "IDs"],
)
def test_fingerprint_depends_on_bytes_labels_and_ids(changed, built, tmp_path):
    manifest = build(str(raw_as_usual(tmp_path / "raw", **changed)), str(tmp_path / "output"))
    assert manifest.fingerprint != read_manifest(str(built)).fingerprint


def test_there_are_no_empty_shards(raw, tmp_path):
    manifest = build(str(raw), str(tmp_path / "output"), num_shards=30)
    assert [shard.records for shard in manifest.splits["validation"].shards] == [1] * 20
    assert len(manifest.splits["train"].shards) == 30


def pack(references):
    packed = pack_images(image for _, _, image in references)
    return [pack_reference(place, image_id, image) for (place, image_id, _), image in zip(references, packed, strict=True)]


def lose_one(assigned):
    (key, references), *others = assigned
    return [(key, references[1:]), *others]


def double_one(assigned):
    (key, references), *others = assigned
    return [(key, [*references, references[0]]), *others]


def mislabel_one(assigned):
    (key, packed), *others = assigned
    first, *references = unpack_references(packed)
    mislabelled = first._replace(image=first.image._replace(label=1 - first.image.label))
    return [(key, pack([mislabelled, *references])), *others]


def exchange_two_ids(assigned):
    (key, packed), *others = assigned
    first, second, *references = unpack_references(packed)
    exchanged = first._replace(image_id=second.image_id), second._replace(image_id=first.image_id)
    return [(key, pack([*exchanged, *references])), *others]


def lose_a_shard(assigned):
    return [item for item in assigned if not item[0][1].endswith("-00001-of-00002")]


def lose_all(assigned):
    return []


@pytest.mark.parametrize("fault", [lose_one, double_one, mislabel_one, exchange_two_ids, lose_a_shard, lose_all])
def test_what_goes_wrong_between_workers_is_caught_and_nothing_published(fault, raw, tmp_path, monkeypatch):
    assign_ids = convert.assign_ids

    def faulty(indexed, plan, counts):
        assigned = list(assign_ids(indexed, plan, counts))
        return fault(assigned) if indexed[0] == 0 or fault in (lose_a_shard, lose_all) else assigned

    monkeypatch.setattr(convert, "assign_ids", faulty)
    with pytest.raises(LostRecordsError, match="nothing was published"):
        build(str(raw), str(tmp_path / "output"), num_shards=2, beam_args=BEAM)
    assert list((tmp_path / "output").iterdir()) == []


@pytest.mark.parametrize("beam_args", [(), BEAM])
def test_a_lost_archive_is_caught(beam_args, raw, tmp_path, monkeypatch):
    index_archive = convert.index_archive

    def faulty(number, plan, *on_checked):
        return (1, []) if number == 1 else index_archive(number, plan, *on_checked)

    monkeypatch.setattr(convert, "index_archive", faulty)
    with pytest.raises(LostRecordsError, match=r"lost ILSVRC2012_img_train.tar/n01000002.tar"):
        build(str(raw), str(tmp_path / "output"), beam_args=beam_args)
    assert list((tmp_path / "output").iterdir()) == []


def test_a_shard_that_is_shorter_on_disk_than_was_written_is_caught(raw, tmp_path, monkeypatch):
    write_shard = convert.write_shard

    def cut(*arguments):
        written = write_shard(*arguments)
        os.truncate(tmp_path / "output" / written.shard.file, written.shard.bytes - 1)
        return written

    monkeypatch.setattr(convert, "write_shard", cut)
    with pytest.raises(LostRecordsError, match="bytes that were written"):
        build(str(raw), str(tmp_path / "output"))


def test_all_unreadable_images_are_named_and_nothing_is_published(tmp_path):
    train = train_images()
    for number, content in enumerate([b"", b"GIF, it says", picture(1)[:100], picture(2, kind="png")[:200], b"\xff\xd8\xff\xd9"]):
        train[SYNSETS[1]][f"bad_{number}.JPEG"] = content
    with pytest.raises(UserError) as caught:
        build(str(raw_as_usual(tmp_path / "raw", train=train)), str(tmp_path / "output"), num_shards=3)
    listed = tmp_path / "output" / "images-rejected.txt"
    assert "5 of the images cannot be read" in str(caught.value)
    assert "ILSVRC2012_img_train.tar/n01000002.tar/bad_0.JPEG is empty" in str(caught.value)
    assert "and 2 more" in str(caught.value)
    assert str(listed) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert [line.split()[0].rsplit("/", 1)[1] for line in listed.read_text().splitlines()] == [f"bad_{n}.JPEG" for n in range(5)]
    assert list((tmp_path / "output").iterdir()) == [listed]


def cmyk_jpegs() -> dict[str, bytes]:
    """The three kinds there are: inverted inks with Adobe's marker, YCCK, and plain inks without the marker."""
    buffer = io.BytesIO()
    Image.new("CMYK", (16, 16), (200, 30, 90, 20)).save(buffer, "jpeg", quality=95)
    adobe = buffer.getvalue()
    start = adobe.index(b"\xff\xee\x00\x0eAdobe")
    return {
        "adobe.JPEG": adobe,
        "plain.JPEG": adobe[:start] + adobe[start + 16 :],
        "ycck.JPEG": adobe[: start + 15] + b"\x02" + adobe[start + 16 :],
    }


def test_cmyk_and_other_formats_become_rgb_jpegs_of_the_same_colours_and_are_listed(tmp_path):
    import tensorflow as tf

    odd = cmyk_jpegs() | {"bmp.JPEG": picture(1, kind="bmp"), "png.JPEG": picture(2, "RGBA", "png")}
    train = train_images(5)
    train[SYNSETS[1]] |= odd
    manifest = build(str(raw_as_usual(tmp_path / "raw", train=train)), str(tmp_path / "output"))
    repaired = manifest.splits["train"].repaired
    assert [(entry["source"], entry["done"]) for entry in repaired] == [
        (f"{TRAIN}/n01000002.tar/{name}", f"{kind} to JPEG RGB")
        for name, kind in [
            ("adobe.JPEG", "JPEG CMYK"),
            ("bmp.JPEG", "BMP RGB"),
            ("plain.JPEG", "JPEG CMYK"),
            ("png.JPEG", "PNG RGBA"),
            ("ycck.JPEG", "JPEG CMYK"),
        ]
    ]
    written = {image_id: content for image_id, _, content in read_records(tmp_path / "output", "train")}
    for entry in repaired:
        with Image.open(io.BytesIO(written[entry["id"]])) as image:
            assert (image.format, image.mode) == ("JPEG", "RGB")
            found = np.asarray(image, int)
        as_tensorflow_sees_it = tf.io.decode_image(odd[entry["source"].rsplit("/", 1)[1]], channels=3).numpy().astype(int)
        assert np.abs((found - as_tensorflow_sees_it).mean(axis=(0, 1))).max() <= 3


def test_a_finished_dataset_is_neither_overwritten_nor_touched(raw, built):
    before = {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in built.iterdir()}
    with pytest.raises(UserError, match=read_manifest(str(built)).fingerprint):
        build(str(raw), str(built), num_shards=3)
    assert {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in built.iterdir()} == before


def test_a_finished_dataset_of_the_same_conversion_is_already_there(raw, tmp_path, capsys):
    output = tmp_path / "output"
    command = ["--raw", str(raw), "--output", str(output), "--num-shards", "2"]
    assert main(command) == 0
    first = capsys.readouterr()
    assert "already there" not in first.err
    before = {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in output.iterdir()}
    assert main(command) == 0
    again = capsys.readouterr()
    assert again.out == first.out
    assert without_progress(again.err) == [f"{output} is already there: the same conversion finished before"]
    assert {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in output.iterdir()} == before

    changed = tmp_path / "raw"
    changed.mkdir()
    for path in raw.iterdir():
        (changed / path.name).write_bytes(path.read_bytes())
    with (changed / TRAIN).open("ab") as archive:
        archive.write(b"\0" * 512)
    for others in (["--images-per-class", "3"], ["--raw", str(changed)]):
        assert main([*command, *others]) == 2
        assert f"{output} has a finished dataset, fingerprint" in capsys.readouterr().err
    shard = next(output.glob("*-train.tfrecord-*"))
    shard.write_bytes(shard.read_bytes()[:-1])
    assert main(command) == 2
    assert f"a finished dataset whose {shard.name} has" in capsys.readouterr().err


def test_a_dataset_from_before_conversions_were_kept_is_not_touched(raw, tmp_path):
    output = str(tmp_path / "output")
    build(str(raw), output, num_shards=2)
    (tmp_path / "output" / CONVERSION).unlink()
    with pytest.raises(UserError, match="has a finished dataset"):
        build(str(raw), output, num_shards=2)
    assert read_manifest(output).fingerprint


def test_a_folder_with_the_records_of_others_is_refused(raw, tmp_path):
    (tmp_path / "theirs-train.tfrecord-00000-of-00001").write_bytes(b"precious")
    with pytest.raises(UserError, match="theirs-train"):
        build(str(raw), str(tmp_path))
    assert contents(tmp_path) == {"theirs-train.tfrecord-00000-of-00001": b"precious"}


def with_file(name: str, change) -> object:
    """Returns what changes one file of a raw folder."""

    def apply(folder: Path) -> None:
        path = folder / name
        content = change(path.read_bytes())
        path.unlink() if content is None else path.write_bytes(content)

    return apply


def doubled(content: bytes) -> bytes:
    """The tar with its first member once more."""
    end = 512 + -(-int(content[124:135], 8) // 512) * 512
    return content[:end] + content


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (with_file(TRAIN, lambda _: None), f"lacks {TRAIN}"),
        (with_file(VALIDATION, lambda _: None), f"lacks {VALIDATION}"),
        (with_file(TRAIN, lambda content: content[: len(content) // 2]), f"{TRAIN} is cut off"),
        (with_file(TRAIN, lambda content: content[:-20480]), f"{TRAIN} is cut off"),
        (with_file(VALIDATION, lambda content: content[: len(content) // 2]), f"{VALIDATION} is cut off"),
        (with_file(VALIDATION, lambda content: content[:1024]), f"{VALIDATION} is cut off"),
        (with_file(TRAIN, lambda _: b"no tar at all" * 100), f"{TRAIN} cannot be read as a tar"),
        (with_file(TRAIN, lambda _: b""), f"{TRAIN} cannot be read as a tar"),
        (with_file(TRAIN, lambda _: tar({})), f"{TRAIN} is empty"),
        (with_file(TRAIN, lambda _: tar(train_images()[SYNSETS[0]])), f"{TRAIN} holds n01000001_0.JPEG"),
        (
            with_file(TRAIN, lambda _: tar({f"{synset}.tar": tar({}) for synset in SYNSETS})),
            r"n01000001.tar is empty.*n01000002.tar is empty",
        ),
        (with_file(TRAIN, doubled), "n01000001.tar twice"),
        (with_file(VALIDATION, doubled), "ILSVRC2012_val_00000001.JPEG twice"),
        (with_file(VALIDATION, lambda _: tar(validation_images(19))), "19 images and there are 20 labels"),
        (with_file(VALIDATION, lambda _: tar(validation_images(21))), "21 images and there are 20 labels"),
        (with_file(OF_VALIDATION, lambda _: b""), f"{OF_VALIDATION} is empty"),
        (
            with_file(OF_VALIDATION, lambda content: content.replace(b"n02000001", b"n09999999", 1)),
            "line 3: n09999999 is not a synset",
        ),
        (
            with_file(OF_VALIDATION, lambda _: None),
            r"datasets/imagenet2012/validation_labels.txt line 1: .*put the right validation_labels.txt",
        ),
    ],
)
def test_raw_data_that_is_not_whole_is_refused_in_one_line(spoil, says, tmp_path):
    raw = raw_as_usual(tmp_path / "raw")
    spoil(raw)
    with pytest.raises(UserError, match=says) as caught:
        build(str(raw), str(tmp_path / "output"))
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("output/*"))


def test_imagenets_own_validation_labels_are_known(tmp_path):
    import tensorflow_datasets as tfds

    synsets = (Path(tfds.__file__).parent / "datasets" / "imagenet2012" / "labels.txt").read_text().split()
    opened = open_raw(str(write_raw(tmp_path, {synset: {} for synset in synsets}, validation_images(1), labels=None)))
    assert opened.synsets == tuple(sorted(synsets))
    of_validation = opened.archives[-1].synsets
    assert Counter(of_validation) == dict.fromkeys(synsets, 50)
    assert of_validation[0] == "n01751748"  # ILSVRC2012_val_00000001 is a sea snake


def test_identity_of_raw_data_changes_with_each_of_its_files(tmp_path):
    raw = raw_as_usual(tmp_path)
    identities = [raw_identity(str(raw))]
    assert raw_identity(str(raw)) == identities[0]
    for name in (TRAIN, VALIDATION, OF_VALIDATION):
        os.utime(raw / name, (1, 1))
        identities.append(raw_identity(str(raw)))
    with (raw / OF_VALIDATION).open("a") as file:
        file.write("\n")
    os.utime(raw / OF_VALIDATION, (1, 1))
    identities.append(raw_identity(str(raw)))
    assert len(set(identities)) == 5
    with pytest.raises(UserError, match=f"lacks {TRAIN} .* and {VALIDATION}"):
        raw_identity(str(tmp_path / "nothing"))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"name": "My Data"}, "name=My Data"),
        ({"num_shards": 0}, "num_shards=0"),
        ({"beam_args": ["--num-shard", "4"]}, "no option --num-shard,"),
        ({"beam_args": ["--runner=NoSuchRunner"]}, "NoSuchRunner"),
        ({"beam_args": ["--runner=DataflowRunner"]}, "Missing required option: project"),
        ({"output": "/dev/null/output"}, "/dev/null/output/.* cannot be written: Not a directory"),
    ],
)
def test_arguments_that_make_no_sense_are_refused_before_anything_is_written(arguments, says, raw, tmp_path):
    with pytest.raises(UserError, match=says):
        build(str(raw), **({"output": str(tmp_path / "output")} | arguments))
    assert not (tmp_path / "output").exists()


def without_progress(said: str) -> list[str]:
    """The lines of stderr apart from those of the progress."""
    return [line for line in said.splitlines() if not line.startswith("[build-tfrecords] ")]


def phases_of(run) -> dict[str, list[tuple[int, int]]]:
    """What `run(on_progress)` reports of each phase, in the order of the phases."""
    seen: dict[str, list[tuple[int, int]]] = {}

    def on_progress(phase: str, done: int = 0, total: int = 0, text: str = "") -> None:
        seen.setdefault(phase, []).append((done, total))

    run(on_progress)
    return seen


def test_each_phase_goes_from_nothing_to_all_and_counts_images_where_they_take_the_time(raw, tmp_path, monkeypatch):
    def convert_to(output: Path):
        return lambda on_progress: build(str(raw), str(output), num_shards=2, on_progress=on_progress)

    seen = phases_of(convert_to(tmp_path / "output"))
    assert [*seen] == [
        "listing raw files",
        "reading pieces of the raw files",
        "listing images, MB",
        "writing images",
        "verifying the dataset",
    ]
    assert (seen["writing images"][0], seen["writing images"][-1]) == ((0, 170), (170, 170))
    assert all(reported == sorted(reported) and reported[-1][0] == reported[-1][1] for reported in seen.values())

    with monkeypatch.context() as patched:
        patched.setattr(convert, "publish", {}.__getitem__)
        with pytest.raises(TypeError):
            build(str(raw), str(tmp_path / "again"), num_shards=2)
    seen = phases_of(convert_to(tmp_path / "again"))
    assert [*seen] == [
        "listing raw files",
        "reading pieces of the raw files",
        "listing images, MB",
        "verifying finished shards",
        "verifying the dataset",
    ]


def test_images_are_counted_within_an_archive_as_they_are_checked(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (1000, 1000, 3)).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "jpeg", quality=95)
    raw = write_raw(tmp_path / "raw", {"n01000001": {f"n01000001_{n}.JPEG": buffer.getvalue() for n in range(4)}}, {}, None)
    options = {"validation": False, "on_bad_image": "skip"}
    seen = phases_of(lambda on_progress: build(str(raw), str(tmp_path / "output"), on_progress=on_progress, **options))
    counts = [done for done, _ in seen["checking images, MB"]]
    assert counts == sorted(counts)
    assert len({*counts}) == 6, counts  # none, four images, and the total


def test_progress_of_a_runner_counts_bytes_listed_and_bytes_written(raw, tmp_path, monkeypatch):
    monkeypatch.setattr(runners, "_SECONDS_BETWEEN_POLLS", 0.01)
    seen = phases_of(lambda on_progress: build(str(raw), str(tmp_path), num_shards=2, beam_args=BEAM, on_progress=on_progress))
    assert [*seen][-2:] == ["listing images, MB", "writing images, MB"]
    plan = make_plan(str(raw), str(tmp_path / "other"), num_shards=2)
    total = sum(archive.size for archive in plan.raw.archives) // 10**6 + 1
    assert (seen["listing images, MB"][0], seen["writing images, MB"][-1]) == ((0, total), (total, total))
    assert all(reported == sorted(reported) for reported in seen.values())


def test_bytes_done_on_a_runner_are_those_of_the_reported_archives_and_shards(raw, tmp_path):
    plan = make_plan(str(raw), str(tmp_path), num_shards=4)
    listed = [archive.size for archive in plan.raw.archives]
    assert verify.bytes_done(plan) == (0, 0)
    index_archive(0, plan)
    index_archive(3, plan)
    assert verify.bytes_done(plan) == (listed[0] + listed[3], 0)
    for name in ("images-train.tfrecord-00000-of-00004", "images-validation.tfrecord-00002-of-00004"):
        (Path(plan.work) / f"{name}.json").write_text("{}")
    assert verify.bytes_done(plan) == (listed[0] + listed[3], sum(listed[:3]) // 4 + listed[3] // 4)


def run_main(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "beam_jobs.build_tfrecords", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1], check=False)


def test_command_prints_its_result_as_json_and_nothing_else(raw, built, tmp_path):
    done = run_main("--raw", str(raw), "--output", str(tmp_path / "output"), "--num-shards", "2", "--json")
    assert done.returncode == 0
    assert json.loads(done.stdout) == {
        "output": str(tmp_path / "output"),
        "name": "images",
        "fingerprint": read_manifest(str(built)).fingerprint,
        "classes": 3,
        "splits": {
            "train": {"images": 150, "shards": 2, "repaired": 0, "rejected": 0, "resized": 0},
            "validation": {"images": 20, "shards": 2, "repaired": 0, "rejected": 0, "resized": 0},
        },
    }
    assert all(line.startswith("[build-tfrecords] ") for line in done.stderr.splitlines()), done.stderr
    assert contents(tmp_path / "output") == contents(built)


def test_command_ends_with_one_line_and_code_2_where_raw_data_is_missing(tmp_path):
    done = run_main("--raw", str(tmp_path), "--output", str(tmp_path / "output"))
    assert done.returncode == 2
    missing = f"{TRAIN} (or train/ with images) and {VALIDATION} (or val/ with images)"
    (line,) = without_progress(done.stderr)
    assert line == f"error: {tmp_path} holds no raw ImageNet: it lacks {missing}; docs/conversion.md lists every layout"


def test_command_ends_with_one_line_and_code_2_where_an_archive_is_bad(tmp_path):
    raw = raw_as_usual(tmp_path / "raw", validation=validation_images(3))
    done = run_main("--raw", str(raw), "--output", str(tmp_path / "output"))
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.splitlines()[-1].startswith(f"error: {VALIDATION} has 3 images and there are 20 labels")
    assert "Traceback" not in done.stderr


def test_a_file_is_there_whole_or_not_at_all(tmp_path):
    def fail_half_way() -> None:
        with files.open_to_write(str(tmp_path / "file")) as file:
            file.write(b"half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail_half_way()
    assert list(tmp_path.iterdir()) == []

"""The raw file of every image: known by ID whatever the layout, and named where a record turns out to be bad."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from support.raw_data import (
    SYNSETS,
    TRAIN,
    VALIDATION,
    picture,
    raw_as_usual,
    read_records,
    train_images,
    validation_images,
    without_segments,
    write_raw,
)

from beam_jobs import images, inspect_dataset
from beam_jobs.job import build
from beam_jobs.sources import source_of
from trainer import bad_records
from trainer.presets import resolve
from trainer.shared.errors import UserError
from trainer.shared.progress import parse_line
from trainer.shared.records import read_manifest
from trainer.shared.sources import count_sources, pack_sources, sources_file, unpack_source

BAD_IN_TRAIN, BAD_IN_VALIDATION = f"{SYNSETS[1]}_7.JPEG", "ILSVRC2012_val_00000007.JPEG"


def test_every_image_of_the_archives_has_its_member_as_source(raw, built):
    manifest = read_manifest(str(built))
    names = [f"{TRAIN}/{synset}.tar/{name}" for synset, of in train_images().items() for name in sorted(of)]
    assert [source_of(str(built), manifest, "train", image_id) for image_id in range(150)] == names
    names = [f"{VALIDATION}/{name}" for name in sorted(validation_images())]
    assert [source_of(str(built), manifest, "validation", image_id) for image_id in range(20)] == names


def test_the_file_of_that_source_has_the_bytes_of_the_record(tmp_path):
    raw = tmp_path / "raw"
    for synset, of in train_images(per_class=4).items():
        for name, data in of.items():
            path = raw / "train" / synset / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
    for number, data in enumerate(validation_images(6).values()):
        path = raw / "val" / SYNSETS[number % 3] / f"{number}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    (raw / "train" / SYNSETS[0] / "a_1.JPEG").write_bytes(b"")
    manifest = build(str(raw), str(tmp_path / "output"), on_bad_image="skip", images_per_class=3)
    for split in ("train", "validation"):
        for image_id, _, encoded in read_records(tmp_path / "output", split):
            assert (raw / source_of(str(tmp_path / "output"), manifest, split, image_id)).read_bytes() == encoded


def test_names_that_are_no_lines_of_text_are_kept_apart():
    names = ["a\nb", 'with "quotes"', "umlaut \xe4", b"latin-1 \xe4".decode(errors="surrogateescape"), ""]
    packed = pack_sources(names[:2]) + pack_sources([]) + pack_sources(names[2:])
    assert [unpack_source(packed, image_id) for image_id in range(5)] == names
    assert count_sources(packed) == 5
    with pytest.raises(ValueError, match="does not name image 5"):
        unpack_source(packed, 5)


def test_the_command_names_an_image(built, capsys):
    assert inspect_dataset.main([str(built), "--image", "6", "--split", "validation"]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"validation image 6: {VALIDATION}/ILSVRC2012_val_00000007.JPEG\n")
    assert inspect_dataset.main([str(built), "--image", "149", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["synset"], found["source"]) == (SYNSETS[2], f"{TRAIN}/{SYNSETS[2]}.tar/{SYNSETS[2]}_9.JPEG")
    assert found["bytes"] == len(train_images()[SYNSETS[2]][f"{SYNSETS[2]}_9.JPEG"])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--image", "150"], "image ID 150 is not within 0..149, the image IDs of train"),
        (["--image", "-1"], "image ID -1 is not within 0..149"),
        (["--image", "1", "--split", "val"], "has no split val: it has train and validation"),
    ],
)
def test_an_image_that_is_not_there_is_one_line(built, capsys, arguments, says):
    assert inspect_dataset.main([str(built), *arguments]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1


def test_a_full_inspection_reads_the_sources_too(tmp_path):
    raw = write_raw(tmp_path / "raw", train_images(per_class=2), validation_images(2), [SYNSETS[0], SYNSETS[1]])
    manifest = build(str(raw), str(tmp_path / "output"))
    assert inspect_dataset.inspect(str(tmp_path / "output"), full=True).problems == ()
    file = tmp_path / "output" / sources_file(manifest.name, "train")
    file.write_bytes(pack_sources(["one"]))
    (problem,) = inspect_dataset.inspect(str(tmp_path / "output"), full=True).problems
    assert problem == f"{file.name} names 1 raw files, and the manifest has 6 records of train"
    file.write_bytes(file.read_bytes()[:-3])
    (problem,) = inspect_dataset.inspect(str(tmp_path / "output"), full=True).problems
    assert "is damaged" in problem


# ---- A bad record


@pytest.fixture(scope="module")
def let_through(tmp_path_factory) -> Path:
    """A dataset with an image in each split that no decoder takes, as a conversion made it that did not look at tables."""
    folder = tmp_path_factory.mktemp("let-through")
    train, validation = train_images(), validation_images()
    train[SYNSETS[1]][BAD_IN_TRAIN] = validation[BAD_IN_VALIDATION] = without_segments(picture(1), 0xDB)
    raw = raw_as_usual(folder / "raw", train=train, validation=validation)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(images, "prepare", lambda data, options: images.Prepared(data, "", False))
        build(str(raw), str(folder / "data"), num_shards=2)
    return folder / "data"


def test_pretraining_names_the_record_and_the_raw_file(let_through, tmp_path):
    from trainer.train import train

    tiny = ("depth=10", "width_multiplier=0.0625", "image_size=16", "global_batch_size=50", "epochs=1", "warmup_epochs=0")
    with pytest.raises(UserError, match=rf"^record \d+ of .*train\.tfrecord-0000.*; it is image 97, from .*/{BAD_IN_TRAIN}$"):
        train(resolve("demo", tiny), str(let_through), str(tmp_path / "run"))


@pytest.mark.parametrize(
    ("split", "named"), [("train", f"image 97, from .*/{BAD_IN_TRAIN}"), ("validation", f"image 6, from .*/{BAD_IN_VALIDATION}")]
)
def test_the_evaluation_names_the_record_and_the_raw_file(let_through, tmp_path, split, named):
    from eval.measure.features import extract
    from trainer.encoder import make_encoder

    config = resolve("demo", ["depth=10", "width_multiplier=0.0625", "image_size=16"])
    encoder = make_encoder(config.encoder, config.views.image_size, config.run.seed)
    with pytest.raises(UserError, match=rf"^record \d+ of .*{split}\.tfrecord-0000.*; it is {named}$"):
        extract(encoder, config, str(let_through), read_manifest(str(let_through)), split, str(tmp_path))


def test_fine_tuning_on_a_subset_names_a_torn_record(built, tmp_path):
    import shutil

    from trainer.input_pipeline import labelled_batches

    folder = Path(shutil.copytree(built, tmp_path / "data"))
    shard = next(folder.glob("*train*00001-of*"))
    content = bytearray(shard.read_bytes())
    content[40] ^= 0xFF
    shard.write_bytes(content)
    config, manifest = resolve("demo"), read_manifest(str(folder))
    with pytest.raises(UserError, match=rf"{shard.name} is torn or altered after record -?\d+.*; it is image \d+, from {TRAIN}/"):
        labelled_batches(config.views, 8, config.run, str(folder), manifest, np.arange(100))


def test_only_the_shard_of_a_bad_record_is_read_one_by_one(let_through, built, monkeypatch, capsys):
    one_by_one = []
    monkeypatch.setattr(bad_records, "_first_of_shard", lambda *arguments: one_by_one.append(arguments[3].file))
    bad_records.first_bad_record(str(built), read_manifest(str(built)), "train")
    assert not one_by_one
    bad_records.first_bad_record(str(let_through), read_manifest(str(let_through)), "train")
    assert len(one_by_one) == 1
    assert capsys.readouterr().err == ""


def test_the_search_is_a_phase_of_the_job_that_met_the_record(let_through, built):
    seen = []

    def on_progress(phase: str, done: int = 0, total: int = 0, text: str = "") -> None:
        seen.append((phase, done, total))

    assert bad_records.first_bad_record(str(built), read_manifest(str(built)), "train", on_progress) is None
    assert {phase for phase, _, _ in seen} == {"searching the train images for the bad record"}
    assert (seen[0][1:], seen[-1][1:]) == ((0, 150), (150, 150))
    assert seen == sorted(seen)

    def failing():
        yield from ()
        raise tf.errors.InvalidArgumentError(None, None, "bad")

    folder = str(let_through)
    seen.clear()
    with pytest.raises(UserError, match="it is image"):
        next(bad_records.naming_bad_records(failing(), folder, read_manifest(folder), "train", on_progress))
    assert seen[0] == ("searching the train images for the bad record", 0, 150)
    assert re.fullmatch(r"reading images-train\.tfrecord-0000\d-of-00002 record by record", seen[-1][0])


def test_a_job_without_such_a_phase_shows_the_search_all_the_same(let_through, capsys):
    def failing():
        yield from ()
        raise tf.errors.InvalidArgumentError(None, None, "bad")

    folder = str(let_through)
    with pytest.raises(UserError, match="it is image"):
        next(bad_records.naming_bad_records(failing(), folder, read_manifest(folder), "train"))
    said = capsys.readouterr().err.splitlines()
    assert parse_line(said[0]) == ("bad-record", "searching the train images for the bad record", 0, 150, "")

"""The demo's raw data, made for real."""

import io
import socket
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from beam_jobs.job import build
from pipelines import demo_data
from pipelines.demo_data import make_raw
from trainer.shared.errors import UserError


def members(archive: bytes) -> dict[str, bytes]:
    with tarfile.open(fileobj=io.BytesIO(archive)) as opened:
        return {member.name: opened.extractfile(member).read() for member in opened}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def raw(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "raw"
    make_raw(str(folder))
    return folder


def test_it_has_imagenets_raw_layout(raw):
    words = [line.split(" ") for line in (raw / "synset_words.txt").read_text().splitlines()]
    assert len(words) == 19
    train = members((raw / "ILSVRC2012_img_train.tar").read_bytes())
    assert list(train) == [f"{synset}.tar" for synset, _ in words]
    for synset, _ in words:
        assert list(members(train[f"{synset}.tar"])) == [f"{synset}_{number}.JPEG" for number in range(1, 106)]
    validation = members((raw / "ILSVRC2012_img_val.tar").read_bytes())
    assert list(validation) == [f"ILSVRC2012_val_{number:08d}.JPEG" for number in range(1, 571)]
    labels = (raw / "validation_labels.txt").read_text().splitlines()
    assert Counter(labels) == {synset: 30 for synset, _ in words}
    assert labels != sorted(labels)


def test_images_are_jpegs_of_many_small_sizes(raw):
    sizes = set()
    for content in members((raw / "ILSVRC2012_img_val.tar").read_bytes()).values():
        with Image.open(io.BytesIO(content)) as image:
            assert image.format == "JPEG"
            sizes.add(image.size)
    assert len(sizes) > 200
    assert min(min(size) for size in sizes) >= 16
    assert max(max(size) for size in sizes) <= 128


def test_it_is_the_same_to_the_byte_each_time_and_needs_no_network(raw, tmp_path, monkeypatch):
    def no_network(*_, **__):
        raise AssertionError("the demo's photographs must come from installed packages")

    monkeypatch.setattr(socket, "socket", no_network)
    seen = []
    make_raw(str(tmp_path / "again"), lambda done, total: seen.append((done, total)))
    assert contents(tmp_path / "again") == contents(raw)
    assert seen == [(done, 19) for done in range(20)]


def test_training_images_are_of_the_left_and_validation_images_of_the_right(tmp_path, monkeypatch):
    photograph = np.zeros((100, 200), np.uint8)
    photograph[:, 140:] = 255
    monkeypatch.setattr(demo_data, "_load", lambda _: Image.fromarray(photograph))
    make_raw(str(tmp_path / "raw"))
    train = members((tmp_path / "raw" / "ILSVRC2012_img_train.tar").read_bytes())
    for level, archive in [
        *((0, archive) for archive in train.values()),
        (255, (tmp_path / "raw" / "ILSVRC2012_img_val.tar").read_bytes()),
    ]:
        for content in members(archive).values():
            with Image.open(io.BytesIO(content)) as image:
                assert image.getextrema() == (level, level)


def test_what_is_there_is_left_alone(raw):
    before = {path.name: path.stat().st_mtime_ns for path in raw.iterdir()}
    make_raw(str(raw))
    assert {path.name: path.stat().st_mtime_ns for path in raw.iterdir()} == before


def test_it_is_there_whole_or_not_at_all(tmp_path):
    def interrupt(done: int, _: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_raw(str(tmp_path / "raw"), interrupt)
    assert list(tmp_path.iterdir()) == []


def test_an_empty_folder_is_filled_and_one_in_use_refused(raw, tmp_path):
    (tmp_path / "empty").mkdir()
    make_raw(str(tmp_path / "empty"))
    assert contents(tmp_path / "empty") == contents(raw)
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "thesis.txt").touch()
    with pytest.raises(UserError, match="in the way"):
        make_raw(str(tmp_path / "used"))
    assert [path.name for path in (tmp_path / "used").iterdir()] == ["thesis.txt"]


def test_a_photograph_that_is_not_installed_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(demo_data.PHOTOGRAPHS, "zebra", "skimage/data/zebra.png")
    with pytest.raises(UserError, match=r"skimage/data/zebra.png is not installed"):
        make_raw(str(tmp_path / "raw"))


def test_it_converts_like_any_raw_data(raw, tmp_path):
    manifest = build(str(raw), str(tmp_path / "output"), name="demo")
    assert manifest.splits["train"].records_per_class == (105,) * 19
    assert manifest.splits["validation"].records_per_class == (30,) * 19
    assert not manifest.splits["train"].repaired

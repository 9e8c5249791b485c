"""What it takes to add a loss, a protocol, a raw layout: one new file and one line elsewhere, on a copy of the sources.

`pytest -n 0 -rP tests/test_additions.py` prints what each addition touched.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.raw_data import LABELS, train_images, validation_images

from trainer.shared.records import read_manifest

ROOT = Path(__file__).parents[1]
ROOMS = ("trainer", "eval", "beam_jobs")


@pytest.fixture
def copy(tmp_path):
    for room in ROOMS:
        shutil.copytree(ROOT / room, tmp_path / room, ignore=shutil.ignore_patterns("__pycache__"))
    git(tmp_path, "init", "--quiet")
    git(tmp_path, "add", "--all")
    git(tmp_path, "-c", "user.name=a", "-c", "user.email=a@b", "commit", "--quiet", "--message", "Copy")
    return tmp_path


def git(folder: Path, *arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=folder, check=True, capture_output=True, text=True).stdout


def add(copy: Path, new: str, source: str, elsewhere: str, before: str, after: str) -> None:
    """Writes the `new` file, changes or adds one line `elsewhere`, and holds the whole addition to just that."""
    (copy / new).write_text(source)
    text = (copy / elsewhere).read_text()
    assert text.count(before) == 1
    (copy / elsewhere).write_text(text.replace(before, after))
    git(copy, "add", "--all")
    touched = git(copy, "diff", "--cached", "--numstat").splitlines()
    print(*touched, sep="\n")
    lines = len(source.splitlines())
    removed = 1 - (after.count("\n") - before.count("\n"))
    assert sorted(touched) == sorted([f"{lines}\t0\t{new}", f"1\t{removed}\t{elsewhere}"])


def python(copy: Path, code: str) -> str:
    """Runs code with the copy's rooms and returns what it prints."""
    environ = {**os.environ, "PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environ, cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_loss(copy):
    source = '''"""Only the positives: the mean of one minus their cosine."""

from dataclasses import dataclass

import tensorflow as tf


def make(settings):
    return Attraction()


@dataclass(frozen=True)
class Attraction:
    vectors = {}

    def __call__(self, projections, stored):
        return 1 - tf.reduce_mean(tf.reduce_sum(projections.z1 * projections.z2, axis=1)), {}

    def metrics(self, vectors):
        return {}
'''
    where = ("trainer/losses/attraction.py", source, "trainer/settings.py")
    add(copy, *where, '"nt_xent", "decoupled"]', '"nt_xent", "decoupled", "attraction"]')
    code = """
import tensorflow as tf
from trainer.losses import make_loss
from trainer.losses.loss import Projections
from trainer.presets import resolve
z = tf.math.l2_normalize(tf.random.stateless_normal([4, 8], [0, 1]), axis=1)
loss = make_loss(resolve("demo", ["loss=attraction"]).loss)
print(round(float(loss(Projections(z, z, z, z, tf.range(4)), {})[0]), 6))
"""
    assert python(copy, code) in ("0.0\n", "-0.0\n")


def test_a_protocol(copy):
    source = '''"""The protocol `first`: class 0, whatever the image."""

import numpy as np

from eval.measure.protocols.protocol import Protocol, Scores, Work


def scores(context):
    return Scores(np.eye(context.manifest.num_classes, dtype=np.float32)[[0] * len(context.validation.labels)], {})


PROTOCOLS = (Protocol("first", "class 0, whatever the image", lambda config, sizes: Work(), scores),)
'''
    where = ("eval/measure/protocols/first.py", source, "trainer/settings.py")
    add(copy, *where, '"online", "official", "finetune-1"', '"online", "first", "official", "finetune-1"')
    code = """
from eval.measure.protocols import chosen
from trainer.presets import resolve
print(*(one.name for one in chosen(resolve("demo", ["linear_eval.protocols=first"]))))
"""
    assert python(copy, code).split()[-1] == "first"


def test_a_raw_layout(copy, raw, built):
    source = '''"""The archives under other names."""

from beam_jobs import files
from beam_jobs.layouts.archives import Archives


class Renamed(Archives):
    def recognise(self, folder, split):
        return super().recognise(f"{folder}/inside", split) if files.find(f"{folder}/inside/ILSVRC2012_img_train.tar") else None


LAYOUT = Renamed()
'''
    where = ("beam_jobs/layouts/renamed.py", source, "beam_jobs/layouts/__init__.py")
    add(copy, *where, '    "archives",\n', '    "renamed",\n    "archives",\n')
    code = f"""
from beam_jobs.raw import raw_identity
from beam_jobs.layouts import LAYOUTS
import os
os.makedirs("raw")
os.symlink({str(raw)!r}, "raw/inside")
print(*(type(one).__name__ for one in LAYOUTS))
print(LAYOUTS[0].recognise("raw", "train").why)
"""
    names, why = python(copy, code).splitlines()
    assert names == "Renamed Archives GzipArchives HuggingFaceParquet HuggingFaceArchives Tfds Kaggle TinyImageNet Folders"
    assert why.endswith("is there")


def test_a_raw_layout_that_is_read_from_beginning_to_end(copy, built):
    source = '''"""SPLIT.lines: each line a synset, a name and an image in hexadecimal digits."""

from beam_jobs import files
from beam_jobs.layouts.layout import Found, Stream, StreamedImage


class Lines(Stream):
    def expects(self, split):
        return f"{split}.lines"

    def recognise(self, folder, split):
        info = files.find(files.join(folder, f"{split}.lines"))
        return Found((info._replace(name=f"{split}.lines"),), "lines are there") if info else None

    def images(self, folder, name, labels):
        with files.open_to_read(files.join(folder, name)) as file:
            for line in file:
                synset, image, digits = line.decode().split()
                yield StreamedImage(image, synset, bytes.fromhex(digits))


LAYOUT = Lines()
'''
    where = ("beam_jobs/layouts/lines.py", source, "beam_jobs/layouts/__init__.py")
    add(copy, *where, '    "archives",\n', '    "lines",\n    "archives",\n')
    (copy / "raw").mkdir()
    lines = [f"{synset} {name} {one.hex()}" for synset, images in train_images().items() for name, one in images.items()]
    (copy / "raw" / "train.lines").write_text("\n".join(reversed(lines)))
    lines = [f"{label} {name} {one.hex()}" for label, (name, one) in zip(LABELS, validation_images().items(), strict=True)]
    (copy / "raw" / "validation.lines").write_text("\n".join(reversed(lines)))
    code = "from beam_jobs.job import build; print(build('raw', 'output').fingerprint)"
    assert python(copy, code).strip() == read_manifest(str(built)).fingerprint

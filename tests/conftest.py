"""Small real datasets for the tests of trainer and eval."""

import hashlib
import io
import os
import signal
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import numpy as np
import pytest
from PIL import Image

from trainer.shared import records

# What a script starts in the background ignores SIGINT, and so does all that it starts, which tests interrupt with it.
signal.signal(signal.SIGINT, signal.default_int_handler)

_LONGEST = (
    "pipeline",
    "distribution",
    "eval_devices",
    "train",
    "gs",
    "submit",
    "attempts",
    "dataflow",
    "containers",
    "lowering",
    "mlflow_server",
    "runners",
    "order",
    "export",
    "linear_eval",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the files that take longest first, so that no worker is left alone with one at the end."""
    rank = {f"test_{name}": number for number, name in enumerate(_LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(rank)))


def stripes(label: int, random: np.random.Generator) -> bytes:
    """A JPEG of stripes whose direction and colour tell its class, with noise."""
    height, width = random.integers(32, 48, 2)
    y, x = np.mgrid[:height, :width]
    waves = np.sin((x * np.cos(label) + y * np.sin(label)) * 0.8)[..., None]
    colour = np.array([label % 3 == channel for channel in range(3)]) * 60.0
    pixels = np.clip(128 + 60 * waves + colour + random.normal(0, 25, (height, width, 3)), 0, 255)
    buffer = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(buffer, "jpeg")
    return buffer.getvalue()


def write_dataset(
    folder: Path,
    *,
    train: int = 48,
    validation: int = 17,
    classes: int = 6,
    shards: int = 2,
    picture: Callable[[int, np.random.Generator], bytes] = stripes,
    example: Callable[[str, bytes, int, int], bytes] = lambda split, encoded, label, image_id: records.encode_example(
        encoded, label, image_id
    ),
) -> records.Manifest:
    """Writes a dataset as design says one is; `example` may write records that are wrong."""
    import tensorflow as tf

    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    splits = {}
    for name, count in {"train": train, "validation": validation}.items():
        labels = [i % classes for i in range(count)]
        order = np.array_split(random.permutation(count), shards)
        written = []
        for number, ids in enumerate(order):
            path = folder / f"test-{name}.tfrecord-{number:05}-of-{shards:05}"
            blocks, size = [], 0
            with tf.io.TFRecordWriter(str(path)) as writer:
                for i, image_id in enumerate(ids):
                    if i % records.RECORDS_PER_BLOCK == 0:
                        blocks.append(size)
                    record = example(name, picture(labels[image_id], random), labels[image_id], int(image_id))
                    writer.write(record)
                    size += len(record) + 16
            content = path.read_bytes()
            assert len(content) == size
            written.append(records.Shard(path.name, len(ids), size, hashlib.sha256(content).hexdigest(), tuple(blocks)))
        per_class = tuple(labels.count(label) for label in range(classes))
        splits[name] = records.Split(count, per_class, tuple(written))
    manifest = records.Manifest("test", f"test-{train}", tuple(f"n{i:08}" for i in range(classes)), splits, "0")
    (folder / records.MANIFEST).write_text(records.manifest_to_json(manifest))
    return manifest


@pytest.fixture(scope="session")
def dataset(tmp_path_factory) -> Path:
    """A dataset of 48 training and 17 validation images in 6 classes."""
    folder = tmp_path_factory.mktemp("dataset")
    write_dataset(folder)
    return folder


@pytest.fixture(scope="session")
def raw(tmp_path_factory) -> Path:
    """What `raw_as_usual` writes: 150 training and 20 validation images of 3 synsets."""
    from raw_data import raw_as_usual

    return raw_as_usual(tmp_path_factory.mktemp("raw"))


@pytest.fixture(scope="session")
def built(raw, tmp_path_factory) -> Path:
    """The dataset of `raw`, in 2 shards a split."""
    from beam_jobs.job import build

    folder = tmp_path_factory.mktemp("built") / "output"
    build(str(raw), str(folder), num_shards=2)
    return folder

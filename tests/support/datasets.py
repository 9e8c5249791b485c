"""A small real dataset, as the conversion leaves one for the trainer and the evaluation."""

import hashlib
import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from trainer.shared import records


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

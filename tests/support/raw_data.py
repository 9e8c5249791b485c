"""Raw data in ImageNet's layout, made by the tests of the conversion, and what they read back."""

import io
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from beam_jobs.layouts.archives import TRAIN_ARCHIVE, VALIDATION_ARCHIVE
from beam_jobs.layouts.labels import VALIDATION_LABELS
from beam_jobs.publish import CONVERSION
from support.datasets import stripes
from trainer.shared.records import ENCODED, IMAGE_ID, LABEL, read_manifest

CIFAR10 = Path(__file__).parents[3] / "shared" / "data" / "cifar10"
TRAIN, VALIDATION, OF_VALIDATION = TRAIN_ARCHIVE, VALIDATION_ARCHIVE, VALIDATION_LABELS
SYNSETS = ("n01000001", "n01000002", "n02000001")


def picture(seed: int, mode: str = "RGB", kind: str = "jpeg") -> bytes:
    """A small image of one random colour and some noise."""
    random = np.random.default_rng(seed)
    channels = Image.new(mode, (1, 1)).getbands()
    pixels = random.integers(20, 200, len(channels)) + random.integers(0, 30, (24, 20, len(channels)))
    buffer = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8).squeeze(), mode).save(buffer, kind)
    return buffer.getvalue()


def tar(members: Mapping[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def write_raw(
    folder: Path, train: Mapping[str, Mapping[str, bytes]], validation: Mapping[str, bytes], labels: Sequence[str] | None
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    inner = {f"{synset}.tar": tar(images) for synset, images in train.items()}
    (folder / TRAIN).write_bytes(tar(inner))
    (folder / VALIDATION).write_bytes(tar(validation))
    if labels is not None:
        (folder / OF_VALIDATION).write_text("".join(f"{label}\n" for label in labels))
    return folder


def train_images(per_class: int = 50) -> dict[str, dict[str, bytes]]:
    """Some of them grey. The order of numbers is not that of names: _10 comes before _2."""
    return {
        synset: {
            f"{synset}_{number}.JPEG": picture(1000 * label + number, "L" if number % 5 == 0 else "RGB")
            for number in range(per_class)
        }
        for label, synset in enumerate(SYNSETS)
    }


def validation_images(count: int = 20) -> dict[str, bytes]:
    return {f"ILSVRC2012_val_{number:08d}.JPEG": picture(9000 + number) for number in range(1, count + 1)}


LABELS = [SYNSETS[number * 7 % 3] for number in range(20)]


def raw_as_usual(folder: Path, **changed) -> Path:
    return write_raw(folder, **({"train": train_images(), "validation": validation_images(), "labels": LABELS} | changed))


def striped_archives(folder: Path) -> Path:
    """Writes 12 training images of each of 3 synsets and 12 validation images, which a network can tell apart."""
    random = np.random.default_rng(0)
    synsets = [f"n0000000{label}" for label in range(3)]
    train = {
        synset: {f"{synset}_{number}.JPEG": stripes(label, random) for number in range(12)}
        for label, synset in enumerate(synsets)
    }
    validation = {f"ILSVRC2012_val_{number + 1:08}.JPEG": stripes(number % 3, random) for number in range(12)}
    return write_raw(folder / "raw", train, validation, [synsets[number % 3] for number in range(12)])


def expected(split: str) -> list[tuple[str, bytes]]:
    """(synset, bytes) of each image, by ID."""
    if split == "train":
        return [(synset, content) for synset, images in sorted(train_images().items()) for _, content in sorted(images.items())]
    return list(zip(LABELS, validation_images().values(), strict=True))


def contents(folder: Path) -> dict[str, bytes]:
    """Returns the files of a dataset, without those that depend on the times and paths of the raw files."""
    files = [path for path in folder.iterdir() if path.name != CONVERSION and not path.name.endswith("-sources.jsonl.gz")]
    return {path.name: path.read_bytes() for path in files}


def without_segments(jpeg: bytes, marker: int) -> bytes:
    """A JPEG without its segments of a kind, whole from its first byte to its last."""
    start = jpeg.find(bytes((0xFF, marker)))
    if start < 0:
        return jpeg
    end = start + 2 + int.from_bytes(jpeg[start + 2 : start + 4])
    return without_segments(jpeg[:start] + jpeg[end:], marker)


def parse(record: bytes) -> tuple[int, int, bytes]:
    import tensorflow as tf

    features = tf.train.Example.FromString(record).features.feature
    assert set(features) == {ENCODED, LABEL, IMAGE_ID}
    return features[IMAGE_ID].int64_list.value[0], features[LABEL].int64_list.value[0], features[ENCODED].bytes_list.value[0]


def read_records(folder: Path, split: str) -> list[tuple[int, int, bytes]]:
    """(ID, label, bytes) in the order of the shards, by TensorFlow, which checks every CRC."""
    import tensorflow as tf

    paths = [str(folder / shard.file) for shard in read_manifest(str(folder)).splits[split].shards]
    return [parse(record) for record in tf.data.TFRecordDataset(paths).as_numpy_iterator()]

"""Raw folders in the layouts that people have, with the images of `support.raw_data`."""

import gzip
import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from beam_jobs.layouts import kaggle
from support.raw_data import LABELS, SYNSETS, TRAIN, VALIDATION, picture, tar, train_images, validation_images, write_raw

TRAINING = train_images()
VALIDATING = dict(zip(validation_images(), zip(LABELS, validation_images().values(), strict=True), strict=True))
"""Name -> (synset, bytes)."""


def write_all(images: dict[Path, bytes]) -> None:
    for path, content in images.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def write_training(folder: Path, within: str = "") -> None:
    write_all({folder / synset / within / name: one for synset, images in TRAINING.items() for name, one in images.items()})


def as_kaggle(folder: Path) -> Path:
    base = folder / "ILSVRC" / "Data" / "CLS-LOC"
    write_training(base / "train")
    write_all({base / "val" / name: one for name, (_, one) in VALIDATING.items()})
    write_all({base / "test" / "ILSVRC2012_test_00000001.JPEG": picture(1)})
    rows = [f"{Path(name).stem},{synset} 1 2 3 4 {synset} 5 6 7 8 " for name, (synset, _) in VALIDATING.items()]
    (folder / kaggle.LABELS).write_text("\r\n".join(["ImageId,PredictionString", *reversed(rows)]) + "\r\n")
    (folder / "LOC_synset_mapping.txt").write_text("".join(f"{synset} a class, of its own\n" for synset in SYNSETS))
    return folder


def as_tiny_imagenet(folder: Path) -> Path:
    for synset in SYNSETS:
        write_all({folder / "train" / synset / f"{synset}_boxes.txt": f"{synset}_0.JPEG\t0\t10\t63\t58\n".encode()})
    write_training(folder / "train", "images")
    write_all({folder / "val" / "images" / name: one for name, (_, one) in VALIDATING.items()})
    lines = [f"{name}\t{synset}\t0\t32\t44\t62\n" for name, (synset, _) in VALIDATING.items()]
    (folder / "val" / "val_annotations.txt").write_text("".join(reversed(lines)))
    (folder / "wnids.txt").write_text("\n".join(reversed(SYNSETS)))
    write_all({folder / "test" / "images" / "test_0.JPEG": picture(1)})
    return folder


def with_synset(name: str, synset: str) -> str:
    return f"{Path(name).stem}_{synset}.JPEG"


def shuffled(seed: int) -> list[tuple[str, int, bytes]]:
    """Training images as Hugging Face names them, with labels, in no order."""
    images = [
        (with_synset(name, synset), label, one) for label, synset in enumerate(SYNSETS) for name, one in TRAINING[synset].items()
    ]
    return [images[place] for place in np.random.default_rng(seed).permutation(len(images))]


def as_parquet(folder: Path) -> Path:
    validating = [(with_synset(name, synset), SYNSETS.index(synset), one) for name, (synset, one) in VALIDATING.items()]
    training = shuffled(0)
    parts = {f"train-{number:05d}-of-00003-0a1b2c3d4e5f": training[number::3] for number in range(3)}
    parts |= {"validation-00000-of-00001": validating[::-1], "test-00000-of-00001": [("ILSVRC2012_test_1.JPEG", -1, b"")]}
    for name, images in parts.items():
        rows = {
            "image": pa.array(
                [{"bytes": one, "path": path} for path, _, one in images],
                pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
            ),
            "label": pa.array([label for _, label, _ in images], pa.int64()),
        }
        (folder / "data").mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table(rows), folder / "data" / f"{name}.parquet", row_group_size=10)
    return folder


def as_hugging_face_archives(folder: Path) -> Path:
    training = shuffled(1)
    for number in range(2):
        write_all({folder / "data" / f"train_images_{number}.tar.gz": zipped({n: c for n, _, c in training[number::2]})})
    validating = {with_synset(name, synset): one for name, (synset, one) in reversed(VALIDATING.items())}
    write_all({folder / "data" / "val_images.tar.gz": zipped(validating)})
    write_all({folder / "data" / "test_images.tar.gz": zipped({"ILSVRC2012_test_00000001.JPEG": picture(1)})})
    return folder


def zipped(members: dict[str, bytes]) -> bytes:
    return gzip.compress(tar(members), 1)


def as_tfds(folder: Path) -> Path:
    import tensorflow_datasets as tfds

    class Imagenet2012(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("5.1.0")
        code_path = None  # TFDS would look for lists of checksums beside it

        def _info(self):
            features = {
                "image": tfds.features.Image(encoding_format="jpeg"),
                "label": tfds.features.ClassLabel(names=list(SYNSETS[::-1])),
                "file_name": tfds.features.Text(),
            }
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, _):
            training = [(name, synset, one) for synset, images in TRAINING.items() for name, one in images.items()]
            validating = [(name, synset, one) for name, (synset, one) in VALIDATING.items()]
            return {"train": self._generate_examples(training), "validation": self._generate_examples(validating)}

        def _generate_examples(self, images):
            for name, synset, one in images:
                yield name, {"image": io.BytesIO(one), "label": synset, "file_name": name}

    builder = Imagenet2012(data_dir=str(folder / "data_dir"))
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(num_shards=2))
    return Path(builder.data_dir)


def as_gzip_archives(folder: Path) -> Path:
    write_raw(folder, TRAINING, {name: one for name, (_, one) in reversed(VALIDATING.items())}, LABELS)
    for name in (TRAIN, VALIDATION):
        (folder / f"{name}.gz").write_bytes(gzip.compress((folder / name).read_bytes(), 1))
        (folder / name).unlink()
    return folder


LAYOUTS: dict[str, Callable[[Path], Path]] = {
    "gzip archives": as_gzip_archives,
    "kaggle": as_kaggle,
    "tiny imagenet": as_tiny_imagenet,
    "hugging face parquet": as_parquet,
    "hugging face archives": as_hugging_face_archives,
    "tfds": as_tfds,
}
STREAMED = ("gzip archives", "hugging face parquet", "hugging face archives", "tfds")

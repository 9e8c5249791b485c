"""How fast the host makes training batches: against the official recipe, and against decoding alone.

    python tests/benchmarks/input_pipeline.py [--images 512] [--rounds 5]

JPEGs of 500x375 in a dataset, two views of 224 px. The rivals take turns in one run; a turn's ratios are of that turn, so that
what else the machine does falls on all of them. The official recipe is SimCLR's, as SogCLR's TensorFlow code has it: for each
view turn the image into float32, crop, resize bicubically, flip, jitter and grey, all on the host (blur is on the device there
too). Decoding alone reads the same records, decodes each once and throws the picture away.
"""

import argparse
import io
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
if not __package__:  # started by its path
    sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import tensorflow as tf
from PIL import Image
from support.datasets import write_dataset

from trainer.config import Config, replace
from trainer.input_pipeline import training_batches
from trainer.shared import records
from trainer.shared.records import read_manifest

BATCH = 64


def photograph(label: int, random: np.random.Generator) -> bytes:
    """A JPEG of 500x375 and about 90 KB: smooth shapes under grain."""
    y, x = np.mgrid[:375, :500]
    phases = random.uniform(0, 6, 3)
    shapes = np.stack([128 + 80 * np.sin(x * (0.02 + 0.01 * c) + y * 0.03 + phases[c]) for c in range(3)], -1)
    buffer = io.BytesIO()
    pixels = np.clip(shapes + random.normal(0, 18, shapes.shape), 0, 255).astype(np.uint8)
    Image.fromarray(pixels).save(buffer, "jpeg", quality=88)
    return buffer.getvalue()


def serialized(folder: Path) -> tf.data.Dataset:
    return tf.data.TFRecordDataset(sorted(map(str, folder.glob("*train*")))).repeat()


def decoding_alone(folder: Path) -> tf.data.Dataset:
    def decode(record: tf.Tensor) -> tf.Tensor:
        return tf.shape(tf.io.decode_jpeg(records.parse_example(record)[records.ENCODED], channels=3))

    return serialized(folder).map(decode, num_parallel_calls=tf.data.AUTOTUNE).batch(BATCH).prefetch(2)


def official_recipe(folder: Path) -> tf.data.Dataset:
    def view(image: tf.Tensor) -> tf.Tensor:
        image = tf.image.convert_image_dtype(image, tf.float32)
        begin, extent, _ = tf.image.sample_distorted_bounding_box(
            tf.shape(image), tf.zeros([1, 0, 4]), 0, 0.0, (3 / 4, 4 / 3), (0.08, 1.0), 100, True
        )
        crop = tf.slice(image, begin, extent)
        pixels = tf.image.random_flip_left_right(tf.image.resize(crop, [224, 224], method="bicubic"))

        def jittered() -> tf.Tensor:
            operations = [
                lambda x: x * tf.random.uniform([], 0.2, 1.8),
                lambda x: tf.image.random_contrast(x, 0.2, 1.8),
                lambda x: tf.image.random_saturation(x, 0.2, 1.8),
                lambda x: tf.image.random_hue(x, 0.2),
            ]
            out, order = pixels, tf.random.shuffle(tf.range(4))
            for stage in range(4):
                out = tf.switch_case(order[stage], [lambda f=f, x=out: f(x) for f in operations])
                out = tf.clip_by_value(out, 0.0, 1.0)
            return out

        pixels = tf.cond(tf.random.uniform([]) < 0.8, jittered, lambda: pixels)
        grey = tf.cond(tf.random.uniform([]) < 0.2, lambda: tf.tile(tf.image.rgb_to_grayscale(pixels), [1, 1, 3]), lambda: pixels)
        return tf.clip_by_value(tf.reshape(grey, [224, 224, 3]), 0.0, 1.0)

    def example(record: tf.Tensor) -> tf.Tensor:
        image = tf.io.decode_jpeg(records.parse_example(record)[records.ENCODED], channels=3)
        return tf.concat([view(image), view(image)], axis=-1)

    return serialized(folder).map(example, num_parallel_calls=tf.data.AUTOTUNE).batch(BATCH).prefetch(2)


def ours(folder: Path, interpolation: str) -> tf.data.Dataset:
    config = replace(Config(), global_batch_size=BATCH, crop_interpolation=interpolation, shuffle_window=256)
    return training_batches(config, str(folder), read_manifest(str(folder)), 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=512, help="in the dataset (default 512)")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each (default 5)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        manifest = write_dataset(folder, train=args.images, validation=1, picture=photograph)
        size = sum(shard.bytes for shard in manifest.splits["train"].shards) / args.images
        print(f"{args.images} JPEGs of 500x375, {size / 1e3:.0f} KB each, {len(os.sched_getaffinity(0))} cores")
        make: dict[str, Callable[[], tf.data.Dataset]] = {
            "decoding alone": lambda: decoding_alone(folder),
            "official recipe": lambda: official_recipe(folder),
            "ours, bilinear": lambda: ours(folder, "bilinear"),
            "ours, bicubic": lambda: ours(folder, "bicubic"),
        }
        rates: dict[str, list[float]] = {name: [] for name in make}
        for turn in range(args.rounds + 1):
            for name, dataset in make.items():
                batches = iter(dataset())  # made anew: what rests takes of the threads of what runs
                for _ in range(8):
                    next(batches)
                begun, steps = time.perf_counter(), 2 * args.images // BATCH
                for _ in range(steps):
                    next(batches)
                if turn:
                    rates[name].append(steps * BATCH / (time.perf_counter() - begun))
                del batches
        print(f"{'':16} images/s  of decoding alone  of the official recipe   (medians; lowest to highest)")
        for name, values in rates.items():
            print(f"{name:16} {statistics.median(values):8.0f}", end="")
            for rival in ("decoding alone", "official recipe"):
                ratios = sorted(own / other for own, other in zip(values, rates[rival], strict=True))
                print(f"   {statistics.median(ratios):5.2f} ({ratios[0]:.2f}-{ratios[-1]:.2f})", end="")
            print()


if __name__ == "__main__":
    main()

"""What `gpu_run.py` does on the machine with TensorFlow: it prepares the runs, and evaluates what they end with."""

import gzip
import itertools
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from benchmarks.gpu_run import ABOUT, DATA, PROJECT, read_network
from eval.measure.features import extract, load_encoder
from eval.measure.logistic import top_k_accuracy
from eval.measure.protocols.cached import fit_with_choice
from trainer import checkpoint as checkpoints
from trainer.augmentation import random_box
from trainer.bad_records import parse
from trainer.config import Config, as_dict, config_from_dict
from trainer.encoder import make_encoder
from trainer.folder import CONFIG
from trainer.input_pipeline import make_sampler
from trainer.lowering import OneOfMany, lower_step
from trainer.optimizer import total_steps
from trainer.presets import resolve
from trainer.shared import records
from trainer.shared.errors import UserError
from trainer.shared.files import whole_file, write_whole
from trainer.state import create_train_state

PRESET = "sogclr_cifar10_r18w025_b128"
ARMS = {"simclr": ("loss=nt_xent",), "sogclr": ()}


def prepare(data: Path, output: Path, overrides: Sequence[str], batches: Sequence[int], seeds: Sequence[int]) -> None:
    """Leaves in the empty folder `output` what the machine with the GPU needs to train each arm with each batch size and seed.

    `data` is a dataset whose training images all have the same size. `overrides` are settings of all runs.
    """
    manifest = records.read_manifest(str(data))
    images, image_ids, labels = training_images(data)
    _write_compressed(output / DATA, {"differences": differences(images), "image_ids": image_ids, "labels": labels})
    runs = []
    for arm, batch, seed in itertools.product(ARMS, batches, seeds):
        own = [*overrides, *ARMS[arm], f"global_batch_size={batch}", f"seed={seed}"]
        config, one = resolve(PRESET, own), OneOfMany(1, recompute_in_backward=False)
        state = create_train_state(config, len(images), manifest.num_classes, one)
        program, order = lower_step(config, state, one), order_of(config, data, len(images))
        files = {
            "step": f"step-{arm}-b{batch}.hlo.gz",
            "initial": f"initial-s{seed}.npz",
            "order": f"order-b{batch}-s{seed}.npz",
            "boxes": f"boxes-s{seed}.npz",
        }
        missing = {kind for kind, name in files.items() if not (output / name).exists()}
        if "step" in missing:
            write_whole(str(output / files["step"]), gzip.compress(program.hlo, mtime=0))
        if "initial" in missing:
            _write_compressed(output / files["initial"], state.arrays())
        if "order" in missing:
            _write_compressed(output / files["order"], {"order": order.astype(np.min_scalar_type(len(images)))})
        if "boxes" in missing:
            # A run's last step may end in one epoch more.
            boxes = boxes_of(config, images.shape[1:], image_ids, config.optimizer.epochs + 1)
            _write_compressed(output / files["boxes"], {"boxes": boxes.astype(np.min_scalar_type(max(images.shape[1:])))})
        runs.append(
            {
                "name": f"gpu-{arm}-b{batch}-s{seed}",
                **{"arm": arm, "batch": batch, "seed": seed, "steps": len(order) // batch, "files": files},
                **{"arguments": list(program.arguments.items()), "metrics": program.metrics},
                **{"image_size": config.views.image_size, "config": as_dict(config), "overrides": own},
                **{"dataset_fingerprint": manifest.fingerprint, "synsets": manifest.synsets},
            }
        )
    # Last: without it, there is nothing to train.
    write_whole(str(output / ABOUT), json.dumps(runs).encode())


def training_images(data: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the training images, [N, H, W, 3] uint8, their IDs and labels, [N] int64, in the order of the shards' records."""
    manifest = records.read_manifest(str(data))
    split = manifest.splits["train"]
    files = [str(data / shard.file) for shard in split.shards]
    examples = [parse(record, split.records, manifest.num_classes) for record in tf.data.TFRecordDataset(files)]
    images = [tf.io.decode_jpeg(one[records.ENCODED], channels=3).numpy() for one in examples]
    if len({image.shape for image in images}) > 1:
        raise UserError(f"the training images of {data} have several sizes: only images of one size are taken")
    ids, labels = (np.array([int(one[name]) for one in examples]) for name in (records.IMAGE_ID, records.LABEL))
    return np.stack(images), ids, labels


def order_of(config: Config, data: Path, num_images: int) -> np.ndarray:
    """Returns the position among the shards' records of each image of a run, in order, [steps * batch] int64."""
    count = total_steps(config.optimizer, num_images) * config.optimizer.global_batch_size
    taken, windows = 0, []
    for window in make_sampler(config.optimizer.global_batch_size, config.run, records.read_manifest(str(data))).windows(0):
        windows.append(window["positions"].numpy())
        taken += len(windows[-1])
        if taken >= count:
            break
    return np.concatenate(windows)[:count]


def boxes_of(config: Config, shape: tuple[int, ...], image_ids: np.ndarray, epochs: int) -> np.ndarray:
    """Returns the boxes of both views of every image in every epoch: top, left, height and width, [epochs, N, 2, 4] int32.

    `shape` is that of an image.
    """

    def boxes(epoch: tf.Tensor, image_id: tf.Tensor) -> tf.Tensor:
        keys = [tf.stack([tf.constant(config.run.seed, tf.int64) * 2**32 + epoch, 3 * image_id + view]) for view in range(2)]
        return tf.stack([random_box(tf.constant(shape), config.views.crop_min_area, key) for key in keys])

    each = tf.data.Dataset.from_tensor_slices(image_ids)
    every = tf.data.Dataset.range(epochs).flat_map(lambda epoch: each.map(lambda image_id: boxes(epoch, image_id)))
    return np.stack(list(every.batch(len(image_ids)).as_numpy_iterator()))


def differences(images: np.ndarray) -> np.ndarray:
    """Returns `images`, [N, H, W, 3] uint8, as differences that compress well. `from_differences` turns them back."""
    coloured = images.copy()
    coloured[..., [0, 2]] -= images[..., 1:2]
    left = np.diff(coloured, axis=2, prepend=np.uint8(0))
    return np.ascontiguousarray(np.moveaxis(left, 3, 0))


def finish(folder: Path, output: Path, work: Path, results: Path) -> None:
    """Evaluates the runs of `folder` that have ended in `output` and have no line in `results`, and appends their lines."""
    done = {json.loads(line)["name"] for line in results.read_text().splitlines()} if results.exists() else set()
    for run in json.loads((folder / ABOUT).read_text()):
        if run["name"] not in done and (output / f"{run['name']}.0.npz").exists():
            line = evaluated(run, *read_network(output, run), work)
            with results.open("a") as file:
                file.write(json.dumps(line) + "\n")
            print(f"{run['name']}: top-1 {line['top_1']:.2%}, untrained {line['untrained_top_1']:.2%}", flush=True)


def evaluated(run: Mapping[str, Any], arrays: Mapping[str, np.ndarray], about: Mapping[str, Any], work: Path) -> dict[str, Any]:
    """Makes WORK/runs/NAME, a checkpoint folder, and returns the line of a run: its encoder's cached linear eval."""
    data, target = str(work / "data"), work / "runs" / run["name"]
    manifest, config = records.read_manifest(data), config_from_dict(run["config"])
    if manifest.fingerprint != run["dataset_fingerprint"]:
        raise UserError(f"{data} is not the dataset of {run['name']}, whose fingerprint is {run['dataset_fingerprint']}")
    code = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=PROJECT).stdout.strip()
    stored = checkpoints.Checkpoint(about["step"], arrays, about["metrics"], run["name"])
    checkpoints.save(str(target), stored, keep=1)
    described = {name: run[name] for name in ("config", "dataset_fingerprint", "synsets")}
    described |= {"num_images": manifest.splits["train"].records, "num_classes": manifest.num_classes}
    write_whole(str(target / CONFIG), json.dumps({**described, "preset": PRESET, "code_version": code}, indent=1).encode())

    def evaluate(encoder: Any) -> tuple[np.ndarray, np.ndarray, float]:
        with tempfile.TemporaryDirectory() as kept:
            train, validation = (extract(encoder, config, data, manifest, split, kept) for split in ("train", "validation"))
            classifier = fit_with_choice(train, manifest.num_classes, config.linear_eval)
            whole = validation.whole()
        return classifier.logits(whole.values), whole.labels, classifier.l2_penalty

    logits, labels, penalty = evaluate(load_encoder(config, stored))
    control, _, _ = evaluate(make_encoder(config.encoder, config.views.image_size, config.run.seed))
    return {
        **{"name": run["name"], "group": "gpu", "arm": run["arm"], "batch": run["batch"], "seed": run["seed"]},
        "top_1": top_k_accuracy(logits, labels, 1),
        "top_5": top_k_accuracy(logits, labels, 5),
        "untrained_top_1": top_k_accuracy(control, labels, 1),
        "l2_penalty": penalty,
        "train": {key.removeprefix("train/"): round(value, 6) for key, value in about["metrics"].items()},
        **{"steps": about["step"], "state_sha256": checkpoints.sha256_of(arrays), "dataset_fingerprint": manifest.fingerprint},
        **{"code": code, "device": about["device"], "device_minutes": round(about["seconds"] / 60, 2)},
        "command": f"gpu_run.py train: --preset {PRESET} --set {' '.join(run['overrides'])}",
        "correct": np.packbits(logits.argmax(1) == labels).tobytes().hex(),
    }


def convert(raw: Path, data: Path, images_per_class: int) -> None:
    """Converts raw images, unless `data` is a dataset already."""
    if not (data / "manifest.json").exists():
        chosen = ["--images-per-class", str(images_per_class)] if images_per_class else []
        command = [sys.executable, "-m", "beam_jobs.build_tfrecords", "--raw", raw, "--output", data, "--allow-other-counts"]
        subprocess.run([*command, *chosen], check=True, cwd=PROJECT)


def _write_compressed(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    with whole_file(str(path)) as file:
        np.savez_compressed(file, **dict[str, Any](arrays))

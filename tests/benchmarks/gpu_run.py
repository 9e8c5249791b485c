"""SimCLR and SogCLR on CIFAR-10 on a machine with JAX and a GPU and without TensorFlow. It takes the trainer's own step.

    python tests/benchmarks/gpu_run.py prepare --raw RAW --work WORK --output FOLDER    here: what that machine needs
    PYTHON tests/benchmarks/gpu_run.py train FOLDER --work STATES --output OUT          there: the runs, one after another
    PYTHON tests/benchmarks/gpu_run.py time FOLDER                                      there: a ResNet-50's step at 224 px
    python tests/benchmarks/gpu_run.py finish FOLDER OUT --work WORK --results FILE     here: evaluation, a line a run

PYTHON has NumPy and JAX; of this project that machine needs the sources. RAW is CIFAR-10 in ImageNet's raw layout.

`prepare` converts RAW, unless WORK/data is there, and lowers the step of each arm and batch size. FOLDER gets the programs, the
training images, the order in which the runs see them, the boxes of all crops, and the initial state. 20,000 images take 36 MB,
the boxes .1 MB an epoch, the order .04 MB an epoch for each batch size, the state 3 MB a seed at a quarter of ResNet-18's width
(46 MB at the whole), the programs 4 MB: 54 MB in all by default. `--images-per-class` and `--epochs` make FOLDER smaller.

`train` saves the state in STATES every `--every` steps, whole or not at all. The same command goes on from there. With
`--minutes`, it stops by then and exits with code 75: run me again. OUT gets a run's network when the run has ended, in files
below 15 MiB. Order, boxes and random numbers are the trainer's, bit for bit. The views are cut from whole images: where a JPEG
has fewer samples of colour than of brightness, the trainer's decoder of a part gives other pixels at that part's edge.

A process that was killed and started again ends with the same bits on a CPU. On a GPU, XLA chooses kernels by their time, so two
processes may round differently. NVIDIA's kernels also round factors in float32 to TF32, as TensorFlow's do.

`finish` makes a checkpoint folder of each run, WORK/runs/NAME, without the optimizer's slots: `python -m eval.task` takes it.
The line that it appends to FILE has the keys of `evidence.py`'s lines.
"""

import argparse
import functools
import gzip
import hashlib
import json
import math
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np

if not __package__:  # started by its path, perhaps where this project is not installed
    sys.path.insert(0, str(Path(__file__).absolute().parents[2]))
    sys.path.insert(0, str(Path(__file__).absolute().parents[1]))

from benchmarks import portable_step
from benchmarks.philox import uniform
from trainer.shared.errors import UserError
from trainer.shared.files import write_arrays

PROJECT = Path(__file__).absolute().parents[2]
TIMED = ("sogclr_imagenet_r50_b512", ("global_batch_size=128", "precision=bfloat16"))
DATA, ABOUT, TIMING = "data.npz", "runs.json", "timing"
MODELS = ("encoder", "projection", "classifier")
PART_BYTES = 15 * 2**20
AGAIN = 75
"""The exit code of a command that stopped on purpose and is to be started again (`trainer.preemption.EXIT_CODE`)."""


def from_differences(stored: np.ndarray) -> np.ndarray:
    """Returns the images, [N, H, W, 3] uint8, of what `benchmarks.gpu_here.differences` made of them, [3, N, H, W] uint8."""
    images = np.cumsum(np.moveaxis(stored, 0, 3), axis=2, dtype=np.uint8)
    images[..., [0, 2]] += images[..., 1:2]
    return images


def batch_of(
    run: Mapping[str, Any], step: int, order: np.ndarray, boxes: np.ndarray, image_ids: np.ndarray, labels: np.ndarray
) -> dict[str, np.ndarray]:
    """Returns the batch of step `step`, from 0, without its views: `draws`, `image_id` and `label` as the trainer has them.

    Also returns `position`, [B], and `boxes`, [B, 2, 4] int32, of which `views_of` makes the views.
    """
    visits = np.arange(step * run["batch"], (step + 1) * run["batch"])
    positions = order[visits].astype(np.int64)
    epochs, ids = visits // len(image_ids), image_ids[positions]
    draws = dict(run["arguments"])["batch/draws"][0][2]
    keys = np.stack([run["seed"] * 2**32 + epochs, 3 * ids + 2], axis=1)
    return {
        "draws": uniform(keys, 2 * draws).reshape(-1, 2, draws),
        "image_id": ids,
        "label": labels[positions],
        "position": positions,
        "boxes": boxes[epochs, positions].astype(np.int32),
    }


def views_of(xp: Any, images: Any, boxes: Any, size: int) -> Any:
    """Returns both views of each image, [B, 2, size, size, 3] uint8, as `trainer.augmentation.resize_crop` makes bilinear ones.

    `images` is [B, H, W, 3] uint8, `boxes` [B, 2, 4] int32: top, left, height and width. `xp` is NumPy or jax.numpy.
    """

    def places(begin: Any, extent: Any) -> tuple[Any, Any, Any]:
        """Returns for each pixel of a side its two neighbours in the image, and the weight of the second."""
        scale = extent.astype(xp.float32)[..., None] / xp.float32(size)
        inside = (xp.arange(size, dtype=xp.float32) + xp.float32(0.5)) * scale - xp.float32(0.5)
        below = xp.floor(inside)
        first = xp.maximum(below.astype(xp.int32), 0)
        second = xp.minimum(below.astype(xp.int32) + 1, extent[..., None] - 1)
        return first + begin[..., None], second + begin[..., None], inside - below

    top, bottom, down = places(boxes[..., 0], boxes[..., 2])
    left, right, across = places(boxes[..., 1], boxes[..., 3])
    number = xp.arange(images.shape[0])[:, None, None, None]

    def pixels(rows: Any, columns: Any) -> Any:
        return images[number, rows[..., :, None], columns[..., None, :]].astype(xp.float32)

    down, across = down[..., :, None, None], across[..., None, :, None]
    upper = pixels(top, left) + (pixels(top, right) - pixels(top, left)) * across
    lower = pixels(bottom, left) + (pixels(bottom, right) - pixels(bottom, left)) * across
    return (upper + (lower - upper) * down + xp.float32(0.5)).astype(xp.uint8)


def train(folder: Path, states: Path, output: Path, names: Sequence[str], every: int, until: float) -> bool:
    """Trains the runs of `folder` that `output` lacks, and returns whether none is left. `until` is a time, as of time.time()."""
    runs = json.loads((folder / ABOUT).read_text())
    with np.load(folder / DATA) as stored:
        images, image_ids, labels = from_differences(stored["differences"]), stored["image_ids"], stored["labels"]
    for run in runs:
        if names and run["name"] not in names:
            continue
        if (output / f"{run['name']}.0.npz").exists():
            read_network(output, run)
            continue
        with np.load(folder / run["files"]["order"]) as visits, np.load(folder / run["files"]["boxes"]) as stored:
            batch = functools.partial(
                batch_of, run, order=visits["order"], boxes=stored["boxes"], image_ids=image_ids, labels=labels
            )
        ended = train_one(folder, run, states / f"{run['name']}.npz", images, batch, every, until)
        if ended is None:
            return False
        write_network(output, *ended)
    return True


def train_one(
    folder: Path,
    run: Mapping[str, Any],
    state: Path,
    images: np.ndarray,
    batch: Callable[[int], dict[str, np.ndarray]],
    every: int,
    until: float,
) -> tuple[dict[str, np.ndarray], dict[str, Any]] | None:
    """Trains one run from what the file `state` holds. Returns the final state and what is known of it, or None at `until`.

    Writes `state` every `every` steps. Raises UserError if the loss or the gradient is not finite.
    """
    sys.path.insert(0, str(PROJECT / "pipelines" / "plan"))
    import jax
    import program

    arrays, about = newest(folder, run, state)
    execute, next_of = program.loaded(program.text_of(gzip.decompress((folder / run["files"]["step"]).read_bytes())))
    names = [name for name, _ in run["arguments"]]
    replica = {"replica": np.zeros([], np.int32)}
    pixels, size = jax.device_put(images), run["image_size"]
    # That this is replica 0 of 1 is an argument too, and no part of the state.
    held = {name: jax.device_put((arrays | replica)[name]) for name in names if not name.startswith("batch/")}
    cut = jax.jit(lambda images, positions, boxes: views_of(jax.numpy, images[positions], boxes, size))
    while about["step"] < run["steps"]:
        begun, first, last = time.time(), about["step"], min(about["step"] + every, run["steps"])
        rows = []
        for step in range(first, last):
            taken = batch(step)
            taken["views"] = cut(pixels, taken.pop("position"), taken.pop("boxes"))
            given = held | {f"batch/{name}": jax.device_put(value) for name, value in taken.items()}
            results = execute([given[name] for name in names])
            held |= {names[argument]: results[result] for result, argument in next_of.items()}
            rows.append(results[: len(run["metrics"])])
        values = np.array(jax.device_get(rows), np.float64)
        if not np.all(np.isfinite(values)):
            raise UserError(f"{run['name']} diverges before step {last}, the last good state is of step {first}: lower its rate")
        metrics = dict(zip(run["metrics"], values.mean(axis=0).tolist(), strict=True))
        seconds = time.time() - begun
        about |= {"step": last, "seconds": about["seconds"] + seconds, "metrics": metrics}
        arrays |= {name: np.asarray(value) for name, value in held.items() if name in arrays}
        write_arrays(str(state), {**arrays, ABOUT: np.array(json.dumps(about))})
        loss, rate = metrics["train/contrastive_loss"], (last - first) / seconds
        print(f"{run['name']}: {last}/{run['steps']} loss {loss:.4f}, {rate:.1f} steps/s", file=sys.stderr, flush=True)
        if time.time() > until and last < run["steps"]:
            return None
    return arrays, {**about, "device": jax.devices()[0].device_kind, "jax": jax.__version__}


def newest(folder: Path, run: Mapping[str, Any], state: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Returns the arrays of a run's state by name, and its step, seconds and metrics: as saved, or as before the first step.

    Raises UserError if the file `state` is of another run.
    """
    about = {"name": run["name"], "run": digest_of(run), "step": 0, "seconds": 0.0, "metrics": {}}
    path = state if state.exists() else folder / run["files"]["initial"]
    with np.load(path) as stored:
        arrays = {name: stored[name] for name in stored.files}
    if ABOUT in arrays:
        about = json.loads(str(arrays.pop(ABOUT)))
    _require_same(run, about, path)
    return arrays, about


def digest_of(run: Mapping[str, Any]) -> str:
    """Returns a digest of all that a run depends on: settings, dataset, arguments of its program."""
    return hashlib.sha256(json.dumps(run, sort_keys=True).encode()).hexdigest()


def _require_same(run: Mapping[str, Any], about: Mapping[str, Any], path: Path) -> None:
    if about["run"] != digest_of(run):
        raise UserError(f"{path} is of another run than {run['name']} here: name a new folder")


def write_network(output: Path, arrays: Mapping[str, np.ndarray], about: Mapping[str, Any]) -> None:
    """Writes all of a state but the optimizer's slots, in files NAME.0.npz, NAME.1.npz and so on. The first says how many."""
    parts: list[dict[str, np.ndarray]] = [{}]
    for key, array in arrays.items():
        if "/" in key and key.split("/")[0] not in MODELS:
            continue
        if parts[-1] and sum(one.nbytes for one in parts[-1].values()) + array.nbytes > PART_BYTES:
            parts.append({})
        parts[-1][key] = array
    parts[0][ABOUT] = np.array(json.dumps({**about, "parts": len(parts)}))
    # The first is written last: it says that all are there.
    for number in reversed(range(len(parts))):
        write_arrays(str(output / f"{about['name']}.{number}.npz"), parts[number])


def read_network(output: Path, run: Mapping[str, Any]) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Returns what `write_network` wrote: arrays by name, and what is known of the run.

    Raises UserError if it is of another run, or a part is not there.
    """
    first = output / f"{run['name']}.0.npz"
    with np.load(first) as stored:
        arrays = {key: stored[key] for key in stored.files}
    about = json.loads(str(arrays.pop(ABOUT)))
    _require_same(run, about, first)
    for number in range(1, about.pop("parts")):
        part = output / f"{run['name']}.{number}.npz"
        if not part.exists():
            raise UserError(f"{part} is missing: it belongs to {first}")
        with np.load(part) as stored:
            arrays |= {key: stored[key] for key in stored.files}
    return arrays, about


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("prepare")
    one.add_argument("--raw", type=Path, required=True, help="CIFAR-10 in ImageNet's raw layout")
    one.add_argument("--work", type=Path, required=True, help="for the dataset")
    one.add_argument("--output", type=Path, required=True)
    one.add_argument("--images-per-class", type=int, default=0, metavar="N", help="training images of a class; 0 for all")
    one.add_argument("--epochs", type=int, default=60)
    one.add_argument("--batches", type=int, nargs="+", default=[64, 256])
    one.add_argument("--seeds", type=int, nargs="+", default=[0])
    one.add_argument("--set", nargs="+", default=[], metavar="key=value", help="settings of every run")
    one = commands.add_parser("train")
    one.add_argument("folder", type=Path)
    one.add_argument("--work", type=Path, required=True, help="for the states")
    one.add_argument("--output", type=Path, required=True, help="for the networks of the runs that have ended")
    one.add_argument("--run", nargs="+", default=[], metavar="NAME", help="the runs; without it, all")
    one.add_argument("--every", type=int, default=500, metavar="STEPS", help="steps between two saved states")
    one.add_argument("--minutes", type=float, default=math.inf, help="stop at the first saved state after so long")
    one = commands.add_parser("time")
    one.add_argument("folder", type=Path)
    one.add_argument("--repeat", type=int, default=20)
    one = commands.add_parser("finish")
    one.add_argument("folder", type=Path)
    one.add_argument("output", type=Path, help="what train left there")
    one.add_argument("--work", type=Path, required=True, help="with the dataset; the checkpoint folders go there too")
    one.add_argument("--results", type=Path, required=True, help="a file of lines, to append to")
    args = parser.parse_args()
    begun = time.time()
    try:
        if args.command == "prepare":
            from benchmarks.gpu_here import convert, prepare

            if args.output.exists() and any(args.output.iterdir()):
                raise UserError(f"{args.output} is not empty: name a new folder")
            convert(args.raw, args.work / "data", args.images_per_class)
            own = [f"epochs={args.epochs}", "data.allow_other_counts=true", *args.set]
            prepare(args.work / "data", args.output, own, args.batches, args.seeds)
            portable_step.write(*TIMED, args.output / TIMING, fuses=False)
            sizes = {path: path.stat().st_size for path in sorted(args.output.rglob("*")) if path.is_file()}
            for path, size in sizes.items():
                print(f"{size / 1e6:8.2f} MB  {path.relative_to(args.output)}")
            print(f"{sum(sizes.values()) / 1e6:8.2f} MB  in all")
        elif args.command == "train":
            until = begun + 60 * args.minutes
            return 0 if train(args.folder, args.work, args.output, args.run, args.every, until) else AGAIN
        elif args.command == "time":
            portable_step.report(args.folder / TIMING, args.repeat)
        else:
            from benchmarks.gpu_here import finish

            finish(args.folder, args.output, args.work, args.results)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

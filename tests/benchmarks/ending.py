"""What SIGTERM leaves behind at random moments: how soon pretraining is over, and which shards a conversion goes on from.

    python tests/benchmarks/ending.py training [--tries 20] [--data DIR] [--tuned] [--waits] [--images 20000] [--seed 0]
    python tests/benchmarks/ending.py conversion [--tries 20] [--folder DIR] [--images 20000] [--seed 0]

`training` starts trainer.task in each try, on the dataset in DIR or on one of small JPEGs, sends SIGTERM at a random moment of
training, and measures from the last byte of the checkpoint to the end of the process: it must be far below half a minute. --tuned
leaves tf.data's autotuning on, as TensorFlow has it; --waits ends the process by the interpreter's own end. Exits with 1 where a
try took over 5 s or ended with another code than 75.

`conversion` starts `sogclr run` on raw archives of JPEGs of 100 KB, and sends SIGTERM at a random moment of writing images. Each
try goes on from the one before, until the conversion is whole; then another root begins. Exits with 1 where a shard that an
earlier try finished was written again, which its inode and its time of change show. Takes about 5 GB of DIR for 20,000 images.
"""

import argparse
import io
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

if not __package__:  # started by its path
    sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
from PIL import Image
from support.datasets import write_dataset

from benchmarks.conversion_scale import write_raw
from trainer.shared.progress import parse_line
from trainer.shared.records import MANIFEST

SETTINGS = ["depth=10", "width_multiplier=0.0625", "image_size=16", "global_batch_size=64", "epochs=100000", "log_every_steps=1"]
ANY_COUNTS = "data.allow_other_counts=true"
TUNED = "import trainer.input_pipeline as one; one._untuned = lambda dataset: dataset"
WAITS = "import os, sys; os._exit = sys.exit"
MAIN = "from trainer.task import main; main()"


def end_training(data: Path, folder: Path, code: str, after: float) -> tuple[int, float]:
    """Returns the exit code and the seconds from the checkpoint to the end of the process."""
    command = [sys.executable, "-c", code, "--preset", "demo", "--data", str(data), "--checkpoint-dir", str(folder)]
    with subprocess.Popen([*command, "--set", ANY_COUNTS, *SETTINGS], stderr=subprocess.PIPE, text=True) as process:
        for line in process.stderr or ():
            if "training:" in line:
                break
        time.sleep(after)
        process.send_signal(signal.SIGTERM)
        process.communicate()
        ended = time.time()
    (checkpoint,) = folder.glob("checkpoint-*.npz")
    return process.returncode, ended - checkpoint.stat().st_mtime


def training(args: argparse.Namespace) -> bool:
    """Returns whether every try ended as it must."""
    program = "; ".join([*[TUNED] * args.tuned, *[WAITS] * args.waits, MAIN])
    moments, taken, wrong = random.Random(args.seed), [], 0
    print("| try | SIGTERM after, s | exit code | from the checkpoint to the end, s |\n|---:|---:|---:|---:|")
    with tempfile.TemporaryDirectory() as temporary:
        data = args.data or Path(temporary, "data")
        if not args.data:
            write_dataset(data, train=args.images)
        for number in range(args.tries):
            after = moments.uniform(0, args.longest)
            code, seconds = end_training(data, Path(temporary, str(number)), program, after)
            taken.append(seconds)
            wrong += code != 75 or seconds > 5
            print(f"| {number + 1} | {after:.1f} | {code} | {seconds:.2f} |", flush=True)
    over = sum(seconds > 5 for seconds in taken)
    print(f"median {statistics.median(taken):.2f} s, longest {max(taken):.2f} s, {over} of {args.tries} over 5 s")
    return not wrong


def finished_shards(root: Path) -> dict[str, tuple[int, int]]:
    """Returns inode and time of change of every shard in a root that is reported as written, or whose dataset is published."""
    reported = {path.name.removesuffix(".json") for path in root.rglob("*.tfrecord-*-of-*.json")}
    shards = {
        path.name: path.stat()
        for path in root.rglob("*.tfrecord-*-of-*[0-9]")
        if path.name in reported or (path.parent / MANIFEST).exists()
    }
    return {name: (status.st_ino, status.st_mtime_ns) for name, status in shards.items()}


def end_conversion(raw: Path, root: Path, after: float) -> tuple[int, bool]:
    """Returns the exit code of `sogclr run` with SIGTERM while it writes images, and whether it had written all by then."""
    command = [sys.executable, "-m", "pipelines.cli", "run", "--preset", "demo", "--raw", str(raw), "--root", str(root)]
    over = False
    with subprocess.Popen(
        [*command, "--set", ANY_COUNTS], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    ) as process:
        for line in process.stderr or ():
            said = parse_line(line)
            over = said is not None and (said[1] == "verifying the dataset" or said[0] == "pretrain")
            if over or (said and said[1] == "writing images"):
                break
        if not over:
            time.sleep(after)
        process.send_signal(signal.SIGTERM)
        process.communicate()
    return process.returncode, over


def conversion(args: argparse.Namespace) -> bool:
    """Returns whether every try went on from all shards that were finished before it."""
    moments, wrong, number, roots = random.Random(args.seed), 0, 0, 0
    picture = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (270, 360, 3), np.uint8)
    Image.fromarray(noise).save(picture, "jpeg", quality=80)
    print("| try | root | SIGTERM after, s | exit code | finished before | finished after | written again |")
    print("|---:|---:|---:|---:|---:|---:|---:|")
    with tempfile.TemporaryDirectory(dir=args.folder) as temporary:
        raw = Path(temporary, "raw")
        write_raw(raw, args.images, max(1000, args.images // 20), picture.getvalue())
        while number < args.tries:
            roots += 1
            with tempfile.TemporaryDirectory(dir=temporary) as root:
                before: dict[str, tuple[int, int]] = {}
                over = False
                while not over and number < args.tries:
                    after = moments.uniform(0, args.longest)
                    code, over = end_conversion(raw, Path(root), after)
                    now = finished_shards(Path(root))
                    again = sum(now.get(name) != shard for name, shard in before.items())
                    wrong += again
                    number += not over
                    said = ["", "", "all written", ""] if over else [str(number), str(roots), f"{after:.1f}", str(code)]
                    print("| " + " | ".join([*said, str(len(before)), str(len(now)), str(again)]) + " |", flush=True)
                    before = now
    return not wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, images, longest in (("training", 20_000, 15.0), ("conversion", 20_000, 4.0)):
        command = commands.add_parser(name)
        command.add_argument("--tries", type=int, default=20)
        command.add_argument("--images", type=int, default=images)
        command.add_argument("--longest", type=float, default=longest, metavar="S", help="seconds before SIGTERM, at most")
        command.add_argument("--seed", type=int, default=0, help="of the moments")
        if name == "training":
            command.add_argument("--data", type=Path, metavar="DIR", help="a dataset (default: one of small JPEGs)")
            command.add_argument("--tuned", action="store_true", help="with tf.data's autotuning")
            command.add_argument("--waits", action="store_true", help="ends by the interpreter's own end")
        else:
            command.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    args = parser.parse_args()
    raise SystemExit(0 if {"training": training, "conversion": conversion}[args.command](args) else 1)


if __name__ == "__main__":
    main()

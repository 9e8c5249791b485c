"""How long pretraining lives on after the checkpoint that SIGTERM made it write: the rest must be far below half a minute.

    python tests/benchmarks/ending.py [--tries 20] [--tuned] [--waits] [--images 20000] [--seed 0]

Each try starts trainer.task on a dataset of small JPEGs, sends SIGTERM at a random moment of training, and measures from the last
byte of the checkpoint to the end of the process. --tuned leaves tf.data's autotuning on, as TensorFlow has it; --waits ends the
process by the interpreter's own end. Exits with 1 where a try took over 5 s or ended with another code than 75.
"""

import argparse
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

from support.datasets import write_dataset

SETTINGS = ["depth=10", "width_multiplier=0.0625", "image_size=16", "global_batch_size=64", "epochs=100000", "log_every_steps=1"]
TUNED = "import trainer.input_pipeline as one; one._untuned = lambda dataset: dataset"
WAITS = "import os, sys; os._exit = sys.exit"
MAIN = "from trainer.task import main; main()"


def end_once(data: Path, folder: Path, code: str, after: float) -> tuple[int, float]:
    """Returns the exit code and the seconds from the checkpoint to the end of the process."""
    command = [sys.executable, "-c", code, "--preset", "demo", "--data", str(data), "--checkpoint-dir", str(folder)]
    with subprocess.Popen([*command, "--set", *SETTINGS], stderr=subprocess.PIPE, text=True) as process:
        for line in process.stderr or ():
            if "training:" in line:
                break
        time.sleep(after)
        process.send_signal(signal.SIGTERM)
        process.communicate()
        ended = time.time()
    (checkpoint,) = folder.glob("checkpoint-*.npz")
    return process.returncode, ended - checkpoint.stat().st_mtime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tries", type=int, default=20)
    parser.add_argument("--tuned", action="store_true", help="with tf.data's autotuning")
    parser.add_argument("--waits", action="store_true", help="ends by the interpreter's own end")
    parser.add_argument("--images", type=int, default=20000)
    parser.add_argument("--longest", type=float, default=15, metavar="S", help="seconds of training before SIGTERM, at most")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    args = parser.parse_args()
    program = "; ".join([*[TUNED] * args.tuned, *[WAITS] * args.waits, MAIN])
    moments, taken, wrong = random.Random(args.seed), [], 0
    with tempfile.TemporaryDirectory() as temporary:
        write_dataset(Path(temporary, "data"), train=args.images)
        for number in range(args.tries):
            after = moments.uniform(0, args.longest)
            code, seconds = end_once(Path(temporary, "data"), Path(temporary, str(number)), program, after)
            taken.append(seconds)
            wrong += code != 75 or seconds > 5
            print(f"{number + 1:3} SIGTERM after {after:5.1f} s: exit code {code}, {seconds:5.2f} s", flush=True)
    over = sum(seconds > 5 for seconds in taken)
    print(f"median {statistics.median(taken):.2f} s, longest {max(taken):.2f} s, {over} of {args.tries} over 5 s")
    raise SystemExit(1 if wrong else 0)


if __name__ == "__main__":
    main()

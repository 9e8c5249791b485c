"""How fast a CPU evaluates: the forward pass of a ResNet-50 at 224 px, and what the host makes of JPEGs for it.

    python tests/benchmarks/evaluation_cpu.py [--images 1024] [--rounds 5]

Prints images a second of one core's time, the best of the rounds, so that other work on the machine counts little. `sogclr plan`
reckons with these figures: in `pipelines/plan/`, `CORE_FLOPS_PER_SECOND` of `machines.py` and `IMAGES_A_CORE` of `evaluation.py`.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")  # as `import trainer` does
if not __package__:  # started by its path
    sys.path.insert(0, str(Path(__file__).parents[1]))

import tensorflow as tf
from support.datasets import write_dataset

from benchmarks.input_pipeline import photograph
from trainer.config import Config, replace
from trainer.encoder import make_encoder
from trainer.encoder_cost import forward_cost
from trainer.input_pipeline import evaluation_batches, labelled_batches
from trainer.settings import EncoderSettings
from trainer.shared.records import read_manifest

AT_ONCE = 32
CORES = len(os.sched_getaffinity(0))


def best_rate(run: Callable[[], int], rounds: int) -> float:
    """Returns the most images a second of a core's time of several runs; `run` returns how many images it did."""
    run()
    rates = []
    for _ in range(rounds):
        begun = time.process_time()
        done = run()
        rates.append(done / (time.process_time() - begun))
    return max(rates)


def forward(precision: str) -> Callable[[], int]:
    encoder = make_encoder(EncoderSettings(precision=precision), 224)
    images = tf.random.uniform([AT_ONCE, 224, 224, 3])

    @tf.function(autograph=False)
    def features(images: tf.Tensor) -> tf.Tensor:
        return encoder(images, training=False)

    def run() -> int:
        for _ in range(4):
            features(images).numpy()
        return 4 * AT_ONCE

    return run


def batches(dataset: tf.data.Dataset) -> Callable[[], int]:
    """Returns what takes the next 16 batches, without end: the making of the dataset is not measured."""
    endless = iter(dataset.repeat())
    return lambda: sum(len(next(endless)["image"]) for _ in range(16))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1024, help="in the dataset (default: 1024)")
    parser.add_argument("--rounds", type=int, default=5, help="runs of each (default: 5)")
    args = parser.parse_args()
    for precision in ("float32", "bfloat16"):
        rate = best_rate(forward(precision), args.rounds)
        flops = rate * forward_cost(EncoderSettings(), 224).flops
        print(f"forward pass, {precision}: {rate:.1f} images/s a core, {flops / 1e9:.0f} GFLOP/s, {CORES} cores", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        write_dataset(Path(folder), train=args.images, validation=1, picture=photograph)
        manifest, config = read_manifest(folder), replace(Config(), global_batch_size=64)
        for name, dataset in {
            "central crops": evaluation_batches(config.views, folder, manifest, "train", 64),
            "random crops": labelled_batches(config.views, 64, config.run, folder, manifest),
        }.items():
            rate = best_rate(batches(dataset), args.rounds)
            print(f"{name}: {rate:.0f} images/s a core, {CORES} cores", flush=True)


if __name__ == "__main__":
    main()

"""What a train step costs: beside a bare loop over the same model, beside the machine's matrix product, and in memory.

    python tests/benchmarks/train_step.py loop       the trainer's step against the bare step, at the demo's size
    python tests/benchmarks/train_step.py precision  float32 and bfloat16 against the matrix product, ResNet-50 at 224 px
    python tests/benchmarks/train_step.py memory     u and a step, as N and B grow

The rivals take turns in one run; ratios are of a turn, so that what else the machine does falls on both.
"""

import argparse
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import numpy as np
import tensorflow as tf

from trainer.augmentation import NUM_DRAWS, augment
from trainer.config import Config, replace
from trainer.losses.global_contrastive import VARIANTS, gamma_of_visit, global_contrastive
from trainer.optimizer import learning_rate
from trainer.presets import resolve
from trainer.state import TrainState, create_train_state
from trainer.step import make_train_step

NUM_IMAGES = 2000


def batch_of(config: Config, seed: int = 0, num_images: int = NUM_IMAGES) -> dict[str, tf.Tensor]:
    random = np.random.default_rng(seed)
    count, side = config.optimizer.global_batch_size, config.views.image_size
    return {
        "views": tf.constant(random.integers(0, 256, (count, 2, side, side, 3), np.uint8)),
        "draws": tf.constant(random.random((count, 2, NUM_DRAWS), np.float32)),
        "image_id": tf.constant(random.choice(num_images, count, replace=False)),
        "label": tf.constant(random.integers(0, 10, count)),
    }


def bare_step(config: Config, state: TrainState) -> Callable[[dict[str, tf.Tensor]], tf.Tensor]:
    """The same model, loss and optimizer with nothing around: no metrics, no replicas."""

    @tf.function(autograph=False)
    def step(batch: dict[str, tf.Tensor]) -> tf.Tensor:
        views = tf.concat([batch["views"][:, 0], batch["views"][:, 1]], 0)
        draws = tf.concat([batch["draws"][:, 0], batch["draws"][:, 1]], 0)
        images = augment(views, draws, config.views.color_jitter_strength, config.views.blur)
        variant = VARIANTS[config.loss.variant]
        with tf.GradientTape() as tape:
            features = state.encoder(images, training=True)
            z1, z2 = tf.split(tf.math.l2_normalize(state.projection(features, training=True), axis=1), 2)
            u = state.u.sparse_read(batch["image_id"])
            gamma = gamma_of_visit(u, config.loss.gamma, variant)
            positions = tf.range(config.optimizer.global_batch_size)
            result = global_contrastive(z1, z2, z1, z2, positions, u, gamma, config.loss.temperature, variant)
            logits = state.classifier(tf.stop_gradient(features))
            labels = tf.tile(batch["label"], [2])
            online = tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits))
            loss = result.loss + online
        rate = learning_rate(config.optimizer, NUM_IMAGES, state.step)
        state.optimizer.apply(tape.gradient(loss, state.trainable), rate, state.step)
        state.u.scatter_update(tf.IndexedSlices(result.u, batch["image_id"]))
        state.step.assign_add(1)
        return result.loss

    return step


def seconds(function: Callable[[], object], times: int) -> float:
    begun = time.perf_counter()
    for _ in range(times):
        function()
    return (time.perf_counter() - begun) / times


def loop(rounds: int) -> None:
    config = resolve("demo")
    batch = batch_of(config)
    ours = make_train_step(config, create_train_state(config, NUM_IMAGES, 10))
    bare = bare_step(config, create_train_state(config, NUM_IMAGES, 10))
    rivals: dict[str, Callable[[], object]] = {
        "ours": lambda: float(ours(batch)["train/contrastive_loss"]),
        "bare": lambda: float(bare(batch)),
    }
    taken: dict[str, list[float]] = {name: [] for name in rivals}
    for turn in range(rounds + 1):
        for name, step in rivals.items():
            spent = seconds(step, 5)
            if turn:
                taken[name].append(spent)
    ratios = sorted(own / other for own, other in zip(taken["ours"], taken["bare"], strict=True))
    print(
        f"{config.optimizer.global_batch_size} samples, ResNet-{config.encoder.depth} x{config.encoder.width_multiplier} "
        f"at {config.views.image_size} px"
    )
    print(f"trainer's step {statistics.median(taken['ours']) * 1e3:.1f} ms, bare {statistics.median(taken['bare']) * 1e3:.1f} ms")
    print(f"ratio {statistics.median(ratios):.3f} (median of {rounds} turns; {ratios[0]:.3f} to {ratios[-1]:.3f})")


def precision(rounds: int) -> None:
    size = 2048
    print("ResNet-50 at 224 px, 8 samples (16 views); a forward and backward pass of a view takes 24.5 GFLOP")
    for name in ("float32", "bfloat16"):
        config = replace(Config(), precision=name, global_batch_size=8, warmup_epochs=0)
        step = make_train_step(config, create_train_state(config, NUM_IMAGES, 10))
        batch = batch_of(config)
        matrix = tf.cast(tf.random.stateless_normal([size, size], [0, 1]), name)
        product = tf.function(lambda matrix=matrix: tf.matmul(matrix, matrix), autograph=False)
        float(step(batch)["train/contrastive_loss"]), product()
        shares, rates = [], []
        for _ in range(rounds):
            peak = 2 * size**3 / seconds(product, 5)
            spent = seconds(lambda step=step, batch=batch: float(step(batch)["train/contrastive_loss"]), 2)
            rates.append(16 / spent)
            shares.append(16 * 24.5e9 / spent / peak)
        print(
            f"{name}: {statistics.median(rates):.1f} views/s, {statistics.median(shares):.0%} of the matrix product's rate "
            f"({min(shares):.0%} to {max(shares):.0%} in {rounds} turns)"
        )


MEASURE_MEMORY = """
import re, sys
from benchmarks.train_step import batch_of, create_train_state, make_train_step, replace, resolve
images, count = int(sys.argv[1]), int(sys.argv[2])
memory = lambda name: int(re.search(name + r":\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024
config = replace(resolve("demo"), global_batch_size=count, width_multiplier=0.0625)
batch = batch_of(config, num_images=images if images < 10**7 else 10**6)
before = memory("VmRSS")
state = create_train_state(config, images, 10)
held = memory("VmRSS") - before
made = memory("VmRSS")
step = make_train_step(config, state)
for _ in range(3):
    step(batch)
first = memory("VmHWM") - made
open("/proc/self/clear_refs", "w").write("5")
resting = memory("VmRSS")
for _ in range(3):
    step(batch)
print(held, first, memory("VmHWM") - resting)
"""


def memory() -> None:
    print("ResNet-18 of a sixteenth's width at 32 px; MiB, of one process each")
    environ = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    print("          N      B   u itself   state made   first steps, tracing too   later steps beyond that, at most")
    for images, count in ((10**4, 128), (10**6, 128), (10**7, 128), (10**8, 128), (10**6, 512), (10**6, 2048)):
        command = [sys.executable, "-c", MEASURE_MEMORY, str(images), str(count)]
        done = subprocess.run(command, env=environ, capture_output=True, text=True, check=True)
        held, first, later = map(float, re.findall(r"[-\d.]+", done.stdout)[-3:])
        print(f"{images:11} {count:6} {images * 4 / 2**20:10.1f} {held:12.1f} {first:12.1f} {later:12.1f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["loop", "precision", "memory"])
    parser.add_argument("--rounds", type=int, default=9, help="turns of each rival (default 9)")
    args = parser.parse_args()
    if args.what == "memory":
        memory()
    else:
        {"loop": loop, "precision": precision}[args.what](args.rounds)


if __name__ == "__main__":
    main()

"""What the gradient of a small batch misses: its mean, against the gradient of the objective over all images.

    python tests/benchmarks/gradient_bias.py measure --data DATA --checkpoint DIR    a line of docs/gradient_bias.jsonl
    python tests/benchmarks/gradient_bias.py page                                    its part of docs/results.md, and the figure

`measure` takes a trained encoder as it stands and projects two views of 2,048 images, once. The global objective of these is
then known exactly, and so is its gradient by the projections, of which every weight's gradient is a linear function. What a loss
makes of the same images batch by batch is averaged over epochs of random batches, each loss by the trainer's own code: the
noise of single batches goes, and what stays is the bias, which no learning rate and no patience puts right. It is given as the
angle between the two. Nothing learns here, so u is as good as gamma lets it be; where the encoder learns, a small gamma has its
price, for u is then of older encoders (the arms of `evidence.py`).
"""

import argparse
import json
import math
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
if not __package__:  # started by its path
    sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import tensorflow as tf
from matplotlib.figure import Figure

from benchmarks.evidence_page import dress, put_between, table, wrapped
from eval.measure.features import load_encoder
from eval.measure.projections import load_head, projected_views
from eval.measure.protocols.cached import drawn_order
from trainer import checkpoint as checkpoints
from trainer.config import Config
from trainer.folder import read_config
from trainer.losses.global_contrastive import VARIANTS, gamma_of_visit, global_contrastive
from trainer.losses.nt_xent import nt_xent
from trainer.shared.errors import UserError
from trainer.shared.records import read_manifest

DOCS = Path(__file__).parents[2] / "docs"
RESULTS = "gradient_bias.jsonl"
FIGURE = "images/gradient_bias.png"
BEGIN, END = "<!-- gradient bias: written by tests/benchmarks/gradient_bias.py page -->", "<!-- end of the gradient bias -->"
IMAGES = 2048
BATCHES = (16, 32, 64, 128)
TEMPERATURES = (0.1, 0.05)
"""Of ImageNet's presets, and half of it: the experiment's."""
CHAINS, EPOCHS = 4, 50
"""Independent orders of the images, and the epochs averaged over in each."""
LOSSES = {"SimCLR": None, "decoupled (gamma = 1)": 1.0, "SogCLR, gamma .9": 0.9, "SogCLR, gamma .1": 0.1}
"""The gamma of each; NT-Xent has none."""
COLOURS = ("#b7791f", "#66727f", "#2f6db5", "#7fb2ea")

Row = dict[str, Any]
Measured = dict[str, Any]
"""What was measured with one encoder, a line of the results."""


@dataclass(frozen=True)
class Bias:
    degrees: float
    """Between the mean gradient and that of the global objective."""
    error: float
    """Standard error of `degrees`, by leaving out one chain at a time."""


def projections(config: Config, data: str, stored: checkpoints.Checkpoint, count: int) -> tf.Tensor:
    """Returns what encoder and head make of two views of `count` images that are drawn, [count, 2, d] float32, not normalised."""
    manifest = read_manifest(data)
    drawn = drawn_order(manifest.splits["train"].records, 0)[:count]
    encoder, head = load_encoder(config, stored), load_head(config, stored)
    with tempfile.TemporaryDirectory() as folder:
        return tf.constant(projected_views(encoder, head, config, data, manifest, folder, drawn))


def global_gradient(hidden: tf.Tensor, temperature: float) -> np.ndarray:
    """Returns the gradient by `hidden`, [n, 2, d], of temperature times the objective over all n images, [n * 2 * d] float64."""
    with tf.GradientTape() as tape:
        tape.watch(hidden)
        z1, z2 = tf.unstack(tf.math.l2_normalize(hidden, axis=2), axis=1)
        objective = temperature * nt_xent(z1, z2, z1, z2, tf.range(len(hidden)), temperature, decoupled=True)
    return tape.gradient(objective, hidden).numpy().astype(np.float64).ravel()


def make_epoch(gamma: float | None, hidden: tf.Tensor, batch: int, temperature: float) -> Callable[..., tuple]:
    """Returns the function of (an order of the n images, u [n]) to (the mean of its batches' gradients by `hidden`, u after)."""
    positions = tf.range(batch)
    variant = VARIANTS["paper"]

    def loss_of_batch(given: tuple[tf.Tensor, tf.Tensor]) -> tuple[tf.Tensor, tf.Tensor]:
        own, u = given
        z1, z2 = tf.unstack(tf.math.l2_normalize(own, axis=2), axis=1)
        if gamma is None:
            return temperature * nt_xent(z1, z2, z1, z2, positions, temperature), u
        gammas = gamma_of_visit(u, gamma, variant)
        result = global_contrastive(z1, z2, z1, z2, positions, u, gammas, temperature, variant)
        return result.loss, result.u

    @tf.function(autograph=False)
    def epoch(order: tf.Tensor, u: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        # No image is in two batches of an epoch, so none of them needs what another did to u.
        by_batch = tf.reshape(order, [-1, batch])
        with tf.GradientTape() as tape:
            tape.watch(hidden)
            losses, new_u = tf.vectorized_map(loss_of_batch, (tf.gather(hidden, by_batch), tf.gather(u, by_batch)))
            mean = tf.reduce_mean(losses)
        gradient = tf.convert_to_tensor(tape.gradient(mean, hidden))
        return gradient, tf.tensor_scatter_nd_update(u, order[:, None], tf.reshape(new_u, [-1]))

    return epoch


def mean_gradient(epoch: Callable[..., tuple], count: int, seed: int, gamma: float | None, epochs: int) -> np.ndarray:
    """Returns the mean of `epochs` epochs' gradients, float64, after as many as u takes to forget where it began."""
    random = np.random.default_rng(seed)
    u, total = tf.zeros([count]), np.float64(0)
    forgetting = math.ceil(6 / (gamma or 1.0))
    for number in range(forgetting + epochs):
        gradient, u = epoch(tf.constant(random.permutation(count)), u)
        if number >= forgetting:
            total = total + gradient.numpy().astype(np.float64).ravel()
    return total / epochs


def bias(means: Sequence[np.ndarray], exact: np.ndarray) -> Bias:
    """Returns how far the gradients' mean points from `exact`, [m], given the means of at least three chains, [m] each.

    Only products of different chains are counted, whose noises have nothing in common, so that noise makes no angle.
    """
    unit = exact / np.linalg.norm(exact)
    along = np.array([mean @ unit for mean in means])
    aside = [mean - part * unit for mean, part in zip(means, along, strict=True)]
    products = {pair: aside[pair[0]] @ aside[pair[1]] for pair in combinations(range(len(means)), 2)}

    def degrees(chains: Iterable[int]) -> float:
        chosen = list(chains)
        square = np.mean([products[pair] for pair in combinations(chosen, 2)])
        return math.degrees(math.atan2(math.sqrt(max(square, 0.0)), along[chosen].mean()))

    every = range(len(means))
    left_out = [degrees(one for one in every if one != without) for without in every]
    return Bias(degrees(every), float(np.sqrt((len(means) - 1) * np.var(left_out))))


def gradient_of_all(gamma: float | None, hidden: tf.Tensor, temperature: float) -> np.ndarray:
    """Returns what a loss makes of all images as one batch, float64, with u where it comes to rest."""
    count = len(hidden)
    everything = tf.range(count, dtype=tf.int64)
    _, rest = make_epoch(1.0, hidden, count, temperature)(everything, tf.zeros([count]))
    gradient, _ = make_epoch(gamma, hidden, count, temperature)(everything, rest)
    return gradient.numpy().astype(np.float64).ravel()


def measure(
    hidden: tf.Tensor,
    temperatures: Sequence[float] = TEMPERATURES,
    batches: Sequence[int] = BATCHES,
    epochs: int = EPOCHS,
) -> Iterator[Row]:
    """Yields the bias of each loss at each batch size and temperature, for images with the projections `hidden`, [n, 2, d]."""
    for temperature in temperatures:
        exact = global_gradient(hidden, temperature)
        for loss, gamma in LOSSES.items():
            for batch in (*batches, len(hidden)):
                if batch < len(hidden):
                    epoch = make_epoch(gamma, hidden, batch, temperature)
                    means = [mean_gradient(epoch, len(hidden), seed, gamma, epochs) for seed in range(CHAINS)]
                else:
                    means = [gradient_of_all(gamma, hidden, temperature)] * CHAINS
                found = bias(means, exact)
                yield {
                    "temperature": temperature,
                    "loss": loss,
                    "batch": batch,
                    "degrees": round(found.degrees, 3),
                    "error": round(found.error, 3),
                }


def write_page(measured: Sequence[Measured], docs: Path) -> None:
    """Puts a table for each encoder between the marks in `docs`/results.md and draws the figure of the last one.

    Raises ValueError where there are no marks.
    """
    parts = [f"![The gradient's bias against batch size]({FIGURE})"]
    for one in measured:
        parts += [_about(one), _table(one)]
    put_between(docs / "results.md", BEGIN, END, "\n\n".join(parts))
    (docs / FIGURE).parent.mkdir(exist_ok=True)
    _figure(measured[-1]).savefig(docs / FIGURE, dpi=160)


def _about(measured: Measured) -> str:
    return wrapped(
        f"The encoder of `{measured['run']}`, state_sha256 `{measured['state_sha256'][:12]}`. Degrees between the mean gradient "
        f"of batches and the objective's gradient over {measured['images']:,} images, ± one standard error, from {CHAINS} chains "
        f"of {measured['epochs']} epochs each. The last column is one batch of all images, with u at its fixed point. The "
        f"dataset has the fingerprint `{measured['dataset_fingerprint'][:12]}`."
    )


def _table(measured: Measured) -> str:
    every = measured["images"]
    rows = measured["rows"]
    batches = [*dict.fromkeys(row["batch"] for row in rows)]

    def cell(row: Row) -> str:
        return f"{row['degrees']:.2f}" if row["batch"] == every else f"{row['degrees']:.2f} ± {row['error']:.2f}"

    cells = [
        [f"{temperature:g}", loss, *(cell(row) for row in rows if (row["temperature"], row["loss"]) == (temperature, loss))]
        for temperature, loss in dict.fromkeys((row["temperature"], row["loss"]) for row in rows)
    ]
    return table(["temperature", "loss", *(f"batch {batch:,}" for batch in batches)], cells)


def _figure(measured: Measured) -> Figure:
    temperatures = [*dict.fromkeys(row["temperature"] for row in measured["rows"])]
    drawn = Figure(figsize=(4.2 * len(temperatures), 3.8), layout="constrained", facecolor="#ffffff")
    panels = drawn.subplots(1, len(temperatures), sharey=True, squeeze=False)[0]
    for axes, temperature in zip(panels, temperatures, strict=True):
        there = [row for row in measured["rows"] if row["temperature"] == temperature and row["batch"] != measured["images"]]
        for loss, colour in zip(LOSSES, COLOURS, strict=True):
            degrees = {row["batch"]: row["degrees"] for row in there if row["loss"] == loss}
            axes.plot(list(degrees), list(degrees.values()), color=colour, label=loss, marker="o", linewidth=1.8)
        dress(axes, f"temperature {temperature:g}", BATCHES)
    panels[0].set_ylabel("gradient's bias, degrees")
    panels[0].set_ylim(bottom=0)
    panels[0].legend(frameon=False)
    return drawn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    measuring = commands.add_parser("measure")
    measuring.add_argument("--data", required=True, metavar="DIR", help="what beam_jobs.build_tfrecords wrote")
    measuring.add_argument("--checkpoint", required=True, metavar="DIR", help="the folder of a run's checkpoints: the newest")
    page = commands.add_parser("page")
    for command in (measuring, page):
        command.add_argument("--docs", type=Path, default=DOCS, help="the folder with the results and results.md")
    args = parser.parse_args()
    if args.command == "page":
        write_page([json.loads(line) for line in (args.docs / RESULTS).read_text().splitlines()], args.docs)
        return
    try:
        config, about = read_config(args.checkpoint)
        stored = checkpoints.load_latest(args.checkpoint)
        if stored is None:
            raise UserError(f"{args.checkpoint} holds no whole checkpoint")
        hidden = projections(config, args.data, stored, IMAGES)
    except UserError as error:
        parser.exit(2, f"error: {error}\n")
    rows = []
    for row in measure(hidden):
        print(json.dumps(row), flush=True)
        rows.append(row)
    measured = {
        "run": Path(args.checkpoint).name,
        "state_sha256": checkpoints.sha256_of(stored.arrays),
        "dataset_fingerprint": about["dataset_fingerprint"],
        "images": len(hidden),
        "epochs": EPOCHS,
        "rows": rows,
    }
    with (args.docs / RESULTS).open("a") as file:
        file.write(json.dumps(measured) + "\n")


if __name__ == "__main__":
    main()

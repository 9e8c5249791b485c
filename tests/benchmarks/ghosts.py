"""Whether a network tells the views of an image by the ghost batch that they share.

    python tests/benchmarks/ghosts.py --data DATA --checkpoint DIR [--together]

Prints the mean similarity of a first view, as it is in training, to the second view of its own image, of other images in the same
ghost batch, and of images in other ghost batches. Where a network takes nothing from the ghost batch, the last two are alike.
With --together, both views of an image are always in the same ghost batch, as in runs of commits before a13771a.
"""

import argparse
import sys
from pathlib import Path

if not __package__:  # started by its path
    sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import tensorflow as tf

from trainer import checkpoint as checkpoints
from trainer.augmentation import augment
from trainer.folder import read_config
from trainer.input_pipeline import training_batches
from trainer.shared.records import read_manifest
from trainer.state import create_train_state, model_variables

_BATCHES = 8


def similarities(data: str, folder: str, together: bool) -> np.ndarray:
    """Returns the three mean cosines, [3]."""
    config, _ = read_config(folder)
    manifest = read_manifest(data)
    state = create_train_state(config, manifest.splits["train"].records, manifest.num_classes)
    stored = checkpoints.open_checkpoint(folder)
    checkpoints.restore(model_variables("encoder", state.encoder) | model_variables("projection", state.projection), stored)
    images, size = config.optimizer.global_batch_size, config.optimizer.ghost_batch_size
    number = np.arange(images)
    first = number // size
    second = first if together else number % (images // size)
    rows = np.argsort(np.concatenate([first, second]), kind="stable")
    same, own = first[:, None] == second[None, :], np.eye(images, dtype=bool)
    found = []
    for batch in training_batches(config, data, manifest, 0).take(_BATCHES):
        views, draws = (tf.concat(tf.unstack(batch[name], axis=1), axis=0) for name in ("views", "draws"))
        seen = augment(views, draws, config.views.color_jitter_strength, config.views.blur).numpy()
        projected = np.empty([2 * images, config.encoder.projection_dim], np.float32)
        projected[rows] = state.projection(state.encoder(seen[rows], training=True), training=True)
        z1, z2 = np.split(projected / np.linalg.norm(projected, axis=1, keepdims=True), 2)
        cosines = z1 @ z2.T
        found.append([cosines[of].mean() for of in (own, same & ~own, ~same & ~own)])
    return np.mean(found, axis=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--checkpoint", required=True, help="folder of a run with ghost_batch_size")
    parser.add_argument("--together", action="store_true")
    args = parser.parse_args()
    own, same, other = similarities(args.data, args.checkpoint, args.together)
    print(f"own image {own:.3f}, another image of the same ghost batch {same:.3f}, of another ghost batch {other:.3f}")


if __name__ == "__main__":
    main()

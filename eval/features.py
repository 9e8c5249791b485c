"""Features of a frozen encoder, one forward pass over a split."""

from collections.abc import Callable
from dataclasses import dataclass

import keras
import numpy as np
import tensorflow as tf

from trainer import checkpoint as checkpoints
from trainer.config import Config
from trainer.encoder import make_encoder
from trainer.input_pipeline import evaluation_batches
from trainer.records import Manifest, UserError
from trainer.train import model_variables


@dataclass(frozen=True)
class Features:
    """What an encoder makes of the n images of a split, in the order of their IDs."""

    values: np.ndarray
    """[n, F] float32."""
    labels: np.ndarray
    """[n] int64."""


def load_encoder(config: Config, checkpoint: checkpoints.Checkpoint) -> keras.Model:
    """Returns the encoder that a pretraining checkpoint holds. Raises UserError where it is of another architecture."""
    encoder = make_encoder(config)
    checkpoints.restore(model_variables("encoder", encoder), checkpoint)
    return encoder


def extract(
    encoder: keras.Model,
    config: Config,
    data_dir: str,
    manifest: Manifest,
    split: str,
    report: Callable[[int], None] = lambda done: None,
) -> Features:
    """Returns the features of every image of `split`; calls `report(images done)` after each batch.

    Raises UserError where the split does not hold every image ID once, and where features are not finite.
    """
    batch_size = config.linear_eval.batch_size
    count = manifest.splits[split].records if split in manifest.splits else 0
    values = np.zeros((count, encoder.output_shape[-1]), np.float32)
    labels = np.full(count, -1, np.int64)

    @tf.function(autograph=False, reduce_retracing=True)
    def forward(images: tf.Tensor) -> tf.Tensor:
        return encoder(images, training=False)

    done = 0
    for batch in evaluation_batches(config, data_dir, manifest, split, batch_size):
        ids = batch["image_id"].numpy()
        values[ids] = forward(batch["image"]).numpy()
        labels[ids] = batch["label"].numpy()
        done += len(ids)
        report(done)
    if done != count or np.any(labels < 0):
        raise UserError(
            f"{data_dir} holds {done} records in split {split}, not image IDs 0..{count - 1} once each: build the dataset again"
        )
    if not np.all(np.isfinite(values)):
        bad = int(np.flatnonzero(~np.isfinite(values).all(axis=1))[0])
        raise UserError(f"the features of image ID {bad} of {split} are not finite: the checkpoint is of a run that diverged")
    return Features(values, labels)

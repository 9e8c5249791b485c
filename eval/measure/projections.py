"""Projections of two augmented views of every training image, which the global objective is measured on."""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict

import keras
import numpy as np
import tensorflow as tf

from eval.measure.features import Features, StoredPass, digest_of, outputs_of_steps
from trainer import checkpoint as checkpoints
from trainer.augmentation import augment
from trainer.config import Config
from trainer.heads import make_projection
from trainer.input_pipeline import view_batches
from trainer.shared.errors import UserError
from trainer.shared.records import Manifest
from trainer.state import model_variables

_INPUTS = ("views", "draws")


def has_head(checkpoint: checkpoints.Checkpoint) -> bool:
    """Returns whether a checkpoint has a projection head. That of an imported encoder has none."""
    return any(name.startswith("projection/") for name in checkpoint.arrays)


def load_head(config: Config, checkpoint: checkpoints.Checkpoint) -> keras.Model:
    """Returns the projection head in a checkpoint. Raises UserError if it has none, or one of another architecture."""
    if not has_head(checkpoint):
        raise UserError(f"{checkpoint.path} has no projection head: take a checkpoint of a pretraining run")
    head = make_head(config)
    checkpoints.restore(model_variables("projection", head), checkpoint)
    return head


def make_head(config: Config) -> keras.Model:
    """Returns the untrained projection head of a run with `config`."""
    encoder = config.encoder
    return make_projection(
        encoder.feature_dim,
        encoder.projection_layers,
        encoder.projection_dim,
        config.run.seed,
        hidden_dim=encoder.projection_hidden_dim,
    )


def projected_views(
    encoder: keras.Model,
    head: keras.Model,
    config: Config,
    data_dir: str,
    manifest: Manifest,
    folder: str,
    image_ids: np.ndarray | None = None,
    *,
    shared: bool = False,
    strategy: tf.distribute.Strategy | None = None,
    on_progress: Callable[[int], None] = lambda done: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> np.ndarray:
    """Returns the projections of two views of each training image, or of those in `image_ids`, [n, 2, d] float32.

    They are in the order of image IDs, and not normalised. Views are augmented as in training; the random numbers depend on
    `linear_eval.seed` and the image ID only, so all encoders see the same views. BN is in inference mode. As `extract` does for
    features, stores the projections in a subfolder of `folder`, resumes an interrupted pass, and raises its errors; the other
    arguments are those of `extract`. `encoder` and `head` must be made in the scope of `strategy`.
    """
    strategy = strategy or tf.distribute.get_strategy()
    settings, views = config.linear_eval, config.views

    def projected(pixels: tf.Tensor, draws: tf.Tensor) -> tf.Tensor:
        # One view at a time needs the memory of a forward pass for features.
        images = [augment(pixels[:, view], draws[:, view], views.color_jitter_strength, views.blur) for view in (0, 1)]
        return tf.concat([head(encoder(view, training=False), training=False) for view in images], axis=1)

    def steps(first: int) -> Iterator[Features]:
        def of_host(context: tf.distribute.InputContext) -> tf.data.Dataset:
            return view_batches(
                views,
                settings.seed,
                data_dir,
                manifest,
                settings.batch_size,
                image_ids,
                first,
                host=context.input_pipeline_id,
                hosts=context.num_input_pipelines,
                replicas=context.num_replicas_in_sync // context.num_input_pipelines,
            )

        return outputs_of_steps(of_host, projected, _INPUTS, data_dir, manifest, "train", strategy)

    dim = head.output_shape[-1]
    stored = StoredPass(
        kind="projections",
        digest=_digest_of(encoder, head, config, manifest, image_ids),
        dim=2 * dim,
        data_dir=data_dir,
        split="train",
        image_ids=np.arange(manifest.splits["train"].records) if image_ids is None else np.sort(image_ids),
        batch_sizes=(strategy.num_replicas_in_sync, settings.batch_size),
        steps=steps,
    )
    return stored.read_or_compute(folder, shared, on_progress, should_stop).whole().values.reshape(-1, 2, dim)


def views_digest(config: Config) -> str:
    """Returns a short digest of everything that the views of an image depend on."""
    views = {name: value for name, value in asdict(config.views).items() if name != "eval_crop_proportion"}
    about = {"views": views, "seed": config.linear_eval.seed}
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]


def _digest_of(encoder: keras.Model, head: keras.Model, config: Config, manifest: Manifest, image_ids: np.ndarray | None) -> str:
    """Returns a digest of everything that the projections of the training images, or of `image_ids`, depend on."""
    arrays = {name: variable.numpy() for name, variable in model_variables("projection", head).items()}
    features = digest_of(encoder, config, manifest, "train", image_ids)
    return hashlib.sha256(f"{features} {checkpoints.sha256_of(arrays)} {views_digest(config)}".encode()).hexdigest()

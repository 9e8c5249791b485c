"""Training with labels on a pretrained encoder: the protocol `official`, where it is frozen, and fine-tuning, where it is not.

Both are what SimCLR's program does (Chen et al. 2020, appendices B.5 and B.6): random crops and flips, SGD with Nesterov
momentum .9, cosine without warm-up, no weight decay, a classifier that begins at zero, and the last step's result.
"""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass

import keras
import numpy as np
import tensorflow as tf

from trainer.config import Config
from trainer.heads import make_classifier
from trainer.input_pipeline import labelled_batches
from trainer.optimizer import learning_rate, make_optimizer, total_steps
from trainer.records import Manifest, UserError


@dataclass(frozen=True)
class Recipe:
    """What training with labels depends on besides encoder and data."""

    num_images: int
    """How many images have labels."""
    epochs: int
    batch_size: int
    """At most `num_images`."""
    base_learning_rate: float
    """Peak learning rate: this * B / 256."""
    seed: int
    frozen: bool
    """Whether the encoder stays as it is, statistics of BN included."""

    def applied_to(self, config: Config) -> Config:
        """Returns `config` with the optimisation of this recipe."""
        return dataclasses.replace(
            config,
            global_batch_size=self.batch_size,
            epochs=self.epochs,
            base_learning_rate=self.base_learning_rate,
            learning_rate_scaling="linear",
            warmup_epochs=0.0,
            optimizer="momentum",
            momentum=0.9,
            weight_decay=0.0,
            seed=self.seed,
        )

    def image_visits(self, config: Config) -> int:
        return total_steps(self.applied_to(config), self.num_images) * self.batch_size


def train_classifier(
    encoder: keras.Model,
    config: Config,
    data_dir: str,
    manifest: Manifest,
    recipe: Recipe,
    image_ids: np.ndarray | None = None,
    report: Callable[[int], None] = lambda done: None,
) -> keras.Model:
    """Returns a classifier, from features, [B, F] float32, to logits, trained on `encoder`, which learns too unless frozen.

    Labels are those of the training images `image_ids`, [n] int64, or of all. Calls `report(images done)` after each step.
    Raises UserError where the loss is not finite.
    """
    tf.config.experimental.enable_op_determinism()
    own = recipe.applied_to(config)
    classifier = make_classifier(encoder.output_shape[-1], manifest.num_classes)
    for variable in classifier.variables:
        variable.assign(tf.zeros(variable.shape))
    models = (classifier,) if recipe.frozen else (encoder, classifier)
    variables = [variable.value for model in models for variable in model.trainable_variables]
    optimizer = make_optimizer(own, variables, [True] * len(variables))

    @tf.function(autograph=False, reduce_retracing=True)
    def frozen_features(images: tf.Tensor) -> tf.Tensor:
        return encoder(_pixels(images), training=False)

    @tf.function(autograph=False)
    def step(inputs: tf.Tensor, labels: tf.Tensor, number: tf.Tensor) -> tf.Tensor:
        with tf.GradientTape() as tape:
            features = inputs if recipe.frozen else encoder(_pixels(inputs), training=True)
            losses = tf.nn.sparse_softmax_cross_entropy_with_logits(labels, classifier(features))
            loss = tf.reduce_mean(losses)
        rate = learning_rate(own, recipe.num_images, number)
        optimizer.apply(tape.gradient(loss, variables), rate, number)
        return loss

    at_once = config.linear_eval.batch_size
    batches = labelled_batches(own, data_dir, manifest, image_ids).take(total_steps(own, recipe.num_images))
    loss = tf.constant(0.0)
    for number, batch in enumerate(batches):
        inputs = batch["image"]
        if recipe.frozen:
            # In the memory of a small forward pass, however large the batch is.
            parts = range(0, recipe.batch_size, at_once)
            inputs = tf.concat([frozen_features(inputs[start : start + at_once]) for start in parts], axis=0)
        loss = step(inputs, batch["label"], tf.constant(number, tf.int64))
        report((number + 1) * recipe.batch_size)
    if not math.isfinite(float(loss)):
        raise UserError(f"training with labels diverged, the loss is {float(loss)}: take a lower base learning rate")
    return classifier


def _pixels(images: tf.Tensor) -> tf.Tensor:
    return tf.cast(images, tf.float32) / 255.0

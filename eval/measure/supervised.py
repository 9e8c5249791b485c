"""Supervised training on a pretrained encoder: with a frozen encoder (the protocol `official`), or fine-tuning all weights.

It runs on all replicas, saves its state every epoch, and resumes from there. Both variants follow SimCLR's code (Chen et al.
2020, appendices B.5 and B.6): random crops and flips, SGD with Nesterov momentum .9, a cosine schedule without warm-up, no weight
decay, a classifier that is initialized to zero, and the weights of the last step.
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import keras
import numpy as np
import tensorflow as tf

from eval.measure.features import digest_of, features_of_pixels
from trainer import checkpoint as checkpoints
from trainer.augmentation import as_floats
from trainer.bad_records import naming_bad_records
from trainer.config import Config
from trainer.distribution import Replicas, jit_compile
from trainer.heads import make_classifier
from trainer.input_pipeline import Batch, labelled_batches
from trainer.optimizer import Optimizer, learning_rate, make_optimizer, total_steps
from trainer.preemption import PreemptedError
from trainer.settings import OptimizerSettings
from trainer.shared.errors import UserError
from trainer.shared.records import Manifest
from trainer.state import model_variables


@dataclass(frozen=True)
class Recipe:
    """The hyperparameters of supervised training."""

    num_images: int
    """Number of labelled images."""
    epochs: int
    batch_size: int
    """Images per step over all replicas, at most `num_images`. It divides evenly over the replicas."""
    base_learning_rate: float
    """Peak learning rate: this * B / 256."""
    seed: int
    frozen: bool
    """Whether the encoder does not change, including BN's statistics."""

    @property
    def optimizer(self) -> OptimizerSettings:
        """SGD with momentum and without weight decay. The learning rate decays by a cosine to 0 from the first step on."""
        return OptimizerSettings(
            name="momentum",
            epochs=self.epochs,
            global_batch_size=self.batch_size,
            base_learning_rate=self.base_learning_rate,
            learning_rate_scaling="linear",
            warmup_epochs=0.0,
            momentum=0.9,
            weight_decay=0.0,
        )

    @property
    def image_visits(self) -> int:
        """Number of images that pass through the encoder in all epochs together."""
        return total_steps(self.optimizer, self.num_images) * self.batch_size


@dataclass(frozen=True)
class State:
    """The state of supervised training: classifier, encoder (which does not change if frozen) and optimizer."""

    encoder: keras.Model
    classifier: keras.Model
    trained: tuple[tf.Variable, ...]
    optimizer: Optimizer
    frozen: bool

    def variables(self) -> dict[str, tf.Variable]:
        named = model_variables("classifier", self.classifier)
        if not self.frozen:
            named |= model_variables("encoder", self.encoder)
        names = {id(variable): name for name, variable in named.items()}
        slots = {
            f"{kind}/{names[id(variable)]}": slot
            for kind, of_kind in self.optimizer.slots.items()
            for variable, slot in zip(self.trained, of_kind, strict=True)
        }
        return named | slots


def train_classifier(
    encoder: keras.Model,
    config: Config,
    data_dir: str,
    manifest: Manifest,
    recipe: Recipe,
    image_ids: np.ndarray | None = None,
    folder: str = "",
    *,
    strategy: tf.distribute.Strategy | None = None,
    on_progress: Callable[[int], None] = lambda done: None,
    on_search: Callable[[int], None] = lambda done: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> keras.Model:
    """Trains a classifier on `encoder`, and the encoder too unless `recipe` freezes it. Returns the classifier.

    The classifier maps features, [B, F] float32, to logits, [B, C] float32. Uses the labels of the training images `image_ids`,
    [n] int64, or of all. `encoder` must be made in the scope of `strategy`, by default TensorFlow's current one. If `folder` is
    given, saves the state in it every epoch and by time; a later call with the same arguments resumes from there and ends with
    the same bits. Calls `on_search(records read)` while it looks for the records of `image_ids`, and after each step
    `on_progress(finished images)` and `should_stop()`. If the latter returns True, saves the state and raises PreemptedError.
    Raises UserError if the loss is not finite.
    """
    tf.config.experimental.enable_op_determinism()
    strategy = strategy or tf.distribute.get_strategy()
    run = _run_name(encoder, config, manifest, recipe, image_ids)
    with strategy.scope():
        state = make_state(encoder, recipe.optimizer, manifest.num_classes, recipe.frozen)
    newest = checkpoints.load_latest(folder, lambda saved: _require_same(state, saved, run)) if folder else None
    if newest is not None:
        checkpoints.restore(state.variables(), newest)
    done = newest.step if newest else 0

    def of_host(context: tf.distribute.InputContext) -> tf.data.Dataset:
        hosts = context.num_input_pipelines
        return labelled_batches(
            config.views,
            recipe.batch_size,
            dataclasses.replace(config.run, seed=recipe.seed),
            data_dir,
            manifest,
            image_ids,
            done,
            host=context.input_pipeline_id,
            hosts=hosts,
            replicas=context.num_replicas_in_sync // hosts,
            on_search=on_search,
        )

    replica_step = make_replica_step(state, recipe, config.linear_eval.batch_size, Replicas())

    @tf.function(autograph=False, jit_compile=jit_compile(strategy) or None)
    def step(batch: Batch, number: tf.Tensor) -> tf.Tensor:
        return strategy.experimental_local_results(strategy.run(replica_step, args=(batch, number)))[0]

    def save(steps: int) -> str:
        arrays = {name: variable.numpy() for name, variable in state.variables().items()}
        return checkpoints.save(folder, checkpoints.Checkpoint(steps, arrays, {}, run), keep=1)

    total = total_steps(recipe.optimizer, recipe.num_images)
    epoch = max(1, recipe.num_images // recipe.batch_size)
    batches = naming_bad_records(strategy.distribute_datasets_from_function(of_host), data_dir, manifest, "train")
    loss = tf.constant(0.0)
    schedule = checkpoints.Schedule(config.run.checkpoint_every_minutes)
    on_progress(done * recipe.batch_size)
    for number, batch in zip(range(done, total), batches, strict=False):
        loss = step(batch, tf.constant(number, tf.int64))
        steps = number + 1
        stopping = steps < total and should_stop()
        if folder and (stopping or steps % epoch == 0 or steps == total or schedule.is_due()):
            if not math.isfinite(float(loss)):
                break
            with schedule.writing():
                path = save(steps)
        if stopping:
            kept = f", saved {path}" if folder else ""
            raise PreemptedError(
                f"stopped at step {steps} of {total} of supervised training{kept}: start the same command again to continue"
            )
        on_progress(steps * recipe.batch_size)
    if not math.isfinite(float(loss)):
        raise UserError(f"supervised training diverged, the loss is {float(loss)}: set a lower base learning rate")
    return state.classifier


def weights_of(classifier: keras.Model) -> dict[str, np.ndarray]:
    """Returns the arrays `weights`, [F, C], and `bias`, [C], of a classifier."""
    kernel, bias = (variable.numpy() for variable in classifier.variables)
    return {"weights": kernel, "bias": bias}


def make_replica_step(
    state: State, recipe: Recipe, images_at_once: int, replicas: Replicas
) -> Callable[[Batch, tf.Tensor], tf.Tensor]:
    """Returns the training step of one of `replicas`: from (its part of a batch, number of the step) to the mean loss.

    The batch comes from `labelled_batches`. A frozen encoder processes `images_at_once` images at a time.
    """
    features_of = features_of_pixels(state.encoder)

    def frozen_features(images: tf.Tensor) -> tf.Tensor:
        count, at_once = images.shape[0], images_at_once
        if count <= at_once:
            return features_of(images)
        # Splits the batch, so that memory does not grow with the size of the batch.
        missing = -count % at_once
        parts = tf.reshape(tf.pad(images, [[0, missing], [0, 0], [0, 0], [0, 0]]), [-1, at_once, *images.shape[1:]])
        features = tf.map_fn(features_of, parts, parallel_iterations=1, fn_output_signature=tf.float32)
        return tf.reshape(features, [count + missing, state.encoder.output_shape[-1]])[:count]

    def replica_step(batch: Batch, number: tf.Tensor) -> tf.Tensor:
        images = batch["image"]
        inputs = frozen_features(images) if state.frozen else as_floats(images)
        with tf.GradientTape() as tape:
            features = inputs if state.frozen else state.encoder(inputs, training=True)
            losses = tf.nn.sparse_softmax_cross_entropy_with_logits(batch["label"], state.classifier(features))
            # The loss of a replica is its share of the mean over the batch, because gradients are summed.
            loss = tf.reduce_mean(losses) / replicas.count
        gradients = replicas.sum(tape.gradient(loss, state.trained))
        state.optimizer.apply(gradients, learning_rate(recipe.optimizer, recipe.num_images, number), number)
        return replicas.sum(loss)

    return replica_step


def make_state(encoder: keras.Model, settings: OptimizerSettings, num_classes: int, frozen: bool) -> State:
    """Returns the state before the first step: a classifier of zeros on `encoder`."""
    classifier = make_classifier(encoder.output_shape[-1], num_classes)
    for variable in classifier.variables:
        variable.assign(tf.zeros(variable.shape))
    models = (classifier,) if frozen else (encoder, classifier)
    trained = tuple(variable.value for model in models for variable in model.trainable_variables)
    return State(encoder, classifier, trained, make_optimizer(settings, trained, [True] * len(trained)), frozen)


def _run_name(encoder: keras.Model, config: Config, manifest: Manifest, recipe: Recipe, image_ids: np.ndarray | None) -> str:
    """Returns a digest of everything that the result of supervised training depends on."""
    about: Mapping[str, object] = {
        "views": dataclasses.asdict(config.views),
        "encoder": dataclasses.asdict(config.encoder),
        "recipe": dataclasses.asdict(recipe),
        "begun_with": digest_of(encoder, config, manifest, "train", image_ids),
    }
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()


def _require_same(state: State, saved: checkpoints.Checkpoint, run: str) -> None:
    if saved.run != run:
        raise UserError(f"{saved.path} is of another supervised training")
    checkpoints.require_same_shapes(state.variables(), saved)

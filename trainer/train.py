"""Pretraining: the state, the step, the loop.

`create_train_state` makes everything that moves, `make_train_step` the function that moves it by one batch, `train` runs them
over a dataset, from the newest checkpoint on.
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from trainer import checkpoint as checkpoints
from trainer.augmentation import augment
from trainer.config import Config, config_from_dict
from trainer.encoder import make_encoder
from trainer.heads import make_classifier, make_projection
from trainer.input_pipeline import Batch, training_batches
from trainer.losses import VARIANTS, gamma_of_visit, global_contrastive, global_objective, nt_xent
from trainer.optimizer import Optimizer, learning_rate, make_optimizer, total_steps
from trainer.records import UserError, read_manifest

CONFIG = "config.json"
RESULT = "result.json"


@dataclass(frozen=True)
class TrainState:
    """Everything that a step changes."""

    encoder: keras.Model
    projection: keras.Model
    classifier: keras.Model
    optimizer: Optimizer
    u: tf.Variable
    """[N] float32, by image ID; 0 where an image was not seen yet."""
    step: tf.Variable
    """int64; how many steps were taken."""

    @property
    def trainable(self) -> list[tf.Variable]:
        return [v.value for model in (self.encoder, self.projection, self.classifier) for v in model.trainable_variables]

    def variables(self) -> dict[str, tf.Variable]:
        """Returns every variable by a name that says what it is."""
        named = model_variables("encoder", self.encoder)
        named |= model_variables("projection", self.projection)
        named |= model_variables("classifier", self.classifier)
        by_id = {id(variable): name for name, variable in named.items()}
        slots = {f"momentum/{by_id[id(v)]}": slot for v, slot in zip(self.trainable, self.optimizer.slots, strict=True)}
        return named | slots | {"u": self.u, "step": self.step}

    def arrays(self) -> dict[str, np.ndarray]:
        return {name: variable.numpy() for name, variable in self.variables().items()}


def model_variables(name: str, model: keras.Model) -> dict[str, tf.Variable]:
    """Returns the variables of a model by `name`/LAYER/VARIABLE."""
    return {f"{name}/{variable.path}": variable.value for variable in model.variables}


@dataclass(frozen=True)
class TrainResult:
    metrics: Mapping[str, float]
    """The last ones logged."""
    steps: int
    state_sha256: str
    """Over every variable in name order."""
    checkpoint: str
    """Path of the final checkpoint."""


def encoder_of(config: Config) -> keras.Model:
    return make_encoder(config.depth, config.width_multiplier, config.image_size, config.cifar_stem, config.seed)


def create_train_state(config: Config, num_images: int, num_classes: int) -> TrainState:
    """Returns the state before the first step, a function of its arguments."""
    encoder = encoder_of(config)
    features = encoder.output_shape[-1]
    projection = make_projection(features, config.projection_layers, config.projection_dim, config.seed)
    classifier = make_classifier(features, num_classes, config.seed)
    contrastive = [v.value for v in (*encoder.trainable_variables, *projection.trainable_variables)]
    supervised = [v.value for v in classifier.trainable_variables]
    # What has one dimension is of BN.
    exempt = [len(variable.shape) == 1 for variable in contrastive] + [True for _ in supervised]
    return TrainState(
        encoder=encoder,
        projection=projection,
        classifier=classifier,
        optimizer=make_optimizer(config, [*contrastive, *supervised], exempt),
        u=tf.Variable(tf.zeros([num_images]), trainable=False, name="u"),
        step=tf.Variable(0, dtype=tf.int64, trainable=False, name="step"),
    )


def make_train_step(config: Config, state: TrainState) -> Callable[[Batch], dict[str, tf.Tensor]]:
    """Returns the function that moves `state` by one batch of `training_batches` and returns scalars by metric name."""
    num_images = state.u.shape[0]
    variant = VARIANTS[config.variant]

    def contrastive_loss(z1: tf.Tensor, z2: tf.Tensor, image_id: tf.Tensor) -> tf.Tensor:
        positions = tf.range(config.global_batch_size)
        if config.loss == "nt_xent":
            return nt_xent(z1, z2, z1, z2, positions, config.temperature)
        u = state.u.sparse_read(image_id)
        gamma = gamma_of_visit(u, config.gamma, variant)
        loss, new_u = global_contrastive(z1, z2, z1, z2, positions, u, gamma, config.temperature, variant)
        state.u.scatter_update(tf.IndexedSlices(new_u, image_id))
        return loss

    @tf.function(autograph=False)
    def train_step(batch: Batch) -> dict[str, tf.Tensor]:
        both = tf.concat([batch["views"][:, 0], batch["views"][:, 1]], axis=0)
        draws = tf.concat([batch["draws"][:, 0], batch["draws"][:, 1]], axis=0)
        labels = tf.tile(batch["label"], [2])
        images = augment(both, draws, config.color_jitter_strength, config.blur)
        rate = learning_rate(config, num_images, state.step)
        with tf.GradientTape() as tape:
            features = state.encoder(images, training=True)
            projected = tf.math.l2_normalize(state.projection(features, training=True), axis=1)
            z1, z2 = tf.split(projected, 2)
            contrastive = contrastive_loss(z1, z2, batch["image_id"])
            logits = state.classifier(tf.stop_gradient(features))
            supervised = tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits))
            kernel_decay = config.weight_decay * tf.nn.l2_loss(state.classifier.trainable_variables[0].value)
            loss = contrastive + supervised + kernel_decay
        state.optimizer.apply(tape.gradient(loss, state.trainable), rate)
        state.step.assign_add(1)
        return {
            "train/contrastive_loss": contrastive,
            "train/learning_rate": rate,
            "train/online_loss": supervised,
            "train/online_top_1_accuracy": tf.reduce_mean(tf.cast(tf.argmax(logits, 1) == labels, tf.float32)),
        }

    return train_step


def train(
    config: Config,
    data_dir: str,
    checkpoint_dir: str,
    *,
    preset: str = "",
    code_version: str = "",
    log_metrics: Callable[[dict[str, float], int], None] = lambda metrics, step: None,
    report: Callable[[int, int, str], None] = lambda done, total, text: None,
) -> TrainResult:
    """Pretrains on the dataset in `data_dir`, from the newest checkpoint in `checkpoint_dir` if there is one.

    Calls `log_metrics(metrics, step)` every `config.log_every_steps` and at the end, `report(steps done, steps in all, text)` as
    often. Leaves config.json, the newest checkpoints and result.json. Killed and started again, it ends with the same bits.
    Raises UserError for data that cannot be used, a checkpoint folder of another run, and a loss that is not finite.
    """
    tf.config.experimental.enable_op_determinism()
    manifest = read_manifest(data_dir)
    num_images = manifest.splits["train"].records
    state = create_train_state(config, num_images, manifest.num_classes)
    origin = {"dataset_fingerprint": manifest.fingerprint, "num_images": num_images, "num_classes": manifest.num_classes}
    _claim(checkpoint_dir, config, origin, {"preset": preset, "code_version": code_version})
    latest = checkpoints.load_latest(checkpoint_dir)
    if latest is not None:
        checkpoints.restore(state.variables(), latest)

    total = total_steps(config, num_images)
    every = max(1, config.checkpoint_every_epochs * num_images // config.global_batch_size)
    train_step = make_train_step(config, state)
    begun = int(state.step.numpy())
    path, metrics = (latest.path, dict(latest.metrics)) if latest else ("", {})
    pending: list[dict[str, tf.Tensor]] = []
    report(begun, total, "")
    for step, batch in zip(range(begun + 1, total + 1), training_batches(config, data_dir, manifest, begun), strict=False):
        pending.append(train_step(batch))
        saves = step % every == 0 or step == total
        if saves or step % config.log_every_steps == 0:
            metrics = _mean(pending) | _metrics_of_u(config, state)
            pending = []
            if not math.isfinite(metrics["train/contrastive_loss"]):
                raise UserError(
                    f"the loss is {metrics['train/contrastive_loss']} at step {step}; the last good checkpoint is "
                    f"{path or 'none'}: a lower base_learning_rate or a higher temperature is the usual cure"
                )
            log_metrics(metrics, step)
            report(step, total, f"loss {metrics['train/contrastive_loss']:.3f}")
        if saves:
            path = checkpoints.save(
                checkpoint_dir, checkpoints.Checkpoint(step, state.arrays(), metrics), config.keep_checkpoints
            )
    result = TrainResult(metrics, total, checkpoints.sha256_of(state.arrays()), path)
    checkpoints.write_whole(f"{checkpoint_dir}/{RESULT}", (json.dumps(asdict(result), indent=1, sort_keys=True) + "\n").encode())
    return result


def read_config(checkpoint_dir: str) -> tuple[Config, dict[str, Any]]:
    """Returns the config of the run in `checkpoint_dir`, and what else config.json says. Raises UserError where there is none."""
    path = f"{checkpoint_dir}/{CONFIG}"
    if not tf.io.gfile.exists(path):
        raise UserError(f"{checkpoint_dir} holds no pretraining run: {CONFIG} is missing")
    with tf.io.gfile.GFile(path) as file:
        stored = json.loads(file.read())
    return config_from_dict(stored["config"]), stored


def _claim(checkpoint_dir: str, config: Config, origin: Mapping[str, Any], about: Mapping[str, str]) -> None:
    """Writes config.json into `checkpoint_dir`, or proves that the run already there is this one."""
    path = f"{checkpoint_dir}/{CONFIG}"
    if tf.io.gfile.exists(path):
        before, stored = read_config(checkpoint_dir)
        now = {**asdict(config), **origin}
        for name, value in (asdict(before) | {name: stored[name] for name in origin}).items():
            if value != now[name] and name != "linear_eval":
                raise UserError(f"{checkpoint_dir} holds a run with {name}={value}, not {now[name]}: take another folder")
        return
    tf.io.gfile.makedirs(checkpoint_dir)
    text = json.dumps({"config": asdict(config), **origin, **about}, indent=1, sort_keys=True) + "\n"
    checkpoints.write_whole(path, text.encode())


def _mean(pending: list[dict[str, tf.Tensor]]) -> dict[str, float]:
    """Means over the steps since the last log; the learning rate is that of the last one."""
    means = {name: float(np.mean([step[name].numpy() for step in pending])) for name in pending[-1]}
    return means | {"train/learning_rate": float(pending[-1]["train/learning_rate"])}


def _metrics_of_u(config: Config, state: TrainState) -> dict[str, float]:
    if config.loss == "nt_xent":
        return {}
    u = state.u.numpy()
    seen = u > 0
    return {
        "train/u_mean": float(u[seen].mean()) if seen.any() else 0.0,
        "train/u_seen": float(seen.mean()),
        "train/global_objective": float(global_objective(state.u, config.temperature)),
    }

"""Pretraining: the state, the step, the loop.

`create_train_state` makes everything that moves, `make_train_step` the function that moves it by one batch, `train` runs them
over a dataset, from the newest checkpoint on.
"""

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from trainer import checkpoint as checkpoints
from trainer.augmentation import augment
from trainer.config import Config, config_from_dict
from trainer.distribution import Replicas, check_divides, jit_compile, make_strategy
from trainer.encoder import make_encoder
from trainer.heads import make_classifier, make_projection
from trainer.input_pipeline import Batch, naming_wrong_records, training_batches, training_split
from trainer.losses import (
    VARIANTS,
    alignment,
    gamma_of_visit,
    global_contrastive,
    global_objective,
    next_temperature,
    nt_xent,
    uniformity_kernel,
)
from trainer.optimizer import Optimizer, learning_rate, make_optimizer, peak_learning_rate, total_steps
from trainer.preemption import PreemptedError
from trainer.shared.errors import UserError
from trainer.shared.files import write_whole
from trainer.shared.records import Manifest, read_manifest

CONFIG = "config.json"
RESULT = "result.json"
BOOKKEEPING = ("linear_eval", "log_every_steps", "keep_checkpoints", "cache")
"""Settings that may change when a run goes on: they move no bit of its state."""


@dataclass(frozen=True)
class TrainState:
    """Everything that a step changes. On several replicas each variable is there on every one, with the same value."""

    encoder: keras.Model
    projection: keras.Model
    classifier: keras.Model
    optimizer: Optimizer
    by_image: Mapping[str, tf.Variable]
    """Vectors over the dataset, [N] float32, by image ID: `u`, 0 where an image was not seen yet; and, where every image learns
    its temperature, `temperature` and `temperature_velocity`."""
    step: tf.Variable
    """int64; how many steps were taken."""

    @property
    def u(self) -> tf.Variable:
        return self.by_image["u"]

    @property
    def trainable(self) -> list[tf.Variable]:
        return [v.value for model in (self.encoder, self.projection, self.classifier) for v in model.trainable_variables]

    def variables(self) -> dict[str, tf.Variable]:
        """Returns every variable by a name that says what it is."""
        named = model_variables("encoder", self.encoder)
        named |= model_variables("projection", self.projection)
        named |= model_variables("classifier", self.classifier)
        by_id = {id(variable): name for name, variable in named.items()}
        slots = {
            f"{kind}/{by_id[id(variable)]}": slot
            for kind, of_kind in self.optimizer.slots.items()
            for variable, slot in zip(self.trainable, of_kind, strict=True)
        }
        return named | slots | dict(self.by_image) | {"step": self.step}

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


def create_train_state(config: Config, num_images: int, num_classes: int, replicas: Replicas | None = None) -> TrainState:
    """Returns the state before the first step, a function of its arguments; made in a strategy's scope, on all its replicas."""
    encoder = make_encoder(config, replicas)
    features = encoder.output_shape[-1]
    projection = make_projection(features, config.projection_layers, config.projection_dim, config.seed, replicas)
    classifier = make_classifier(features, num_classes, config.seed)
    contrastive = [v.value for v in (*encoder.trainable_variables, *projection.trainable_variables)]
    supervised = [v.value for v in classifier.trainable_variables]
    # What has one dimension is of BN.
    exempt = [len(variable.shape) == 1 for variable in contrastive] + [True for _ in supervised]
    by_image = {"u": 0.0}
    if VARIANTS[config.variant].learns_temperature:
        by_image |= {"temperature": config.temperature, "temperature_velocity": 0.0}
    return TrainState(
        encoder=encoder,
        projection=projection,
        classifier=classifier,
        optimizer=make_optimizer(config, [*contrastive, *supervised], exempt),
        by_image={
            name: tf.Variable(tf.fill([num_images], value), trainable=False, name=name) for name, value in by_image.items()
        },
        step=tf.Variable(0, dtype=tf.int64, trainable=False, name="step"),
    )


def make_train_step(
    config: Config, state: TrainState, strategy: tf.distribute.Strategy | None = None, compiled: bool = False
) -> Callable[[Batch], dict[str, tf.Tensor]]:
    """Returns the function that moves `state` by one batch of `training_batches` and returns scalars by metric name.

    On R replicas of `strategy` (TensorFlow's default is one) it takes a batch for each, an R-th of the global batch. `compiled`
    has XLA compile the whole step.
    """
    strategy = strategy or tf.distribute.get_strategy()
    replica_step = make_replica_step(config, state, Replicas())

    @tf.function(autograph=False, jit_compile=compiled or None)
    def train_step(batch: Batch) -> dict[str, tf.Tensor]:
        metrics = strategy.run(replica_step, args=(batch,))
        return {name: strategy.experimental_local_results(value)[0] for name, value in metrics.items()}

    return train_step


def make_replica_step(config: Config, state: TrainState, replicas: Replicas) -> Callable[[Batch], dict[str, tf.Tensor]]:
    """Returns what one of `replicas` does in a step, with its part of a global batch.

    Negatives are those of all replicas, and the gradient goes through them.
    """
    num_images = state.u.shape[0]
    variant = VARIANTS[config.variant]

    def global_loss(
        z1: tf.Tensor, z2: tf.Tensor, all_z1: tf.Tensor, all_z2: tf.Tensor, positions: tf.Tensor, image_id: tf.Tensor
    ) -> tf.Tensor:
        # Every replica reads and writes the entries of the whole batch, so that u is the same on all.
        every_id = replicas.gather(image_id)
        every_u = _entries(state.u, every_id)
        gamma = tf.gather(gamma_of_visit(every_u, config.gamma, variant), positions)
        temperature: tf.Tensor | float = config.temperature
        if variant.learns_temperature:
            temperature = _entries(state.by_image["temperature"], image_id)
        result = global_contrastive(z1, z2, all_z1, all_z2, positions, tf.gather(every_u, positions), gamma, temperature, variant)
        updates = {"u": result.u}
        if variant.learns_temperature:
            velocity = _entries(state.by_image["temperature_velocity"], image_id)
            temperature, velocity = next_temperature(temperature, velocity, result.temperature_gradient, config)
            updates |= {"temperature": temperature, "temperature_velocity": velocity}
        every_update = replicas.gather(tf.stack(list(updates.values()), axis=1))
        for name, values in zip(updates, tf.unstack(every_update, axis=1), strict=True):
            state.by_image[name].scatter_update(tf.IndexedSlices(values, every_id))
        return result.loss

    def replica_step(batch: Batch) -> dict[str, tf.Tensor]:
        per_replica = config.global_batch_size // replicas.count
        positions = replicas.index() * per_replica + tf.range(per_replica)
        both = tf.concat([batch["views"][:, 0], batch["views"][:, 1]], axis=0)
        draws = tf.concat([batch["draws"][:, 0], batch["draws"][:, 1]], axis=0)
        labels = tf.tile(batch["label"], [2])
        images = augment(both, draws, config.color_jitter_strength, config.blur)
        rate = learning_rate(config, num_images, state.step)
        with tf.GradientTape() as tape:
            features = state.encoder(images, training=True)
            projected = tf.math.l2_normalize(state.projection(features, training=True), axis=1)
            z1, z2 = tf.split(projected, 2)
            all_z1, all_z2 = tf.unstack(replicas.gather(tf.stack([z1, z2], axis=1)), axis=1)
            if config.loss == "global_contrastive":
                contrastive = global_loss(z1, z2, all_z1, all_z2, positions, tf.cast(batch["image_id"], tf.int32))
            else:
                contrastive = nt_xent(z1, z2, all_z1, all_z2, positions, config.temperature, config.loss == "decoupled")
            logits = state.classifier(tf.stop_gradient(features))
            supervised = tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits))
            kernel_decay = config.weight_decay * tf.nn.l2_loss(state.classifier.trainable_variables[0].value)
            # Each replica has its part of the mean; their gradients are summed.
            loss = (contrastive + supervised + kernel_decay) / replicas.count
        gradients = replicas.sum(tape.gradient(loss, state.trainable))
        state.optimizer.apply(gradients, rate, state.step)
        state.step.assign_add(1)
        means = {
            "train/contrastive_loss": contrastive,
            "train/online_loss": supervised,
            "train/online_top_1_accuracy": tf.reduce_mean(tf.cast(tf.argmax(logits, 1) == labels, tf.float32)),
            "train/alignment": alignment(z1, z2),
            "train/uniformity": uniformity_kernel(z1, all_z1, positions),
        }
        values = tf.unstack(replicas.mean(tf.stack(list(means.values()))))
        metrics = dict(zip(means, values, strict=True))
        return metrics | {
            "train/uniformity": tf.math.log(metrics["train/uniformity"]),
            "train/learning_rate": rate,
            "train/gradient_norm": tf.linalg.global_norm(gradients),
        }

    return replica_step


def train(
    config: Config,
    data_dir: str,
    checkpoint_dir: str,
    *,
    preset: str = "",
    code_version: str = "",
    strategy: tf.distribute.Strategy | None = None,
    log_metrics: Callable[[dict[str, float], int], None] = lambda metrics, step: None,
    report: Callable[[int, int, str], None] = lambda done, total, text: None,
    before_checkpoint: Callable[[], None] = lambda: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> TrainResult:
    """Pretrains on the dataset in `data_dir`, from the newest checkpoint in `checkpoint_dir` if there is one.

    Runs on `strategy`'s replicas, by default on whatever the machine has. Calls `log_metrics(metrics, step)` every
    `config.log_every_steps` and at the end, `report(steps done, steps in all, text)` as often, and `should_stop()` after every
    step: where that is true it saves the state and raises PreemptedError. Calls `before_checkpoint()` before it saves: a run
    that goes on from the checkpoint does not log again what came before it. Leaves config.json, the newest checkpoints and
    result.json. Killed and started again, it ends with the same bits.

    Raises UserError for data that cannot be used, a checkpoint folder of another run, and a loss that is not finite.
    """
    tf.config.experimental.enable_op_determinism()
    strategy = strategy or make_strategy()
    check_divides(config.global_batch_size, strategy.num_replicas_in_sync)
    manifest = read_manifest(data_dir)
    num_images = training_split(config, data_dir, manifest).records
    total = total_steps(config, num_images)
    batches = _Batches(config, data_dir, manifest, strategy)
    with strategy.scope():
        state = create_train_state(config, num_images, manifest.num_classes)
    origin = {"dataset_fingerprint": manifest.fingerprint, "num_images": num_images, "num_classes": manifest.num_classes}
    about = {"preset": preset, "code_version": code_version, "synsets": manifest.synsets}
    run = _claim(checkpoint_dir, config, origin, about)

    def of_this_run(checkpoint: checkpoints.Checkpoint) -> None:
        if checkpoint.run != run:
            raise UserError(f"{checkpoint.path} is of another run than {checkpoint_dir}/{CONFIG}")
        checkpoints.require_same_shapes(state.variables(), checkpoint)

    latest = checkpoints.load_latest(checkpoint_dir, of_this_run)
    if latest is not None:
        checkpoints.restore(state.variables(), latest)

    every = max(1, config.checkpoint_every_epochs * num_images // config.global_batch_size)
    train_step = make_train_step(config, state, strategy, jit_compile(strategy))
    begun = int(state.step.numpy())
    path, metrics = (latest.path, dict(latest.metrics)) if latest else ("", {})
    pending = _Pending(config.global_batch_size, latest.pending if latest else ())
    report(begun, total, "")
    for step, batch in zip(range(begun + 1, total + 1), pending.timed(batches.from_step(begun)), strict=False):
        pending.add(train_step(batch))
        stopping = step < total and should_stop()
        saves = step % every == 0 or step == total
        if saves or step % config.log_every_steps == 0:
            pending.require_finite(step, path, metrics, config)
            metrics = pending.metrics() | _metrics_by_image(config, state)
            log_metrics(metrics, step)
            report(step, total, f"loss {metrics['train/contrastive_loss']:.3f}, {_rate(metrics)}")
        if saves or stopping:
            pending.require_finite(step, path, metrics, config)
            before_checkpoint()
            saved = checkpoints.Checkpoint(step, state.arrays(), metrics, run, pending=pending.as_numbers())
            path = checkpoints.save(checkpoint_dir, saved, config.keep_checkpoints)
        if stopping:
            raise PreemptedError(f"stopped at step {step} of {total}, saved {path}: start the same command again to go on")
    result = TrainResult(metrics, total, checkpoints.sha256_of(state.arrays()), path)
    write_whole(f"{checkpoint_dir}/{RESULT}", (json.dumps(asdict(result), indent=1, sort_keys=True) + "\n").encode())
    return result


def read_config(checkpoint_dir: str) -> tuple[Config, dict[str, Any]]:
    """Returns the config of the run in `checkpoint_dir`, and what else config.json says. Raises UserError where there is none."""
    path = f"{checkpoint_dir}/{CONFIG}"
    if not tf.io.gfile.exists(path):
        raise UserError(f"{checkpoint_dir} holds no pretraining run: {CONFIG} is missing")
    with tf.io.gfile.GFile(path) as file:
        stored = json.loads(file.read())
    return config_from_dict(stored["config"]), stored


def _claim(checkpoint_dir: str, config: Config, origin: Mapping[str, Any], about: Mapping[str, Any]) -> str:
    """Writes config.json into `checkpoint_dir`, or proves that the run already there is this one; returns the run's name."""
    path = f"{checkpoint_dir}/{CONFIG}"
    now = {name: value for name, value in {**asdict(config), **origin}.items() if name not in BOOKKEEPING}
    if tf.io.gfile.exists(path):
        before, stored = read_config(checkpoint_dir)
        for name, value in (asdict(before) | {name: stored[name] for name in origin}).items():
            if name not in BOOKKEEPING and value != now[name]:
                raise UserError(f"{checkpoint_dir} holds a run with {name}={value}, not {now[name]}: take another folder")
    else:
        tf.io.gfile.makedirs(checkpoint_dir)
        text = json.dumps({"config": asdict(config), **origin, **about}, indent=1, sort_keys=True) + "\n"
        write_whole(path, text.encode())
    return hashlib.sha256(json.dumps(now, sort_keys=True).encode()).hexdigest()


def _entries(vector: tf.Variable, image_id: tf.Tensor) -> tf.Tensor:
    # tf.gather would first read a variable of several replicas whole.
    return tf.raw_ops.ResourceGather(resource=vector.handle, indices=image_id, dtype=vector.dtype)


@dataclass(frozen=True)
class _Batches:
    """The training images, to every replica its part of a batch."""

    config: Config
    data_dir: str
    manifest: Manifest
    strategy: tf.distribute.Strategy

    def from_step(self, first_step: int) -> Iterator[Batch]:
        """Yields what `train_step` takes. Raises UserError that names the record where one is wrong."""

        def of_host(context: tf.distribute.InputContext) -> tf.data.Dataset:
            hosts = context.num_input_pipelines
            return training_batches(
                self.config,
                self.data_dir,
                self.manifest,
                first_step,
                host=context.input_pipeline_id,
                hosts=hosts,
                replicas=context.num_replicas_in_sync // hosts,
            )

        batches = self.strategy.distribute_datasets_from_function(of_host)
        yield from naming_wrong_records(batches, self.data_dir, self.manifest, "train")


class _Pending:
    """What the steps since the last log returned, and how long they took."""

    def __init__(self, batch_size: int, before: Sequence[Mapping[str, float]] = ()) -> None:
        self.batch_size = batch_size
        self.steps: list[Mapping[str, tf.Tensor | np.float32]] = [
            {name: np.float32(value) for name, value in step.items()} for step in before
        ]
        self.waited = 0.0
        self.since: float | None = None

    def timed(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Yields `batches`, with an eye on the time that waiting for each takes."""
        while True:
            asked = time.perf_counter()
            batch = next(batches)
            self.waited += time.perf_counter() - asked
            yield batch

    def add(self, metrics: dict[str, tf.Tensor]) -> None:
        self.steps.append(metrics)

    def as_numbers(self) -> list[dict[str, float]]:
        """Returns the metrics of each step since the last log, for a checkpoint."""
        return [{name: float(value) for name, value in step.items()} for step in self.steps]

    def require_finite(self, step: int, checkpoint: str, before: Mapping[str, float], config: Config) -> None:
        """Raises UserError if a step up to `step` had a loss or a gradient that is not finite."""
        norms = [float(metrics["train/gradient_norm"]) for metrics in self.steps]
        for index, (norm, metrics) in enumerate(zip(norms, self.steps, strict=True)):
            loss = float(metrics["train/contrastive_loss"])
            if math.isfinite(loss) and math.isfinite(norm):
                continue
            what = f"the loss is {loss}" if not math.isfinite(loss) else f"the gradient's norm is {norm}"
            earlier = [before["train/gradient_norm"]] if "train/gradient_norm" in before else []
            earlier += norms[:index]
            grew = len(earlier) > 1 and max(earlier) > 3 * earlier[0]
            cause = (
                f"the gradient's norm rose from {earlier[0]:.3g} to {max(earlier):.3g} before it"
                if grew
                else f"the peak learning rate is {peak_learning_rate(config):.3g}, the temperature {config.temperature}"
            )
            raise UserError(
                f"{what} at step {step - len(self.steps) + index + 1}; the last good checkpoint is {checkpoint or 'none'}; "
                f"{cause}: a lower base_learning_rate or a longer warm-up is the usual cure"
                + ("" if grew else ", or a higher temperature")
            )

    def metrics(self) -> dict[str, float]:
        """Returns means over the steps since the last call, the last learning rate, and the speed."""
        means = {name: float(np.mean([np.asarray(step[name]) for step in self.steps])) for name in self.steps[-1]}
        means["train/learning_rate"] = float(self.steps[-1]["train/learning_rate"])
        now = time.perf_counter()
        if self.since is not None:
            seconds = (now - self.since) / len(self.steps)
            means["train/step_seconds"] = seconds
            means["train/images_per_second"] = self.batch_size / seconds
            means["train/input_wait_fraction"] = min(1.0, self.waited / (now - self.since))
        self.steps, self.waited, self.since = [], 0.0, now
        return means


def _rate(metrics: Mapping[str, float]) -> str:
    if "train/images_per_second" not in metrics:
        return "warming up"
    return f"{metrics['train/images_per_second']:.0f} images/s"


def _metrics_by_image(config: Config, state: TrainState) -> dict[str, float]:
    """Returns what u, and the temperatures if they are learned, look like over the images seen so far."""
    if config.loss != "global_contrastive":
        return {}
    u = state.u.numpy()
    seen = u > 0
    if not seen.any():
        return {}
    quantiles = np.quantile(u[seen], (0.01, 0.1, 0.5, 0.9, 0.99))
    metrics = {
        "train/u_mean": float(u[seen].mean()),
        "train/u_seen": float(seen.mean()),
        "train/global_objective": float(global_objective(tf.constant(u), config.temperature)),
    }
    metrics |= {f"train/u_p{name}": float(value) for name, value in zip(("01", "10", "50", "90", "99"), quantiles, strict=True)}
    if "temperature" in state.by_image:
        temperature = state.by_image["temperature"].numpy()[seen]
        metrics |= {"train/temperature_mean": float(temperature.mean()), "train/temperature_std": float(temperature.std())}
        metrics["train/global_objective"] = float(np.mean(temperature * np.log(u[seen])))
    return metrics

"""The pretraining loop: runs train steps over a dataset, starting from the newest checkpoint."""

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import tensorflow as tf

from trainer import checkpoint as checkpoints
from trainer.bad_records import naming_bad_records
from trainer.config import Config
from trainer.distribution import check_divides, jit_compile, make_strategy
from trainer.folder import CONFIG, RESULT, claim_folder, recorded_source
from trainer.initial import find_source, initialise
from trainer.input_pipeline import Batch, training_batches, training_split
from trainer.losses import make_loss
from trainer.optimizer import peak_learning_rate, total_steps
from trainer.preemption import PreemptedError
from trainer.shared.data import require_dataset
from trainer.shared.errors import UserError
from trainer.shared.files import write_whole
from trainer.shared.progress import OnProgress, silent
from trainer.shared.records import Manifest, read_manifest
from trainer.state import create_train_state
from trainer.step import make_train_step


class DivergedError(UserError):
    """The loss or the gradient of a step is not finite."""


@dataclass(frozen=True)
class TrainResult:
    metrics: Mapping[str, float]
    """The last logged metrics."""
    steps: int
    state_sha256: str
    """SHA-256 of all variables of the final state, in name order."""
    checkpoint: str
    """Path of the final checkpoint."""


def train(
    config: Config,
    data_dir: str,
    checkpoint_dir: str,
    *,
    init_from: str = "",
    preset: str = "",
    code_version: str = "",
    strategy: tf.distribute.Strategy | None = None,
    log_metrics: Callable[[dict[str, float], int], None] = lambda metrics, step: None,
    on_progress: OnProgress = silent,
    before_checkpoint: Callable[[], None] = lambda: None,
    should_stop: Callable[[], bool] = lambda: False,
    say: Callable[[str], None] = lambda line: None,
    clock: Callable[[], float] = time.monotonic,
) -> TrainResult:
    """Pretrains on the dataset in `data_dir`, from the newest checkpoint in `checkpoint_dir` if there is one.

    A run that begins starts from the encoder, heads and u of the checkpoint `init_from`, a file or a folder, if one is given:
    `trainer.initial` says how. Runs on the replicas of `strategy`, by default all devices of the machine. Writes config.json,
    checkpoints and result.json. A run that is killed and started again ends with the same bits as an undisturbed one.

    Calls `log_metrics(metrics, step)` and `on_progress("training", finished steps, total steps, text)` every `log_every_steps`
    steps and at the end, and `on_progress(phase)` for what comes before. Calls `should_stop()` after every step: if it returns
    True, saves the state and raises PreemptedError. Calls `before_checkpoint()` before each checkpoint, so that the caller can
    deliver its logs: a resumed run does not repeat them. Calls `say(line)` for the user. `clock()`, in seconds, tells when a
    checkpoint is due by time.

    Raises UserError if the dataset cannot be used, `init_from` does not fit, the checkpoint folder belongs to another run, or a
    loss is not finite.
    """
    tf.config.experimental.enable_op_determinism()
    strategy = strategy or make_strategy()
    check_divides(config.optimizer.global_batch_size, strategy.num_replicas_in_sync)
    config.optimizer.check_parts(strategy.num_replicas_in_sync)
    on_progress("checking the dataset")
    manifest = read_manifest(data_dir)
    require_dataset(config.data, manifest, data_dir)
    num_images = training_split(config.optimizer.global_batch_size, data_dir, manifest).records
    total = total_steps(config.optimizer, num_images)
    on_progress("building the network")
    batches = _Batches(config, data_dir, manifest, strategy)
    with strategy.scope():
        state = create_train_state(config, num_images, manifest.num_classes)
    origin = {"dataset_fingerprint": manifest.fingerprint, "num_images": num_images, "num_classes": manifest.num_classes}
    about = {"preset": preset, "code_version": code_version, "synsets": manifest.synsets}
    source = find_source(init_from, recorded_source(checkpoint_dir), config, manifest, state) if init_from else None
    run = claim_folder(checkpoint_dir, config, origin, about, source.as_json() if source else None)

    def require_this_run(checkpoint: checkpoints.Checkpoint) -> None:
        if checkpoint.run != run:
            raise UserError(f"{checkpoint.path} is of another run than {checkpoint_dir}/{CONFIG}")
        checkpoints.require_same_shapes(state.variables(), checkpoint)

    on_progress("reading the newest checkpoint")
    latest = checkpoints.load_latest(checkpoint_dir, require_this_run)
    if latest is not None:
        checkpoints.restore(state.variables(), latest)
    elif source is not None:
        initialise(state, source, say)

    every = max(1, config.run.checkpoint_every_epochs * num_images // config.optimizer.global_batch_size)
    loss = make_loss(config.loss)
    train_step = make_train_step(config, state, strategy, jit_compile(strategy))
    begun = int(state.step.numpy())
    path, metrics = (latest.path, dict(latest.metrics)) if latest else ("", {})
    pending = _Pending(config.optimizer.global_batch_size, latest.pending if latest else ())
    schedule = checkpoints.Schedule(config.run.checkpoint_every_minutes, clock)
    on_progress("compiling the training step")
    for step, batch in zip(range(begun + 1, total + 1), pending.timed(batches.from_step(begun, on_progress)), strict=False):
        pending.add(train_step(batch))
        if step == begun + 1:
            on_progress("training", begun, total)
        stopping = step < total and should_stop()
        saves = step % every == 0 or step == total
        if saves or step % config.run.log_every_steps == 0:
            pending.require_finite(step, path, metrics, config)
            metrics = pending.metrics() | loss.metrics({name: state.by_image[name].numpy() for name in loss.vectors})
            log_metrics(metrics, step)
            on_progress("training", step, total, f"loss {metrics['train/contrastive_loss']:.3f}, {_rate(metrics)}")
        if saves or stopping or schedule.is_due():
            pending.require_finite(step, path, metrics, config)
            with schedule.writing():
                before_checkpoint()
                saved = checkpoints.Checkpoint(step, state.arrays(), metrics, run, pending=pending.as_numbers())
                path = checkpoints.save(checkpoint_dir, saved, config.run.keep_checkpoints, every)
        if stopping:
            raise PreemptedError(f"stopped at step {step} of {total}, saved {path}: start the same command again to continue")
    result = TrainResult(metrics, total, checkpoints.sha256_of(state.arrays()), path)
    write_whole(f"{checkpoint_dir}/{RESULT}", (json.dumps(asdict(result), indent=1, sort_keys=True) + "\n").encode())
    return result


@dataclass(frozen=True)
class _Batches:
    """The training batches, distributed to the replicas of `strategy`."""

    config: Config
    data_dir: str
    manifest: Manifest
    strategy: tf.distribute.Strategy

    def from_step(self, first_step: int, on_progress: OnProgress) -> Iterator[Batch]:
        """Yields the arguments of `train_step`. At a bad record, raises UserError that names it."""

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
        yield from naming_bad_records(batches, self.data_dir, self.manifest, "train", on_progress)


class _Pending:
    """The metrics and the duration of the steps since the last log."""

    def __init__(self, batch_size: int, before: Sequence[Mapping[str, float]] = ()) -> None:
        self.batch_size = batch_size
        self.steps: list[Mapping[str, tf.Tensor | np.float32]] = [
            {name: np.float32(value) for name, value in step.items()} for step in before
        ]
        self.waited = 0.0
        self.since: float | None = None

    def timed(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Yields `batches`, and adds up the time spent waiting for them."""
        while True:
            asked = time.perf_counter()
            batch = next(batches)
            self.waited += time.perf_counter() - asked
            yield batch

    def add(self, metrics: dict[str, tf.Tensor]) -> None:
        self.steps.append(metrics)

    def as_numbers(self) -> list[dict[str, float]]:
        """Returns the metrics of each step since the last log as floats, to store in a checkpoint."""
        return [{name: float(value) for name, value in step.items()} for step in self.steps]

    def require_finite(self, step: int, checkpoint: str, before: Mapping[str, float], config: Config) -> None:
        """Raises DivergedError if the loss or the gradient of a step since the last log is not finite. `step` is the latest."""
        optimizer, temperature = config.optimizer, config.loss.temperature
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
                else f"the peak learning rate is {peak_learning_rate(optimizer):.3g}, the temperature {temperature}"
            )
            raise DivergedError(
                f"{what} at step {step - len(self.steps) + index + 1}; the last good checkpoint is {checkpoint or 'none'}; "
                f"{cause}: a lower base_learning_rate or a longer warm-up is the usual cure"
                + ("" if grew else ", or a higher temperature")
            )

    def metrics(self) -> dict[str, float]:
        """Returns the means over the steps since the last log, the latest learning rate and the speed; starts the next period."""
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

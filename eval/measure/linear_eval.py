"""The evaluation of a checkpoint: one forward pass over the data, and every protocol that was asked for on the features.

An untrained encoder of the same architecture goes through the protocol `cached` too and stands beside: the control.
"""

import hashlib
import io
import json
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import tensorflow as tf

from eval.measure.evaluation import Accuracy, read_accuracy, write_predictions, write_result
from eval.measure.features import Features, StoredFeatures, digest_of, extract, load_encoder
from eval.measure.logistic import top_k_accuracy
from eval.measure.protocols import Context, Protocol, Scores, Sizes, Work, chosen, work_of
from eval.measure.statistics import bootstrap_interval, confusion_matrix
from trainer import checkpoint as checkpoints
from trainer.config import Config, override
from trainer.distribution import make_strategy
from trainer.encoder_cost import forward_cost
from trainer.settings import LINEAR_EVAL, LinearEvalSettings
from trainer.shared.errors import UserError
from trainer.shared.files import write_arrays
from trainer.shared.records import Manifest, read_manifest
from trainer.train import read_config

SPLITS = ("train", "validation")


@dataclass(frozen=True)
class LinearEvalResult:
    metrics: Mapping[str, float]
    """By MLflow's names, as `eval/top_1_accuracy`; fractions in [0, 1]."""
    accuracies: tuple[Accuracy, ...]
    per_class_accuracy: tuple[float, ...]
    """By label, of the protocol `cached`."""
    confusion: np.ndarray
    """[C, C] int64: validation images by label (row) and prediction of `cached` (column)."""
    num_images: int
    """Validation images, all of them."""
    features: Mapping[str, Mapping[str, Any]]
    """By split, of the folder of the pretrained encoder's features: its `path`, its `digest`, and how many `images` of how many
    `dimensions` it holds."""


def linear_eval(
    data_dir: str,
    checkpoint: str,
    output: str,
    overrides: Iterable[str] = (),
    *,
    workspace: str = "",
    strategy: tf.distribute.Strategy | None = None,
    log_metrics: Callable[[dict[str, float], int], None] = lambda metrics, step: None,
    report: Callable[[int, int, str], None] = lambda done, total, text: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> LinearEvalResult:
    """Evaluates the encoder in `checkpoint`, a folder (the newest in it) or one file, on the dataset in `data_dir`.

    `overrides` are `linear_eval.` settings. Writes predictions.parquet, the classifiers and, last, result.json into `output`,
    and features into `workspace`, by default `output` too. Runs on the replicas of `strategy`, by default on whatever the
    machine has. What an earlier attempt with the same `workspace` left is gone on from: features, finished protocols, training
    with labels by epochs. Calls `log_metrics` once with the step of the checkpoint, `report(done, total, text)` as it goes,
    counted in images through the encoder, and `should_stop()` often: soon after that is true it raises PreemptedError. Raises
    UserError for what it cannot use.
    """
    strategy = strategy or make_strategy()
    workspace = (workspace or output).rstrip("/")
    folder = checkpoints.run_folder(checkpoint)
    pretraining, about = read_config(folder)
    config = _with_settings(pretraining, overrides)
    settings = config.linear_eval
    stored = checkpoints.open_checkpoint(checkpoint)
    manifest = read_manifest(data_dir)
    _require_every_class(data_dir, manifest)
    same_classes = _has_classes_of(about, manifest)
    if not same_classes:
        _note_other_classes(data_dir, folder, settings)
    protocols = chosen(config)
    for protocol in protocols:
        protocol.check(config, manifest, strategy.num_replicas_in_sync)
    with strategy.scope():
        encoder = load_encoder(config, stored)
    tf.io.gfile.makedirs(output)
    images = {split: manifest.splits[split].records for split in SPLITS}
    sizes = Sizes(images["train"], images["validation"], manifest.num_classes, encoder.output_shape[-1])
    progress = _Progress(work_of(config, sizes), forward_cost(config.encoder, config.views.image_size).flops, report)

    features: dict[str, StoredFeatures] = {}
    seconds: dict[str, float] = {}
    on_progress = progress.part("features")
    for split in SPLITS:
        begun, before = time.perf_counter(), sum(one.count for one in features.values())

        def on_images(done: int, before: int = before) -> None:
            on_progress((before + done) / sum(images.values()), "features")

        features[split] = extract(
            encoder,
            config,
            data_dir,
            manifest,
            split,
            workspace,
            strategy=strategy,
            on_progress=on_images,
            should_stop=should_stop,
        )
        seconds[split] = time.perf_counter() - begun
    validation = features["validation"].whole()

    protocols_dir = f"{workspace}/protocols-{_key(encoder, config, manifest)}"
    context = Context(
        config,
        data_dir,
        manifest,
        strategy,
        stored,
        encoder,
        features["train"],
        validation,
        features_dir=workspace,
        work_dir=protocols_dir,
        should_stop=should_stop,
    )
    measured: list[_Measured] = []
    for protocol in protocols:
        path = f"{protocols_dir}/scores-{protocol.row}.npz"
        found = _Measured.read(path)
        if found is None:
            begun = time.perf_counter() - sum(seconds[split] for split in protocol.stands_on)
            scores = protocol.scores(replace(context, on_progress=progress.part(protocol.row)))
            found = _measure(protocol, scores, validation, begun)
            found.write(path)
        measured.append(found)
    progress.end()

    accuracies = tuple(one.accuracy for one in measured)
    cached = measured[0]
    metrics = {"eval/l2_penalty": float(cached.arrays["l2_penalty"]), **_metrics(accuracies)}
    log_metrics(metrics, stored.step)
    confusion = confusion_matrix(validation.labels, cached.predictions, manifest.num_classes)
    files = {
        split: {"path": one.folder, "digest": one.digest, "images": one.count, "dimensions": one.dim}
        for split, one in features.items()
    }
    per_class = tuple((np.diag(confusion) / confusion.sum(axis=1)).tolist())
    result = LinearEvalResult(metrics, accuracies, per_class, confusion, images["validation"], files)
    written = {
        "metrics": metrics,
        "accuracies": [asdict(one) for one in accuracies],
        "num_images": result.num_images,
        "train_images": images["train"],
        "features": files,
        "per_class_accuracy": per_class,
        "synsets": manifest.synsets,
        "linear_eval": asdict(settings),
        "checkpoint": stored.path,
        "step": stored.step,
        "dataset_fingerprint": manifest.fingerprint,
        "pretraining_dataset_fingerprint": about["dataset_fingerprint"],
        "classes_of_pretraining": same_classes,
    }
    predictions = {one.accuracy.column: one.predictions for one in measured}
    write_predictions(output, validation.image_ids, validation.labels, predictions)
    for one in measured:
        if one.arrays:
            name = "classifier" if one is cached else f"classifier-{one.accuracy.protocol}"
            write_arrays(f"{output}/{name}.npz", one.arrays)
    write_result(output, written)
    _clear(protocols_dir, whole=workspace == output.rstrip("/"))
    return result


def _clear(work: str, whole: bool) -> None:
    """Deletes what protocols left in the folder `work` for an attempt after a kill.

    Where the workspace is not the output, the caller may yet fail to record the result and evaluate again into another output:
    then the rows of finished protocols stay, which are small. What cannot be deleted harms nobody.
    """
    try:
        folders = [f"{work}/{name.rstrip('/')}" for name in tf.io.gfile.listdir(work)]
        for folder in [work] if whole else filter(tf.io.gfile.isdir, folders):
            tf.io.gfile.rmtree(folder)
    except tf.errors.OpError as error:
        print(f"warning: {work} is no longer needed and cannot be deleted: {error.message}", file=sys.stderr)


@dataclass(frozen=True)
class _Measured:
    """A finished row: what one protocol says of one encoder."""

    accuracy: Accuracy
    predictions: np.ndarray
    """[n] int64, by image ID."""
    arrays: Mapping[str, np.ndarray]
    """What the protocol learned, if that is kept."""

    def write(self, path: str) -> None:
        tf.io.gfile.makedirs(path.rpartition("/")[0])
        kept = {f"array/{name}": np.asarray(value) for name, value in self.arrays.items()}
        text = np.array(json.dumps(asdict(self.accuracy)))
        write_arrays(path, {"accuracy": text, "predictions": self.predictions, **kept})

    @classmethod
    def read(cls, path: str) -> "_Measured | None":
        """Returns what an earlier attempt wrote to `path`, or None."""
        if not tf.io.gfile.exists(path):
            return None
        with tf.io.gfile.GFile(path, "rb") as file, np.load(io.BytesIO(file.read())) as stored:
            arrays = {name.removeprefix("array/"): stored[name] for name in stored.files if name.startswith("array/")}
            about = json.loads(str(stored["accuracy"]))
            return cls(read_accuracy(about), stored["predictions"], arrays)


def _measure(protocol: Protocol, scores: Scores, validation: Features, begun: float) -> _Measured:
    """Counts what is right by the scores of a protocol that was begun when `time.perf_counter()` was `begun`."""
    top_1, top_5 = (top_k_accuracy(scores.logits, validation.labels, k) for k in (1, 5))
    predicted = scores.logits.argmax(axis=1)
    seconds = time.perf_counter() - begun
    interval = bootstrap_interval(predicted == validation.labels)
    row = Accuracy(protocol.name, protocol.encoder, top_1, interval, top_5, scores.settings, seconds)
    return _Measured(row, predicted, scores.arrays)


def _metrics(accuracies: Iterable[Accuracy]) -> dict[str, float]:
    metrics: dict[str, float] = {}
    for one in accuracies:
        low, high = one.top_1_interval
        metrics |= {one.metric: one.top_1, one.metric.replace("top_1", "top_5"): one.top_5}
        metrics |= {f"{one.metric}_low": low, f"{one.metric}_high": high}
    return metrics


def _key(encoder: Any, config: Config, manifest: Manifest) -> str:
    """Returns a short name of all that the rows of an evaluation depend on, but which of them are asked for."""
    settings = {name: value for name, value in asdict(config.linear_eval).items() if name not in ("protocols", "batch_size")}
    about = {"features": digest_of(encoder, config, manifest, "validation"), "settings": settings}
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]


@dataclass
class _Progress:
    """How much is done of all that there is to do, in images through the encoder."""

    work: Mapping[str, Work]
    """By row, in the order in which they are done."""
    flops_per_image: float
    """Of a forward pass."""
    report: Callable[[int, int, str], None]
    done: int = field(default=0)

    @property
    def total(self) -> int:
        return sum(map(self._images, self.work.values()))

    def part(self, row: str) -> Callable[[float, str], None]:
        """Returns what a row calls with the part of its work that is done, in [0, 1], and a text."""
        names = list(self.work)
        begun = sum(self._images(self.work[name]) for name in names[: names.index(row)])
        own = self._images(self.work[row])

        def on_progress(done: float, text: str) -> None:
            self.done = max(self.done, begun + int(own * min(1.0, done)))
            self.report(self.done, self.total, text)

        return on_progress

    def end(self) -> None:
        self.report(self.total, self.total, "")

    def _images(self, work: Work) -> int:
        # A backward pass takes about twice as long as a forward pass.
        return work.forward + 3 * work.trained + round(work.flops / self.flops_per_image)


def _require_every_class(data_dir: str, manifest: Manifest) -> None:
    for name in SPLITS:
        per_class = manifest.splits[name].records_per_class if name in manifest.splits else (0,) * manifest.num_classes
        empty = [manifest.synsets[label] for label, count in enumerate(per_class) if count == 0]
        if empty:
            more = f" and {len(empty) - 1} more" if len(empty) > 1 else ""
            raise UserError(
                f"class {empty[0]}{more} of {data_dir} has no {name} images: an accuracy over its classes needs some of each; "
                "build the dataset with them, or without the class"
            )


def _has_classes_of(pretraining: Mapping[str, Any], manifest: Manifest) -> bool:
    """Whether the dataset has the classes that `pretraining`, what config.json says, was given."""
    if "synsets" in pretraining:
        return tuple(pretraining["synsets"]) == manifest.synsets
    return pretraining["dataset_fingerprint"] == manifest.fingerprint


def _note_other_classes(data_dir: str, folder: str, settings: LinearEvalSettings) -> None:
    """Says that the dataset has other classes than pretraining's. Raises UserError where a protocol knows only those."""
    said = f"{data_dir} has other classes than the dataset that {folder} was pretrained on"
    if "online" in settings.protocols:
        others = [one for one in settings.protocols if one != "online"] or ["cached"]
        raise UserError(f"{said}, which the online classifier knows: take linear_eval.protocols={','.join(others)}")
    print(f"note: {said}", file=sys.stderr)


def _with_settings(config: Config, overrides: Iterable[str]) -> Config:
    items = list(overrides)
    for item in items:
        if not item.strip().startswith(LINEAR_EVAL):
            raise UserError(
                f"{item} cannot be set here: pretraining is over, only settings that begin with {LINEAR_EVAL} are left"
            )
    return override(config, items)

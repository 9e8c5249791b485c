"""The evaluation of a checkpoint: one forward pass over the dataset, then the selected protocols on its features.

As a control, the protocol `cached` also evaluates an untrained encoder of the same architecture.
"""

import hashlib
import io
import json
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import tensorflow as tf

from eval.measure.evaluation import Accuracy, Measurement, read_accuracy, write_predictions, write_result
from eval.measure.features import StoredFeatures, digest_of, extract, load_encoder
from eval.measure.logistic import top_k_accuracy
from eval.measure.protocols import Context, Protocol, Values, chosen
from eval.measure.statistics import bootstrap_interval, confusion_matrix
from trainer import checkpoint as checkpoints
from trainer.config import Config, override, pretraining_of
from trainer.distribution import make_strategy
from trainer.folder import read_config
from trainer.named_files import with_digest
from trainer.settings import LINEAR_EVAL, LinearEvalSettings
from trainer.shared.errors import UserError
from trainer.shared.files import make_folder, write_arrays
from trainer.shared.progress import OnProgress, of_batches, silent
from trainer.shared.records import Manifest, read_manifest

SPLITS = ("train", "validation")


@dataclass(frozen=True)
class LinearEvalResult:
    metrics: Mapping[str, float]
    """MLflow's metrics by name, as `eval/top_1_accuracy`. Accuracies are fractions in [0, 1]."""
    accuracies: tuple[Accuracy, ...]
    measurements: tuple[Measurement, ...]
    per_class_accuracy: tuple[float, ...]
    """Top-1 accuracy of each class by the protocol `cached`, in label order."""
    confusion: np.ndarray
    """[C, C] int64: number of validation images by label (row) and prediction of `cached` (column)."""
    num_images: int
    """Number of validation images."""
    features: Mapping[str, Mapping[str, Any]]
    """For each split, the folder of the pretrained encoder's features: `path`, `digest`, and the numbers of `images` and of
    `dimensions`."""


def linear_eval(
    data_dir: str,
    checkpoint: str,
    output: str,
    overrides: Iterable[str] = (),
    *,
    workspace: str = "",
    features_dir: str = "",
    strategy: tf.distribute.Strategy | None = None,
    log_metrics: Callable[[dict[str, float], int], None] = lambda metrics, step: None,
    on_progress: OnProgress = silent,
    should_stop: Callable[[], bool] = lambda: False,
) -> LinearEvalResult:
    """Evaluates the encoder in `checkpoint`, a file or a folder (its newest checkpoint), on the dataset in `data_dir`.

    `overrides` change `linear_eval.` settings. Writes predictions.parquet, the classifiers and, last, result.json into `output`.
    Writes intermediate state into `workspace`, by default `output`, and features into `features_dir`, by default `workspace`.
    Other evaluations of this machine may use the same `features_dir` at the same time and find the features there. With the same
    `workspace`, resumes an earlier attempt: reuses its finished protocols and its finished epochs. Runs on the replicas of
    `strategy`, by default all devices of the machine.

    Calls `log_metrics` once, with the step of the checkpoint, and `on_progress` regularly: each forward pass, each path of fits,
    each training and the search for neighbours is a phase with a count of its own. Calls `should_stop()` often, and raises
    PreemptedError soon after it returns True. Raises UserError if the dataset, the checkpoint or a setting cannot be used.
    """
    strategy = strategy or make_strategy()
    workspace = (workspace or output).rstrip("/")
    shared, features_dir = bool(features_dir), (features_dir or workspace).rstrip("/")
    folder = checkpoints.run_folder(checkpoint)
    on_progress("checking the dataset")
    pretraining, about = read_config(folder)
    config = evaluation_config(pretraining, overrides)
    settings = config.linear_eval
    stored = checkpoints.open_checkpoint(checkpoint)
    manifest = read_manifest(data_dir)
    _require_every_class(data_dir, manifest)
    same_classes = _has_classes_of(about, manifest)
    if not same_classes:
        _note_other_classes(data_dir, folder, settings)
    protocols = chosen(config)
    for protocol in protocols:
        _require_part(protocol, stored, settings)
        protocol.check(config, manifest, strategy.num_replicas_in_sync)
    on_progress("loading the encoder")
    with strategy.scope():
        encoder = load_encoder(config, stored)
    make_folder(output)
    images = {split: manifest.splits[split].records for split in SPLITS}
    features: dict[str, StoredFeatures] = {}
    seconds: dict[str, float] = {}
    for split in SPLITS:
        begun = time.perf_counter()
        features[split] = extract(
            encoder,
            config,
            data_dir,
            manifest,
            split,
            features_dir,
            shared=shared,
            strategy=strategy,
            on_progress=of_batches(on_progress, f"features of {split}", images[split]),
            should_stop=should_stop,
        )
        seconds[split] = time.perf_counter() - begun
    validation = features["validation"].whole()

    protocols_dir = f"{workspace}/protocols-{_digest_of_rows(encoder, config, manifest, stored)}"
    context = Context(
        config,
        data_dir,
        manifest,
        strategy,
        stored,
        encoder,
        features["train"],
        validation,
        features_dir=features_dir,
        shares_features=shared,
        work_dir=protocols_dir,
        should_stop=should_stop,
    )
    rows: list[_Measured | Measurement] = []
    for protocol in protocols:
        path = f"{protocols_dir}/scores-{protocol.row}.npz"
        found = _read_row(path)
        if found is None:
            begun = time.perf_counter() - sum(seconds[split] for split in protocol.uses_features_of)
            found = _measure(protocol, replace(context, on_progress=on_progress), begun)
            _write_row(path, found)
        rows.append(found)

    measured = [row for row in rows if isinstance(row, _Measured)]
    measurements = tuple(row for row in rows if isinstance(row, Measurement))
    accuracies = tuple(one.accuracy for one in measured)
    cached = measured[0]
    metrics = {"eval/l2_penalty": float(cached.arrays["l2_penalty"]), **_metrics(accuracies)}
    for measurement in measurements:
        metrics |= measurement.metrics
    log_metrics(metrics, stored.step)
    confusion = confusion_matrix(validation.labels, cached.predictions, manifest.num_classes)
    files = {
        split: {"path": one.folder, "digest": one.digest, "images": one.count, "dimensions": one.dim}
        for split, one in features.items()
    }
    per_class = tuple((np.diag(confusion) / confusion.sum(axis=1)).tolist())
    result = LinearEvalResult(metrics, accuracies, measurements, per_class, confusion, images["validation"], files)
    written = {
        "metrics": metrics,
        "accuracies": [asdict(one) for one in accuracies],
        "measurements": [asdict(row) for row in measurements],
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
    _delete_protocol_state(protocols_dir, whole=workspace == output.rstrip("/"))
    return result


def _delete_protocol_state(folder: str, whole: bool) -> None:
    """Deletes the state of protocols, which an interrupted evaluation would resume from. Prints a warning if it cannot.

    If not `whole`, keeps the scores of finished protocols, which are small: if the workspace is not the output, the caller may
    still fail to record the result, and evaluate again into another output.
    """
    try:
        entries = [f"{folder}/{name.rstrip('/')}" for name in tf.io.gfile.listdir(folder)]
        for path in [folder] if whole else filter(tf.io.gfile.isdir, entries):
            tf.io.gfile.rmtree(path)
    except tf.errors.OpError as error:
        print(f"warning: {folder} is no longer needed and cannot be deleted: {error.message}", file=sys.stderr)


@dataclass(frozen=True)
class _Measured:
    """The result of a finished protocol on one encoder."""

    accuracy: Accuracy
    predictions: np.ndarray
    """[n] int64, in the order of image IDs."""
    arrays: Mapping[str, np.ndarray]
    """Weights that the protocol learned, if they are to be saved."""


def _write_row(path: str, row: _Measured | Measurement) -> None:
    make_folder(path.rpartition("/")[0])
    if isinstance(row, Measurement):
        write_arrays(path, {"measurement": np.array(json.dumps(asdict(row)))})
        return
    kept = {f"array/{name}": np.asarray(value) for name, value in row.arrays.items()}
    text = np.array(json.dumps(asdict(row.accuracy)))
    write_arrays(path, {"accuracy": text, "predictions": row.predictions, **kept})


def _read_row(path: str) -> _Measured | Measurement | None:
    """Reads the file that `_write_row` wrote in an earlier attempt. Returns None if there is none."""
    if not tf.io.gfile.exists(path):
        return None
    with tf.io.gfile.GFile(path, "rb") as file, np.load(io.BytesIO(file.read())) as stored:
        if "measurement" in stored.files:
            return Measurement(**json.loads(str(stored["measurement"])))
        arrays = {name.removeprefix("array/"): stored[name] for name in stored.files if name.startswith("array/")}
        about = json.loads(str(stored["accuracy"]))
        return _Measured(read_accuracy(about), stored["predictions"], arrays)


def _measure(protocol: Protocol, context: Context, begun: float) -> _Measured | Measurement:
    """Runs a protocol. `begun` is its start by `time.perf_counter()`."""
    scores, validation = protocol.measure(context), context.validation
    if isinstance(scores, Values):
        seconds = time.perf_counter() - begun
        return Measurement(protocol.name, scores.values, scores.conditions, scores.settings, seconds)
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


def _digest_of_rows(encoder: Any, config: Config, manifest: Manifest, checkpoint: checkpoints.Checkpoint) -> str:
    """Returns a short digest of everything that rows depend on, except the selection of protocols."""
    settings = {name: value for name, value in asdict(config.linear_eval).items() if name not in ("protocols", "batch_size")}
    heads = {name: array for name, array in checkpoint.arrays.items() if name.split("/")[0] in ("classifier", "projection")}
    about = {
        "features": digest_of(encoder, config, manifest, "validation"),
        "heads": checkpoints.sha256_of(heads),
        "pretraining": pretraining_of(config),
        "settings": settings,
    }
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]


def _require_part(protocol: Protocol, checkpoint: checkpoints.Checkpoint, settings: LinearEvalSettings) -> None:
    """Raises UserError if `checkpoint` lacks the part that a protocol needs."""
    if protocol.needs and not any(name.startswith(f"{protocol.needs}/") for name in checkpoint.arrays):
        others = [one for one in settings.protocols if one != protocol.name] or ["cached"]
        raise UserError(
            f"{checkpoint.path} has no {protocol.needs}, which the protocol {protocol.name} needs: "
            f"set linear_eval.protocols={','.join(others)}"
        )


def _require_every_class(data_dir: str, manifest: Manifest) -> None:
    for name in SPLITS:
        if name not in manifest.splits:
            raise UserError(
                f"{data_dir} has no {name} split, which linear eval needs: build a dataset with {name} images of the same classes"
            )
        empty = [manifest.synsets[label] for label, count in enumerate(manifest.splits[name].records_per_class) if count == 0]
        if empty:
            more = f" and {len(empty) - 1} more" if len(empty) > 1 else ""
            raise UserError(
                f"class {empty[0]}{more} of {data_dir} has no {name} images: an accuracy needs images of every class; "
                "build the dataset with them, or without the class"
            )


def _has_classes_of(pretraining: Mapping[str, Any], manifest: Manifest) -> bool:
    """Returns whether the dataset has the classes of pretraining. `pretraining` is the content of its config.json."""
    if "synsets" in pretraining:
        return tuple(pretraining["synsets"]) == manifest.synsets
    return pretraining["dataset_fingerprint"] == manifest.fingerprint


def _note_other_classes(data_dir: str, folder: str, settings: LinearEvalSettings) -> None:
    """Notes on stderr that the dataset has other classes than pretraining. Raises UserError if `online` is selected."""
    text = f"{data_dir} has other classes than the dataset that {folder} was pretrained on"
    if "online" in settings.protocols:
        others = [one for one in settings.protocols if one != "online"] or ["cached"]
        raise UserError(f"{text}, and the online classifier knows only the latter: set linear_eval.protocols={','.join(others)}")
    print(f"note: {text}", file=sys.stderr)


def evaluation_config(pretraining: Config, overrides: Iterable[str]) -> Config:
    """Returns the config of an evaluation of an encoder with the config `pretraining`, with the digest of the files it names.

    Raises UserError if one of `overrides` is no setting of the linear eval, or if the files differ from a digest among them.
    """
    items = list(overrides)
    for item in items:
        if not item.strip().startswith(LINEAR_EVAL):
            raise UserError(
                f"{item} cannot be set here: pretraining is finished, and only settings that begin with {LINEAR_EVAL} apply"
            )
    return with_digest(override(pretraining, items))

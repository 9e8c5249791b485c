"""The evaluation of a checkpoint: one forward pass over the data, and every protocol that was asked for on what came of it.

An untrained encoder of the same architecture goes through the protocol `cached` too and stands beside.
"""

import io
import json
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import keras
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tensorflow as tf

from eval.cached import fit_with_choice, top_k_accuracy
from eval.features import Features, digest_of, extract, load_encoder, read_features, write_features
from eval.knn import knn_scores
from eval.statistics import bootstrap_interval
from eval.subsets import balanced_counts, balanced_subset, read_subset
from eval.supervised import Recipe, train_classifier
from trainer import checkpoint as checkpoints
from trainer.config import LINEAR_EVAL, Config, LinearEval, override
from trainer.encoder import make_encoder
from trainer.heads import make_classifier
from trainer.records import Manifest, UserError, read_manifest
from trainer.train import model_variables, read_config

RESULT = "result.json"
PREDICTIONS = "predictions.parquet"
SPLITS = ("train", "validation")
_ON_FEATURES = ("cached", "knn", "online")
_PARTS = {"finetune-1": 0.01, "finetune-10": 0.1}
"""Of the training images, the part that has labels; all have where none is named."""


@dataclass(frozen=True)
class Accuracy:
    """What one protocol says of one encoder, on all validation images."""

    protocol: str
    encoder: str
    """`pretrained` or `untrained`."""
    top_1: float
    top_1_interval: tuple[float, float]
    """95%, bootstrap over images."""
    top_5: float
    settings: Mapping[str, Any]
    """What the protocol used."""
    seconds: float
    """All that it takes by itself: with the forward pass, where it stands on features that were computed now."""

    @property
    def metric(self) -> str:
        """Name of its top-1 in MLflow; `cached` is what goes without saying."""
        words = {"cached": ""}.get(self.protocol, f"{self.protocol.replace('-', '_')}_")
        return f"eval/{'untrained_' if self.encoder == 'untrained' else ''}{words}top_1_accuracy"


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
    """By split, of the file of the pretrained encoder's features: its `path`, its `digest`, and how many `images` of how many
    `dimensions` it holds."""


def features_path(output: str, split: str) -> str:
    """Returns where `linear_eval` leaves the pretrained encoder's features of `split` in the folder `output`."""
    return f"{output.rstrip('/')}/features-{split}.parquet"


def read_result(output: str) -> dict[str, Any]:
    """Returns result.json of the folder that `linear_eval` wrote."""
    with tf.io.gfile.GFile(f"{output}/{RESULT}") as file:
        return json.loads(file.read())


def linear_eval(
    data_dir: str,
    checkpoint: str,
    output: str,
    overrides: Iterable[str] = (),
    *,
    strategy: tf.distribute.Strategy | None = None,
    log_metrics: Callable[[dict[str, float], int], None] = lambda metrics, step: None,
    report: Callable[[int, int, str], None] = lambda done, total, text: None,
) -> LinearEvalResult:
    """Evaluates the encoder in `checkpoint`, a folder (the newest in it) or one file, on the dataset in `data_dir`.

    `overrides` are `linear_eval.` settings. Writes features, predictions.parquet, classifier.npz and, last, result.json into
    `output`; features that are there already, of the same encoder and images, are used. Calls `log_metrics` once with the step
    of the checkpoint, `report(images done, images in all, text)` as it goes. Raises UserError for what it cannot use.
    """
    folder = checkpoint.rpartition("/")[0] or "." if checkpoint.endswith(".npz") else checkpoint.rstrip("/")
    pretraining, about = read_config(folder)
    config = _with_settings(pretraining, overrides)
    settings = config.linear_eval
    stored = checkpoints.load(checkpoint) if checkpoint.endswith(".npz") else checkpoints.load_latest(folder)
    if stored is None:
        raise UserError(f"{folder} holds no whole checkpoint: pretraining has not come so far")
    manifest = read_manifest(data_dir)
    _require_every_class(data_dir, manifest)
    same_classes = _has_classes_of(about, manifest)
    if not same_classes:
        _note_other_classes(data_dir, folder, settings)
    trainings = {one: _training(one, settings, manifest) for one in settings.protocols if one not in _ON_FEATURES}
    encoder = load_encoder(config, stored)
    tf.io.gfile.makedirs(output)

    images = {split: manifest.splits[split].records for split in SPLITS}
    passes = 2 * sum(images.values()) + sum(images["validation"] for recipe, _ in trainings.values() if not recipe.frozen)
    work = _Work(passes + sum(recipe.image_visits(config) for recipe, _ in trainings.values()), report)
    features, seconds = {}, {}
    for split in SPLITS:
        begun = time.perf_counter()
        features[split] = _stored_features(encoder, config, data_dir, manifest, split, output, work)
        seconds[split] = time.perf_counter() - begun
    train, validation = features["train"], features["validation"]
    scores = _Scores(validation.labels)

    begun = time.perf_counter() - sum(seconds.values())
    classifier = fit_with_choice(train, manifest.num_classes, settings)
    scores.add("cached", classifier.logits(validation.values), {"l2_penalty": classifier.l2_penalty}, begun)

    begun = time.perf_counter()
    control = make_encoder(config)
    own_train, own_validation = (
        extract(control, config, data_dir, manifest, split, work.part("features, untrained")) for split in SPLITS
    )
    untrained = fit_with_choice(own_train, manifest.num_classes, settings)
    scores.add("cached", untrained.logits(own_validation.values), {"l2_penalty": untrained.l2_penalty}, begun, "untrained")

    if "knn" in settings.protocols:
        begun = time.perf_counter() - sum(seconds.values())
        k, temperature = min(settings.knn_k, images["train"]), settings.knn_temperature
        votes = knn_scores(train, validation.values, manifest.num_classes, k, temperature)
        scores.add("knn", votes, {"k": k, "temperature": temperature}, begun)
    if "online" in settings.protocols:
        begun = time.perf_counter() - seconds["validation"]
        online = make_classifier(encoder.output_shape[-1], manifest.num_classes)
        checkpoints.restore(model_variables("classifier", online), stored)
        scores.add("online", online(validation.values).numpy(), {}, begun)
    for protocol, (recipe, listed) in trainings.items():
        begun = time.perf_counter() - (seconds["validation"] if recipe.frozen else 0.0)
        image_ids = listed
        if listed is None and protocol in _PARTS:
            image_ids = balanced_subset(train.labels, _PARTS[protocol], settings.seed)
        trained = encoder if recipe.frozen else load_encoder(config, stored)
        head = train_classifier(trained, config, data_dir, manifest, recipe, image_ids, work.part(protocol))
        own = validation if recipe.frozen else extract(trained, config, data_dir, manifest, "validation", work.part(protocol))
        used = {name: value for name, value in asdict(recipe).items() if name != "frozen"}
        scores.add(protocol, head(own.values).numpy(), used, begun)

    metrics = {"eval/l2_penalty": classifier.l2_penalty, **scores.metrics()}
    log_metrics(metrics, stored.step)
    confusion = np.zeros((manifest.num_classes, manifest.num_classes), np.int64)
    np.add.at(confusion, (validation.labels, scores.predictions["cached"]), 1)
    per_class = np.diag(confusion) / confusion.sum(axis=1)
    files = {
        split: {
            "path": features_path(output, split),
            "digest": digest_of(encoder, config, manifest, split),
            "images": images[split],
            "dimensions": encoder.output_shape[-1],
        }
        for split in SPLITS
    }
    result = LinearEvalResult(
        metrics, tuple(scores.accuracies), tuple(per_class.tolist()), confusion, images["validation"], files
    )
    written = {
        "metrics": metrics,
        "accuracies": [asdict(one) for one in result.accuracies],
        "num_images": result.num_images,
        "features": files,
        "per_class_accuracy": result.per_class_accuracy,
        "synsets": manifest.synsets,
        "linear_eval": asdict(settings),
        "checkpoint": stored.path,
        "step": stored.step,
        "dataset_fingerprint": manifest.fingerprint,
        "pretraining_dataset_fingerprint": about["dataset_fingerprint"],
        "classes_of_pretraining": same_classes,
    }
    scores.write_predictions(f"{output}/{PREDICTIONS}")
    checkpoints.write_arrays(f"{output}/classifier.npz", asdict(classifier))
    checkpoints.write_whole(f"{output}/{RESULT}", (json.dumps(written, indent=1, sort_keys=True) + "\n").encode())
    return result


@dataclass
class _Scores:
    """What was measured so far, on validation images with `labels`, [n] int64."""

    labels: np.ndarray
    accuracies: list[Accuracy] = field(default_factory=list)
    predictions: dict[str, np.ndarray] = field(default_factory=dict)
    """[n] int64, by protocol."""

    def add(
        self, protocol: str, logits: np.ndarray, settings: Mapping[str, Any], begun: float, encoder: str = "pretrained"
    ) -> None:
        """Counts what is right by `logits`, [n, C], of a protocol that was begun when `time.perf_counter()` was `begun`."""
        top_1, top_5 = (top_k_accuracy(logits, self.labels, k) for k in (1, 5))
        predicted = logits.argmax(axis=1)
        seconds = time.perf_counter() - begun
        interval = bootstrap_interval(predicted == self.labels)
        self.accuracies.append(Accuracy(protocol, encoder, top_1, interval, top_5, settings, seconds))
        self.predictions[protocol if encoder == "pretrained" else f"{encoder}_{protocol}"] = predicted

    def metrics(self) -> dict[str, float]:
        metrics: dict[str, float] = {}
        for one in self.accuracies:
            low, high = one.top_1_interval
            metrics |= {one.metric: one.top_1, one.metric.replace("top_1", "top_5"): one.top_5}
            metrics |= {f"{one.metric}_low": low, f"{one.metric}_high": high}
        return metrics

    def write_predictions(self, path: str) -> None:
        buffer = io.BytesIO()
        pq.write_table(pa.table({"image_id": np.arange(len(self.labels)), "label": self.labels, **self.predictions}), buffer)
        checkpoints.write_whole(path, buffer.getvalue())


def _training(protocol: str, settings: LinearEval, manifest: Manifest) -> tuple[Recipe, np.ndarray | None]:
    """Returns how a protocol trains with labels, and the image IDs that a file lists for it, if one does."""
    train = manifest.splits["train"]
    name = protocol.replace("-", "_")
    file = getattr(settings, f"{name}_subset", "")
    listed = read_subset(file, manifest, settings.train_names) if file else None
    if listed is not None:
        count = len(listed)
    elif protocol in _PARTS:
        count = int(balanced_counts(train.records_per_class, _PARTS[protocol]).sum())
    else:
        count = train.records
    kind = "official" if protocol == "official" else "finetune"
    recipe = Recipe(
        num_images=count,
        epochs=getattr(settings, f"{name}_epochs"),
        # A batch of more images than there are would hold some of them twice.
        batch_size=min(getattr(settings, f"{kind}_batch_size"), count),
        base_learning_rate=getattr(settings, f"{kind}_base_learning_rate"),
        seed=settings.seed,
        frozen=protocol == "official",
    )
    return recipe, listed


@dataclass
class _Work:
    """How much is done of all that there is to do, in images."""

    total: int
    report: Callable[[int, int, str], None]
    done: int = field(default=0)

    def part(self, text: str) -> Callable[[int], None]:
        """Returns what a part of the work calls with the images it has done; it begins where the part before ended."""
        begun = self.done

        def report(done: int) -> None:
            self.done = begun + done
            self.report(self.done, self.total, text)

        return report


def _stored_features(
    encoder: keras.Model, config: Config, data_dir: str, manifest: Manifest, split: str, output: str, work: _Work
) -> Features:
    """Returns the features of `split` that lie in `output`, where they are these, or computes and writes them."""
    path, digest = features_path(output, split), digest_of(encoder, config, manifest, split)
    progress = work.part("features")
    if tf.io.gfile.exists(path):
        try:
            features = read_features(path, digest)
            progress(len(features.labels))
            return features
        except UserError as error:
            print(f"note: {error}; computing them again", file=sys.stderr)
    features = extract(encoder, config, data_dir, manifest, split, progress)
    write_features(path, features, digest)
    return features


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


def _note_other_classes(data_dir: str, folder: str, settings: LinearEval) -> None:
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

"""Reads and writes the files of an evaluation: result.json and predictions.parquet.

A row of result.json is an accuracy, or the measurement of a protocol that classifies nothing.

predictions.parquet has one row for each validation image, with the int64 columns `image_id`, `label`, and for each accuracy in
result.json the predictions, in the column `Accuracy.column`.
"""

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import tensorflow as tf

from eval.measure.statistics import confusion_matrix
from trainer.shared.errors import UserError
from trainer.shared.files import write_whole

RESULT = "result.json"
PREDICTIONS = "predictions.parquet"
_IMAGE_ID, _LABEL = "image_id", "label"


@dataclass(frozen=True)
class Accuracy:
    """The accuracy of one encoder by one protocol, on all validation images."""

    protocol: str
    encoder: str
    """`pretrained` or `untrained`."""
    top_1: float
    top_1_interval: tuple[float, float]
    """95% interval of top_1, by bootstrap over images."""
    top_5: float
    settings: Mapping[str, Any]
    """Settings that the protocol used."""
    seconds: float
    """Duration of the protocol, including the forward passes of this evaluation whose features it uses."""

    @property
    def metric(self) -> str:
        """Name of the top-1 accuracy in MLflow. The protocol `cached` is not part of the name."""
        words = {"cached": ""}.get(self.protocol, f"{self.protocol.replace('-', '_')}_")
        return f"eval/{'untrained_' if self.encoder == 'untrained' else ''}{words}top_1_accuracy"

    @property
    def column(self) -> str:
        """Name of the predictions' column in predictions.parquet."""
        return self.protocol if self.encoder == "pretrained" else f"{self.encoder}_{self.protocol}"

    @property
    def settings_in_words(self) -> str:
        settings = self.settings.items()
        return ", ".join(f"{name}={value:g}" if isinstance(value, float) else f"{name}={value}" for name, value in settings)


@dataclass(frozen=True)
class Measurement:
    """Numbers of the pretrained encoder by a protocol that has no accuracy."""

    protocol: str
    values: Mapping[str, float]
    """Numbers by name. MLflow's names are `eval/` and these. The one named `name` stands for the protocol."""
    conditions: Mapping[str, Any]
    """What the numbers depend on, besides the dataset and the encoder. Only numbers of equal conditions are comparable."""
    settings: Mapping[str, Any]
    """Other settings that the protocol used."""
    seconds: float
    """Duration of the protocol."""

    @property
    def metrics(self) -> dict[str, float]:
        """MLflow's metrics by name."""
        return {f"eval/{name}": value for name, value in self.values.items()}

    @property
    def name(self) -> str:
        """Name of the number that stands for the protocol, as `global_objective`."""
        return self.protocol.replace("-", "_")

    @property
    def headline(self) -> float:
        """The number that stands for the protocol."""
        return self.values[self.name]


def read_accuracy(row: Mapping[str, Any]) -> Accuracy:
    """Returns the accuracy of an entry of `accuracies` in result.json, the inverse of `asdict`."""
    return Accuracy(**{**row, "top_1_interval": tuple(row["top_1_interval"])})


@dataclass(frozen=True)
class Evaluation:
    folder: str
    result: Mapping[str, Any]
    """Content of result.json."""
    rows: tuple[Accuracy, ...]
    measurements: tuple[Measurement, ...]
    labels: np.ndarray
    """[n] int64, labels of the validation images in the order of their IDs."""
    predictions: Mapping[str, np.ndarray]
    """`Accuracy.column` -> predictions, [n] int64, in the order of the image IDs."""

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the dataset. Equal fingerprints mean the same validation images."""
        return str(self.result["dataset_fingerprint"])

    @property
    def classes(self) -> Sequence[str]:
        """Synsets of the classes, in label order."""
        return list(self.result["synsets"])

    @property
    def headline(self) -> Accuracy:
        """The accuracy that represents the run: the pretrained encoder's by the protocol `cached`."""
        row = self.row("cached")
        assert row is not None, "every evaluation has it"
        return row

    def row(self, protocol: str, encoder: str = "pretrained") -> Accuracy | None:
        return next((row for row in self.rows if (row.protocol, row.encoder) == (protocol, encoder)), None)

    @property
    def about_control(self) -> str:
        """The interval of the untrained control in words, with the number of images if it was not fitted to all."""
        control, count = self.row("cached", "untrained"), self.result["train_images"]
        if control is None:
            return "turned off: linear_eval.control_images=0"
        low, high = control.top_1_interval
        fitted = control.settings["images"]
        part = "" if fitted == count else f", fitted to {fitted:,} of {count:,} training images"
        return f"{low:.1%} to {high:.1%}{part}"

    def measurement(self, protocol: str) -> Measurement | None:
        return next((row for row in self.measurements if row.protocol == protocol), None)

    def correct(self, key: str) -> np.ndarray:
        """Returns whether each validation image was classified correctly, [n] bool."""
        return np.asarray(self.predictions[key] == self.labels)

    def confusion(self, key: str) -> np.ndarray:
        """Counts validation images by label (row) and prediction (column), [C, C] int64."""
        return confusion_matrix(self.labels, self.predictions[key], len(self.classes))


def write_predictions(folder: str, image_ids: np.ndarray, labels: np.ndarray, predictions: Mapping[str, np.ndarray]) -> None:
    """Writes predictions.parquet. `predictions` maps columns to predictions; all arrays are [n] int64."""
    buffer = io.BytesIO()
    parquet.write_table(pa.table({_IMAGE_ID: image_ids, _LABEL: labels, **predictions}), buffer)
    write_whole(f"{folder}/{PREDICTIONS}", buffer.getvalue())


def write_result(folder: str, result: Mapping[str, Any]) -> None:
    """Writes result.json, which marks the evaluation in `folder` as finished."""
    write_whole(f"{folder}/{RESULT}", (json.dumps(result, indent=1, sort_keys=True) + "\n").encode())


def read_result(output: str) -> dict[str, Any]:
    """Returns the content of result.json in the folder of an evaluation."""
    with tf.io.gfile.GFile(f"{output}/{RESULT}") as file:
        return json.loads(file.read())


def read_evaluation(folder: str) -> Evaluation:
    """Reads an evaluation. Raises UserError if the folder holds no finished evaluation, or one of an older version."""
    folder = folder.rstrip("/")
    path = f"{folder}/{RESULT}"
    if not tf.io.gfile.exists(path):
        raise UserError(f"{folder} holds no finished evaluation: {RESULT} is missing")
    with tf.io.gfile.GFile(path) as file:
        result = json.loads(file.read())
    if "accuracies" not in result or not tf.io.gfile.exists(f"{folder}/{PREDICTIONS}"):
        raise UserError(f"{folder} holds an evaluation of an older version: sogclr rerun linear-eval makes it anew")
    with tf.io.gfile.GFile(f"{folder}/{PREDICTIONS}", "rb") as file:
        stored = parquet.read_table(io.BytesIO(file.read()))
    columns = {name: stored[name].to_numpy() for name in stored.column_names if name != _IMAGE_ID}
    labels = columns.pop(_LABEL)
    rows = tuple(map(read_accuracy, result["accuracies"]))
    # An evaluation of an earlier version has no measurements.
    measurements = tuple(Measurement(**row) for row in result.get("measurements", ()))
    return Evaluation(folder, result, rows, measurements, labels, columns)

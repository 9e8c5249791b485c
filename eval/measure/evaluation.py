"""The files that an evaluation writes into its folder, and how they are read back: result.json and predictions.parquet.

predictions.parquet has a row a validation image: `image_id`, `label`, and for each row of result.json the column
`Accuracy.column` with its prediction, all int64.
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

    @property
    def column(self) -> str:
        """Name of its predictions."""
        return self.protocol if self.encoder == "pretrained" else f"{self.encoder}_{self.protocol}"

    @property
    def settings_in_words(self) -> str:
        settings = self.settings.items()
        return ", ".join(f"{name}={value:g}" if isinstance(value, float) else f"{name}={value}" for name, value in settings)


def read_accuracy(row: Mapping[str, Any]) -> Accuracy:
    """Returns the row that `asdict` made a dict of, as in result.json."""
    return Accuracy(**{**row, "top_1_interval": tuple(row["top_1_interval"])})


@dataclass(frozen=True)
class Evaluation:
    folder: str
    result: Mapping[str, Any]
    """result.json."""
    rows: tuple[Accuracy, ...]
    labels: np.ndarray
    """[n] int64, of the validation images, by ID."""
    predictions: Mapping[str, np.ndarray]
    """By the column of its row: [n] int64."""

    @property
    def fingerprint(self) -> str:
        """Of the dataset, so that equal ones have the same validation images."""
        return str(self.result["dataset_fingerprint"])

    @property
    def classes(self) -> Sequence[str]:
        """Synsets by label."""
        return list(self.result["synsets"])

    @property
    def headline(self) -> Accuracy:
        """Returns the row that stands for the run."""
        row = self.row("cached")
        assert row is not None, "every evaluation has it"
        return row

    def row(self, protocol: str, encoder: str = "pretrained") -> Accuracy | None:
        return next((row for row in self.rows if (row.protocol, row.encoder) == (protocol, encoder)), None)

    @property
    def about_control(self) -> str:
        """Says what the untrained control was fitted to, in words."""
        control, count = self.row("cached", "untrained"), self.result["train_images"]
        if control is None:
            return "turned off: linear_eval.control_images=0"
        low, high = control.top_1_interval
        fitted = control.settings["images"]
        part = "" if fitted == count else f", fitted to {fitted:,} of {count:,} training images"
        return f"{low:.1%} to {high:.1%}{part}"

    def correct(self, key: str) -> np.ndarray:
        """Returns for each validation image whether it was told right, [n] bool."""
        return np.asarray(self.predictions[key] == self.labels)

    def confusion(self, key: str) -> np.ndarray:
        """Counts validation images by label (row) and prediction (column), [C, C] int64."""
        return confusion_matrix(self.labels, self.predictions[key], len(self.classes))


def write_predictions(folder: str, image_ids: np.ndarray, labels: np.ndarray, predictions: Mapping[str, np.ndarray]) -> None:
    """Writes predictions.parquet; `predictions` are by column, all arrays are [n] int64."""
    buffer = io.BytesIO()
    parquet.write_table(pa.table({_IMAGE_ID: image_ids, _LABEL: labels, **predictions}), buffer)
    write_whole(f"{folder}/{PREDICTIONS}", buffer.getvalue())


def write_result(folder: str, result: Mapping[str, Any]) -> None:
    """Writes result.json, which makes the evaluation in `folder` a finished one."""
    write_whole(f"{folder}/{RESULT}", (json.dumps(result, indent=1, sort_keys=True) + "\n").encode())


def read_result(output: str) -> dict[str, Any]:
    """Returns result.json of the folder that an evaluation wrote."""
    with tf.io.gfile.GFile(f"{output}/{RESULT}") as file:
        return json.loads(file.read())


def read_evaluation(folder: str) -> Evaluation:
    """Reads what an evaluation wrote. Raises UserError where the folder holds none, or one of an older version."""
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
    return Evaluation(folder, result, tuple(map(read_accuracy, result["accuracies"])), labels, columns)

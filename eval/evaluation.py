"""What an evaluation left in its folder, read back for those who show it or compare it."""

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow.parquet as parquet
import tensorflow as tf

from eval.linear_eval import PREDICTIONS, RESULT, Accuracy, read_accuracy
from eval.protocols import PROTOCOLS
from trainer.shared.errors import UserError


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
        """Returns how many images of a label (row) were taken for another (column), [C, C] int64."""
        matrix = np.zeros((len(self.classes), len(self.classes)), np.int64)
        np.add.at(matrix, (self.labels, self.predictions[key]), 1)
        return matrix


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
    columns = {name: stored[name].to_numpy() for name in stored.column_names if name != "image_id"}
    labels = columns.pop("label")
    return Evaluation(folder, result, tuple(map(read_accuracy, result["accuracies"])), labels, columns)


def description_of(protocol: str) -> str:
    """Returns the line that describes a protocol, or nothing where this version does not know it."""
    return PROTOCOLS[protocol].description if protocol in PROTOCOLS else ""


def settings_in_words(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value:g}" if isinstance(value, float) else f"{name}={value}" for name, value in settings.items())

"""What an evaluation left in its folder, read back for those who show it or compare it."""

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow.parquet as parquet
import tensorflow as tf

from eval.linear_eval import PREDICTIONS, RESULT, Accuracy
from trainer.records import UserError

PROTOCOLS = {
    "cached": "exact logistic regression on stored features, its penalty chosen on held-out training images",
    "official": "the published one: linear classifier by momentum SGD on augmented images, encoder frozen",
    "online": "classifier trained alongside, on features that pass no gradient back",
    "knn": "nearest neighbours by cosine, weighted; nothing is trained",
    "finetune-1": "all weights trained on 1% of the labels",
    "finetune-10": "all weights trained on 10% of the labels",
    "finetune-100": "all weights trained on all labels",
}
"""What each protocol does, in words; accuracies of different ones are not comparable."""


def column_of(row: Accuracy) -> str:
    """Returns the name that the predictions of an encoder by a protocol have."""
    return row.protocol if row.encoder == "pretrained" else f"{row.encoder}_{row.protocol}"


@dataclass(frozen=True)
class Evaluation:
    folder: str
    result: Mapping[str, Any]
    """result.json."""
    rows: tuple[Accuracy, ...]
    labels: np.ndarray
    """[n] int64, of the validation images, by ID."""
    predictions: Mapping[str, np.ndarray]
    """By `column_of` its row: [n] int64."""

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
    rows = tuple(Accuracy(**{**row, "top_1_interval": tuple(row["top_1_interval"])}) for row in result["accuracies"])
    return Evaluation(folder, result, rows, labels, columns)


def settings_in_words(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value:g}" if isinstance(value, float) else f"{name}={value}" for name, value in settings.items())

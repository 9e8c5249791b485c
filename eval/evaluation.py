"""What an evaluation left in its folder, read back for those who show it or compare it."""

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow.parquet as parquet
import tensorflow as tf

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


@dataclass(frozen=True)
class Row:
    """The accuracy of one encoder by one protocol, between 0 and 1."""

    protocol: str
    encoder: str
    """pretrained or untrained."""
    top_1: float
    low: float
    high: float
    """Of the 95% interval."""
    top_5: float | None
    settings: Mapping[str, Any]
    seconds: float

    @property
    def pretrained(self) -> bool:
        return self.encoder == "pretrained"

    @property
    def key(self) -> str:
        """Names the column of predictions."""
        return self.protocol if self.pretrained else f"untrained_{self.protocol}"


@dataclass(frozen=True)
class Evaluation:
    folder: str
    result: Mapping[str, Any]
    """result.json."""
    rows: tuple[Row, ...]
    labels: np.ndarray
    """[n] int64, of the validation images, by ID."""
    predictions: Mapping[str, np.ndarray]
    """By `Row.key`: [n] int64."""

    @property
    def fingerprint(self) -> str:
        """Of the dataset, so that equal ones have the same validation images."""
        return str(self.result["dataset_fingerprint"])

    @property
    def classes(self) -> Sequence[str]:
        """Synsets by label."""
        return list(self.result["synsets"])

    @property
    def best_known(self) -> Row:
        """Returns the row that stands for the run: `cached`, else the first there is."""
        ours = [row for row in self.rows if row.pretrained]
        return next((row for row in ours if row.protocol == "cached"), ours[0])

    def row(self, protocol: str, encoder: str = "pretrained") -> Row | None:
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
    path = f"{folder}/result.json"
    if not tf.io.gfile.exists(path):
        raise UserError(f"{folder} holds no finished evaluation: result.json is missing")
    with tf.io.gfile.GFile(path) as file:
        result = json.loads(file.read())
    if "accuracies" not in result or not tf.io.gfile.exists(f"{folder}/predictions.parquet"):
        raise UserError(
            f"{folder} holds an evaluation of an older version, without predictions: sogclr rerun linear-eval makes it anew"
        )
    with tf.io.gfile.GFile(f"{folder}/predictions.parquet", "rb") as file:
        stored = parquet.read_table(io.BytesIO(file.read()))
    columns = {name: stored[name].to_numpy() for name in stored.column_names}
    labels = columns.pop("label")
    columns.pop("image_id")
    rows = tuple(
        Row(
            protocol=row["protocol"],
            encoder=row["encoder"],
            top_1=row["top_1"],
            low=row["top_1_interval"][0],
            high=row["top_1_interval"][1],
            top_5=row["top_5"],
            settings=row["settings"],
            seconds=row["seconds"],
        )
        for row in result["accuracies"]
    )
    return Evaluation(folder, result, rows, labels, columns)


def settings_in_words(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value:g}" if isinstance(value, float) else f"{name}={value}" for name, value in settings.items())

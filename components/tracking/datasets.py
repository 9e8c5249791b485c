"""Datasets in MLflow: the images that a step made or read, and the features that it computed from them."""

import json
from collections.abc import Mapping
from typing import Any

from mlflow.entities import Dataset, DatasetInput, InputTag

from components.tracking import names
from components.tracking.step_file import KfpArtifact
from components.tracking.store import Store

_DIGEST_LENGTH = 36
"""The longest digest that MLflow stores, in characters."""


class Datasets:
    """The datasets of one run. MLflow stores them as the run's inputs."""

    def __init__(self, store: Store, run_id: str) -> None:
        self._store, self._run_id = store, run_id

    def log(self, dataset: KfpArtifact, context: str) -> None:
        """Records a dataset of images in the context "training", "eval" or "output".

        MLflow keeps one entry for equal datasets, with the first one's source. The tags of the input name this one's source.
        """
        about = dataset.metadata
        entry = Dataset(
            **name_and_digest(dataset),
            source_type=_source_type(dataset.uri),
            source=json.dumps({"uri": dataset.uri, "run_id": about["run_id"]}),
            profile=json.dumps({key: int(about[key]) for key in ("train_images", "validation_images", "classes")}),
        )
        tags = {
            names.CONTEXT: context,
            names.DATASET_URI: dataset.uri,
            names.FINGERPRINT: str(about["fingerprint"]),
            names.DATASET_RUN: str(about["run_id"]),
        }
        self._log_inputs(_input(entry, tags))
        self._store.client.set_tag(self._run_id, names.DATASET_FINGERPRINT, about["fingerprint"])

    def log_features(self, dataset: KfpArtifact, features: Mapping[str, Mapping[str, Any]]) -> None:
        """Records the feature files of `dataset`, by split. Each is a dataset, identified by the digest of its contents."""
        inputs = []
        for split, file in features.items():
            path = str(file["path"])
            entry = Dataset(
                name=f"{dataset.metadata['name']}-features-{split}",
                digest=str(file["digest"])[:_DIGEST_LENGTH],
                source_type=_source_type(path),
                source=json.dumps({"uri": file["path"], "run_id": self._run_id}),
                profile=json.dumps({key: int(file[key]) for key in ("images", "dimensions")}),
            )
            fingerprint = dataset.metadata["fingerprint"]
            tags = {names.CONTEXT: "features", names.DATASET_URI: path, names.FINGERPRINT: fingerprint}
            inputs.append(_input(entry, tags))
        self._log_inputs(*inputs)

    def _log_inputs(self, *inputs: DatasetInput) -> None:
        self._store.client.log_inputs(self._run_id, datasets=list(inputs))


def name_and_digest(dataset: KfpArtifact) -> dict[str, str]:
    """Returns the `name` and `digest` that identify a dataset of images in MLflow."""
    return {"name": dataset.metadata["name"], "digest": dataset.metadata["fingerprint"][:_DIGEST_LENGTH]}


def _source_type(uri: str) -> str:
    return "gs" if uri.startswith("gs://") else "local"


def _input(entry: Dataset, tags: Mapping[str, str]) -> DatasetInput:
    return DatasetInput(entry, [InputTag(key, value) for key, value in tags.items()])

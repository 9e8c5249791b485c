"""Encoders in MLflow: a pretrained encoder becomes a registered model, an evaluated one becomes an input of its run."""

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mlflow
from mlflow.entities import LoggedModelInput, LoggedModelOutput
from mlflow.exceptions import MlflowException

from components.tracking import names, registry, runs
from components.tracking.metrics import Metrics
from components.tracking.servable import save_servable
from components.tracking.step_file import KfpArtifact
from components.tracking.store import Store


class Encoders:
    """The encoders of one run."""

    def __init__(self, store: Store, run_id: str, metrics: Metrics) -> None:
        self._store, self._run_id, self._metrics = store, run_id, metrics

    def log(
        self,
        model: KfpArtifact,
        dataset: KfpArtifact | None,
        files: Sequence[str],
        exported: str,
        *,
        params: Mapping[str, Any],
        metrics: Mapping[str, float],
        step: int,
        origin: Mapping[str, str] | None = None,
    ) -> None:
        """Records an encoder as a logged model with its final metrics, registers it, and adds both IDs to `model.metadata`.

        `dataset` is that of pretraining, None if it is not known. `origin` are the tags of an imported encoder's source.

        If an earlier attempt recorded the same state, by `params["state_sha256"]`, completes that record instead of adding one.
        The model holds `files` and the contents of the folder `exported`, which `eval.export` wrote. Any MLflow can serve it. If
        the store is a database, MLFLOW_TRACKING_URI must name it, because MLflow looks there for the model to register.
        """
        client = self._store.client
        texts = {name: str(value) for name, value in params.items()}
        logged = registry.logged_model(self._store, self._run_id, texts)
        with tempfile.TemporaryDirectory() as made, tempfile.TemporaryDirectory() as fetched:
            source = Path(mlflow.artifacts.download_artifacts(artifact_uri=exported, dst_path=fetched))
            card = (source / "README.md").read_text()
            if not registry.is_ready(logged):
                save_servable(made, source / "saved_model", logged.model_id, self._run_id)
                own = [str(file) for file in sorted(source.iterdir()) if file.is_file()]
                for file in (*files, *own):
                    mlflow.artifacts.download_artifacts(artifact_uri=file, dst_path=made)
                client.log_model_artifacts(logged.model_id, made)
                client.finalize_logged_model(logged.model_id, "READY")
        self._log_output(logged.model_id, step)
        self._metrics.log_final(metrics, logged.model_id, dataset, step)
        trained_on = {names.TRAINED_ON: dataset.metadata["fingerprint"]} if dataset else {}
        tags = {**trained_on, names.MODEL_URI: model.uri, **texts, **(origin or {})}
        version = registry.register(self._store, self._run_id, logged, card, tags)
        model.metadata.update(model_id=logged.model_id, model_name=registry.ENCODER, model_version=version)

    def use(self, model: KfpArtifact) -> None:
        """Records an encoder as this run's input: as a logged model, or by its path if this store lacks the model."""
        if registry.has_model(self._store, model.metadata["model_id"]):
            self._store.client.log_inputs(self._run_id, models=[LoggedModelInput(model.metadata["model_id"])])
        else:
            self._store.client.set_tag(self._run_id, names.ENCODER_URI, model.uri)

    def import_from(self, checkpoint: str, sha256: str, form: str) -> dict[str, str]:
        """Records the checkpoint of other code that this run imports. Returns the tags that say so."""
        tags = {names.SOURCE: checkpoint, names.SOURCE_SHA256: sha256, names.SOURCE_FORMAT: form}
        runs.set_tags(self._store, self._run_id, tags)
        return tags

    def start_from(self, checkpoint: str, state_sha256: str) -> None:
        """Records the checkpoint that this run starts from; if this store has its run, that run and its logged model too."""
        tags = {names.INIT_FROM: checkpoint, names.INIT_STATE: state_sha256}
        if source := registry.model_of_state(self._store, state_sha256):
            tags |= {names.INIT_RUN: str(source.source_run_id)}
            self._store.client.log_inputs(self._run_id, models=[LoggedModelInput(source.model_id)])
        runs.set_tags(self._store, self._run_id, tags)

    def rate(self, model: KfpArtifact, dataset: KfpArtifact, card: str, top_1: float) -> None:
        """Records this run's accuracy on a registered encoder, and moves the aliases. Does nothing if this store lacks it."""
        version = registry.version_of(self._store, model.metadata["model_id"])
        if version:
            registry.rate(self._store, self._run_id, version, dataset.metadata["fingerprint"], card, top_1)

    def _log_output(self, model_id: str, step: int) -> None:
        def is_there() -> bool:
            outputs = self._store.client.get_run(self._run_id).outputs
            return outputs is not None and any(one.model_id == model_id for one in outputs.model_outputs)

        # A database store refuses to record the output twice, even if the answer to the first call was lost.
        if not is_there():
            try:
                self._store.client.log_outputs(self._run_id, [LoggedModelOutput(model_id, step)])
            except MlflowException:
                if not is_there():
                    raise

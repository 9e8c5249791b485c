"""Logged models and the registry: one model and one version for each state of a run, and aliases for the best version.

An attempt can be killed between any two calls, and a call is repeated if its answer was lost. So each function first looks for
existing records, and deletes duplicates.
"""

import json
from collections.abc import Mapping

from mlflow.entities import LoggedModel, LoggedModelStatus
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from components.tracking import names
from components.tracking.store import Store

ENCODER = "sogclr-encoder"
"""Name of the registered model."""
CHAMPION = "champion"
"""Alias of the version with the best top-1 accuracy."""

_DESCRIPTION_LENGTH = 5000
"""The longest description that the registry stores, in characters."""


def has_model(store: Store, model_id: str) -> bool:
    """Returns whether this store has a logged model."""
    try:
        return bool(store.client.get_logged_model(model_id))
    except MlflowException as error:
        if error.get_http_status_code() != 404:
            raise
        return False


def is_ready(model: LoggedModel) -> bool:
    """Returns whether a logged model has all its files."""
    return model.status == LoggedModelStatus.READY


def logged_model(store: Store, run_id: str, params: Mapping[str, str]) -> LoggedModel:
    """Returns the logged model of the run `run_id` for the state in `params`, and creates the model if there is none."""
    there = _logged_models(store, run_id, params.get(names.STATE))
    if there:
        return there[0]
    store.client.create_logged_model(store.experiment_id, ENCODER, run_id, params=dict(params), model_type="encoder")
    # There are two if the answer to the first call was lost.
    return _logged_models(store, run_id, params.get(names.STATE))[0]


def model_of_state(store: Store, state_sha256: str) -> LoggedModel | None:
    """Returns the first logged model of a state, of whatever run, or None if this store has none."""
    found = store.client.search_logged_models([store.experiment_id], f"params.{names.STATE} = '{state_sha256}'")
    return min(found, key=lambda model: (model.creation_timestamp, model.model_id), default=None)


def register(store: Store, run_id: str, model: LoggedModel, card: str, tags: Mapping[str, str]) -> str:
    """Returns the version of `ENCODER` that a logged model is, and creates a new version if it is none yet.

    Deletes other logged models of the same state of the run, and other versions of the same model.
    """
    client = store.client
    if not client.search_registered_models(f"name = '{ENCODER}'"):
        client.create_registered_model(ENCODER, description="Encoders of the pipeline, one version a run.")
    if not _versions_of(store, run_id, model):
        client.create_model_version(
            ENCODER, _source(model.model_id), run_id, dict(tags), description=_cut(card), model_id=model.model_id
        )
    version, *others = _versions_of(store, run_id, model)
    for other in others:
        client.delete_model_version(ENCODER, other)
    for twin in _logged_models(store, run_id, model.params.get(names.STATE)):
        if twin.model_id != model.model_id:
            client.delete_logged_model(twin.model_id)
    # The UI reads a logged model's versions from this tag.
    client.set_logged_model_tags(model.model_id, {names.MODEL_VERSIONS: json.dumps([{"name": ENCODER, "version": version}])})
    return version


def version_of(store: Store, model_id: str) -> str | None:
    """Returns the version of `ENCODER` that a logged model is, or None if this store lacks it."""
    return next((str(one.version) for one in _versions(store) if one.source == _source(model_id)), None)


def rate(store: Store, run_id: str, version: str, fingerprint: str, card: str, top_1: float) -> None:
    """Records the accuracy that the run `run_id` measured of a version on the dataset `fingerprint`, and moves the aliases.

    `CHAMPION`-FINGERPRINT moves to the version with the best top-1 on that dataset; of equal versions, to the earliest. An
    imported encoder gets no alias: it was not pretrained here.
    `CHAMPION` moves with it unless its current version was measured on another dataset: accuracies on different images are not
    comparable.
    """
    client = store.client
    client.update_model_version(ENCODER, version, _cut(card))
    for key, value in {names.TOP_1: str(top_1), names.TOP_1_DATASET: fingerprint, names.TOP_1_RUN: run_id}.items():
        client.set_model_version_tag(ENCODER, version, key, value)
    own = [one for one in _versions(store) if names.SOURCE not in one.tags]
    measured = {one.version: one.tags for one in own if names.TOP_1 in one.tags}
    rivals = [version for version, tags in measured.items() if tags[names.TOP_1_DATASET] == fingerprint]
    if not rivals:
        return
    best = max(rivals, key=lambda version: (float(measured[version][names.TOP_1]), -int(version)))
    holder = client.get_registered_model(ENCODER).aliases.get(CHAMPION)
    client.set_registered_model_alias(ENCODER, f"{CHAMPION}-{fingerprint[:12]}", best)
    if measured.get(holder, {}).get(names.TOP_1_DATASET, fingerprint) == fingerprint:
        client.set_registered_model_alias(ENCODER, CHAMPION, best)


def _source(model_id: str) -> str:
    return f"models:/{model_id}"


def _cut(card: str) -> str:
    """Returns a card without its last sections if it is too long for the registry."""
    while len(card) > _DESCRIPTION_LENGTH:
        card = card.rpartition("\n## ")[0] or card[:_DESCRIPTION_LENGTH]
    return card


def _logged_models(store: Store, run_id: str, state: str | None) -> list[LoggedModel]:
    """Returns the logged models of one state of a run: complete ones first, then by age, the oldest first."""
    found = store.client.search_logged_models([store.experiment_id], f"source_run_id = '{run_id}'")
    of_state = [model for model in found if model.name == ENCODER and model.params.get(names.STATE) == state]
    return sorted(of_state, key=lambda model: (not is_ready(model), model.creation_timestamp, model.model_id))


def _versions(store: Store) -> list[ModelVersion]:
    return list(store.client.search_model_versions(f"name = '{ENCODER}'"))


def _versions_of(store: Store, run_id: str, model: LoggedModel) -> list[str]:
    """Returns the versions of `ENCODER` that are `model`, the oldest first."""
    found = store.client.search_model_versions(f"name = '{ENCODER}' and run_id = '{run_id}'")
    own = [str(one.version) for one in found if one.source == _source(model.model_id)]
    return sorted(own, key=int)

"""One logged model and one registered version for one state of one run, however often recording it was begun.

An attempt can be killed between any two calls, and a call whose answer was lost is made twice. So each looks first for what is
there, and what there is too much of goes. Knows MLflow's client only as it is given.
"""

import json
from collections.abc import Mapping
from typing import Any

ENCODER = "sogclr-encoder"
"""Name of the registered model."""
_STATE = "state_sha256"
_READY = "READY"
_DESCRIPTION_LENGTH = 5000
"""What the registry has room for."""


def logged_model(client: Any, experiment_id: str, run_id: str, params: Mapping[str, str]) -> Any:
    """Returns the logged model of the state that `params` name in the run `run_id`: the one that is there, else a new one."""
    there = _logged_models(client, experiment_id, run_id, params.get(_STATE))
    if there:
        return there[0]
    client.create_logged_model(experiment_id, ENCODER, run_id, params=dict(params), model_type="encoder")
    # Two, where the answer to the first call was lost.
    return _logged_models(client, experiment_id, run_id, params.get(_STATE))[0]


def is_ready(model: Any) -> bool:
    """Returns whether all files of a logged model are there."""
    return bool(str(model.status) == _READY)


def register(client: Any, model: Any, experiment_id: str, run_id: str, card: str, tags: Mapping[str, str]) -> str:
    """Makes a logged model a version of `ENCODER`, the next one if it is none yet; returns the version.

    Deletes other logged models of the same state of the run, and other versions of the model.
    """
    if not client.search_registered_models(f"name = '{ENCODER}'"):
        client.create_registered_model(ENCODER, description="Encoders pretrained by the pipeline, one version a run.")
    if not _versions_of(client, run_id, model):
        client.create_model_version(
            ENCODER, f"models:/{model.model_id}", run_id, dict(tags), description=described(card), model_id=model.model_id
        )
    version, *others = _versions_of(client, run_id, model)
    for other in others:
        client.delete_model_version(ENCODER, other)
    for twin in _logged_models(client, experiment_id, run_id, model.params.get(_STATE)):
        if twin.model_id != model.model_id:
            client.delete_logged_model(twin.model_id)
    # The UI shows on a logged model the versions that this tag names.
    client.set_logged_model_tags(model.model_id, {"mlflow.modelVersions": json.dumps([{"name": ENCODER, "version": version}])})
    return version


def versions(client: Any) -> list[Any]:
    """Returns all versions of `ENCODER`."""
    return list(client.search_model_versions(f"name = '{ENCODER}'"))


def described(card: str) -> str:
    """Returns as many whole sections of a card as the registry has room for."""
    while len(card) > _DESCRIPTION_LENGTH:
        card = card.rpartition("\n## ")[0] or card[:_DESCRIPTION_LENGTH]
    return card


def _logged_models(client: Any, experiment_id: str, run_id: str, state: str | None) -> list[Any]:
    """Returns the logged models of one state of a run: one that is whole first, else the oldest."""
    found = client.search_logged_models([experiment_id], f"source_run_id = '{run_id}'")
    of_state = [model for model in found if model.name == ENCODER and model.params.get(_STATE) == state]
    return sorted(of_state, key=lambda model: (not is_ready(model), model.creation_timestamp, model.model_id))


def _versions_of(client: Any, run_id: str, model: Any) -> list[str]:
    """Returns the versions that are `model`, the oldest first."""
    found = client.search_model_versions(f"name = '{ENCODER}' and run_id = '{run_id}'")
    own = [str(one.version) for one in found if one.source == f"models:/{model.model_id}"]
    return sorted(own, key=int)

"""The files with a step's arguments and outputs, which are too large for MLflow's parameters. Artifacts of the step's run.

Each is written with one content only. A server that is slow may carry out a request after its client has given up and sent it
again, and so an older content could replace a newer one.
"""

import json
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from components.lineage import Artifact
from components.tracking import names
from components.tracking.store import Store


class KfpArtifact(Protocol):
    """An artifact of KFP: an input or output of a component."""

    schema_title: str
    uri: str
    metadata: dict[str, Any]


def begin(store: Store, run_id: str, arguments: Mapping[str, Any]) -> None:
    """Records a step's arguments."""
    store.client.log_dict(run_id, {"arguments": dict(arguments)}, names.ARGUMENTS_FILE)


def complete(store: Store, run_id: str, arguments: Mapping[str, Any], outputs: Mapping[str, KfpArtifact]) -> None:
    """Records the arguments and outputs of a step that has made its outputs."""
    artifacts = {name: asdict(Artifact(a.schema_title, a.uri, a.metadata)) for name, a in outputs.items()}
    store.client.log_dict(run_id, {"arguments": dict(arguments), "outputs": artifacts}, names.STEP_FILE)


def is_complete(store: Store, run_id: str) -> bool:
    """Returns whether a step has recorded its outputs and the record is still there."""
    return any(file.path == names.STEP_FILE for file in store.client.list_artifacts(run_id))


def read(store: Store, run_id: str) -> dict[str, Any]:
    """Returns the `arguments` and `outputs` of a step. Outputs are empty before it is complete, both before it began."""
    recorded: dict[str, Any] = {"arguments": {}, "outputs": {}}
    there = {file.path for file in store.client.list_artifacts(run_id)}
    file = next((file for file in (names.STEP_FILE, names.ARGUMENTS_FILE) if file in there), None)
    if file is None:
        return recorded
    with tempfile.TemporaryDirectory() as folder:
        return recorded | json.loads(Path(store.client.download_artifacts(run_id, file, folder)).read_text())

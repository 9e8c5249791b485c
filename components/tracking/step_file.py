"""The file with a step's arguments and outputs, which are too large for MLflow's parameters. An artifact of the step's run."""

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


def write(store: Store, run_id: str, arguments: Mapping[str, Any], outputs: Mapping[str, KfpArtifact]) -> None:
    """Records a step's arguments and outputs. `outputs` is empty until the step has made them."""
    artifacts = {name: asdict(Artifact(a.schema_title, a.uri, a.metadata)) for name, a in outputs.items()}
    store.client.log_dict(run_id, {"arguments": dict(arguments), "outputs": artifacts}, names.STEP_FILE)


def read(store: Store, run_id: str) -> dict[str, Any]:
    """Returns the `arguments` and `outputs` of a step. Both are empty if the step was killed before it recorded them."""
    if not any(file.path == names.STEP_FILE for file in store.client.list_artifacts(run_id)):
        return {"arguments": {}, "outputs": {}}
    with tempfile.TemporaryDirectory() as folder:
        found: dict[str, Any] = json.loads(Path(store.client.download_artifacts(run_id, names.STEP_FILE, folder)).read_text())
    return found

"""The cache of finished steps, as KFP's local runner uses it: by code, settings and the content of the inputs.

KFP's own cache knows an input by its path and by the run that made it. So it would pretrain again after the same images were
converted again.
"""

import json
import os
from pathlib import Path
from typing import Any

from kfp import dsl
from kfp.local.cache import LocalCache

from pipelines.cache import absolute, fault_of, relative
from trainer.shared.files import is_local, write_whole

_CONTENT = ("fingerprint", "state_sha256", "preset", "config")
"""Metadata that identifies the content of a dataset or of a model."""


class StepCache(LocalCache):
    """The cache in the form that KFP's local runner uses. It is in its root's folder."""

    reads = True
    """Whether finished steps are reused."""

    @property
    def _root(self) -> str:
        return os.path.dirname(os.path.abspath(self.cache_root))

    def compute_key(
        self, component_name: str, image: str, full_command: list[str], arguments: dict[str, Any], **more: Any
    ) -> str:
        known = {name: self._identity(name, value) for name, value in arguments.items()}
        return super().compute_key(component_name, image, full_command, known, **more)

    def get(self, key: str) -> dict[str, Any] | None:
        try:
            stored = json.loads(Path(self._entry_path(key)).read_text()) if self.reads else None
        except (OSError, ValueError):
            return None
        if not stored or any(fault_of(output, self._root) for output in stored.values()):
            return None
        return self._deserialize_outputs({name: {**one, "uri": absolute(one["uri"], self._root)} for name, one in stored.items()})

    def put(self, key: str, outputs: dict[str, Any]) -> None:
        stored = self._serialize_outputs(outputs)
        inside = {name: {**one, "uri": relative(one["uri"], self._root)} for name, one in stored.items()}
        write_whole(self._entry_path(key), json.dumps(inside).encode())

    def _identity(self, name: str, value: Any) -> Any:
        if isinstance(value, dsl.Artifact):
            content = {key: value.metadata[key] for key in _CONTENT if key in value.metadata}
            return {"type": type(value).schema_title, **(content or {"uri": value.uri, "metadata": value.metadata})}
        # Its identity is an argument of its own.
        if name == "encoder":
            return ""
        # A link to a folder is that folder.
        return relative(os.path.realpath(value), os.path.realpath(self._root)) if name == "raw" and is_local(value) else value


class WriteOnlyCache(StepCache):
    """Runs every step again, and stores the outputs in place of earlier ones."""

    reads = False

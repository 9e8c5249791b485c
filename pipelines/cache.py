"""The entries of a root's cache of finished steps, and whether their outputs can still be used.

An entry is a JSON file with a step's outputs. Paths within the root are relative to it. `kfp_cache` reads and writes entries.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from components import datasets
from components.lineage import short
from trainer.shared.files import is_local


def folder_of(root: Path) -> Path:
    return root / "cache"


def drop_unusable(root: Path, why_lost: Callable[[str], str]) -> Iterator[str]:
    """Removes the entries whose outputs cannot be reused, and yields a line about each.

    `why_lost(run ID)` returns why the record of a run cannot be used, or "" if it can.
    """
    for entry in sorted(folder_of(root).glob("*.json")):
        try:
            stored = json.loads(entry.read_text())
            runs = sorted({str(output["metadata"].get("run_id")) for output in stored.values()})
            faults = [f"run {short(run)} {why}" for run in runs if (why := why_lost(run))]
            faults += filter(None, (fault_of(output, str(root)) for output in stored.values()))
            fault = faults[0] if faults else "" if stored else "it is empty"
        except (ValueError, KeyError, TypeError, AttributeError):
            fault = "it is torn" if entry.stat().st_size else "it is empty"
        if fault:
            entry.unlink(missing_ok=True)
            yield f"{entry.stem[:8]} drops out of the cache: {fault}"


def fault_of(output: Mapping[str, Any], root: str) -> str:
    """Returns why an output cannot be reused, or "". Output elsewhere than on this machine is trusted."""
    path = absolute(output["uri"], root)
    if not is_local(path):
        return ""
    if not os.path.exists(path):
        return f"{path} is gone"
    if "fingerprint" in output["metadata"]:
        return datasets.fault_of(path)
    if "state_sha256" in output["metadata"] and not any(Path(path).glob("checkpoint-*.npz")):
        return f"{path} has no checkpoint any more"
    return ""


def relative(path: str, root: str) -> str:
    """Returns a path relative to the root if it is within the root."""
    return path[len(root) + 1 :] if path.startswith(f"{root}/") else path


def absolute(path: str, root: str) -> str:
    """Returns the path of what `relative` returned."""
    return os.path.join(root, path) if is_local(path) else path

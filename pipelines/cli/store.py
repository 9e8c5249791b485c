"""The root, a folder for all local files, and the MLflow store in it or in the environment."""

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.shared.errors import UserError

if TYPE_CHECKING:
    from components.tracking import Store

ROOT = "runs"
"""The default root."""
_UNUSABLE = re.compile(r"://|[?#]|%[0-9A-Fa-f]{2}")
"""What MLflow takes for a part of a URL in the path of a file."""


def make_root(name: str) -> Path:
    """Creates the root folder `name` if needed and returns it. Raises UserError if it cannot be a folder."""
    root = root_of(name)
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--root {name} cannot be a folder: {error.strerror}") from error
    return root


def root_of(name: str) -> Path:
    """Returns the absolute path of the root `name`. Raises UserError if MLflow cannot use a folder of that name."""
    root = absolute(name)
    if "://" in name:
        raise UserError(f"--root {name} is not a folder of this machine; sogclr submit keeps what it makes in Cloud Storage")
    if found := _UNUSABLE.search(str(root)):
        raise UserError(
            f"--root {name} cannot be used: MLflow takes {found[0]} in {root} for a part of a URL; take another folder"
        )
    return root


def absolute(path: str) -> Path:
    """Returns a path as an absolute path, so that equal paths have equal cache keys."""
    return Path(os.path.abspath(path))


def shown(path: Path | str) -> str:
    """Returns a path as text, relative to the current folder if it is inside it."""
    relative = os.path.relpath(path) if "://" not in str(path) else str(path)
    return str(path) if relative.startswith("..") else relative


def mlflow_names(root: Path) -> dict[str, str]:
    """Returns MLflow's own variables for a root. Values in the environment take precedence."""
    return {
        "MLFLOW_TRACKING_URI": os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{root / 'mlflow.db'}",
        "MLFLOW_EXPERIMENT_NAME": os.environ.get("MLFLOW_EXPERIMENT_NAME") or "sogclr",
    }


def open_store(root: Path) -> "Store":
    """Returns the store of a root, and creates it if there is none. If the root has moved, its records follow."""
    from components import tracking

    tracking.move_credentials()
    names = mlflow_names(root)
    uri = names["MLFLOW_TRACKING_URI"]
    if not os.environ.get("MLFLOW_TRACKING_URI"):
        return tracking.open_root(root, names["MLFLOW_EXPERIMENT_NAME"])
    # A server chooses itself where it keeps artifacts.
    artifacts = None if uri.startswith("http") else str(root / "artifacts")
    return tracking.open_store(uri, names["MLFLOW_EXPERIMENT_NAME"], artifacts)


def check_runs(root: Path) -> None:
    """Raises UserError if a root has no recorded runs and the environment names no other store."""
    if not os.environ.get("MLFLOW_TRACKING_URI") and not (root / "mlflow.db").exists():
        raise UserError(f"--root {shown(root)} holds no runs; sogclr run --preset demo --root {shown(root)} makes the first")

"""Roots with a store, and runs in it."""

import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

from components import tracking


def copy_store(made: Path, root: Path) -> None:
    """Gives the new folder `root` the store of `made`, which has no run, as if it had been made there."""
    root.mkdir()
    shutil.copy(made / "mlflow.db", root)
    with closing(sqlite3.connect(root / "mlflow.db")) as store, store:
        store.execute("UPDATE experiments SET artifact_location = ? WHERE name = 'sogclr'", (f"{root}/artifacts",))


def finished_run(root: Path, **artifacts: str) -> str:
    """Records a finished step and returns its run's ID."""
    store = tracking.open_root(root)
    run_id = store.client.create_run(store.experiment_id, tags={"sogclr.component": "pretrain"}).info.run_id
    for tag in ("sogclr.run.pretrain", "mlflow.parentRunId"):
        store.client.set_tag(run_id, tag, run_id)
    outputs = {name: {"type": "system.Model", "uri": uri, "metadata": {}} for name, uri in artifacts.items()}
    store.client.log_dict(run_id, {"arguments": {"raw": f"{root}/demo-raw"}, "outputs": outputs}, "step.json")
    store.client.set_terminated(run_id)
    return run_id

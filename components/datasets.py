"""The folder of a conversion's dataset. The next conversion of the same raw data with the same settings finds it again."""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from components import variables, workspace
from components.patience import say
from trainer.shared.records import MANIFEST, manifest_from_json


def claim(output: str, job: str, about: Mapping[str, Any], environ: Mapping[str, str] = os.environ) -> workspace.Claim:
    """Returns the folder for a conversion of `job` whose result depends on `about` alone: `output` if no other is kept.

    A dataset there that has lost a shard is removed, so that the conversion makes it again. Datasets are kept on this machine
    only, and only if the identity of the raw data is known.
    """
    parent = environ.get(variables.DATASETS, "")
    if not parent or not about["raw"]:
        return workspace.Claim(output)
    claimed = workspace.claim(parent, job, bool(environ.get(variables.REUSE)), **about)
    if Path(claimed.folder, MANIFEST).exists() and (fault := fault_of(claimed.folder)):
        say(f"{fault}: the dataset is made again")
        shutil.rmtree(claimed.folder)
    return claimed


def fault_of(dataset: str) -> str:
    """Returns why a finished dataset on this machine cannot be used, or "". Looks at names and sizes, not into the shards."""
    folder = Path(dataset)
    try:
        manifest = manifest_from_json((folder / MANIFEST).read_text())
    except (OSError, ValueError, KeyError, TypeError):
        return f"{folder / MANIFEST} is gone or torn"
    for shard in (shard for split in manifest.splits.values() for shard in split.shards):
        file = folder / shard.file
        if not file.exists():
            return f"{file} is gone"
        if file.stat().st_size != shard.bytes:
            return f"{file} has {file.stat().st_size} bytes, not {shard.bytes}"
    return ""

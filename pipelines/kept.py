"""What a root keeps besides MLflow's records: what it is, what needs it, and its removal.

A folder is renamed before it is deleted. So a removal that is killed leaves nothing that looks whole and is not, and the next one
deletes the rest.
"""

import json
import os
import shutil
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from components.workspace import STORE_LOCK, job_in, lock_of
from pipelines.cache import folder_of
from pipelines.logs import abandoned, any_lives
from trainer.shared.locks import locked
from trainer.shared.records import MANIFEST

_REMOVED = ".removed-"
_CLAIMED = ("datasets", "checkpoints")
"""Folders whose subfolders have locks of their own."""


@dataclass(frozen=True)
class Kept:
    """A file or folder of a root."""

    path: str
    """Path relative to the root."""
    what: str
    bytes: int
    seconds: float
    """Time since its last change."""
    needed_by: tuple[str, ...]
    """The runs that refer to it, each as its short ID and its name."""
    used: bool
    """Whether a running process uses it, or may use it."""


@dataclass(frozen=True)
class Reference:
    """A recorded run and the texts in its record that may name files."""

    run_id: str
    name: str
    texts: Set[str]


def listed(root: Path) -> Mapping[str, str]:
    """Returns what a root keeps: the path relative to the root -> what it is. Must run before `examined` reads the runs."""
    found = {}
    for path in sorted((root / "datasets").glob("[!.]*")):
        found[path] = "dataset" if (path / MANIFEST).exists() else "interrupted conversion"
    for path in sorted((root / "checkpoints").glob("[!.]*")):
        found[path] = "pretraining" if (path / "config.json").exists() else "evaluation"
    found |= dict.fromkeys(sorted((root / "features").glob("[!.]*")), "features")
    found |= dict.fromkeys(sorted((root / "kfp").glob("[!.]*")), "outputs of steps")
    found |= dict.fromkeys(sorted(folder_of(root).glob("*.json")), "cache entry")
    left = [*root.glob(f"{_REMOVED}*"), *root.glob(".demo-raw-*"), *abandoned(root)]
    return {
        str(path.relative_to(root)): what for path, what in [*found.items(), *dict.fromkeys(sorted(left), "left over").items()]
    }


def examined(root: Path, things: Mapping[str, str], references: Sequence[Reference]) -> list[Kept]:
    """Returns what is known of `things`, which `listed` returned. `references` must have been read after that."""
    busy = any_lives(root)
    by_id = {one.run_id: one.name for one in references}
    kept = []
    for name, what in things.items():
        path = root / name
        needed = _needed_by(path, what, references, by_id)
        used = busy if needed or what in ("outputs of steps", "left over", "cache entry") else False
        size, changed = _size_and_time(path)
        kept.append(Kept(name, what, size, max(0.0, time.time() - changed), needed, used or _is_locked(root, name)))
    return kept


def remove(root: Path, name: str) -> bool:
    """Removes a thing of the root, unless a process has begun to use it. Returns whether it did."""
    path = root / name
    with ExitStack() as held:
        for lock in _locks(root, name):
            if not held.enter_context(locked(lock)):
                return False
        removed = path
        if not name.startswith(_REMOVED):
            removed = root / f"{_REMOVED}{uuid.uuid4().hex}"
            removed.mkdir()
            if not path.exists():
                removed.rmdir()
                return False
            path.rename(removed / path.name)
        if name.split("/")[0] in _CLAIMED:
            # An empty record says that nobody works in the folder and that nobody has finished it.
            os.truncate(lock_of(str(path)), 0)
    shutil.rmtree(removed)
    return True


def _needed_by(path: Path, what: str, references: Sequence[Reference], by_id: Mapping[str, str]) -> tuple[str, ...]:
    if what == "cache entry":
        return tuple(sorted({by_id[run] for run in _runs_of(path) if run in by_id}))
    text = str(path)
    found = [one.name for one in references if any(other == text or other.startswith(f"{text}/") for other in one.texts)]
    if path.parent.name in _CLAIMED:
        # The next command goes on from what a run left unfinished.
        found += [one.name for one in references if one.run_id == job_in(text).rpartition(" ")[2]]
    return tuple(dict.fromkeys(found))


def _runs_of(entry: Path) -> Iterator[str]:
    try:
        for output in json.loads(entry.read_text()).values():
            yield str(output["metadata"].get("run_id"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return


def _locks(root: Path, name: str) -> list[str]:
    """Returns the locks that a process holds while it uses a thing."""
    parent = name.split("/")[0]
    if parent in _CLAIMED:
        return [lock_of(str(root / name))]
    return [str(root / "features" / STORE_LOCK)] if parent == "features" else []


def _is_locked(root: Path, name: str) -> bool:
    for lock in _locks(root, name):
        with locked(lock) as free:
            if not free:
                return True
    return False


def _size_and_time(path: Path) -> tuple[int, float]:
    """Returns the bytes of a file, or of all files in a folder, and the time of the last change, in seconds since 1970."""
    files = [path, *path.rglob("*")] if path.is_dir() else [path]
    size, changed = 0, 0.0
    for file in files:
        try:
            about = file.lstat()
        except OSError:
            continue
        size += about.st_size if not file.is_dir() else 0
        changed = max(changed, about.st_mtime)
    return size, changed

"""Where a step works, so that its next attempt finds what the last one left."""

import fcntl
import hashlib
import itertools
import json
import os
from typing import IO, Any

from components import outbox

_held: list[IO[str]] = []
"""Locks, which end with the process."""


def claim(root: str, **depends_on: Any) -> str:
    """Returns the folder under `root` for work that is a function of `depends_on`.

    It is the one that an unfinished attempt at the same work left, else a new one: finished work is never touched again.
    On this machine two processes never get the same.
    """
    import tensorflow as tf

    def unfinished(folder: str) -> bool:
        return not tf.io.gfile.isdir(folder) or tf.io.gfile.exists(f"{folder}/{outbox.FILE}")

    key = hashlib.sha256(json.dumps(depends_on, sort_keys=True, default=str).encode()).hexdigest()[:16]
    for number in itertools.count(1):
        folder = f"{root.rstrip('/')}/{key}-{number}"
        # Asked again under the lock: whoever had it may have finished.
        if unfinished(folder) and _lock(folder) and unfinished(folder):
            return folder
    raise AssertionError("there is always a next number")


def _lock(folder: str) -> bool:
    if "://" in folder:
        return True
    parent, name = os.path.split(folder)
    os.makedirs(parent, exist_ok=True)
    file = open(f"{parent}/.{name}.lock", "w")  # noqa: SIM115  it is held until the process ends
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        return False
    _held.append(file)
    return True

"""Locks between processes of one machine. The system releases a lock when its process ends, however it ends."""

import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from trainer.shared.files import make_folder, naming_unwritable

_SECONDS_BETWEEN_TRIES = 0.2


@contextmanager
def locked(path: str, *, shared: bool = False, on_wait: Callable[[], object] | None = None) -> Iterator[bool]:
    """Locks the local file `path` while the block runs, and makes it if needed. Yields whether the lock was free.

    Any number of processes hold a `shared` lock at once. If the lock is not free, calls `on_wait()` and tries again until it is;
    an exception from it ends the wait. Without `on_wait`, the block runs at once, unlocked.
    """
    make_folder(os.path.dirname(path) or ".")
    with naming_unwritable(path):
        file = open(path, "a+")  # noqa: SIM115  closed below
    with file:
        while not (free := _try(file.fileno(), fcntl.LOCK_SH if shared else fcntl.LOCK_EX)) and on_wait:
            on_wait()
            time.sleep(_SECONDS_BETWEEN_TRIES)
        yield free


def _try(number: int, kind: int) -> bool:
    try:
        fcntl.flock(number, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True

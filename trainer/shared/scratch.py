"""Temporary folders of commands. What a killed command leaves is removed as the next one begins."""

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress

_PREFIX = "sogclr-scratch-"


@contextmanager
def scratch_folder() -> Iterator[str]:
    """Gives a new folder among the system's temporary files, which is removed when the block ends.

    First removes the folders of the same user's processes that died without removing theirs. A lock on a folder shows that its
    process lives.
    """
    _remove_abandoned(tempfile.gettempdir())
    while (lock := _locked(folder := tempfile.mkdtemp(prefix=_PREFIX))) is None:
        pass  # another process took the new folder for an abandoned one
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def _remove_abandoned(parent: str) -> None:
    for entry in os.scandir(parent):
        if not entry.name.startswith(_PREFIX) or entry.stat(follow_symlinks=False).st_uid != os.getuid():
            continue
        if (lock := _locked(entry.path)) is not None:
            shutil.rmtree(entry.path, ignore_errors=True)
            os.close(lock)


def _locked(folder: str) -> int | None:
    """Returns a descriptor that locks `folder` until it is closed. Returns None if another process has the lock or removed it."""
    with suppress(OSError):
        opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.stat(folder)
            return opened
        except OSError:
            os.close(opened)
    return None

"""Where a step works, so that its next attempt finds what the last one left, and no other process writes there meanwhile."""

import fcntl
import hashlib
import itertools
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import IO, Any, Protocol

from components import lease, outbox

_held: list[IO[str]] = []
"""Locks, which end with the process."""


class Hold(Protocol):
    """What keeps others out of a folder."""

    def require(self) -> None:
        """Raises UserError where somebody else has the folder now."""

    def release(self, finished: bool) -> None:
        """Lets others in, or where the work is `finished` only the same job."""


@dataclass(frozen=True)
class Claim:
    """A folder that is this process's."""

    folder: str
    hold: Hold | None = None

    def release(self, finished: bool) -> None:
        if self.hold:
            self.hold.release(finished)

    def require(self) -> None:
        if self.hold:
            self.hold.require()

    def stopping(self, should_stop: Callable[[], bool]) -> Callable[[], bool]:
        """Returns `should_stop` as a job is to ask it: it raises UserError where the folder is no longer this process's."""

        def asked() -> bool:
            self.require()
            return should_stop()

        return asked


def claim(root: str, job: str, /, **depends_on: Any) -> Claim:
    """Returns the folder under `root` for the work of `job`, a function of `depends_on`.

    It is the one that an earlier attempt of the same job had, whether it finished or not; else one that another job left
    unfinished; else a new one. What another job finished is never touched again, and two processes never get the same: on
    this machine by a lock, on gs:// by a lease. On other remote storage nothing keeps them apart.
    """
    key = hashlib.sha256(json.dumps(depends_on, sort_keys=True, default=str).encode()).hexdigest()[:16]
    for number in itertools.count(1):
        folder = f"{root.rstrip('/')}/{key}-{number}"
        if folder.startswith("gs://"):
            hold: Hold | None = lease.take(folder, job, partial(_is_unfinished, folder))
        elif "://" in folder:
            hold = _Open() if _is_unfinished(folder) else None
        else:
            hold = _lock(folder, job)
        if hold:
            return Claim(folder, hold)
    raise AssertionError("there is always a next number")


def _is_unfinished(folder: str) -> bool:
    """Returns what a folder says where nothing beside it says whether it is finished."""
    from trainer.shared.files import names_in

    names = names_in(folder)
    return not names or outbox.FILE in names


class _Open:
    """Keeps nobody out."""

    def require(self) -> None:
        pass

    def release(self, finished: bool) -> None:
        pass


class _Lock:
    """A file beside the folder that is locked, and says which job was at work and whether it finished."""

    def __init__(self, file: IO[str], job: str) -> None:
        self._file, self._job = file, job
        self._write(lease.WORKING)

    def require(self) -> None:
        pass

    def release(self, finished: bool) -> None:
        if not self._file.closed:
            self._write(lease.FINISHED if finished else lease.RELEASED)
            self._file.close()

    def _write(self, state: str) -> None:
        self._file.seek(0)
        self._file.truncate()
        json.dump({"job": self._job, "state": state}, self._file)
        self._file.flush()


def _lock(folder: str, job: str) -> _Lock | None:
    parent, name = os.path.split(folder)
    os.makedirs(parent, exist_ok=True)
    file = open(f"{parent}/.{name}.lock", "a+")  # noqa: SIM115  it is held until the work or the process ends
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        return None
    # Only now: whoever had it may have finished.
    file.seek(0)
    try:
        found = json.loads(file.read())
    except ValueError:
        # Of an earlier version, or of a process that was killed while it wrote.
        found = {}
    if found.get("job") != job and (found.get("state") == lease.FINISHED or not (found or _is_unfinished(folder))):
        file.close()
        return None
    _held.append(file)
    return _Lock(file, job)

"""The folder that a step works in. The step's next attempt finds it again, and no other process writes to it meanwhile."""

import fcntl
import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import IO, Any, Protocol

from components import lease, outbox
from trainer.shared.locks import locked

STORE_LOCK = ".lock"
"""File in a folder that several processes read. They hold a shared lock on it."""
_held: list[IO[str]] = []
"""Open lock files. The locks end with the process."""


class Hold(Protocol):
    """Keeps other processes out of a folder."""

    def require(self) -> None:
        """Raises UserError if another process has taken over the folder."""

    def release(self, finished: bool) -> None:
        """Lets other jobs in, or only the same job if the work is `finished`."""


@dataclass(frozen=True)
class Claim:
    """A folder that this process holds."""

    folder: str
    hold: Hold | None = None
    finished_by: str = ""
    """The other job that finished the work in this folder before; empty if none did."""

    def release(self, finished: bool) -> None:
        if self.hold:
            self.hold.release(finished)

    def require(self) -> None:
        if self.hold:
            self.hold.require()

    def stopping(self, should_stop: Callable[[], bool]) -> Callable[[], bool]:
        """Returns `should_stop`, extended: it raises UserError if another process has taken over the folder."""

        def checked() -> bool:
            self.require()
            return should_stop()

        return checked


def claim(root: str, job: str, reuses: bool = False, /, **depends_on: Any) -> Claim:
    """Returns a folder under `root` for work of `job` whose result depends on `depends_on` alone.

    Returns the folder of an earlier attempt of the same job, finished or not; else a folder that another job left unfinished;
    else a new one. A folder that another job finished is touched only if the job `reuses` such work, on this machine. Two
    processes never hold the same folder: a lock ensures it on this machine, a lease on gs://. On other remote storage nothing
    does.
    """
    key = hashlib.sha256(json.dumps(depends_on, sort_keys=True, default=str).encode()).hexdigest()[:16]
    for number in itertools.count(1):
        folder = f"{root.rstrip('/')}/{key}-{number}"
        if folder.startswith("gs://"):
            hold: Hold | None = lease.take(folder, job, partial(_is_unfinished, folder))
        elif "://" in folder:
            hold = _Open() if _is_unfinished(folder) else None
        else:
            hold = _lock(folder, job, reuses)
        if hold:
            return Claim(folder, hold, hold.finished_by if isinstance(hold, _Lock) else "")
    raise AssertionError("there is always a next number")


def lock_of(folder: str) -> str:
    """Returns the lock file of a local folder that `claim` returns. Its holder works in the folder."""
    parent, name = os.path.split(folder)
    return f"{parent}/.{name}.lock"


def job_in(folder: str) -> str:
    """Returns the job that left the local folder unfinished, or "" if it finished or is unknown."""
    try:
        with open(lock_of(folder)) as file:
            found = json.load(file)
        return "" if found["state"] == lease.FINISHED else str(found["job"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


@contextmanager
def in_use(store: str) -> Iterator[None]:
    """Keeps `sogclr clean` out of the local folder `store` while the block runs. An empty name stands for no folder."""
    with locked(f"{store}/{STORE_LOCK}", shared=True, on_wait=lambda: None) if store else nullcontext():
        yield


def _is_unfinished(folder: str) -> bool:
    """Returns whether the contents of a folder look unfinished. For a folder whose state is not recorded beside it."""
    from trainer.shared.files import names_in

    names = names_in(folder)
    return not names or outbox.FILE in names


class _Open:
    """Keeps no process out."""

    def require(self) -> None:
        pass

    def release(self, finished: bool) -> None:
        pass


class _Lock:
    """A locked file beside the folder. It records which job works in the folder and whether that job has finished."""

    def __init__(self, file: IO[str], job: str, finished_by: str = "") -> None:
        self._file, self._job, self.finished_by = file, job, finished_by
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


def _lock(folder: str, job: str, reuses: bool) -> _Lock | None:
    os.makedirs(os.path.dirname(folder), exist_ok=True)
    file = open(lock_of(folder), "a+")  # noqa: SIM115  stays open until the work or the process ends
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        return None
    # Read after locking: the previous holder may have finished until then.
    file.seek(0)
    try:
        found = json.loads(file.read())
    except ValueError:
        # An earlier version wrote the file, or its writer was killed halfway.
        found = {}
    finished = found.get("state") == lease.FINISHED or not (found or _is_unfinished(folder))
    by_another = finished and found.get("job") != job
    if by_another and not reuses:
        file.close()
        return None
    _held.append(file)
    return _Lock(file, job, found.get("job", "") if by_another else "")

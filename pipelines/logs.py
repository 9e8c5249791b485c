"""The logs of a root's commands. A command and its runner hold locks on their log, which show later commands whether they live.

The locks are on bytes of the file. The system releases them when the process dies, however it dies.
"""

import fcntl
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from trainer.shared.files import make_folder, naming_full_disk, naming_unwritable

_COMMAND, _RUNNER = 0, 1
"""The bytes that the command and its runner lock."""
_STARTING = ".starting"
_SECONDS_BETWEEN_LOOKS = 0.1


@dataclass(frozen=True)
class Log:
    """The log of a command that runs."""

    path: Path
    file: IO[str]
    """Must stay open, and must be the only opened file of this path in its process: closing another would end the lock."""


def log_of(root: Path, run_id: str) -> Path:
    """Returns the log of the command whose pipeline run is `run_id`."""
    return root / "logs" / f"{run_id}.log"


@contextmanager
def log_of_new_run(root: Path, start: Callable[[str], str], started: Callable[[str], object]) -> Iterator[tuple[str, Log]]:
    """Yields a new pipeline run's ID and its open log, which this process locks while the block runs.

    `start(token)` opens the run, and lets `runs_without_log` find it by `token` until the log has the run's name. Then calls
    `started(run ID)`.
    """
    token = uuid.uuid4().hex
    beginning = root / "logs" / f"{token}{_STARTING}"
    make_folder(str(beginning.parent))
    with naming_unwritable(str(beginning)):
        file = beginning.open("w")
    # Closing the file writes the rest of the log, so it can fail as the block's own writes do.
    with naming_full_disk(str(beginning.parent)), file:
        fcntl.lockf(file, fcntl.LOCK_EX, 1, _COMMAND)
        try:
            run_id = start(token)
        except BaseException:
            beginning.unlink(missing_ok=True)
            raise
        beginning.rename(log_of(root, run_id))
        started(run_id)
        yield run_id, Log(log_of(root, run_id), file)


def lock_as_runner(log: Path) -> IO[str]:
    """Locks a command's log for its runner, until the runner ends."""
    file = log.open("a")
    fcntl.lockf(file, fcntl.LOCK_EX, 1, _RUNNER)
    return file


def is_dead(root: Path, run_id: str, token: str, on_wait: Callable[[], object]) -> bool:
    """Returns whether the command of a pipeline run is dead. If it was on another root or machine, that is not known: False.

    If the command is dead, but its runner still ends its steps, calls `on_wait()` and waits until they have ended.
    """
    for log in (log_of(root, run_id), root / "logs" / f"{token}{_STARTING}"):
        with suppress(FileNotFoundError), log.open("r+") as file:
            if _is_locked(file, _COMMAND):
                return False
            if _is_locked(file, _RUNNER):
                on_wait()
                while _is_locked(file, _RUNNER):
                    time.sleep(_SECONDS_BETWEEN_LOOKS)
            return True
    return False


def abandoned(root: Path) -> list[Path]:
    """Returns the logs that commands left that died before their log had the run's name."""
    found = []
    for beginning in (root / "logs").glob(f"*{_STARTING}"):
        with suppress(FileNotFoundError), beginning.open("r+") as file:
            if not _is_locked(file, _COMMAND):
                found.append(beginning)
    return found


def any_lives(root: Path) -> bool:
    """Returns whether a command of another process, or its runner, works on the root."""
    for log in (root / "logs").glob("*"):
        with suppress(FileNotFoundError, IsADirectoryError), log.open("r+") as file:
            if _is_locked(file, _COMMAND) or _is_locked(file, _RUNNER):
                return True
    return False


def logged_runs(root: Path) -> set[str]:
    """Returns the IDs of the pipeline runs that commands on this root have started."""
    return {log.stem for log in (root / "logs").glob("*.log") if len(log.stem) == 32}


def _is_locked(file: IO[str], byte: int) -> bool:
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, byte)
    except (BlockingIOError, PermissionError):
        return True
    fcntl.lockf(file, fcntl.LOCK_UN, 1, byte)
    return False

"""The processes that tests start.

One that stops at a place in its work lets a test do something to it there, however fast the machine is.
"""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

_TESTS = Path(__file__).parents[1]


def search_path(*first: Path) -> dict[str, str]:
    """Returns the PYTHONPATH with which a process finds `first`, then the tests and the project, wherever it runs."""
    folders = [*first, _TESTS, _TESTS.parent, os.environ.get("PYTHONPATH", "")]
    return {"PYTHONPATH": os.pathsep.join(filter(None, map(str, folders)))}


def run_module(name: str, *arguments: str | Path) -> str:
    """Runs a module of the tests in a process of its own, and returns what it printed. Fails where that fails."""
    environ = {**os.environ, **search_path()}
    done = subprocess.run([sys.executable, "-m", name, *arguments], env=environ, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr[-5000:]}"
    return done.stdout


def in_a_process_of_its_own(do: Callable[[], object]) -> int:
    """Runs `do` in a copy of this process and returns how it ended: 0, 1 for an error, or minus the signal's number."""
    child = os.fork()
    if not child:
        try:
            do()
        except BaseException:
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@dataclass(frozen=True)
class Hold:
    """Where it stops: at the first progress of `job` with each of `places` or more. `folder` says when it does."""

    job: str
    places: tuple[int, ...]
    folder: Path

    @property
    def environ(self) -> dict[str, str]:
        """What the process, or one that it starts, has to have in its environment."""
        places = ",".join(map(str, self.places))
        return {**search_path(Path(__file__).with_name("hold")), "HOLD": f"{self.job} {places} {self.folder}"}

    def wait(self, process: subprocess.Popen, place: int = 0) -> None:
        """Returns once it has stopped at that one of its places."""
        until((self.folder / f"{place}.held").exists, process)

    def release(self, place: int = 0) -> None:
        """Lets it go on from there."""
        (self.folder / f"{place}.released").touch()


@contextlib.contextmanager
def started(command: Sequence[str | Path], **options) -> Iterator[subprocess.Popen]:
    """Runs a process, and ends it where the test fails meanwhile, which would otherwise wait for it."""
    with subprocess.Popen(command, **options) as process:
        try:
            yield process
        except BaseException:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(60)
            process.kill()
            raise


def until(holds: Callable[[], bool], process: subprocess.Popen) -> None:
    """Returns once `holds()` is true. Fails where the process ends before."""
    while not holds():
        assert process.poll() is None or holds(), f"{process.args} ended with {process.returncode}"
        time.sleep(0.01)

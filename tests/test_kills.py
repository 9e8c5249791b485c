"""SIGKILL at random moments of `sogclr run`, then the same command: the root ends as if nothing had happened.

The commands are copies of this process, which has imported what they import, because they are killed many times.
"""

import json
import os
import random
import shutil
import signal
import sqlite3
import time
import uuid
from contextlib import closing
from pathlib import Path

import pytest
from support.processes import search_path
from support.raw_data import striped_archives

import components.tracking  # noqa: F401  for the copies
from pipelines import cli

TINY = [
    *("depth=10", "image_size=16", "global_batch_size=16", "epochs=1", "warmup_epochs=0", "width_multiplier=0.125"),
    *("linear_eval.protocols=cached", "linear_eval.l2_penalties=1e-2", "linear_eval.control_images=0"),
]


class Root:
    """A root with raw data beside it, and the command that runs the pipeline in it."""

    def __init__(self, folder: Path, raw: Path) -> None:
        self.folder, self.raw = folder, raw
        self.mark = uuid.uuid4().hex
        self.out = folder.with_name(f"{folder.name}.out")

    def start(self) -> int:
        """Starts the command and returns its process ID."""
        child = os.fork()
        if child:
            return child
        try:
            os.setsid()
            for number, mode in ((1, "w"), (2, "a")):
                os.dup2(
                    os.open(f"{self.out}{number}", os.O_CREAT | os.O_WRONLY | (os.O_TRUNC if mode == "w" else os.O_APPEND)),
                    number,
                )
            os.environ.update(search_path(), KILL_TEST=self.mark)
            for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_RUN_ID"):
                os.environ.pop(name, None)
            arguments = ["run", "--preset", "demo", "--raw", str(self.raw), "--root", str(self.folder), "--json", "--set", *TINY]
            with open(1, "w", closefd=False) as out, open(2, "w", closefd=False) as err:
                import sys

                sys.stdout, sys.stderr = out, err
                code = cli.main(arguments)
            os._exit(code)
        except BaseException:
            os._exit(99)

    def killed_after(self, seconds: float) -> bool:
        """Starts the command and kills it after some seconds. Returns False if it finished before."""
        child, end = self.start(), time.monotonic() + seconds
        while time.monotonic() < end:
            if os.waitpid(child, os.WNOHANG)[0]:
                return False
            time.sleep(0.01)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        return True

    def finish(self) -> dict:
        """Runs the command to its end and returns its answer."""
        code = os.waitstatus_to_exitcode(os.waitpid(self.start(), 0)[1])
        assert code == 0, Path(f"{self.out}2").read_text()[-3000:]
        return json.loads(Path(f"{self.out}1").read_text())

    def orphans(self) -> list[str]:
        """Returns the command lines of the processes that the command, or one that it started, has started."""
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            try:
                # The copies have the mark only in their memory, not in what the system shows.
                if f"KILL_TEST={self.mark}".encode() in (process / "environ").read_bytes():
                    found.append((process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")[:200])
            except OSError:
                continue
        return found

    def ask(self, question: str) -> list:
        with closing(sqlite3.connect(self.folder / "mlflow.db")) as store:
            return store.execute(question).fetchall()


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    return striped_archives(tmp_path_factory.mktemp("kills"))


@pytest.fixture(scope="module")
def undisturbed(raw, tmp_path_factory):
    """The digest of the state that a run without kills ends with, and how many seconds it takes."""
    begun = time.monotonic()
    digest = state_of(Root(tmp_path_factory.mktemp("undisturbed") / "root", raw).finish())
    return digest, time.monotonic() - begun


def state_of(answer: dict) -> str:
    return answer["components"]["pretrain"]["outputs"]["model"]["metadata"]["state_sha256"]


def kill(raw: Path, undisturbed: tuple[str, float], folder: Path, kills: int, seed: int) -> None:
    digest, seconds = undisturbed
    chosen = random.Random(seed)
    done = number = 0
    while done < kills:
        number += 1
        root = Root(folder / str(number), raw)
        # Half of the kills hit the first seconds, in which the store is made, the run is opened and the runner starts.
        while done < kills and root.killed_after(chosen.uniform(0, seconds / chosen.choice((1, 8)))):
            done += 1
            # What it had started ends by itself.
            until = time.monotonic() + 30
            while root.orphans() and time.monotonic() < until:
                time.sleep(0.05)
            assert root.orphans() == []
        assert state_of(root.finish()) == digest
        assert root.ask("SELECT run_uuid FROM runs WHERE status = 'RUNNING'") == []
        assert root.ask("PRAGMA integrity_check") == [("ok",)]
        assert list(root.folder.glob("logs/*.starting")) == []
        shutil.rmtree(root.folder)


@pytest.mark.thorough
def test_after_20_kills_the_same_command_ends_as_if_nothing_had_happened(raw, undisturbed, tmp_path):
    kill(raw, undisturbed, tmp_path, 20, seed=0)


@pytest.mark.slow
def test_after_200_kills_the_same_command_ends_as_if_nothing_had_happened(raw, undisturbed, tmp_path):
    kill(raw, undisturbed, tmp_path, 200, seed=1)

"""SIGKILL at random moments of `sogclr run`, then the same command: the root ends as if nothing had happened."""

import json
import os
import random
import shutil
import signal
import sqlite3
import time
from contextlib import closing
from pathlib import Path

import pytest
from support.copies import Copies
from support.raw_data import striped_archives

TINY = [
    *("depth=10", "image_size=16", "global_batch_size=16", "epochs=1", "warmup_epochs=0", "width_multiplier=0.125"),
    *("linear_eval.protocols=cached", "linear_eval.l2_penalties=1e-2", "linear_eval.control_images=0"),
]


class Root:
    """A root with raw data beside it, and the command that runs the pipeline in it."""

    def __init__(self, copies: Copies, folder: Path, raw: Path) -> None:
        self.copies, self.folder, self.raw = copies, folder, raw
        self.output = folder.with_name(f"said-{folder.name}")

    def start(self) -> int:
        """Starts the command and returns its process ID."""
        arguments = ["run", "--preset", "demo", "--raw", self.raw, "--root", self.folder, "--json", "--set", *TINY]
        return self.copies.start("pipelines.cli", *arguments, output=self.output)

    def killed_after(self, seconds: float) -> bool:
        """Starts the command and kills it after some seconds. Returns False if it finished before."""
        child, end = self.start(), time.monotonic() + seconds
        while time.monotonic() < end:
            if self.copies.poll(child) is not None:
                return False
            time.sleep(0.01)
        os.kill(child, signal.SIGKILL)
        return self.copies.wait(child) == -signal.SIGKILL

    def finish(self) -> dict:
        """Runs the command to its end and returns its answer."""
        code = self.copies.wait(self.start())
        assert code == 0, self.output.with_suffix(".err").read_text()[-3000:]
        return json.loads(self.output.with_suffix(".out").read_text())

    def ask(self, question: str) -> list:
        with closing(sqlite3.connect(self.folder / "mlflow.db")) as store:
            return store.execute(question).fetchall()


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    return striped_archives(tmp_path_factory.mktemp("kills"))


@pytest.fixture(scope="module")
def undisturbed(copies, raw, tmp_path_factory):
    """The digest of the state that a run without kills ends with, and how many seconds it takes."""
    begun = time.monotonic()
    digest = state_of(Root(copies, tmp_path_factory.mktemp("undisturbed") / "root", raw).finish())
    return digest, time.monotonic() - begun


def state_of(answer: dict) -> str:
    return answer["components"]["pretrain"]["outputs"]["model"]["metadata"]["state_sha256"]


def kill(copies: Copies, raw: Path, undisturbed: tuple[str, float], folder: Path, kills: int, seed: int) -> None:
    digest, seconds = undisturbed
    chosen = random.Random(seed)
    done = number = 0
    while done < kills:
        number += 1
        root = Root(copies, folder / str(number), raw)
        # Half of the kills hit the first seconds, in which the store is made, the run is opened and the runner starts.
        while done < kills and root.killed_after(chosen.uniform(0, seconds / chosen.choice((1, 8)))):
            done += 1
            # What it had started ends by itself.
            until = time.monotonic() + 30
            while copies.has_processes() and time.monotonic() < until:
                time.sleep(0.05)
            assert not copies.has_processes()
        assert state_of(root.finish()) == digest
        assert root.ask("SELECT run_uuid FROM runs WHERE status = 'RUNNING'") == []
        assert root.ask("PRAGMA integrity_check") == [("ok",)]
        assert list(root.folder.glob("logs/*.starting")) == []
        shutil.rmtree(root.folder)


@pytest.mark.thorough
def test_after_20_kills_the_same_command_ends_as_if_nothing_had_happened(copies, raw, undisturbed, tmp_path):
    kill(copies, raw, undisturbed, tmp_path, 20, seed=0)


@pytest.mark.slow
def test_after_200_kills_the_same_command_ends_as_if_nothing_had_happened(copies, raw, undisturbed, tmp_path):
    kill(copies, raw, undisturbed, tmp_path, 200, seed=1)

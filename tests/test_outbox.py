"""Metrics on their way to MLflow while the server, the storage of their file or both fail, hang or refuse.

The client is MLflow's, the server answers on a loopback address, and the storage is TensorFlow's own in memory, ram://, which
counts as remote. A call that should wait for nothing is made while a server or a storage hangs: where it waits, the test hangs.
"""

import json
import os
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest
import tensorflow as tf
from mlflow import MlflowClient
from support.loopback import answering
from support.processes import started, until

from components import outbox, patience, tracking
from components.tracking import metrics
from trainer.shared.errors import UserError

PATIENCE = 600
POINTS = 100
FAILURES = {
    "unavailable": tf.errors.UnavailableError(None, None, "HTTP response code 503"),
    "forbidden": tf.errors.PermissionDeniedError(None, None, "HTTP response code 403"),
}


class Storage:
    """Makes writes to storage count, fail or hang."""

    def __init__(self, monkeypatch):
        self.writes = 0
        self.failure: Exception | None = None
        self.open = threading.Event()
        self.open.set()
        self.asked = threading.Semaphore(0)
        self.rename, self.remove = tf.io.gfile.rename, tf.io.gfile.remove
        monkeypatch.setattr(tf.io.gfile, "rename", self._take(self.rename))
        monkeypatch.setattr(tf.io.gfile, "remove", self._take(self.remove))

    def _take(self, real):
        def take(*args, **named):
            self.writes += 1
            self.asked.release()
            self.open.wait()
            if failure := self.failure:
                if real is self.rename:
                    # A second write to a file in ram:// appends to it.
                    self.remove(args[0])
                raise failure
            return real(*args, **named)

        return take


@pytest.fixture
def storage(monkeypatch):
    storage = Storage(monkeypatch)
    yield storage
    storage.open.set()


@pytest.fixture
def folder():
    return f"ram://bucket/{uuid.uuid4().hex}"


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setattr(outbox, "_SECONDS_BETWEEN_CALLS", 0.02)
    monkeypatch.setattr(outbox, "_SECONDS_BETWEEN_REMOTE_WRITES", 0.02, raising=False)
    for module in (outbox, patience):
        monkeypatch.setattr(module, "SHORTEST_WAIT", 0.02)
        monkeypatch.setattr(module, "LONGEST_WAIT", 0.05)


def eventually(holds: Callable[[], bool]) -> None:
    while not holds():
        time.sleep(0.01)


def step_run(uri):
    return tracking.StepRun(tracking.Store(MlflowClient(uri), "0"), "run")


def log(run, steps=range(POINTS)):
    for step in steps:
        run.metrics.log({"loss": 1 / (step + 1)}, step)


def steps_in(folder):
    with tf.io.gfile.GFile(f"{folder}/{outbox.FILE}") as file:
        return [step for _, _, _, step in json.loads(file.read())["metrics"]]


@pytest.mark.parametrize("failure", FAILURES.values(), ids=FAILURES)
def test_metrics_are_delivered_while_storage_fails(storage, folder, failure):
    with answering() as server:
        run = step_run(server.url)
        run.metrics.keep_in(folder)
        storage.failure = failure
        log(run)
        run.metrics.flush()
        assert sorted(set(server.steps())) == list(range(POINTS))
        storage.failure = None
        log(run, [POINTS])
        run.close(finished=True)
    assert POINTS in server.steps()
    assert not tf.io.gfile.exists(f"{folder}/{outbox.FILE}")


def test_training_waits_neither_for_the_server_nor_for_storage(storage, folder):
    with answering() as server:
        run = step_run(server.url)
        run.metrics.keep_in(folder)
        storage.open.clear()
        server.open.clear()
        log(run, [0])
        server.asked.acquire()
        log(run, range(1, POINTS))
        storage.open.set()
        server.open.set()
        run.metrics.flush()
        assert sorted(set(server.steps())) == list(range(POINTS))
        run.close()


def test_storage_sees_a_few_writes_however_many_lines_are_logged(storage, folder, monkeypatch):
    monkeypatch.setattr(outbox, "_SECONDS_BETWEEN_REMOTE_WRITES", 3600.0, raising=False)
    with answering(503) as server:
        run = step_run(server.url)
        run.metrics.keep_in(folder)
        for step in range(POINTS):
            log(run, [step])
        run.close()
    assert steps_in(folder) == list(range(POINTS))
    assert storage.writes <= 4, "at most: by keep_metrics_in, after it, and when it closes, before and after the last delivery"


def test_the_file_follows_what_was_logged_while_the_server_is_down(folder, storage):
    with answering(503) as server:
        run = step_run(server.url)
        run.metrics.keep_in(folder)
        log(run)
        eventually(lambda: steps_in(folder) == list(range(POINTS)))
        server.status = 200
        eventually(lambda: steps_in(folder) == [])
        assert sorted(set(server.steps())) == list(range(POINTS))
        run.close()


KILLED = """
import sys, time
from components.outbox import Outbox
def deliver(points):
    raise ConnectionError("nobody is there")
outbox = Outbox(deliver, 60)
outbox.keep_in(sys.argv[1], "killed")
outbox.put([("loss", 1.0, 2, step) for step in range(100)])
time.sleep(3600)
"""


def test_the_next_attempt_delivers_what_a_killed_process_logged(tmp_path):
    folder = str(tmp_path / "work")
    environ = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    with started([sys.executable, "-c", KILLED, folder], env=environ, stderr=subprocess.DEVNULL) as process:
        until(lambda: Path(folder, outbox.FILE).exists() and len(steps_in(folder)) == POINTS, process)
        process.kill()
    delivered = []
    box = outbox.Outbox(delivered.extend, PATIENCE)
    assert box.keep_in(folder, "killed") == "killed"
    box.flush()
    assert delivered == [("loss", 1.0, 2, step) for step in range(POINTS)]
    box.close(finished=True)
    assert not Path(folder, outbox.FILE).exists()


@pytest.mark.parametrize("kept", [True, False])
def test_closing_ends_while_the_server_hangs(storage, folder, kept, monkeypatch, capsys):
    monkeypatch.setattr(outbox, "_SECONDS_TO_CLOSE", 0.1, raising=False)
    with answering() as server:
        run = step_run(server.url)
        run.metrics.keep_in(folder)
        server.open.clear()
        if not kept:
            storage.open.clear()
        log(run)
        server.asked.acquire()
        if kept:
            eventually(lambda: steps_in(folder) == list(range(POINTS)))
        run.close()
        said = capsys.readouterr().err
        storage.open.set()
    if kept:
        assert steps_in(folder) == list(range(POINTS))
        assert said == ""
    else:
        assert said.count("\n") == 1
        assert f"{POINTS} metric values are lost: MLflow does not answer, and {folder}/{outbox.FILE} cannot be written" in said


def test_closing_says_in_one_line_what_neither_took(storage, folder, capsys):
    with answering(503) as server:
        run = step_run(server.url)
        run.metrics.keep_in(folder)
        storage.failure = FAILURES["forbidden"]
        log(run)
        run.close()
    lost = [line for line in capsys.readouterr().err.splitlines() if "lost" in line]
    assert len(lost) == 1
    assert f"{POINTS} metric values are lost: MLflow answers HTTP 503 at {server.url}/api/" in lost[0]
    assert lost[0].endswith(f"and {folder}/{outbox.FILE} cannot be written (HTTP response code 403)")


def test_closing_a_run_without_a_file_says_what_is_lost(capsys):
    with answering(503) as server:
        run = step_run(server.url)
        log(run)
        run.close()
    assert f"{POINTS} metric values are lost: MLflow answers HTTP 503 at {server.url}" in capsys.readouterr().err


def test_a_finished_run_whose_file_cannot_be_removed_says_so_and_ends(storage, folder, capsys):
    with answering() as server:
        run = step_run(server.url)
        run.metrics.keep_in(folder)
        log(run)
        run.metrics.flush()
        storage.failure = FAILURES["forbidden"]
        run.close(finished=True)
    assert f"{folder}/{outbox.FILE} cannot be removed (HTTP response code 403)" in capsys.readouterr().err


def test_a_step_that_ends_waits_for_the_server_and_says_what_it_answers(capsys):
    with answering(503) as server:
        run = step_run(server.url)
        log(run)
        ending = threading.Thread(target=run.metrics.flush)
        ending.start()
        for _ in range(3):
            server.asked.acquire()
        server.status = 200
        ending.join()
        assert sorted(set(server.steps())) == list(range(POINTS))
        run.close()
    said = capsys.readouterr().err
    assert said == f"MLflow answers HTTP 503 at {server.url}/api/2.0/mlflow/runs/log-batch; waiting for it\n"


def test_a_step_that_ends_fails_in_one_line_when_patience_ends(folder, monkeypatch):
    monkeypatch.setattr(metrics, "PATIENCE_OF_STEPS", 0.1)
    with answering(503) as server:
        run = step_run(server.url)
        run.metrics.keep_in(folder)
        log(run)
        with pytest.raises(UserError, match=r"took no metrics for 0 s: it .*; undelivered metrics are kept in") as raised:
            run.metrics.flush()
        assert "\n" not in str(raised.value)
        run.close()


def test_a_server_that_refuses_for_a_while_gets_every_metric(folder):
    with answering(403, "who are you") as server:
        run = step_run(server.url)
        run.metrics.keep_in(folder)
        log(run, [0])
        server.asked.acquire()
        with pytest.raises(
            UserError,
            match=r"MLflow refuses metrics: it answers HTTP 403 .*who are you.*; undelivered metrics are kept in ram://",
        ):
            run.metrics.flush()
        server.status, server.body = 200, "{}"
        log(run, range(1, POINTS))
        eventually(lambda: sorted(set(server.steps())) == list(range(POINTS)))
        run.close()


def test_storage_that_fails_for_a_while_stops_no_step_that_begins(storage, folder, capsys):
    storage.failure = FAILURES["unavailable"]
    with answering() as server:
        run = step_run(server.url)
        beginning = threading.Thread(target=run.metrics.keep_in, args=(folder,))
        beginning.start()
        for _ in range(3):
            storage.asked.acquire()
        storage.failure = None
        beginning.join()
        assert steps_in(folder) == []
        run.close()
    assert "UnavailableError: HTTP response code 503); waiting for it" in capsys.readouterr().err


def test_storage_that_refuses_a_step_that_begins_is_the_user_s_to_mend(storage, folder):
    storage.failure = FAILURES["forbidden"]
    box = outbox.Outbox(lambda points: None, PATIENCE)
    with pytest.raises(UserError, match=rf"{outbox.FILE} cannot be read or written \(HTTP response code 403\)"):
        box.keep_in(folder, "run")
    box.close()


def test_a_folder_is_taken_over_whole_or_not_at_all(folder):
    box = outbox.Outbox(lambda points: None, PATIENCE)
    box.keep_in(folder, "before")
    box.close()

    def killed(run):
        raise KeyboardInterrupt

    box = outbox.Outbox(lambda points: None, PATIENCE)
    with pytest.raises(KeyboardInterrupt):
        box.keep_in(folder, "after", killed)
    box.close()
    blocked = threading.Event()
    box = outbox.Outbox(lambda points: blocked.wait(), PATIENCE)
    assert box.keep_in(folder, "after", lambda run: [(run, 1.0, 2, 3)]) == "before"
    with tf.io.gfile.GFile(f"{folder}/{outbox.FILE}") as file:
        assert json.loads(file.read()) == {"run_id": "after", "metrics": [["before", 1.0, 2, 3]]}
    blocked.set()
    box.close()


@pytest.mark.parametrize("status", [200, 503])
def test_once_the_outbox_has_settled_a_sigkill_loses_nothing(storage, folder, monkeypatch, status):
    """Whichever of the two answers: the server has the points, or the file has."""
    monkeypatch.setattr(outbox, "_SECONDS_BETWEEN_REMOTE_WRITES", 3600.0)
    with answering(status) as server:
        run = step_run(server.url)
        run.metrics.keep_in(folder)
        for first in (0, POINTS):
            log(run, range(first, first + POINTS))
            run.metrics.settle()
            assert sorted({*server.steps(), *steps_in(folder)}) == list(range(first + POINTS))
        run.close()

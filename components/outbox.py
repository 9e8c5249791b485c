"""What stands between a job and a server that may be down: calls that are made again, metrics that wait in a file.

Knows of MLflow only how its errors look.
"""

import json
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from trainer.records import UserError

FILE = "undelivered-metrics.json"

_POINTS_PER_CALL = 500
_SECONDS_BETWEEN_CALLS = 5.0
_SHORTEST_WAIT, _LONGEST_WAIT = 0.5, 10.0
_TRANSIENT = (429, 500, 502, 503, 504)


def is_transient(error: BaseException) -> bool:
    """Returns whether a call that failed so may go through later: no answer, too many calls, a server that is not itself."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ConnectionError | TimeoutError) or type(cause).__module__.startswith("requests."):
            response = getattr(cause, "response", None)
            return response is None or response.status_code in _TRANSIENT
        cause = cause.__cause__ or cause.__context__
    # Of MLflow's exceptions only those of its REST client come from a server; others name an error of this process.
    status = getattr(error, "get_http_status_code", None)
    return type(error).__name__ == "RestException" and status is not None and status() in _TRANSIENT


def patiently(call: Callable[[], Any], patience: float) -> Any:
    """Returns what `call` returns, calling again while it fails in a way that may pass, for `patience` seconds."""
    until = time.monotonic() + patience
    wait, told = _SHORTEST_WAIT, False
    while True:
        try:
            return call()
        except Exception as error:
            if time.monotonic() + wait > until or not is_transient(error):
                raise
        if not told:
            print("MLflow does not answer; waiting for it", file=sys.stderr, flush=True)
            told = True
        time.sleep(wait)
        wait = min(2 * wait, _LONGEST_WAIT)


class PatientClient:
    """A client whose every call is made again while the server does not answer, for `patience` seconds."""

    def __init__(self, client: Any, patience: float) -> None:
        self.impatient = client
        self._patience = patience

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self.impatient, name)
        if not callable(attribute):
            return attribute
        return lambda *args, **named: patiently(lambda: attribute(*args, **named), self._patience)


Point = tuple[str, float, int, int]
"""A metric's name, value, time in milliseconds, and step."""


class Outbox:
    """Metrics on their way to a server: delivered by a thread, kept in a file until then.

    `deliver` sends points, and may fail. What is in the file survives the process. Points that are delivered twice, because
    an answer was lost, are the same points to MLflow.
    """

    def __init__(self, deliver: Callable[[Sequence[Point]], object], patience: float) -> None:
        self._deliver = deliver
        self._patience = patience
        self._waiting: list[Point] = []
        self._file = ""
        self._owner = ""
        self._changed = threading.Condition()
        self._wanted = False
        """Whether someone waits for all to be delivered."""
        self._closing = False
        self._over = False
        """Whether it was given up, since the server refuses."""
        self._failure: Exception | None = None
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def keep_in(self, folder: str, owner: str) -> str:
        """Keeps what waits in `folder` from now on, for the run `owner`, and delivers what is there already.

        Returns the run that the folder was of before, or nothing.
        """
        file = f"{folder}/{FILE}"
        stored = json.loads(_read(file) or "{}")
        with self._changed:
            self._file, self._owner = file, owner
            self._waiting += map(_point, stored.get("metrics", ()))
            self._write()
        return str(stored.get("run_id", ""))

    def put(self, points: Sequence[Point]) -> None:
        """Takes points; when it returns they are in the file, if there is one."""
        with self._changed:
            self._waiting += points
            self._write()

    def flush(self) -> None:
        """Waits until all is delivered. Raises what stands in the way where patience ends or there is no hope."""
        with self._changed:
            self._wanted = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._waiting or self._over, self._patience)
            if self._waiting:
                kept = f"; what it lacks is kept in {self._file}" if self._file else ""
                what = "refuses metrics" if self._over else f"took no metrics for {self._patience:.0f} s"
                raise UserError(f"MLflow {what} ({self._failure}){kept}") from self._failure

    def close(self, finished: bool = False) -> None:
        """Tries once more to deliver what waits, and ends the thread; what could not be delivered stays in the file.

        Where the job is `finished` and nothing is left, the file goes.
        """
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join()
        if finished and self._file and not self._waiting:
            _remove(self._file)

    def _work(self) -> None:
        wait = _SECONDS_BETWEEN_CALLS
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._wanted or self._closing, wait)
                batch, closing = self._waiting[:_POINTS_PER_CALL], self._closing
            try:
                if batch:
                    self._deliver(batch)
            except Exception as error:
                with self._changed:
                    self._failure = error
                    if closing or not is_transient(error):
                        self._over = True
                        self._changed.notify_all()
                        return
                    wait = min(2 * wait, _LONGEST_WAIT)
                    self._changed.wait_for(lambda: self._closing, wait)
                continue
            wait = _SECONDS_BETWEEN_CALLS
            with self._changed:
                if batch:
                    del self._waiting[: len(batch)]
                    self._write()
                if not self._waiting:
                    self._wanted = False
                    self._changed.notify_all()
                    if self._closing:
                        return

    def _write(self) -> None:
        if self._file:
            _write_whole(self._file, json.dumps({"run_id": self._owner, "metrics": self._waiting}))


def _point(stored: list[Any]) -> Point:
    name, value, timestamp, step = stored
    return str(name), float(value), int(timestamp), int(step)


# Files by path, local or gs:// alike. TensorFlow knows both, and a job that keeps a file has loaded it.


def _read(file: str) -> str:
    import tensorflow as tf

    if not tf.io.gfile.exists(file):
        return ""
    with tf.io.gfile.GFile(file) as opened:
        return str(opened.read())


def _write_whole(file: str, text: str) -> None:
    import tensorflow as tf

    from trainer.checkpoint import write_whole

    tf.io.gfile.makedirs(file.rpartition("/")[0])
    write_whole(file, text.encode())


def _remove(file: str) -> None:
    import tensorflow as tf

    tf.io.gfile.remove(file)

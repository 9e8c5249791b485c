"""Keeps metrics in a file until MLflow has received them."""

import json
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from components.patience import (
    LONGEST_WAIT,
    SHORTEST_WAIT,
    UnansweredError,
    answer,
    is_transient,
    one_line,
    patiently,
    say,
)
from trainer.shared.errors import UserError

FILE = "undelivered-metrics.json"

_POINTS_PER_CALL = 500
_SECONDS_BETWEEN_CALLS = 5.0
_SECONDS_BETWEEN_REMOTE_WRITES = 10.0
"""Writing a file in Cloud Storage takes at least two requests."""
_SECONDS_BETWEEN_LOCAL_WRITES = 0.2
_SECONDS_TO_CLOSE = 60.0
_SECONDS_TO_SETTLE = 60.0

T = TypeVar("T")

Point = tuple[str, float, int, int]
"""A metric's name, value, timestamp in milliseconds, and step."""


class Outbox:
    """Queues metrics for a server. One thread delivers them, another writes the undelivered ones to a file.

    Both `deliver`, which sends points, and the storage of the file may fail or hang. Neither ends a thread, and `put` waits for
    neither. `put` reaches the file within 10 s on remote storage and 0.2 s on a local disk, plus the time of two writes. As long
    as storage accepts the file, a SIGKILL loses no undelivered point that is older than that, and after `settle` it loses none.
    If an answer is lost, points are delivered twice; MLflow stores them once.
    """

    def __init__(self, deliver: Callable[[Sequence[Point]], object], patience: float) -> None:
        self._deliver = deliver
        self._patience = patience
        self._changed = threading.Condition()
        """Guards all attributes below. No thread holds it while it waits for the server or for storage."""
        self._waiting: list[Point] = []
        """Undelivered points, oldest first."""
        self.taken_over: Sequence[Point] = ()
        """Points of earlier attempts that `keep_in` found and queued."""
        self._file, self._owner = "", ""
        self._stored: Sequence[Point] = ()
        """The points in the file."""
        self._file_is_old = False
        self._flushing = False
        self._write_now = False
        self._try_now = False
        """Whether `flush` was called after the last attempt to deliver."""
        self._refused = False
        """Whether the last attempt to deliver failed permanently, so that a retry will not help."""
        self._failure: Exception | None = None
        """Why the last attempt to deliver failed."""
        self._write_failure: Exception | None = None
        self._closing, self._finished, self._closed = False, False, False
        self._removed = False
        self._delivering, self._writing = True, True
        """Whether the threads are still working."""
        for work in (self._deliver_until_closed, self._write_until_closed):
            threading.Thread(target=work, daemon=True).start()

    def keep_in(
        self, folder: str, owner: str, inherit: Callable[[str], Sequence[Point]] = lambda run: (), finished_by: str = ""
    ) -> str:
        """Keeps the undelivered points of the run `owner` in `folder` from now on, and delivers the points found there.

        If the folder belonged to another run, as its file says, or else to the run `finished_by`, `inherit` gets the ID of that
        run and returns the points that `owner` takes over. The write that stores these points also makes `owner` the folder's
        owner. Waits for storage up to `patience`. Returns the previous owner, or "" if there was none. Raises UserError if the
        file cannot be read or written.
        """
        file = f"{folder}/{FILE}"
        stored = json.loads(self._from_storage(file, lambda: _read(file)) or "{}")
        before = str(stored.get("run_id") or finished_by)
        earlier = [_point(one) for one in stored.get("metrics", ())]
        earlier += inherit(before) if before and before != owner else ()
        with self._changed:
            points = [*self._waiting, *earlier]
        self._from_storage(file, lambda: _make_folder(folder))
        self._from_storage(file, lambda: _write_whole(file, _as_text(owner, points)))
        with self._changed:
            self._file, self._owner, self._stored, self.taken_over = file, owner, points, earlier
            self._waiting += earlier
            self._file_is_old = True
            self._changed.notify_all()
        return before

    def put(self, points: Sequence[Point]) -> None:
        """Queues points without waiting."""
        with self._changed:
            self._waiting += points
            self._file_is_old = True
            self._changed.notify_all()

    def settle(self) -> None:
        """Waits, at most 60 s, until every point is delivered or in the file, so that a SIGKILL loses none."""
        until = time.monotonic() + _SECONDS_TO_SETTLE
        with self._changed:
            self._flushing = self._try_now = True
            self._failure = None
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._waiting or self._failure, _SECONDS_BETWEEN_CALLS)
            if self._waiting and self._file:
                self._write_now = True
                self._changed.notify_all()
                self._changed.wait_for(lambda: set(self._waiting) <= set(self._stored), until - time.monotonic())

    def flush(self) -> None:
        """Waits up to `patience` until all points are delivered. Raises UserError at once if the server refuses them."""
        until = time.monotonic() + self._patience
        with self._changed:
            self._flushing = self._try_now = True
            self._failure, self._refused = None, False
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._waiting or self._failure, self._patience)
            if self._waiting and self._failure and not self._refused:
                say(f"MLflow {answer(self._failure)}; waiting for it")
            self._changed.wait_for(lambda: not self._waiting or self._refused, until - time.monotonic())
            if self._waiting:
                kept = f"; undelivered metrics are kept in {self._file}" if self._file else ""
                what = "refuses metrics" if self._refused else f"took no metrics for {self._patience:.0f} s"
                said = answer(self._failure) if self._failure else "does not answer"
                kind = UserError if self._refused else UnansweredError
                raise kind(f"MLflow {what}: it {said}{kept}") from self._failure

    def abandon(self) -> None:
        """Forgets all points and the file, because another process has taken them over and will deliver them."""
        with self._changed:
            self._waiting.clear()
            self._file = ""
            self._changed.notify_all()

    def close(self, finished: bool = False) -> None:
        """Tries once more to deliver, writes the remaining points to the file, and ends both threads. Takes 60 s at most.

        If the job is `finished` and all points are delivered, removes the file. If neither the server nor storage took some
        points, prints a warning with their number on stderr.
        """
        with self._changed:
            self._closing, self._finished = True, finished
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._delivering and not self._writing, _SECONDS_TO_CLOSE)
            self._closed = True
            self._changed.notify_all()
            stored = set(self._stored)
            lost = [point for point in self._waiting if point not in stored]
            left_over = finished and self._file and not self._waiting and not self._removed
            reason = _reason(self._write_failure) if self._write_failure else "storage does not answer"
            said = answer(self._failure) if self._failure else "does not answer"
        if lost:
            kept = f"{self._file} cannot be written ({reason})" if self._file else "no file keeps them"
            say(f"warning: {len(lost)} metric values are lost: MLflow {said}, and {kept}")
        elif left_over:
            say(f"warning: {self._file} cannot be removed ({reason}): remove it, or the same work starts in this folder again")

    def _from_storage(self, file: str, call: Callable[[], T]) -> T:
        try:
            return patiently(call, self._patience, f"the storage of {file}")
        except UnansweredError:
            raise
        except Exception as error:
            raise UserError(f"{file} cannot be read or written ({_reason(error)}): fix that and start again") from error

    def _deliver_until_closed(self) -> None:
        pause = _SECONDS_BETWEEN_CALLS
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._flushing or self._closing, pause)
                if self._closed:
                    return
                self._try_now = False
                batch, closing = self._waiting[:_POINTS_PER_CALL], self._closing
            failure = None
            try:
                if batch:
                    self._deliver(batch)
            except Exception as error:
                failure = error
            with self._changed:
                self._failure, self._refused = failure, failure is not None and not is_transient(failure)
                if failure is None and batch and self._waiting[: len(batch)] == batch:
                    del self._waiting[: len(batch)]
                    self._file_is_old = True
                self._flushing = self._flushing and bool(self._waiting)
                if closing and (failure or not self._waiting):
                    self._delivering = False
                    self._changed.notify_all()
                    return
                self._changed.notify_all()
                if failure:
                    pause = min(2 * pause, LONGEST_WAIT)
                    self._changed.wait_for(lambda: self._try_now or self._closing, pause)
                else:
                    pause = _SECONDS_BETWEEN_CALLS

    def _write_until_closed(self) -> None:
        pause = 0.0
        while not self._closing:
            with self._changed:
                self._changed.wait_for(lambda: self._closing or self._write_now, pause)
                self._changed.wait_for(lambda: self._closing or (self._file and self._file_is_old))
                self._write_now = False
            self._write()
            between = _SECONDS_BETWEEN_REMOTE_WRITES if "://" in self._file else _SECONDS_BETWEEN_LOCAL_WRITES
            pause = LONGEST_WAIT if self._write_failure else between
        # Writes at once, because the machine may be about to disappear, and again once the deliveries have ended.
        self._write()
        with self._changed:
            self._changed.wait_for(lambda: not self._delivering or self._closed)
        pause = SHORTEST_WAIT
        while not self._closed:
            self._write()
            if self._write_failure is None or not is_transient(self._write_failure):
                break
            with self._changed:
                self._changed.wait_for(lambda: self._closed, pause)
            pause = min(2 * pause, LONGEST_WAIT)
        with self._changed:
            self._writing = False
            self._changed.notify_all()

    def _write(self) -> None:
        """Writes the undelivered points to the file, or removes the file if it is no longer needed."""
        with self._changed:
            file, owner, points = self._file, self._owner, self._waiting.copy()
            remove = self._finished and not self._delivering and not points
            self._file_is_old = False
        if not file or (self._stored == points and not remove):
            return
        failure = None
        try:
            if remove:
                _remove(file)
            else:
                _write_whole(file, _as_text(owner, points))
        except Exception as error:
            failure = error
            if self._write_failure is None and not self._closing:
                say(f"warning: {file} cannot be written ({_reason(error)}); undelivered metrics are in memory only")
        with self._changed:
            self._write_failure = failure
            if failure is None:
                self._stored, self._removed = points, remove
            else:
                self._file_is_old = True
            self._changed.notify_all()


def _point(stored: list[Any]) -> Point:
    name, value, timestamp, step = stored
    return str(name), float(value), int(timestamp), int(step)


def _reason(error: Exception) -> str:
    # `write_whole` adds the path and advice to the system's own message, which is the cause.
    return one_line(error.__cause__ or error)


def _as_text(owner: str, points: Sequence[Point]) -> str:
    return json.dumps({"run_id": owner, "metrics": points})


# Files by path, local or gs://. TensorFlow handles both, and every job that keeps a file has loaded TensorFlow already.


def _read(file: str) -> str:
    import tensorflow as tf

    if not tf.io.gfile.exists(file):
        return ""
    with tf.io.gfile.GFile(file) as opened:
        return str(opened.read())


def _make_folder(folder: str) -> None:
    import tensorflow as tf

    tf.io.gfile.makedirs(folder)


def _write_whole(file: str, text: str) -> None:
    from trainer.shared.files import write_whole

    write_whole(file, text.encode())


def _remove(file: str) -> None:
    import tensorflow as tf

    tf.io.gfile.remove(file)

"""Shows in MLflow the phase that a running step is in, as a tag of its run."""

import threading
from collections.abc import Callable
from contextlib import suppress

from mlflow.exceptions import MlflowException

from components.tracking import names
from components.tracking.store import Store, impatient
from trainer.shared.progress import OnProgress

_SECONDS_TO_LAST = 5.0
"""A phase that is over sooner is not shown."""


class Phase:
    """The tag of one run. A thread of its own sets it, so the step never waits for the server. A failure is not repeated."""

    def __init__(self, store: Store, run_id: str, seconds_to_last: float = _SECONDS_TO_LAST) -> None:
        self._store, self._run_id, self._seconds_to_last = store, run_id, seconds_to_last
        self._changed = threading.Condition()
        """Guards the attributes below."""
        self._now, self._told, self._closed, self._finished = "", "", False, False
        self.thread: threading.Thread | None = None
        """Sets the tag, from the first phase on."""

    def of(self, on_progress: OnProgress) -> OnProgress:
        """Returns a callable that shows what it is told in both places."""

        def both(phase: str, done: int = 0, total: int = 0, text: str = "") -> None:
            on_progress(phase, done, total, text)
            self._enter(phase)

        return both

    def close(self, finished: bool) -> None:
        """Removes the tag of a finished run. A run that failed keeps the phase that it failed in."""
        with self._changed:
            self._closed, self._finished = True, finished
            self._changed.notify_all()
            told = self._told
        if finished and told:
            self._remove()

    def _remove(self) -> None:
        with suppress(MlflowException):
            self._store.client.delete_tag(self._run_id, names.PHASE)

    def _enter(self, phase: str) -> None:
        with self._changed:
            if not self.thread:
                self.thread = threading.Thread(target=self._tell_until_closed, daemon=True)
                self.thread.start()
            self._now = phase
            self._changed.notify_all()

    def _tell_until_closed(self) -> None:
        client = impatient(self._store).client
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._now != self._told)
                lasting = self._now
                if self._changed.wait_for(self._left(lasting), self._seconds_to_last):
                    if self._closed:
                        return
                    continue
                self._told = lasting
            with suppress(Exception):
                client.set_tag(self._run_id, names.PHASE, lasting)
            with self._changed:
                late = self._finished
            if late:  # the run finished while the server took the tag
                self._remove()

    def _left(self, phase: str) -> Callable[[], bool]:
        return lambda: self._closed or self._now != phase

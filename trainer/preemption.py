"""Preemption: a machine sends SIGTERM before it is taken away. A run then saves its state and exits."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

EXIT_CODE = 75
"""Exit status of a preempted run: "temporary failure, try again" (EX_TEMPFAIL of sysexits.h)."""


class PreemptedError(Exception):
    """The run was asked to stop and saved its state. It resumes from there when it is started again."""


@contextmanager
def sigterm_noted() -> Iterator[Callable[[], bool]]:
    """Keeps SIGTERM from ending the process, and yields a callable that tells whether it arrived. For the main thread only."""
    arrived = threading.Event()
    before = signal.signal(signal.SIGTERM, lambda number, frame: arrived.set())
    try:
        yield arrived.is_set
    finally:
        signal.signal(signal.SIGTERM, before)

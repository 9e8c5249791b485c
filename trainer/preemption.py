"""Preemption: a machine that is about to be taken away says so by SIGTERM, and a run that was told leaves its state behind."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

EXIT_CODE = 75
"""What a preempted run's process exits with: "temporary failure, try again" (EX_TEMPFAIL of sysexits.h)."""


class PreemptedError(Exception):
    """The run was asked to stop, saved its state, and goes on from there when it is started again."""


@contextmanager
def sigterm_noted() -> Iterator[Callable[[], bool]]:
    """Within it, SIGTERM does not end the process; the callable given says whether it came. For the main thread only."""
    came = threading.Event()
    before = signal.signal(signal.SIGTERM, lambda number, frame: came.set())
    try:
        yield came.is_set
    finally:
        signal.signal(signal.SIGTERM, before)

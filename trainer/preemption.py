"""Preemption: a machine that is taken away sends SIGTERM, a closed terminal SIGHUP. A run then saves its state and exits."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from trainer.shared.processes import endings

EXIT_CODE = 75
"""Exit status of a preempted run: "temporary failure, try again" (EX_TEMPFAIL of sysexits.h)."""


class PreemptedError(Exception):
    """The run was asked to stop and saved its state. It resumes from there when it is started again."""


@contextmanager
def ending_noted() -> Iterator[Callable[[], bool]]:
    """Keeps SIGTERM and SIGHUP from ending the process, and yields a callable that tells whether one arrived.

    For the main thread only. A SIGHUP that is ignored, as under nohup, stays ignored.
    """
    arrived = threading.Event()
    before = {number: signal.signal(number, lambda number, frame: arrived.set()) for number in endings()}
    try:
        yield arrived.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

"""Preemption: a machine that is taken away sends SIGTERM, a closed terminal SIGHUP. A run then saves its state and exits."""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from trainer.shared.processes import endings

EXIT_CODE = 75
"""Exit status of a preempted run: "temporary failure, try again" (EX_TEMPFAIL of sysexits.h)."""


class PreemptedError(BaseException):
    """The run was asked to stop and saved its state. It resumes from there when it is started again.

    Like KeyboardInterrupt, this is no `Exception`: nothing failed.
    """


@contextmanager
def exits_if_preempted() -> Iterator[None]:
    """Prints a PreemptedError of the block on stderr, and ends the process at once with `EXIT_CODE`.

    Nothing is left to do, and a preempted machine gives half a minute. The interpreter's own end waits for every thread of the
    input pipeline, which may wait for slow storage, and then collects all of TensorFlow's objects as garbage, several times.
    """
    try:
        yield
    except PreemptedError as preempted:
        print(f"preempted: {preempted}", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(EXIT_CODE)


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

"""Makes SIGTERM end a conversion like Ctrl-C, within a time limit."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

EXIT_CODE = 128 + signal.SIGTERM
_SECONDS_TO_END = 25.0
"""Seconds from SIGTERM to the end of the process. Clusters send SIGKILL half a minute after SIGTERM."""


@contextmanager
def ends_on_sigterm() -> Iterator[None]:
    """While the block runs, SIGTERM raises SystemExit with `EXIT_CODE` and ends the process within `_SECONDS_TO_END`.

    The time limit is needed because a thread that writes a shard or waits for a service keeps Python from ending. Has no
    effect outside the main thread, the only one that a signal can interrupt.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        at_last = threading.Timer(_SECONDS_TO_END, os._exit, (EXIT_CODE,))
        at_last.daemon = True
        at_last.start()
        print("terminated; the same conversion goes on from the shards that are finished", file=sys.stderr, flush=True)
        raise SystemExit(EXIT_CODE)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGTERM) is end:
            signal.signal(signal.SIGTERM, before)

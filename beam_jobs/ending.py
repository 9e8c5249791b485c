"""Makes SIGTERM and SIGHUP end a conversion like Ctrl-C, within a time limit."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from trainer.shared.processes import endings

_SECONDS_TO_END = 25.0
"""Seconds from the signal to the end of the process. Clusters send SIGKILL half a minute after SIGTERM."""


@contextmanager
def ends_when_asked() -> Iterator[None]:
    """While the block runs, SIGTERM and SIGHUP raise SystemExit with 128 + SIGNAL and end the process within `_SECONDS_TO_END`.

    The time limit is needed because a thread that writes a shard or waits for a service keeps Python from ending. Has no
    effect outside the main thread, the only one that a signal can interrupt.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: FrameType | None) -> None:
        for one in before:
            signal.signal(one, signal.SIG_IGN)
        at_last = threading.Timer(_SECONDS_TO_END, os._exit, (128 + number,))
        at_last.daemon = True
        at_last.start()
        with suppress(OSError):  # a closed terminal takes no more lines
            print("terminated; the same conversion goes on from the shards that are finished", file=sys.stderr, flush=True)
        raise SystemExit(128 + number)

    before = {number: signal.getsignal(number) for number in endings()}
    for number in before:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number, handler in before.items():
            if signal.getsignal(number) is end:
                signal.signal(number, handler)

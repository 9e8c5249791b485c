"""SIGTERM ends a conversion as Ctrl-C does, and soon."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

EXIT_CODE = 128 + signal.SIGTERM
_SECONDS_TO_END = 25.0
"""From SIGTERM on. Whoever sends it kills what is there half a minute later."""


@contextmanager
def ends_on_sigterm() -> Iterator[None]:
    """Within it, SIGTERM raises SystemExit with `EXIT_CODE`, and the process ends within `_SECONDS_TO_END` whatever it waits for.

    What a thread does at that time may keep Python from ending: a shard that is written, a service that does not answer. Only
    the main thread can be interrupted so; elsewhere SIGTERM does what it did.
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

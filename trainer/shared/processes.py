"""Ending: a process that ends with its parent, and the signals that ask a process to end."""

import os
import signal
import threading
import time
from collections.abc import Callable

_SECONDS_BETWEEN_LOOKS = 0.2


def endings() -> list[signal.Signals]:
    """Returns the signals that ask this process to end: SIGTERM, and SIGHUP of a closed terminal unless nohup ignores it."""
    hangs_up = signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN
    return [signal.SIGTERM, *([signal.SIGHUP] if hangs_up else [])]


def end_with(parent: int, end: Callable[[], object]) -> None:
    """Calls `end` from a thread shortly after the process `parent`, which started this one, is dead, even by SIGKILL."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_SECONDS_BETWEEN_LOOKS)
        end()

    threading.Thread(target=watch, daemon=True).start()

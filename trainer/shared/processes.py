"""Ending: a process that ends with its parent or with its work, and the signals that ask a process to end."""

import atexit
import os
import signal
import sys
import threading
import time
from collections.abc import Callable

_SECONDS_BETWEEN_LOOKS = 0.2


def endings() -> list[signal.Signals]:
    """Returns the signals that ask this process to end: SIGTERM, and SIGHUP of a closed terminal unless nohup ignores it."""
    hangs_up = signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN
    return [signal.SIGTERM, *([signal.SIGHUP] if hangs_up else [])]


def end_with_its_work(main: Callable[[], object]) -> None:
    """Calls `main`, and ends the process with the same exit code as ever as soon as all exit handlers ran.

    The interpreter would then take apart what threads of TensorFlow may still use, and a process can die by SIGABRT although its
    work is done. For the main module, before it loads anything that registers an exit handler, since those must run first.
    """
    code, process = 1, os.getpid()

    def end() -> None:
        if os.getpid() != process:
            return  # a fork inherits the exit handlers, and ends with a code of its own
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

    atexit.register(end)
    try:
        main()
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        raise


def end_with(parent: int, end: Callable[[], object]) -> None:
    """Calls `end` from a thread shortly after the process `parent`, which started this one, is dead, even by SIGKILL."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_SECONDS_BETWEEN_LOOKS)
        end()

    threading.Thread(target=watch, daemon=True).start()

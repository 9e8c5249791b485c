"""Keeps two evaluations on this machine from computing the same features at the same time."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from trainer.preemption import PreemptedError
from trainer.shared.files import is_local
from trainer.shared.locks import locked

LOCK = ".lock"
"""File in a shared folder of features. A process that writes to the folder holds a lock on it."""


@contextmanager
def alone(folder: str, should_stop: Callable[[], bool]) -> Iterator[None]:
    """Keeps other processes out of a local folder of features while the block runs. Waits until they have left it.

    Raises PreemptedError soon after `should_stop()` returns True. Does nothing for a remote folder.
    """
    if not is_local(folder):
        yield
        return
    said = False

    def on_wait() -> None:
        nonlocal said
        if not said:
            print(f"[linear-eval] another process computes the features in {folder}: waiting for it", file=sys.stderr, flush=True)
        said = True
        if should_stop():
            raise PreemptedError("stopped while another process computes the features: start the same command again to continue")

    with locked(f"{folder}/{LOCK}", on_wait=on_wait):
        yield

"""Work of one Beam worker in several processes or threads at the same time."""

import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import apache_beam as beam


@dataclass(frozen=True)
class Writers:
    """How many files one worker writes at the same time. One is enough for a runner that has many workers."""

    processes: int = 1
    threads: int = 1
    """Threads in the worker's own process. Used only if `processes` is 1."""


def local_writers(processes: int) -> Writers:
    """Returns writers that use all of this machine. Threads suffice: hashing, reading and writing release Python's lock."""
    return Writers(processes, min(os.cpu_count() or 1, 8))


class Pooled(beam.DoFn):
    """A step whose calls run as many at the same time as there are writers. A bundle ends when all its calls are done."""

    def __init__(self, writers: Writers) -> None:
        self.writers = writers
        self._pool: Executor | None = None
        self._pending: list[Future] = []

    def setup(self) -> None:
        if self.writers.processes > 1:
            # Forked processes start at once and share memory. Forking is safe on Linux only.
            context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
            self._pool = ProcessPoolExecutor(self.writers.processes, context, _end_with, (os.getpid(),))
        elif self.writers.threads > 1:
            self._pool = ThreadPoolExecutor(self.writers.threads)

    def call(self, function: Callable[..., Any], *arguments: Any) -> None:
        """Calls `function`, at once or later."""
        if self._pool:
            self._pending.append(self._pool.submit(function, *arguments))
        else:
            self.called(function(*arguments))

    def called(self, result: Any) -> None:
        """Takes the result of a call."""

    def finish_bundle(self) -> None:
        pending, self._pending = self._pending, []
        try:
            for one in pending:
                self.called(one.result())
        finally:  # after a failure or an interrupt, cancel the calls that have not begun
            for one in pending:
                one.cancel()

    def teardown(self) -> None:
        if self._pool:
            self._pool.shutdown(cancel_futures=True)


def _end_with(parent: int) -> None:
    """Exits this process shortly after `parent` dies, even by SIGKILL."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()

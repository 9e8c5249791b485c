"""Work of one Beam worker in several processes or threads at the same time."""

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import apache_beam as beam

from trainer.shared.processes import end_with


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
            self._pool = ProcessPoolExecutor(self.writers.processes, context, _begin_worker, (os.getpid(),))
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


def _begin_worker(parent: int) -> None:
    """Prepares a worker process: it ends with `parent`, which alone answers what a terminal sends to both."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    end_with(parent, lambda: os._exit(1))

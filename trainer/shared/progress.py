"""Progress of long jobs on stderr: bars on a terminal, plain lines elsewhere.

A job is given an `OnProgress`. It calls it with the phase that it is in, how much of the phase is done, how much there is in all,
and a text. A phase is named for what the user waits for ("hashing shards, MB") and counts what takes the time. It begins with the
first call that names it and ends when the job names another. A phase that cannot be counted has a total of 0. Work that may take
over five seconds has a phase of its own, which the job names before the work begins.

    on_progress("listing raw files")
    on_progress("training", step, steps, "loss -1.432")

Plain lines of job pretrain are `[pretrain] listing raw files ...` and `[pretrain] training: 120/640 loss -1.432, 0:31 left`. A
program that runs a job in another process parses such lines with `parse_line` and draws the bar itself. A note is a line
`[pretrain] running on 8 x TPU v5e`.
"""

import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import Protocol, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

SECONDS_BETWEEN_LINES = 30.0
"""At most so long a job that works says nothing where there is no terminal."""
_LINE = re.compile(
    r"\[(?P<job>[\w-]+)\] (?P<phase>[^:\[\]]+?)"
    r"(?:: (?P<done>\d+)/(?P<total>\d+)(?: (?P<text>.*?))?(?:,? ?[\d:]+ left)?| \.\.\.(?: (?P<said>.*?))?(?:,? ?[\d:]+ so far)?)$"
)


class OnProgress(Protocol):
    def __call__(self, phase: str, done: int = 0, total: int = 0, text: str = "") -> None: ...


def silent(phase: str, done: int = 0, total: int = 0, text: str = "") -> None:
    """Shows nothing."""


@dataclass
class _Phase:
    """A phase of a job as it was last reported."""

    job: str
    name: str
    done: int
    total: int
    text: str
    first: int = field(init=False)
    """What was done when this process came to the phase. The time left counts what came after it."""
    begun: float = field(init=False)
    counted: float = field(init=False)
    """When `done` last grew."""

    def __post_init__(self) -> None:
        self.first, self.begun = self.done, time.monotonic()
        self.counted = self.begun

    def update(self, done: int, total: int, text: str) -> None:
        if done != self.done:
            self.counted = time.monotonic()
        self.done, self.total, self.text = done, total, text

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.begun

    @property
    def is_over(self) -> bool:
        return self.done == self.total > 0

    @property
    def left(self) -> str:
        """How long the rest takes at the rate of this process, as `0:31 left`; empty where that is not known.

        It falls while the count stands still, until the time is up.
        """
        if not self.first < self.done < self.total:
            return ""
        rest = (self.counted - self.begun) * (self.total - self.done) / (self.done - self.first)
        left = rest - (time.monotonic() - self.counted)
        return f"{_clock(left)} left" if left >= 0 else ""

    def line(self, waited: bool = False) -> str:
        if self.total:
            return f"[{self.job}] {self.name}: {self.done}/{self.total} {_listed(self.text, self.left)}".rstrip()
        return f"[{self.job}] {self.name} ... {_listed(self.text, f'{_clock(self.seconds)} so far' if waited else '')}".rstrip()


class ProgressBars:
    """Shows the progress of jobs, one after the other. Call it with (job, phase, done, total, text).

    Without a terminal a line appears as a phase begins, as it ends, and every `seconds_between_lines` while it lasts.
    """

    def __init__(self, seconds_between_lines: float = SECONDS_BETWEEN_LINES) -> None:
        console = Console(stderr=True)
        self._bars = (
            Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.fields[count]}"),
                TimeElapsedColumn(),
                TextColumn("{task.fields[left]}"),
                TextColumn("{task.fields[text]}"),
                console=console,
            )
            if console.is_terminal
            else None
        )
        self._between = seconds_between_lines
        self._tasks: dict[str, TaskID] = {}
        """Job -> ID of its bar."""
        self._now: _Phase | None = None
        self._last_line = 0.0
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._repeating = threading.Thread(target=self._repeat, daemon=True)

    def __enter__(self) -> Self:
        if self._bars:
            self._bars.start()
        else:
            self._repeating.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._ended.set()
        if self._bars:
            self._bars.stop()
        else:
            self._repeating.join()

    def __call__(self, job: str, phase: str, done: int = 0, total: int = 0, text: str = "") -> None:
        with self._lock:
            now = self._now
            new = now is None or (now.job, now.name) != (job, phase)
            if now is None or new:
                now = self._now = _Phase(job, phase, done, total, text)
            now.update(done, total, text)
            if self._bars:
                self._draw(self._bars, now, new)
            elif new or now.is_over or time.monotonic() - self._last_line >= self._between:
                self._print(now.line())

    def of(self, job: str) -> OnProgress:
        """Returns the callable that is given to `job`."""

        def on_progress(phase: str, done: int = 0, total: int = 0, text: str = "") -> None:
            self(job, phase, done, total, text)

        return on_progress

    def note(self, job: str, text: str) -> None:
        """Prints a permanent line about `job` above the bars."""
        print(f"[{job}] {text}", file=sys.stderr, flush=True)

    def _draw(self, bars: Progress, now: _Phase, new: bool) -> None:
        if now.job not in self._tasks:
            self._tasks[now.job] = bars.add_task(now.job, total=None, text="", count="", left="")
        number = self._tasks[now.job]
        if new:
            bars.reset(number, total=None)
        bars.update(
            number,
            description=f"{now.job}: {now.name}",
            completed=now.done,
            total=now.total or None,
            count=f"{now.done}/{now.total}" if now.total else "",
            left=now.left,
            text=now.text,
        )

    def _repeat(self) -> None:
        """Says of a phase that nothing is reported of that it lasts."""
        while not self._ended.wait(min(1.0, self._between)):
            with self._lock:
                if self._now and not self._now.is_over and time.monotonic() - self._last_line >= self._between:
                    # Nobody may read any longer. The job's own next line says so where it can be handled.
                    with suppress(BrokenPipeError):
                        self._print(self._now.line(waited=True))

    def _print(self, line: str) -> None:
        self._last_line = time.monotonic()
        print(line, file=sys.stderr, flush=True)


@contextmanager
def followed(
    on_progress: OnProgress, phase: str, count: Callable[[], int], total: int, seconds: float = 1.0, text: str = ""
) -> Iterator[None]:
    """Reports a phase while the block runs, whose work is done elsewhere. `count()` says how much is done, every `seconds`."""
    done = min(count(), total)

    def report() -> None:
        nonlocal done
        done = max(done, min(count(), total - 1))
        on_progress(phase, done, total, text)

    on_progress(phase, done, total, text)
    with polled(report, seconds):
        yield
    on_progress(phase, total, total, text)


def of_batches(on_progress: OnProgress, what: str, total: int) -> Callable[[int], None]:
    """Returns what a loop over batches calls with the number of finished images, before the first batch and after each.

    The first batch is a phase of its own, since the loop compiles its step for it and starts its readers. The time left of the
    other batches does not count it.
    """
    begun = False

    def on_images(done: int) -> None:
        nonlocal begun
        if begun or done == total:
            on_progress(f"{what}, images", done, total)
        else:
            on_progress(f"{what}, first batch")
        begun = True

    return on_images


@contextmanager
def polled(report: Callable[[], None], seconds: float = 1.0) -> Iterator[None]:
    """Calls `report()` every `seconds` while the block runs, in another thread."""
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(seconds):
            report()

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()


def parse_line(line: str) -> tuple[str, str, int, int, str] | None:
    """Parses a plain progress line into (job, phase, done, total, text), without the times. Returns None for any other line."""
    match = _LINE.match(line.rstrip())
    if match is None:
        return None
    return match["job"], match["phase"], int(match["done"] or 0), int(match["total"] or 0), match["text"] or match["said"] or ""


def _listed(*parts: str) -> str:
    return ", ".join(filter(None, parts))


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"

"""Progress of long jobs on stderr: bars on a terminal, plain lines elsewhere.

A plain line is `[pretrain] 120/640 loss -1.432, 0:31 left`. A program that runs a job in another process parses such lines with
`parse_line` and draws the bar itself. A note is a line `[pretrain] running on 8 x TPU v5e`.
"""

import re
import sys
import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

_LINE = re.compile(r"\[(?P<job>[\w-]+)\] (?P<done>\d+)/(?P<total>\d+)(?: (?P<text>.*?))?(?:,? ?[\d:]+ left)?$")
_SECONDS_BETWEEN_LINES = 5.0


class ProgressBars:
    """Shows the progress of jobs. Call it with (job, done, total, text); a job ends when done == total."""

    def __init__(self) -> None:
        console = Console(stderr=True)
        self._bars = (
            Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.completed:.0f}/{task.total:.0f}"),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[text]}"),
                console=console,
            )
            if console.is_terminal
            else None
        )
        self._tasks: dict[str, tuple[TaskID, float]] = {}
        """Job -> (ID of its bar, start time in seconds)."""
        self._last_line = 0.0

    def __enter__(self) -> Self:
        if self._bars:
            self._bars.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bars:
            self._bars.stop()

    def __call__(self, job: str, done: int, total: int, text: str = "") -> None:
        now = time.monotonic()
        new = job not in self._tasks
        if new:
            self._tasks[job] = (self._bars.add_task(job, total=total, text="") if self._bars else TaskID(0), now)
        number, begun = self._tasks[job]
        if self._bars:
            self._bars.update(number, completed=done, total=total, text=text)
        elif new or done == total or now - self._last_line >= _SECONDS_BETWEEN_LINES:
            self._last_line = now
            left = f"{_clock((now - begun) * (total - done) / done)} left" if 0 < done < total else ""
            print(f"[{job}] {done}/{total} {', '.join(filter(None, (text, left)))}".rstrip(), file=sys.stderr, flush=True)

    def note(self, job: str, text: str) -> None:
        """Prints a permanent line about `job` above the bars."""
        print(f"[{job}] {text}", file=sys.stderr, flush=True)


def parse_line(line: str) -> tuple[str, int, int, str] | None:
    """Parses a plain progress line into (job, done, total, text), without the time left. Returns None for any other line."""
    match = _LINE.match(line.rstrip())
    if match is None:
        return None
    return match["job"], int(match["done"]), int(match["total"]), match["text"] or ""


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"

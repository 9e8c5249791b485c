"""All of the pipeline at ImageNet's counts, as somebody who waits for it sees it: what takes how long, and what says nothing.

    python tests/benchmarks/scale.py --folder DIR [--train 1281167] [--validation 50000] [--batch 2048]

Makes the raw archives of small JPEGs, converts them with a SIGTERM on the way, pretrains with a SIGKILL on the way, and evaluates
64 features. At last it spoils a record of the last shard and searches for it. Prints a row for each phase of each command: its
time, the longest time in which its count and text stood still, the longest time in which nothing was said, and how far the time
left was from the truth from a fifth of this process's part of the phase on, as a ratio. Beside it stands the ratio of an estimate
that knew from the beginning how long the phase will take in all. What is left of that one are changes of speed within the phase.
The first row is a loop whose pieces are all the same. Peak memory is the largest process's. Shards are as many as those of the
real images. Takes about 2.5 GB of DIR and removes it at the end.
"""

import argparse
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

if not __package__:  # started by its path
    sys.path.insert(0, str(Path(__file__).parents[1]))

from support.processes import search_path

from benchmarks.conversion_scale import SHARDS, write_raw
from trainer.shared.progress import parse_line

SMALL = ["depth=10", "width_multiplier=0.125", "image_size=16", "warmup_epochs=0", "epochs=1", "log_every_steps=10"]
_LEFT = re.compile(r"(?:(\d+):)?(\d+):(\d+) left$")
_SHORTEST = 5.0
"""Phases that took fewer seconds are one row."""
_FROM = 0.2
"""Fraction of what a process does of a phase, from which on the time left is held against the truth."""
_STEADY = """
from trainer.shared.progress import ProgressBars
with ProgressBars() as bars:
    on_progress = bars.of("steady")
    for piece in range(1501):
        on_progress("pieces of a loop", piece, 1500)
        sum(number * number for number in range(300_000))
"""
_SEARCH = """
import sys
from trainer.shared.progress import ProgressBars
with ProgressBars() as bars:
    on_progress = bars.of("bad-record")
    on_progress("loading TensorFlow")
    from trainer.bad_records import first_bad_record
    from trainer.shared.records import read_manifest
    print(first_bad_record(sys.argv[1], read_manifest(sys.argv[1]), "train", on_progress), file=sys.stderr)
"""


@dataclass(frozen=True)
class Promise:
    """A time left, as it was said."""

    moment: float
    counted: float
    """When the count last moved."""
    done: float
    """Fraction of what the process does of the phase."""
    left: float
    """Seconds."""


@dataclass
class Phase:
    name: str
    begun: float
    ended: float = 0.0
    still: float = 0.0
    """Longest time without another count or text, in seconds."""
    silent: float = 0.0
    """Longest time without a line."""
    promised: list[Promise] = field(default_factory=list)
    first: int = 0
    """What was done when the process came to the phase."""
    count: tuple[int, int, str] = (0, 0, "")
    """What was done, of how much, and the text."""
    counted: float = 0.0
    full: float = 0.0
    """When the count reached its total, which the time left is of. What follows, such as the end of the process, is not."""

    @property
    def seconds(self) -> float:
        return self.ended - self.begun

    @property
    def worst(self) -> float:
        """The largest ratio between what was left and what was said, or the other way round. 1 where nothing was said."""
        return self._largest_ratio(lambda promise: promise.left)

    @property
    def worst_of_known(self) -> float:
        """The same, had each promise been what the phase's mean speed makes of the rest. Only a prophet knows that speed."""
        whole = (self.full or self.ended) - self.begun
        return self._largest_ratio(lambda it: whole * (1 - it.done) - (it.moment - it.counted))

    def _largest_ratio(self, seconds_left: Callable[[Promise], float]) -> float:
        ratios = [1.0]
        for promise in self.promised:
            truth = (self.full or self.ended) - promise.moment
            if promise.done >= _FROM and truth > _SHORTEST:
                # Times are said in whole seconds.
                left = max(seconds_left(promise), 1.0)
                ratios += [truth / left, left / truth]
        return max(ratios)


@dataclass
class Seen:
    """What a command showed."""

    phases: list[Phase]
    seconds: float
    code: int
    peak: int
    """Memory of its largest process, in bytes."""


def watch(command: Sequence[str], end: tuple[str, float, signal.Signals] | None = None) -> Seen:
    """Runs a command and returns what it showed. `end` is a phase, a fraction of it, and the signal that is sent there."""
    begun = last = time.monotonic()
    cut: Phase | None = None
    phases = [Phase("before the first line", begun, counted=begun)]
    environ = {**os.environ, **search_path(Path(__file__).parents[1] / "support" / "often"), "TF_CPP_MIN_LOG_LEVEL": "2"}
    process = subprocess.Popen(
        [sys.executable, *command], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=environ
    )
    for line in process.stderr or ():
        now = time.monotonic()
        phase = phases[-1]
        phase.silent, phase.ended = max(phase.silent, now - last), now
        last = now
        said = parse_line(line)
        if said is None:
            print(f"    {line.rstrip()}")
            continue
        _, name, done, total, text = said
        if name != phase.name:
            phase.still = max(phase.still, now - phase.counted)
            phase = Phase(name, now, ended=now, first=done, count=(done, total, text), counted=now)
            phases.append(phase)
        elif (done, total, text) != phase.count:
            phase.still, phase.counted, phase.count = max(phase.still, now - phase.counted), now, (done, total, text)
        if done == total > 0:
            phase.full = phase.full or now
        if total and (left := _LEFT.search(line.rstrip())):
            hours, minutes, seconds = (int(part or 0) for part in left.groups())
            fraction = (done - phase.first) / (total - phase.first)
            phase.promised.append(Promise(now, phase.counted, fraction, hours * 3600.0 + minutes * 60 + seconds))
        if end and name == end[0] and total and done / total >= end[1]:
            process.send_signal(end[2])
            end = None
            cut = phase
    if cut:  # its time left was that of a whole phase
        cut.promised.clear()
    _, status, used = os.wait4(process.pid, 0)
    now = time.monotonic()
    phases[-1].silent, phases[-1].ended = max(phases[-1].silent, now - last), now
    phases[-1].still = max(phases[-1].still, now - phases[-1].counted)
    return Seen(phases, now - begun, os.waitstatus_to_exitcode(status), used.ru_maxrss * 1024)


def spoil(shard: Path) -> None:
    """Changes a byte of the last record."""
    with shard.open("r+b") as file:
        file.seek(-8, 2)
        (byte,) = file.read(1)
        file.seek(-8, 2)
        file.write(bytes([byte ^ 0xFF]))


def rows(name: str, seen: Seen) -> list[tuple[str, ...]]:
    """Returns the rows of a command: one for itself, and one for each phase of 5 s or more."""
    short = [phase for phase in seen.phases if phase.seconds < _SHORTEST]
    found: list[tuple[str, ...]] = [
        (
            f"**{name}**",
            f"{seen.seconds:.1f}",
            "",
            f"{max(phase.silent for phase in seen.phases):.1f}",
            "",
            "",
            f"{seen.peak / 1e6:,.0f}",
        )
    ]
    for phase in seen.phases:
        if phase not in short:
            ratios = (f"{phase.worst:.2f}", f"{phase.worst_of_known:.2f}") if phase.promised else ("", "")
            found.append((phase.name, f"{phase.seconds:.1f}", f"{phase.still:.1f}", f"{phase.silent:.1f}", *ratios, ""))
    if short:
        total, still, silent = (
            sum(phase.seconds for phase in short),
            max(phase.still for phase in short),
            max(phase.silent for phase in short),
        )
        found.append((f"{len(short)} phases under 5 s", f"{total:.1f}", f"{still:.1f}", f"{silent:.1f}", "", "", ""))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--train", type=int, default=1_281_167)
    parser.add_argument("--validation", type=int, default=50_000)
    parser.add_argument("--batch", type=int, default=2048, help="global batch size")
    args = parser.parse_args()
    table: list[tuple[str, ...]] = [
        ("", "seconds", "stood still", "silent", "time left", "known speed", "peak MB"),
        ("---", "---:", "---:", "---:", "---:", "---:", "---:"),
    ]
    with tempfile.TemporaryDirectory(dir=args.folder) as temporary:
        raw, data, run, out = (Path(temporary, name) for name in ("raw", "data", "run", "out"))
        begun = time.monotonic()
        # In a process of its own: the peak memory of a child begins with this one's.
        writing = multiprocessing.get_context("spawn").Process(target=write_raw, args=(raw, args.train, args.validation))
        writing.start()
        writing.join()
        if writing.exitcode:
            raise SystemExit(f"the raw archives were not made: {writing.exitcode}")
        table.append(("raw archives, made", f"{time.monotonic() - begun:.1f}", "", "", "", "", ""))
        convert = ["-m", "beam_jobs.build_tfrecords", "--raw", str(raw), "--output", str(data), "--allow-other-counts"]
        convert += ["--num-shards", str(SHARDS)]
        pretrain = ["-m", "trainer.task", "--preset", "demo", "--data", str(data), "--checkpoint-dir", str(run)]
        pretrain += [
            "--set",
            *SMALL,
            f"global_batch_size={args.batch}",
            "checkpoint_every_minutes=0.25",
            "data.allow_other_counts=true",
        ]
        evaluate = ["-m", "eval.task", "--data", str(data), "--checkpoint", str(run), "--output", str(out)]
        evaluate += ["--set", "linear_eval.protocols=cached,knn"]
        for name, command, end, codes in (
            ("steady work", ["-c", _STEADY], None, (0,)),
            ("dry run", [*convert, "--dry-run"], None, (0,)),
            ("conversion, SIGTERM at a third", convert, ("writing images", 1 / 3, signal.SIGTERM), (143, -15, 130)),
            ("conversion, gone on with", convert, None, (0,)),
            ("the same conversion again", convert, None, (0,)),
            ("pretraining, SIGKILL at a third", pretrain, ("training", 1 / 3, signal.SIGKILL), (-9,)),
            ("pretraining, SIGTERM at two thirds", pretrain, ("training", 2 / 3, signal.SIGTERM), (75,)),
            ("pretraining, gone on with", pretrain, None, (0,)),
            (
                "inspection, every byte",
                ["-m", "beam_jobs.inspect_dataset", str(data), "--full", "--output", str(out) + ".html"],
                None,
                (0,),
            ),
            ("evaluation", evaluate, None, (0,)),
            ("search for a bad record", ["-c", _SEARCH, str(data)], None, (0,)),
        ):
            if _SEARCH in command:
                spoil(max(data.glob("*-train.tfrecord-*")))
            print(f"{name}: python {' '.join(command)}", flush=True)
            os.sync()  # what was written before must not slow what is measured now
            seen = watch(command, end)
            table += rows(name, seen)
            print("\n".join("| " + " | ".join(row) + " |" for row in rows(name, seen)), flush=True)
            if seen.code not in codes:
                raise SystemExit(f"{name} ended with {seen.code}")
    print("\n".join("| " + " | ".join(row) + " |" for row in table))


if __name__ == "__main__":
    main()

"""The progress of long jobs: what is shown of it, and when."""

import io
import sys
import threading

import pytest

from trainer.shared import progress
from trainer.shared.progress import ProgressBars, followed, of_batches, parse_line


@pytest.fixture
def clock(monkeypatch):
    """The seconds that the program sees; a test moves them on by adding to `clock[0]`."""
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def lines(capsys) -> list[str]:
    return capsys.readouterr().err.splitlines()


def test_each_phase_has_a_line_where_there_is_no_terminal(capsys, clock):
    bars = ProgressBars()
    bars("pretrain", "compiling the step")
    bars("pretrain", "training", 0, 640)
    clock[0] += 60
    bars("pretrain", "training", 120, 640, "loss -1.432")
    assert lines(capsys) == [
        "[pretrain] compiling the step ...",
        "[pretrain] training: 0/640",
        "[pretrain] training: 120/640 loss -1.432, 4:20 left",
    ]


def test_a_phase_says_how_far_it_is_every_30_seconds_and_at_its_end(capsys, clock):
    bars = ProgressBars()
    for done in range(101):
        bars("build-tfrecords", "hashing", done, 100)
        clock[0] += 1
    assert [parse_line(line)[2] for line in lines(capsys)] == [0, 30, 60, 90, 100]


def test_the_time_left_counts_the_work_of_this_process_only(capsys, clock):
    bars = ProgressBars(0)
    bars("pretrain", "training", 500, 1000)  # as after a resume
    clock[0] += 100
    bars("pretrain", "training", 600, 1000)
    assert lines(capsys)[-1] == "[pretrain] training: 600/1000 6:40 left"


def test_the_time_left_counts_the_phase_that_it_is_in(capsys, clock):
    bars = ProgressBars(0)
    bars("linear-eval", "features", 0, 10)
    clock[0] += 1000
    bars("linear-eval", "features", 10, 10)
    bars("linear-eval", "fit", 0, 100)
    clock[0] += 10
    bars("linear-eval", "fit", 50, 100)
    assert lines(capsys)[-1] == "[linear-eval] fit: 50/100 0:10 left"


def test_the_time_left_of_a_pass_over_batches_does_not_count_how_long_the_first_took(capsys, clock):
    count = of_batches(ProgressBars(0).of("linear-eval"), "features", 1000)
    for seconds, done in ((0, 0), (60, 10), (1, 20)):
        clock[0] += seconds
        count(done)
    assert lines(capsys) == [
        "[linear-eval] features, first batch ...",
        "[linear-eval] features, images: 10/1000",
        "[linear-eval] features, images: 20/1000 1:38 left",
    ]


def test_a_pass_over_batches_that_was_done_before_has_no_first_batch(capsys):
    of_batches(ProgressBars(0).of("linear-eval"), "features", 1000)(1000)
    assert lines(capsys) == ["[linear-eval] features, images: 1000/1000"]


@pytest.mark.parametrize(("seconds", "left"), [(4.6, "0:05"), (4.4, "0:04"), (59.7, "1:00")])
def test_the_time_left_is_rounded_to_seconds(capsys, clock, seconds, left):
    bars = ProgressBars(0)
    bars("pretrain", "training", 0, 2)
    clock[0] += seconds
    bars("pretrain", "training", 1, 2)
    assert lines(capsys)[-1] == f"[pretrain] training: 1/2 {left} left"


def test_the_time_left_falls_while_the_count_stands_still(capsys, clock):
    """Whoever counts every ten steps, or every shard, is asked for the time in between too."""
    bars = ProgressBars(0)
    bars("pretrain", "training", 0, 40)
    for seconds, done in ((10, 10), (10, 10), (10, 10), (10, 10)):
        clock[0] += seconds
        bars("pretrain", "training", done, 40)
    said = [line.partition("/40 ")[2] for line in lines(capsys)]
    assert said == ["", "0:30 left", "0:20 left", "0:10 left", "0:00 left"]
    clock[0] += 1
    bars("pretrain", "training", 10, 40)
    assert lines(capsys) == ["[pretrain] training: 10/40"]


def test_a_phase_that_reports_nothing_is_not_silent(monkeypatch):
    said: list[str] = []
    enough = threading.Event()

    class Heard(io.StringIO):
        def write(self, text: str) -> int:
            said.append(text)
            if len(said) > 6:
                enough.set()
            return len(text)

    monkeypatch.setattr(sys, "stderr", Heard())
    with ProgressBars(0.01) as bars:
        bars("pretrain", "compiling the step")
        assert enough.wait()
    assert {one for one in said if one.strip()} == {
        "[pretrain] compiling the step ...",
        "[pretrain] compiling the step ... 0:00 so far",
    }


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ("[pretrain] training: 120/640 loss -1.432, 0:31 left", ("pretrain", "training", 120, 640, "loss -1.432")),
        ("[pretrain] training: 120/640 1:00:31 left", ("pretrain", "training", 120, 640, "")),
        ("[build-tfrecords] hashing shards, MB: 3/4", ("build-tfrecords", "hashing shards, MB", 3, 4, "")),
        ("[pretrain] compiling the step ...", ("pretrain", "compiling the step", 0, 0, "")),
        ("[pretrain] compiling the step ... 0:30 so far", ("pretrain", "compiling the step", 0, 0, "")),
        ("[linear-eval] fit: 3/9 penalty 0.01, loss 2.1, 0:30 left", ("linear-eval", "fit", 3, 9, "penalty 0.01, loss 2.1")),
        ("[pretrain] running on 8 x TPU v5e", None),
        ("[pretrain] warning: 3 of 4/5 things", None),
        ("epoch 3/10", None),
    ],
)
def test_a_program_that_runs_a_job_reads_its_lines(line, parts):
    assert parse_line(line) == parts


def test_what_is_shown_is_what_is_read(capsys, clock):
    bars = ProgressBars(0)
    shown = [
        ("a-job", "one", 0, 0, ""),
        ("a-job", "two", 0, 5, ""),
        ("a-job", "two", 2, 5, "so far, so good"),
        ("b", "x", 1, 1, ""),
    ]
    for one in shown:
        bars(*one)
        clock[0] += 1
    assert [parse_line(line) for line in lines(capsys)] == shown


def test_nothing_speaks_after_the_end(capsys):
    """A thread that still runs while the interpreter ends can abort the process."""
    before = set(threading.enumerate())
    for _ in range(20):
        with ProgressBars(0.0) as bars:
            bars("pretrain", "training")
        assert set(threading.enumerate()) == before


def test_work_that_is_done_elsewhere_is_followed_to_its_end():
    seen, counts = [], iter([2, 3, 9])
    looked = threading.Event()

    def count() -> int:
        value = next(counts, 9)
        if value == 9:
            looked.set()
        return value

    def on_progress(phase: str, done: int = 0, total: int = 0, text: str = "") -> None:
        seen.append((phase, done, total))

    with followed(on_progress, "shards", count, 5, seconds=0.001):
        assert looked.wait()
    assert seen[0] == ("shards", 2, 5)
    assert seen[-1] == ("shards", 5, 5)
    assert {done for _, done, _ in seen[1:-1]} <= {3, 4}

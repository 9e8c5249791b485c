"""Two jobs that do the same at once: who gets which folder on gs://, and what becomes of the one that loses it.

Google's own client talks to a loopback Cloud Storage. Looks at a lease wait in `Waits`, so no test depends on a clock.
"""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from support.processes import started
from vertex.google import serving

from components import lease, patience, workspace
from trainer.shared.errors import UserError

ROOT = "gs://bucket/checkpoints"


class Waits:
    """Stands in for the module `time` where a job waits: counts the waits, and does something in each."""

    def __init__(self):
        self.count = 0
        self.do = lambda: None

    def sleep(self, seconds):
        self.count += 1
        self.do()

    def monotonic(self):
        return 0.0


@pytest.fixture
def google(tmp_path, monkeypatch):
    (tmp_path / "gcs" / "bucket").mkdir(parents=True)
    with serving(tmp_path / "gcs") as google:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", google.url)
        yield google


@pytest.fixture
def waits(monkeypatch):
    waits = Waits()
    monkeypatch.setattr(lease, "time", waits)
    return waits


@pytest.fixture(autouse=True)
def folders(monkeypatch):
    """Folders without a lease are unfinished, and no thread renews one unless a test says so."""
    monkeypatch.setattr(workspace, "_is_unfinished", lambda folder: True)
    monkeypatch.setattr(lease, "_SECONDS_BETWEEN_RENEWALS", 3600.0)
    monkeypatch.setattr(lease, "_SECONDS_AFTER_A_FAILURE", 0.01)
    monkeypatch.setattr(patience, "SHORTEST_WAIT", 0.01)
    monkeypatch.setattr(patience, "LONGEST_WAIT", 0.02)


def claim(job):
    return workspace.claim(ROOT, job, seed=0)


def renew(claimed):
    claimed.hold._write(claimed.hold._record)


def number(claimed):
    return int(claimed.folder.rpartition("-")[2])


def fail(google, *kinds):
    """Makes the next requests for objects go wrong."""
    google.fail(*kinds, path="/b/bucket/o")


def requests(google):
    """Returns how often objects were asked for. Once the client asks by itself what kind of bucket it is."""
    return sum("/b/bucket/o" in target for _, target, _ in google.requests)


def record(google, claimed):
    path = google.storage.folder / claimed.folder.removeprefix("gs://") / lease.FILE
    return json.loads(path.read_text())


def eventually(holds):
    while not holds():
        time.sleep(0.01)


def test_of_two_jobs_at_once_the_second_works_elsewhere(google, waits, capsys):
    first = claim("jobs/a")
    waits.do = lambda: renew(first)
    second = claim("jobs/b")
    assert (number(first), number(second), waits.count) == (1, 2, 1)
    assert capsys.readouterr().err == f"{first.folder} is held by jobs/a; waiting for a sign of life\n"
    renew(first)
    renew(second)
    for one in (first, second):
        one.require()
        one.release(finished=False)


def test_two_jobs_that_begin_in_the_same_moment_get_two_folders(google, waits):
    waits.do = lambda: [renew(one) for one in claimed]
    claimed = []
    barrier = threading.Barrier(4)

    def begin(job):
        barrier.wait()
        claimed.append(claim(job))

    threads = [threading.Thread(target=begin, args=(f"jobs/{job}",)) for job in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(map(number, claimed)) == [1, 2, 3, 4]
    for one in claimed:
        renew(one)
        one.require()


def test_what_was_released_is_gone_on_with_and_what_was_finished_is_left_to_its_own_job(google, waits):
    claim("jobs/a").release(finished=False)
    again = claim("jobs/b")
    assert number(again) == 1
    again.release(finished=True)
    other, own = claim("jobs/c"), claim("jobs/b")
    assert (number(other), number(own)) == (2, 1)
    assert waits.count == 0


def test_the_next_attempt_of_the_same_job_takes_over_at_once_and_the_one_before_stops(google, waits):
    before = claim("jobs/a")
    should_stop = before.stopping(lambda: False)
    assert not should_stop()
    after = claim("jobs/a")
    assert (number(after), waits.count) == (1, 0)
    renew(before)
    with pytest.raises(UserError, match=r"lease.json was taken over by jobs/a.* it stops without another write") as raised:
        should_stop()
    assert "\n" not in str(raised.value)
    before.release(finished=True)
    renew(after)
    after.require()
    assert record(google, after)["state"] == "working"


KILLED = """
import sys, time
from components import workspace
workspace._is_unfinished = lambda folder: True
print(workspace.claim(sys.argv[1], "jobs/killed", seed=0).folder, flush=True)
time.sleep(3600)
"""


def test_what_a_killed_job_left_is_gone_on_with_by_the_next_once_it_is_thought_dead(google, waits):
    environ = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    with started([sys.executable, "-c", KILLED, ROOT], env=environ, stdout=subprocess.PIPE, text=True) as process:
        left = process.stdout.readline().strip()
        process.kill()
    after = claim("jobs/after")
    assert after.folder == left
    assert waits.count == lease._POLLS - 1
    renew(after)
    after.require()


def test_a_holder_that_storage_kept_from_renewing_is_not_thought_dead(google, waits):
    first = claim("jobs/a")

    def do():
        if waits.count == lease._POLLS - 2:
            fail(google, *[503] * 20)
        if waits.count == 2 * lease._POLLS - 4:
            renew(first)

    waits.do = do
    assert number(claim("jobs/b")) == 2
    first.require()


def test_renewing_outlives_errors_and_lost_answers(google, monkeypatch, capsys):
    monkeypatch.setattr(lease, "_SECONDS_BETWEEN_RENEWALS", 0.01)
    fail(google, "lost", "lost")
    held = claim("jobs/a")
    for faults in ([503] * 5, ["lost"] * 3, [429, 403, "lost", 500]):
        fail(google, *faults)
        eventually(lambda: not google.faults)
        seen = requests(google)
        eventually(lambda seen=seen: requests(google) > seen + 3)
        held.require()
    assert "lease.json is not renewed: it answers HTTP 503" in capsys.readouterr().err
    fail(google, 503, "lost")
    held.release(finished=True)
    assert record(google, held)["state"] == "finished"


def test_a_lease_takes_two_requests_to_have_and_one_to_keep(google):
    held = claim("jobs/a")
    assert requests(google) == 2
    renew(held)
    assert requests(google) == 3
    held.release(finished=True)
    assert requests(google) == 4


def test_storage_that_refuses_is_one_line(google):
    fail(google, 403)
    with pytest.raises(UserError, match=r"lease.json cannot be read or written: it answers HTTP 403") as raised:
        claim("jobs/a")
    assert "\n" not in str(raised.value)


def test_on_this_machine_the_same_job_gets_its_folder_back_finished_or_not(tmp_path):
    def claim(job):
        return workspace.claim(str(tmp_path), job, seed=0)

    first = claim("jobs/a")
    other = claim("jobs/b")
    assert (number(first), number(other)) == (1, 2)
    first.release(finished=True)
    assert number(claim("jobs/a")) == 1
    assert number(claim("jobs/c")) == 3

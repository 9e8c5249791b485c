"""What `make rehearse` holds a job to: it would be worth nothing if it passed whatever the job leaves."""

import copy

import pytest
from vertex import rehearse

RUN = {
    "status": "FINISHED",
    "name": "a run",
    "metrics": {"train/loss": [[5, 0.5], [10, 0.25]], "train/step_seconds": [[10, 0.1]]},
}
PLAIN = {
    "name": "plain",
    "cancelled": False,
    "state": "SUCCEEDED",
    "state_sha256": ["a" * 64],
    "versions": 1,
    "models": 1,
    "dataflow": [],
    "still_running": [],
    "runs": {component: [RUN] for component in ("pipeline", "build-tfrecords", "pretrain", "linear-eval")},
}


def test_a_job_that_left_the_same_is_as_it_should_be():
    other = copy.deepcopy(PLAIN)
    for run in other["runs"].values():
        run[0]["metrics"]["train/step_seconds"] = []
    assert rehearse.complaints(other, PLAIN) == []


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        (("state",), "FAILED", "the job's state is FAILED"),
        (("state_sha256",), ["b" * 64], "state_sha256"),
        (("state_sha256",), ["a" * 64, "b" * 64], "the number of states is 2"),
        (("versions",), 2, "model versions is 2"),
        (("models",), 2, "logged models is 2"),
        (("dataflow",), ["build-tfrecords-1"], "Dataflow still runs"),
        (("still_running",), ["components.ending"], "still runs"),
        (("runs", "pretrain"), [RUN, RUN], "the runs of pretrain"),
        (("runs", "pretrain"), [], "the runs of pretrain"),
        (("runs", "linear-eval", 0, "status"), "RUNNING", "the runs of linear-eval"),
        (("runs", "pretrain", 0, "metrics", "train/loss"), [[5, 0.5]], "pretrain's train/loss"),
        (("runs", "pretrain", 0, "metrics", "train/loss"), [[5, 0.5], [10, 0.25], [10, 0.25]], "pretrain's train/loss"),
        (("runs", "pretrain", 0, "metrics", "train/loss"), [[5, 0.5], [10, 0.26]], "pretrain's train/loss"),
        (("runs", "pretrain", 0, "metrics", "train/step_seconds"), [[10, 0.2], [11, 0.1]], "pretrain's train/step_seconds"),
        (("cancelled",), True, "the job's state is SUCCEEDED"),
    ],
)
def test_whatever_else_a_job_left_is_named(path, value, named):
    found = copy.deepcopy(PLAIN)
    at = found
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    assert any(named in one for one in rehearse.complaints(found, PLAIN))


def test_random_kills_are_the_same_for_the_same_seed_and_within_a_step_s_time():
    seconds = {"build-tfrecords": 10.0, "pretrain": 20.0, "linear-eval": 30.0}
    trouble = rehearse.random_kills(3, seconds, 7)
    assert trouble == rehearse.random_kills(3, seconds, 7) != rehearse.random_kills(3, seconds, 8)
    assert len(trouble.endings) == 9
    assert all(0 <= one.seconds <= seconds[one.step] for one in trouble.endings)

"""Checkpoints: whole or passed over, of this architecture or refused."""

from itertools import chain, repeat

import numpy as np
import pytest
import tensorflow as tf

from trainer.checkpoint import (
    Checkpoint,
    Schedule,
    load,
    load_latest,
    open_checkpoint,
    paths,
    restore,
    run_folder,
    save,
    sha256_of,
)
from trainer.shared.errors import UserError
from trainer.shared.files import write_whole


def checkpoint(step: int, value: float = 0.0) -> Checkpoint:
    return Checkpoint(step, {"a": np.full((2, 3), value, np.float32), "step": np.int64(step)}, {"loss": 1.5})


def test_a_checkpoint_comes_back_as_it_was(tmp_path):
    path = save(str(tmp_path), checkpoint(7, 2.5), keep=3)
    back = load(path)
    assert (back.step, back.metrics, back.path) == (7, {"loss": 1.5}, path)
    np.testing.assert_array_equal(back.arrays["a"], np.full((2, 3), 2.5, np.float32))


def test_only_the_newest_are_kept(tmp_path):
    for step in (9, 10, 100000000):
        save(str(tmp_path), checkpoint(step), keep=2)
    assert [path.rpartition("-")[2] for path in paths(str(tmp_path))] == ["00000010.npz", "100000000.npz"]


def test_checkpoints_of_epochs_are_kept_beside_the_newest(tmp_path):
    for step in (4, 5, 8, 9, 10, 12, 13):
        save(str(tmp_path), checkpoint(step), keep=2, every=4)
    assert [int(path[-12:-4]) for path in paths(str(tmp_path))] == [8, 12, 13]
    for step in (14, 15):
        save(str(tmp_path), checkpoint(step), keep=2, every=4)
    assert [int(path[-12:-4]) for path in paths(str(tmp_path))] == [8, 12, 14, 15]


def simulated(minutes, seconds_a_write, hours=24):
    """Returns (the longest time without a checkpoint, the fraction of the time that went into writing) of steps of 2 s."""
    now = 0.0
    schedule = Schedule(minutes, lambda: now)
    writes, last, longest, spent = iter(seconds_a_write), 0.0, 0.0, 0.0
    while now < hours * 3600:
        now += 2
        if schedule.is_due():
            longest = max(longest, now - last)
            with schedule.writing():
                spent += (took := next(writes))
                now += took
            last = now
    return max(longest, now - last), spent / now


def test_at_most_ten_minutes_are_lost_and_at_most_one_percent_of_the_time_goes_into_writing():
    longest, share = simulated(10, repeat(5))
    assert longest <= 602
    assert share <= 0.01
    slow, share = simulated(10, repeat(60))
    assert 5900 <= slow <= 12_002, "where both are not possible, writing keeps to its share"
    assert share <= 0.01
    after_a_hitch, share = simulated(10, chain(repeat(1, 60), [120], repeat(1)))
    assert after_a_hitch <= 602, "a slow write among fast ones is paid for by what they left"
    assert share <= 0.01


@pytest.mark.parametrize("damage", ["truncated", "empty", "a byte changed"])
def test_a_torn_checkpoint_is_named_and_the_one_before_taken(tmp_path, capsys, damage):
    save(str(tmp_path), checkpoint(1, 1.0), keep=3)
    newest = tmp_path / "checkpoint-00000002.npz"
    save(str(tmp_path), checkpoint(2, 2.0), keep=3)
    content = bytearray(newest.read_bytes())
    if damage == "a byte changed":
        content[content.index(np.float32(2.0).tobytes())] ^= 1
    newest.write_bytes({"truncated": content[:-40], "empty": b"", "a byte changed": content}[damage])
    assert load_latest(str(tmp_path)).step == 1
    assert str(newest) in capsys.readouterr().err


def test_an_interrupted_write_leaves_the_earlier_checkpoint(tmp_path):
    save(str(tmp_path), checkpoint(1), keep=1)
    (tmp_path / "checkpoint-00000002.npz.partial").write_bytes(b"half")
    assert load_latest(str(tmp_path)).step == 1


def test_a_checkpoint_is_opened_by_its_file_and_by_its_folder(tmp_path):
    paths_of = [save(str(tmp_path), checkpoint(step), keep=2) for step in (1, 2)]
    assert [open_checkpoint(path).step for path in (*paths_of, str(tmp_path), f"{tmp_path}/")] == [1, 2, 2, 2]
    assert {run_folder(path) for path in (*paths_of, f"{tmp_path}/")} == {str(tmp_path)}
    assert run_folder("checkpoint-00000001.npz") == "."
    with pytest.raises(UserError, match="holds no whole checkpoint"):
        open_checkpoint(str(tmp_path / "nowhere"))


def test_no_checkpoint_is_none(tmp_path):
    assert load_latest(str(tmp_path)) is None
    assert load_latest(str(tmp_path / "nowhere")) is None


@pytest.mark.parametrize("variables", [{"a": (2, 4)}, {"b": (2, 3)}], ids=["another shape", "another name"])
def test_a_checkpoint_of_another_architecture_is_refused_and_changes_nothing(tmp_path, variables):
    stored = load(save(str(tmp_path), checkpoint(1), keep=1))
    ours = {name: tf.Variable(tf.ones(shape)) for name, shape in variables.items()}
    with pytest.raises(UserError, match="another architecture"):
        restore(ours | {"step": tf.Variable(5, dtype=tf.int64)}, stored)
    assert all(np.all(variable.numpy() == 1) for variable in ours.values())


def test_digest_sees_names_types_shapes_and_values():
    base = {"a": np.zeros((2, 2), np.float32), "b": np.ones(3)}
    assert sha256_of(base) == sha256_of(dict(reversed(base.items())))
    others = [
        {"a": base["a"], "c": base["b"]},
        {"a": base["a"].astype(np.float64), "b": base["b"]},
        {"a": base["a"].reshape(4), "b": base["b"]},
        {"a": base["a"] + 1, "b": base["b"]},
    ]
    assert len({sha256_of(arrays) for arrays in [base, *others]}) == 5


def test_on_cloud_storage_a_file_is_written_once_under_its_own_name(monkeypatch):
    """Renaming there is a copy and a deletion, and an object appears whole anyway."""
    real, opened = tf.io.gfile.GFile, []

    def open_elsewhere(path, mode="r"):
        opened.append(path)
        return real(path.replace("gs://", "ram://"), mode)

    def renamed(*_, **__):
        raise AssertionError("renamed")

    monkeypatch.setattr(tf.io.gfile, "GFile", open_elsewhere)
    monkeypatch.setattr(tf.io.gfile, "rename", renamed)
    write_whole("gs://bucket/result.json", b"{}")
    assert opened == ["gs://bucket/result.json"]
    with real("ram://bucket/result.json", "rb") as file:
        assert file.read() == b"{}"

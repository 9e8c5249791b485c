"""Pretraining: the step, the loop, resuming, and what is refused."""

import json
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import tensorflow as tf
from conftest import write_dataset

from trainer import records
from trainer.input_pipeline import evaluation_batches, training_batches
from trainer.presets import resolve
from trainer.records import UserError, read_manifest
from trainer.train import create_train_state, make_train_step, train

TINY = ["width_multiplier=0.0625", "global_batch_size=20", "epochs=3", "log_every_steps=2", "checkpoint_every_epochs=1"]


def tiny(*overrides: str):
    return resolve("demo", [*TINY, *overrides])


def test_a_batch_has_every_image_once_and_views_that_depend_on_epoch_and_image_alone(dataset):
    config = tiny()
    batches = list(training_batches(config, str(dataset), read_manifest(str(dataset)), 0).take(8))
    epoch = np.concatenate([batch["image_id"] for batch in batches])[:48]
    assert sorted(epoch) == list(range(48))
    assert all(len(set(batch["image_id"].numpy())) == 20 for batch in batches)
    later = next(iter(training_batches(config, str(dataset), read_manifest(str(dataset)), 5)))
    for name, value in later.items():
        np.testing.assert_array_equal(value, batches[5][name])

    other_batching = list(training_batches(tiny("global_batch_size=12"), str(dataset), read_manifest(str(dataset)), 0).take(4))
    views = {int(i): v.numpy() for b in other_batching for i, v in zip(b["image_id"], b["views"], strict=True)}
    for batch in batches[:2]:
        for image_id, view in zip(batch["image_id"], batch["views"], strict=True):
            np.testing.assert_array_equal(view, views[int(image_id)])


def test_evaluation_sees_every_image_once(dataset):
    batches = list(evaluation_batches(tiny(), str(dataset), read_manifest(str(dataset)), "validation", 5))
    assert sorted(np.concatenate([batch["image_id"] for batch in batches])) == list(range(17))
    assert batches[-1]["image"].shape == (2, 32, 32, 3)


def test_a_step_changes_u_of_its_own_images_only(dataset):
    config = tiny()
    state = create_train_state(config, 48, 6)
    batch = next(iter(training_batches(config, str(dataset), read_manifest(str(dataset)), 0)))
    make_train_step(config, state)(batch)
    changed = np.flatnonzero(state.u.numpy())
    assert sorted(changed) == sorted(batch["image_id"].numpy())
    assert int(state.step.numpy()) == 1


def test_the_online_classifier_sends_no_gradient_into_the_encoder(dataset):
    """With labels permuted, only the classifier ends elsewhere."""
    config = tiny("optimizer=lars")
    batch = next(iter(training_batches(config, str(dataset), read_manifest(str(dataset)), 0)))
    ends = []
    for labels in (batch["label"], (batch["label"] + 1) % 6):
        state = create_train_state(config, 48, 6)
        state.step.assign(5)
        make_train_step(config, state)({**batch, "label": labels})
        ends.append(state.arrays())
    differ = {
        name.split("/")[0] for name in ends[0] if not np.array_equal(ends[0][name], ends[1][name]) and "momentum" not in name
    }
    assert differ == {"classifier"}


@pytest.mark.parametrize("overrides", [(), ("loss=nt_xent",), ("variant=pt_official", "optimizer=lars", "blur=true")])
def test_the_loss_falls(dataset, tmp_path, overrides):
    losses = []
    train(
        tiny("epochs=12", *overrides),
        str(dataset),
        str(tmp_path),
        log_metrics=lambda m, _: losses.append(m["train/contrastive_loss"]),
    )
    assert np.mean(losses[-3:]) < np.mean(losses[:3])
    assert np.all(np.isfinite(losses))


@pytest.fixture(scope="module")
def undisturbed(dataset, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    return train(tiny(), str(dataset), str(folder)), folder


def test_result_and_config_lie_beside_the_checkpoints(undisturbed):
    result, folder = undisturbed
    written = json.loads((folder / "result.json").read_text())
    assert written["state_sha256"] == result.state_sha256
    assert written["steps"] == 48 * 3 // 20 + 1
    assert set(written["metrics"]) >= {"train/contrastive_loss", "train/learning_rate", "train/u_mean"}
    assert json.loads((folder / "config.json").read_text())["dataset_fingerprint"] == "test-48"


def test_a_finished_run_started_again_ends_with_the_same_result(undisturbed, dataset, tmp_path):
    result, folder = undisturbed
    shutil.copytree(folder, tmp_path / "again")
    (tmp_path / "again" / "result.json").unlink()
    again = train(tiny(), str(dataset), str(tmp_path / "again"))
    assert (again.state_sha256, again.metrics) == (result.state_sha256, result.metrics)


def test_a_run_killed_and_started_again_ends_with_the_same_bits(undisturbed, dataset, tmp_path):
    """Killed as soon as a first checkpoint is there, in another process."""
    command = [
        sys.executable,
        "-m",
        "trainer.task",
        "--preset",
        "demo",
        "--data",
        str(dataset),
        "--checkpoint-dir",
        str(tmp_path),
    ]
    command += ["--json", "--set", *TINY]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("checkpoint-*.npz")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert list(tmp_path.glob("checkpoint-*.npz"))
    assert not (tmp_path / "result.json").exists()
    finished = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True)
    assert json.loads(finished.stdout)["state_sha256"] == undisturbed[0].state_sha256


def test_u_is_in_the_checkpoint(undisturbed):
    result, _ = undisturbed
    with np.load(result.checkpoint) as stored:
        assert stored["u"].shape == (48,)
        assert np.all(stored["u"] > 0)


def test_a_folder_of_another_run_is_refused(undisturbed, dataset):
    _, folder = undisturbed
    with pytest.raises(UserError, match=r"temperature=0\.3, not 0\.2"):
        train(tiny("temperature=0.2"), str(dataset), str(folder))


def test_fewer_images_than_a_batch_are_refused(dataset, tmp_path):
    with pytest.raises(UserError, match="global_batch_size=64 is more than the 48"):
        train(tiny("global_batch_size=64"), str(dataset), str(tmp_path))


def test_a_loss_that_is_not_finite_stops_the_run_and_saves_nothing(dataset, tmp_path):
    with pytest.raises(UserError, match="the loss is nan"):
        train(tiny("base_learning_rate=1e30", "warmup_epochs=0"), str(dataset), str(tmp_path))
    for path in tmp_path.glob("checkpoint-*.npz"):
        with np.load(path) as stored:
            assert all(np.all(np.isfinite(stored[name])) for name in stored.files if stored[name].dtype.kind == "f")


WRONG = {
    "image ID 48": lambda split, encoded, label, image_id: records.encode_example(
        encoded, label, 48 if image_id == 5 else image_id
    ),
    "label 6": lambda split, encoded, label, image_id: records.encode_example(encoded, 6 if image_id == 5 else label, image_id),
    "image/ID": lambda split, encoded, label, image_id: tf.train.Example().SerializeToString(),
}


@pytest.mark.parametrize("named", WRONG)
def test_a_wrong_record_is_named_before_it_does_harm(tmp_path, named):
    write_dataset(tmp_path, example=WRONG[named])
    with pytest.raises(tf.errors.InvalidArgumentError, match=named):
        list(training_batches(tiny(), str(tmp_path), read_manifest(str(tmp_path)), 0).take(3))


def test_a_half_written_dataset_is_refused(dataset, tmp_path):
    with pytest.raises(UserError, match=r"manifest\.json is missing"):
        read_manifest(str(tmp_path))
    shutil.copytree(dataset, tmp_path / "torn")
    shard = next((tmp_path / "torn").glob("*train*00001-of*"))
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(UserError, match=shard.name):
        read_manifest(str(tmp_path / "torn"))


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--preset", "demmo"], "error: there is no preset demmo; did you mean demo?"),
        (["--preset", "demo", "--set", "epocs=3"], "error: epocs is not a setting; did you mean epochs?"),
        (["--preset", "demo", "--data", "/nowhere"], "error: /nowhere holds no finished dataset"),
    ],
)
def test_a_mistake_gives_one_line_and_exit_code_2(arguments, line, tmp_path):
    given = ["--data", str(tmp_path), "--checkpoint-dir", str(tmp_path / "c"), *arguments]
    done = subprocess.run([sys.executable, "-m", "trainer.task", *given], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith(line)
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "c").exists()

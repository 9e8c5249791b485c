"""Pretraining: the step, the loop, resuming, and what is refused."""

import json
import re
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from support.copies import Copies
from support.datasets import write_dataset

from trainer.augmentation import augment
from trainer.input_pipeline import evaluation_batches, labelled_batches, training_batches, view_batches
from trainer.losses.loss import alignment, uniformity_kernel
from trainer.preemption import EXIT_CODE, PreemptedError
from trainer.presets import resolve
from trainer.shared import records
from trainer.shared.errors import UserError
from trainer.shared.progress import parse_line
from trainer.shared.records import read_manifest
from trainer.state import create_train_state
from trainer.step import make_train_step
from trainer.task import main
from trainer.train import train

TINY = [
    "depth=10",
    "width_multiplier=0.0625",
    "global_batch_size=20",
    "epochs=3",
    "log_every_steps=2",
    "checkpoint_every_epochs=1",
]


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
    batches = list(evaluation_batches(tiny().views, str(dataset), read_manifest(str(dataset)), "validation", 5))
    ids = np.concatenate([batch["image_id"] for batch in batches])
    assert sorted(ids) == [-1, -1, -1, *range(17)]
    assert [batch["image"].shape for batch in batches] == 4 * [(5, 32, 32, 3)]
    later = list(evaluation_batches(tiny().views, str(dataset), read_manifest(str(dataset)), "validation", 5, first_step=2))
    np.testing.assert_array_equal(np.concatenate([batch["image_id"] for batch in later]), ids[10:])
    beyond = evaluation_batches(tiny().views, str(dataset), read_manifest(str(dataset)), "validation", 5, first_step=9)
    assert len(list(beyond.take(1))) == 0


@pytest.mark.parametrize("chosen", [None, np.arange(0, 48, 5)])
def test_every_host_evaluates_its_own_shards_in_as_many_batches(dataset, chosen):
    """Of two shards a host has one, a third has none: padding keeps the batches of all in step."""
    hosts = [
        list(
            evaluation_batches(
                tiny().views, str(dataset), read_manifest(str(dataset)), "train", 5, chosen, host=host, hosts=3, replicas=2
            )
        )
        for host in range(3)
    ]
    assert len({len(batches) for batches in hosts}) == 1
    assert len(hosts[0]) % 2 == 0
    ids = np.concatenate([batch["image_id"] for batches in hosts for batch in batches])
    assert sorted(ids[ids >= 0]) == list(range(48) if chosen is None else chosen)


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


def test_the_views_of_an_image_share_a_ghost_batch_no_more_than_others_and_the_loss_is_of_the_whole_batch(dataset):
    """What a step reports, beside networks that get one ghost batch at a time and know nothing of the others."""
    config = tiny("ghost_batch_size=4", "blur=true")
    batch = next(iter(training_batches(config, str(dataset), read_manifest(str(dataset)), 0)))
    found = make_train_step(config, create_train_state(config, 48, 6))(batch)

    apart = create_train_state(tiny("blur=true"), 48, 6)
    numbers = np.arange(20)
    z = np.zeros((2, 20, config.encoder.projection_dim), np.float32)
    losses, together = [], 0
    for ghost in range(5):
        of_views = numbers[numbers // 4 == ghost], numbers[numbers % 5 == ghost]
        together += len(np.intersect1d(*of_views))
        both, draws = (
            tf.concat([tf.gather(batch[name][:, view], of_view) for view, of_view in enumerate(of_views)], axis=0)
            for name in ("views", "draws")
        )
        features = apart.encoder(augment(both, draws, config.views.color_jitter_strength, True), training=True)
        projected = tf.math.l2_normalize(apart.projection(features, training=True), axis=1)
        for view, (of_view, part) in enumerate(zip(of_views, tf.split(projected, 2), strict=True)):
            z[view, of_view] = part
        labels = tf.gather(batch["label"], np.concatenate(of_views))
        losses.append(tf.nn.sparse_softmax_cross_entropy_with_logits(labels, apart.classifier(features)))
    assert together == 20 / 5
    z1, z2 = tf.unstack(tf.constant(z))
    positions = tf.range(20)
    expected = {
        "train/alignment": alignment(z1, z2),
        "train/uniformity": tf.math.log(uniformity_kernel(z1, z1, positions)),
        "train/online_loss": tf.reduce_mean(tf.concat(losses, axis=0)),
    }
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-5, err_msg=name)


@pytest.mark.thorough
@pytest.mark.parametrize(
    "overrides", [(), ("loss=nt_xent",), ("variant=pt_official", "optimizer=lars", "base_learning_rate=4", "blur=true")]
)
def test_the_loss_falls(dataset, tmp_path, overrides):
    losses = []
    train(
        tiny("epochs=40", *overrides),
        str(dataset),
        str(tmp_path),
        log_metrics=lambda m, _: losses.append(m["train/contrastive_loss"]),
    )
    assert np.mean(losses[-12:]) < np.mean(losses[:12]) - 0.2
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


def endings(copies: Copies, places: str, folder: Path, data: Path) -> list[tuple[int, str, str]]:
    """Returns exit code, stdout and stderr of trainer.task, run again for each of `places`, which `support.ending` explains."""
    given = ["--preset", "demo", "--data", data, "--checkpoint-dir", folder / "run", "--json", "--set", *TINY]
    copies.printed_by("support.ending", "trainer.task", places, folder / "endings.json", *given)
    return json.loads((folder / "endings.json").read_text())


@pytest.mark.thorough
def test_a_run_that_is_ended_in_every_way_ends_with_the_same_bits(copies, undisturbed, dataset, tmp_path):
    """Killed between two steps, within a write, and stopped by SIGTERM at a step after which there would be no checkpoint."""
    *ended, finished = endings(copies, "kill:4,torn:checkpoint-00000006,term:6,end", tmp_path, dataset)
    assert [code for code, _, _ in ended] == [-signal.SIGKILL, -signal.SIGKILL, EXIT_CODE]
    progress = [
        [one for one in map(parse_line, err.splitlines()) if one and one[1] == "training"] for _, _, err in (*ended, finished)
    ]
    assert [(done, total) for (_, _, done, total, _), *_ in progress] == [(0, 8), (2, 8), (4, 8), (7, 8)]
    assert ended[-1][2].splitlines()[-1].startswith("preempted: stopped at step 7 of 8, saved ")
    assert EXIT_CODE == 75
    assert json.loads(finished[1])["state_sha256"] == undisturbed[0].state_sha256


def test_a_torn_or_foreign_checkpoint_is_named_and_passed_over(undisturbed, dataset, tmp_path, capsys):
    result, folder = undisturbed
    shutil.copytree(folder, tmp_path / "run")
    earlier, last = sorted((tmp_path / "run").glob("checkpoint-*.npz"))
    torn = tmp_path / "run" / "checkpoint-00000009.npz"
    torn.write_bytes(last.read_bytes()[:-1000])
    other = train(tiny("seed=7"), str(dataset), str(tmp_path / "other"))
    shutil.copy(other.checkpoint, tmp_path / "run" / "checkpoint-00000010.npz")
    last.unlink()
    again = train(tiny(), str(dataset), str(tmp_path / "run"))
    assert again.state_sha256 == result.state_sha256
    told = capsys.readouterr().err
    assert "checkpoint-00000010.npz is of another run" in told
    assert "checkpoint-00000009.npz is not a whole checkpoint" in told
    assert earlier.name not in told


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


def test_a_run_that_is_preempted_again_and_again_logs_what_an_undisturbed_run_logs(dataset, tmp_path):
    config = tiny("log_every_steps=3")

    def after(steps):
        asked = iter(range(1, 1000))
        return lambda: next(asked) == steps

    def logged(name, stops):
        """Each point of the metrics that are no times; the run stops after each of `stops` steps."""
        points = []

        def log(metrics, step):
            points.extend((step, name, value) for name, value in metrics.items() if not re.search("second|wait", name))

        for steps in stops:
            with pytest.raises(PreemptedError):
                train(config, str(dataset), str(tmp_path / name), log_metrics=log, should_stop=after(steps))
        train(config, str(dataset), str(tmp_path / name), log_metrics=log)
        return points

    undisturbed = logged("undisturbed", ())
    assert {step for step, _, _ in undisturbed} == {2, 3, 4, 6, 8}
    assert logged("preempted", (1, 2, 2)) == undisturbed


class Clock:
    """Time as a test tells it."""

    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.thorough
def test_a_run_killed_within_an_epoch_goes_on_from_a_checkpoint_by_time_to_the_same_bits_and_logs(dataset, tmp_path):
    """Of 13 steps; an epoch has 2.4, a log 5. A step takes 4 minutes, so that every third one has a checkpoint."""
    settings = ["epochs=5", "checkpoint_every_epochs=5", "log_every_steps=5"]

    def trained(name, killed_at=0, *more):
        """Trains, but kills the run after a step if one is given. Returns its result, what it logged and its checkpoints."""
        clock, steps, points, folder = Clock(), [], {}, tmp_path / name

        def step_ends() -> bool:
            clock.now += 240
            steps.append(clock.now)
            if len(steps) == killed_at:
                raise KeyboardInterrupt
            return False

        def log(metrics, step):
            points[step] = {name: value for name, value in metrics.items() if not re.search("second|wait", name)}

        result = None
        with suppress(KeyboardInterrupt):
            result = train(tiny(*settings, *more), str(dataset), str(folder), log_metrics=log, should_stop=step_ends, clock=clock)
        return result, points, [int(path.stem[-8:]) for path in sorted(folder.glob("checkpoint-*.npz"))]

    alone, logged, _ = trained("alone", 0, "checkpoint_every_minutes=1e9")
    _, before, kept = trained("killed", 8)
    assert kept == [3, 6]
    _, again, kept = trained("killed", 5)
    assert kept == [6, 9]
    result, rest, kept = trained("killed", 0, "checkpoint_every_minutes=1e9")
    assert kept == [12, 13]
    assert result.state_sha256 == alone.state_sha256
    assert before | again | rest == logged


def test_a_loss_that_is_not_finite_stops_the_run_and_saves_nothing_of_it(dataset, tmp_path):
    with pytest.raises(UserError, match=r"is nan at step \d; the last good checkpoint is none; .*lower base_learning_rate"):
        train(tiny("base_learning_rate=1e30", "warmup_epochs=0"), str(dataset), str(tmp_path))
    for path in tmp_path.glob("checkpoint-*.npz"):
        with np.load(path) as stored:
            assert all(np.all(np.isfinite(stored[name])) for name in stored.files if stored[name].dtype.kind == "f")


def of_image_5(change) -> dict:
    """Writes the record of image 5 in another way."""
    return {
        "example": lambda split, encoded, label, image_id: (
            change(encoded, label) if (split, image_id) == ("train", 5) else records.encode_example(encoded, label, image_id)
        )
    }


WRONG = {
    "image ID 48 is not within": of_image_5(lambda encoded, label: records.encode_example(encoded, label, 48)),
    "has image ID 6, which record": of_image_5(lambda encoded, label: records.encode_example(encoded, label, 6)),
    "label 6 is not within": of_image_5(lambda encoded, label: records.encode_example(encoded, 6, 5)),
    "image/ID": of_image_5(lambda encoded, label: tf.train.Example().SerializeToString()),
    "Unknown image file format": of_image_5(lambda encoded, label: records.encode_example(b"no picture", label, 5)),
}


@pytest.mark.parametrize("named", WRONG)
def test_a_wrong_record_stops_the_run_before_it_does_harm_and_is_named(tmp_path, named):
    write_dataset(tmp_path / "data", **WRONG[named])
    seen = []
    with pytest.raises(UserError, match=rf"record \d+ of .*test-train\.tfrecord-0000\d-of-00002.*{named}"):
        train(
            tiny("log_every_steps=1"),
            str(tmp_path / "data"),
            str(tmp_path / "run"),
            log_metrics=lambda metrics, step: seen.append(step),
        )
    assert len(seen) <= 2, "an epoch has 2.4 steps; by then every record was met"


def test_a_shard_that_was_altered_is_named(tmp_path):
    write_dataset(tmp_path / "data")
    shard = next((tmp_path / "data").glob("test-train.tfrecord-00001*"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 0xFF
    shard.write_bytes(content)
    with pytest.raises(UserError, match=rf"{shard.name} is torn or altered after record \d+"):
        train(tiny(), str(tmp_path / "data"), str(tmp_path / "run"))


def test_an_empty_split_is_refused(tmp_path):
    write_dataset(tmp_path / "data", train=0)
    with pytest.raises(UserError, match="has no images in split train"):
        train(tiny(), str(tmp_path / "data"), str(tmp_path / "run"))


def test_what_is_logged_says_how_fast_how_well_and_what_u_looks_like(dataset, tmp_path):
    logged = {}
    train(tiny("variant=isogclr"), str(dataset), str(tmp_path), log_metrics=lambda metrics, step: logged.update({step: metrics}))
    names = ["contrastive_loss", "learning_rate", "online_loss", "online_top_1_accuracy", "alignment", "uniformity"]
    names += ["gradient_norm", "step_seconds", "images_per_second", "input_wait_fraction", "global_objective"]
    names += ["u_mean", "u_seen", "u_p01", "u_p10", "u_p50", "u_p90", "u_p99", "temperature_mean", "temperature_std"]
    assert set(logged[8]) == {f"train/{name}" for name in names}
    last = logged[8]
    assert last["train/u_seen"] == 1.0
    assert last["train/u_p01"] <= last["train/u_p50"] <= last["train/u_p99"]
    assert 0 <= last["train/input_wait_fraction"] <= 1
    assert 0 <= last["train/alignment"] <= 4
    assert -4 <= last["train/uniformity"] <= 0


def test_a_cached_set_gives_the_same_bits(undisturbed, dataset, tmp_path):
    assert train(tiny("cache=true"), str(dataset), str(tmp_path)).state_sha256 == undisturbed[0].state_sha256


def test_two_hosts_feed_what_one_step_needs(dataset):
    """Each a half of every step, in two batches for its two replicas."""
    config = tiny()
    manifest = read_manifest(str(dataset))
    parts = [
        list(training_batches(config, str(dataset), manifest, 0, host=host, hosts=2, replicas=2).take(10)) for host in range(2)
    ]
    assert {tuple(batch["views"].shape) for part in parts for batch in part} == {(5, 2, 32, 32, 3)}
    ids = [np.concatenate([batch["image_id"] for part in parts for batch in part[2 * step : 2 * step + 2]]) for step in range(5)]
    assert all(len(set(step)) == 20 for step in ids)
    assert sorted(np.concatenate([np.concatenate(ids[:2]), ids[2]])[:40].tolist()) != list(range(40))
    assert set(np.concatenate(ids[:3]).tolist()) == set(range(48))


def test_a_preempted_process_ends_though_its_threads_do_not(tmp_path):
    """As those do that read from storage which does not answer."""
    code = """
import threading
from trainer.preemption import PreemptedError, exits_if_preempted
with exits_if_preempted():
    threading.Thread(target=threading.Event().wait).start()
    print("said before")
    raise PreemptedError("stopped at step 7, saved it")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    said = (EXIT_CODE, "said before\n", "preempted: stopped at step 7, saved it\n")
    assert (done.returncode, done.stdout, done.stderr) == said


def test_no_pipeline_is_tuned_by_a_thread_that_its_iterator_waits_for(dataset):
    """Up to a minute, in which a preempted run would not end: seen in the native stack of such a process."""
    data, manifest, config = str(dataset), read_manifest(str(dataset)), tiny()
    for batches in (
        training_batches(config, data, manifest, 0),
        training_batches(tiny("cache=true"), data, manifest, 0),
        labelled_batches(config.views, config.optimizer.global_batch_size, config.run, data, manifest),
        labelled_batches(config.views, config.optimizer.global_batch_size, config.run, data, manifest, np.arange(20)),
        evaluation_batches(config.views, data, manifest, "validation", 5),
        view_batches(config.views, 0, data, manifest, 5),
    ):
        assert batches.options().autotune.enabled is False


def test_the_input_pipeline_needs_no_python_where_it_runs(dataset):
    graph = training_batches(tiny(), str(dataset), read_manifest(str(dataset)), 0)._as_serialized_graph().numpy()
    assert b"DecodeAndCropJpeg" in graph
    assert b"PyFunc" not in graph


@pytest.mark.thorough
def test_a_step_makes_no_copy_of_u(dataset):
    """Of 50 million images: 200 MB. The most that five steps take beside what was there is far less."""
    script = rf"""
import re, tensorflow as tf
from trainer.input_pipeline import training_batches
from trainer.presets import resolve
from trainer.shared.records import read_manifest
from trainer.state import create_train_state
from trainer.step import make_train_step
config = resolve("demo", {TINY!r})
batches = iter(training_batches(config, {str(dataset)!r}, read_manifest({str(dataset)!r}), 0))
state = create_train_state(config, 50_000_000, 6)
step = make_train_step(config, state)
memory = lambda name: int(re.search(name + r":\s+(\d+)", open("/proc/self/status").read())[1]) / 1024
for _ in range(3):
    step(next(batches))
open("/proc/self/clear_refs", "w").write("5")
before = memory("VmRSS")
for _ in range(5):
    step(next(batches))
print(memory("VmHWM") - before)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 100


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
def test_a_mistake_gives_one_line_and_exit_code_2(arguments, line, tmp_path, capfd):
    with pytest.raises(SystemExit) as ended:
        main(["--data", str(tmp_path), "--checkpoint-dir", str(tmp_path / "c"), *arguments])
    *notes, said = capfd.readouterr().err.splitlines()
    assert ended.value.code == 2
    assert said.startswith(line)
    assert all(parse_line(note) or note.startswith(("[pretrain] running on ", "[pretrain] warning: ")) for note in notes)
    assert not (tmp_path / "c").exists()


@pytest.mark.thorough
def test_a_mistake_is_all_that_a_process_of_its_own_says_but_for_what_it_runs_on(tmp_path):
    """TensorFlow, which is imported for it, says nothing."""
    given = ["--preset", "demo", "--data", "/nowhere", "--checkpoint-dir", str(tmp_path / "c")]
    done = subprocess.run([sys.executable, "-m", "trainer.task", *given], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    running, *warning, error = (line for line in done.stderr.splitlines() if not parse_line(line))
    assert running.startswith("[pretrain] running on ")
    assert [line for line in warning if not line.startswith("[pretrain] warning: ")] == warning[1:] == []
    assert error.startswith("error: /nowhere holds no finished dataset")

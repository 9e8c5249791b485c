"""The step on a machine without TensorFlow: its batches are the trainer's, and so is the state that it ends with."""

import io
import itertools
import json
import subprocess

import numpy as np
import pytest
import tensorflow as tf
from benchmarks import gpu_here, gpu_run
from benchmarks.philox import uniform
from PIL import Image
from support.datasets import write_dataset
from support.lifted import lift
from support.raw_data import raw_as_usual
from support.tpu_compiler import PYTHON, needs_compiler

from trainer import checkpoint
from trainer.config import config_from_dict
from trainer.input_pipeline import training_batches
from trainer.shared.errors import UserError
from trainer.shared.files import write_arrays
from trainer.shared.records import read_manifest
from trainer.state import create_train_state
from trainer.step import make_train_step

TINY = ["depth=10", "width_multiplier=0.0625", "image_size=16", "warmup_epochs=0", "epochs=3", "data.allow_other_counts=true"]
BATCH, STEPS = 10, 15
"""48 images: the fifth step spans two epochs, and the last one ends in a fourth."""

APART = {"encoder": 2e-4, "classifier": 2e-4, "projection": 2e-3, "u": 1e-2, "momentum": 0.1, "step": 0.0}
"""By which part of its norm each kind of variable may differ after five steps."""


def square(label: int, random: np.random.Generator) -> bytes:
    """A JPEG with as many samples of colour as of brightness: a part of it has the pixels that the whole has there."""
    pixels = np.clip(random.normal(128 + 15 * label, 50, (8, 8, 3)), 0, 255).astype(np.uint8).repeat(4, 0).repeat(4, 1)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "jpeg", subsampling=0)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A folder with `work/data`, and with what `prepare` makes of it in `there`."""
    folder = tmp_path_factory.mktemp("gpu")
    write_dataset(folder / "work" / "data", picture=square)
    gpu_here.prepare(folder / "work" / "data", folder / "there", TINY, [BATCH], [3])
    return folder


def runs_of(prepared):
    return {run["arm"]: run for run in json.loads((prepared / "there" / gpu_run.ABOUT).read_text())}


def batches_there(prepared, run):
    """Yields the batches that a machine without TensorFlow makes, by NumPy in place of JAX."""
    folder = prepared / "there"
    data, visits, boxes = (np.load(folder / name) for name in (gpu_run.DATA, run["files"]["order"], run["files"]["boxes"]))
    images = gpu_run.from_differences(data["differences"])
    for step in range(run["steps"]):
        batch = gpu_run.batch_of(run, step, visits["order"], boxes["boxes"], data["image_ids"], data["labels"])
        batch["views"] = gpu_run.views_of(np, images[batch.pop("position")], batch.pop("boxes"), run["image_size"])
        yield batch


def test_the_raw_data_are_converted_once_with_so_many_images_of_a_class(tmp_path):
    raw = raw_as_usual(tmp_path / "raw")
    gpu_here.convert(raw, tmp_path / "data", 3)
    counts = read_manifest(str(tmp_path / "data")).splits["train"].records_per_class
    assert set(counts) == {3}
    gpu_here.convert(raw, tmp_path / "data", 2)
    assert read_manifest(str(tmp_path / "data")).splits["train"].records_per_class == counts


def test_random_numbers_are_tensorflow_s_bit_for_bit():
    seeds = np.array([[0, 0], [3 * 2**32 + 7, 5], [2**62 + 1, 2**40], [-1, -(2**50)]])
    for count in (1, 4, 26):
        expected = [tf.random.stateless_uniform([count], seed, alg="philox").numpy() for seed in seeds]
        np.testing.assert_array_equal(uniform(seeds, count), expected)


def test_every_batch_of_a_run_is_the_trainer_s(prepared):
    run = runs_of(prepared)["sogclr"]
    data, config = str(prepared / "work" / "data"), config_from_dict(run["config"])
    expected = training_batches(config, data, read_manifest(data), 0)
    assert run["steps"] == STEPS
    for ours, theirs in zip(batches_there(prepared, run), expected, strict=False):
        assert set(ours) == set(theirs)
        for name, values in ours.items():
            np.testing.assert_array_equal(values, theirs[name], err_msg=name)


def test_pixels_survive_as_differences():
    images = np.random.default_rng(0).integers(0, 256, (3, 5, 7, 3), np.uint8)
    np.testing.assert_array_equal(gpu_run.from_differences(gpu_here.differences(images)), images)


def test_images_of_several_sizes_are_refused(dataset):
    with pytest.raises(UserError, match="only images of one size"):
        gpu_here.training_images(dataset)


def test_a_network_comes_home_in_parts_and_gets_the_line_of_a_run(prepared, tmp_path, monkeypatch):
    """Of the initial state: so the encoder is as good as the untrained one."""
    run = runs_of(prepared)["sogclr"]
    arrays, about = gpu_run.newest(prepared / "there", run, tmp_path / "none")
    monkeypatch.setattr(gpu_run, "PART_BYTES", 20_000)
    about |= {"step": STEPS, "seconds": 90.0, "metrics": {"train/online_loss": 1.5}, "device": "a chip"}
    gpu_run.write_network(tmp_path, arrays, about)
    assert len(list(tmp_path.glob("*.npz"))) > 1
    results = tmp_path / "results.jsonl"
    for _ in range(2):
        gpu_here.finish(prepared / "there", tmp_path, prepared / "work", results)
    (line,) = map(json.loads, results.read_text().splitlines())
    assert line["top_1"] == line["untrained_top_1"]
    assert (line["arm"], line["batch"], line["seed"], line["steps"]) == ("sogclr", BATCH, 3, STEPS)
    assert (line["device"], line["device_minutes"], line["train"]) == ("a chip", 1.5, {"online_loss": 1.5})
    stored = checkpoint.open_checkpoint(str(prepared / "work" / "runs" / run["name"]))
    assert checkpoint.sha256_of(stored.arrays) == line["state_sha256"]
    assert {name for name in arrays if name not in stored.arrays} == {name for name in arrays if name.startswith("momentum/")}


def test_a_state_or_a_network_of_another_run_is_refused(prepared, tmp_path):
    run = runs_of(prepared)["sogclr"]
    arrays, about = gpu_run.newest(prepared / "there", run, tmp_path / "none")
    other = {**run, "seed": 4}
    write_arrays(str(tmp_path / "state.npz"), arrays | {gpu_run.ABOUT: np.array(json.dumps(about))})
    gpu_run.newest(prepared / "there", run, tmp_path / "state.npz")
    with pytest.raises(UserError, match=r"state\.npz is of another run"):
        gpu_run.newest(prepared / "there", other, tmp_path / "state.npz")
    gpu_run.write_network(tmp_path, arrays, about)
    with pytest.raises(UserError, match="is of another run"):
        gpu_run.read_network(tmp_path, other)


def train(prepared, folder, *options):
    command = [PYTHON, gpu_run.__file__, "train", prepared / "there", "--work", folder, "--output", folder / "out", *options]
    return subprocess.run(command, capture_output=True, text=True)


@needs_compiler
@pytest.mark.parametrize("arm", ["simclr", "sogclr"])
def test_jax_ends_with_the_state_that_the_trainer_ends_with(prepared, tmp_path, arm):
    """After five steps, from a state whose ReLUs rounding does not turn. Rounding itself grows from step to step.

    It shows most in the gradients, which the momentum holds, because BN cancels most of what reaches a layer's offset. TensorFlow
    with XLA and without differ as much: by 4% of the momentum, 4e-4 of the projection head, 8e-4 of u, 2e-5 of the encoder.
    """
    run = runs_of(prepared)[arm]
    config = config_from_dict(run["config"])
    state = lift(create_train_state(config, 48, 6))
    _, about = gpu_run.newest(prepared / "there", run, tmp_path / "none")
    begun = {gpu_run.ABOUT: np.array(json.dumps(about))}
    write_arrays(str(tmp_path / f"{run['name']}.npz"), state.arrays() | begun)
    done = train(prepared, tmp_path, "--run", run["name"], "--every", "5", "--minutes", "0")
    assert done.returncode == gpu_run.AGAIN, done.stderr
    found, _ = gpu_run.newest(prepared / "there", run, tmp_path / f"{run['name']}.npz")
    step = make_train_step(config, state)
    for batch in itertools.islice(batches_there(prepared, run), 5):
        step({name: tf.constant(values) for name, values in batch.items()})
    expected = state.arrays()
    assert set(found) == set(expected)
    for kind in {name.split("/")[0] for name in expected}:
        ours, theirs = (
            np.concatenate([arrays[name].ravel().astype(np.float64) for name in expected if name.split("/")[0] == kind])
            for arrays in (found, expected)
        )
        # NT-Xent leaves u at zero.
        assert np.linalg.norm(ours - theirs) <= APART[kind] * np.linalg.norm(theirs), kind


@needs_compiler
def test_a_run_that_stops_and_goes_on_ends_with_the_bits_of_one_that_does_not(prepared, tmp_path):
    run = runs_of(prepared)["sogclr"]
    name = run["name"]
    assert train(prepared, tmp_path / "whole", "--run", name, "--every", "5").returncode == 0
    stops = ["--run", name, "--every", "5", "--minutes", "0"]
    assert [train(prepared, tmp_path / "parts", *stops).returncode for _ in range(3)] == [gpu_run.AGAIN, gpu_run.AGAIN, 0]
    whole, parts = (gpu_run.read_network(tmp_path / which / "out", run)[0] for which in ("whole", "parts"))
    assert checkpoint.sha256_of(whole) == checkpoint.sha256_of(parts)

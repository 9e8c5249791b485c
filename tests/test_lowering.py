"""The step as a program: what another XLA runtime makes of it, whether a TPU's compiler takes it. Needs `make tpu-check`."""

import json
import subprocess

import numpy as np
import pytest
import tensorflow as tf
from benchmarks import portable_step
from support.tpu_compiler import PYTHON, needs_compiler

from eval.measure.programs import lower_forward, lower_labelled_step
from eval.measure.supervised import Recipe
from pipelines.code import PROJECT
from pipelines.plan import compiler
from pipelines.plan.machines import DEVICES
from trainer import encoder
from trainer.input_pipeline import training_batches
from trainer.lowering import OneOfMany, arguments_of, lower, lower_step, to_hlo
from trainer.presets import resolve
from trainer.shared.errors import UserError
from trainer.shared.records import read_manifest
from trainer.state import create_train_state
from trainer.step import make_train_step

TINY = ["depth=10", "width_multiplier=0.0625", "global_batch_size=16", "epochs=6", "warmup_epochs=0", "base_learning_rate=0.002"]


@pytest.fixture
def one_block(monkeypatch):
    """A network of one bottleneck block, which has every kind of operation that a ResNet-50's step has."""
    monkeypatch.setitem(encoder.BLOCKS, 50, (1,))


@needs_compiler
@pytest.mark.parametrize("how", ["as on a CPU", "as on a TPU"])
def test_another_runtime_takes_the_same_three_steps(dataset, tmp_path, one_block, how):
    """The program itself, on JAX's CPU: the loss and every variable are those of the TensorFlow step."""
    config = resolve("demo", [*TINY, "depth=50", "blur=true"])
    manifest = read_manifest(str(dataset))
    batch = {name: value.numpy() for name, value in next(iter(training_batches(config, str(dataset), manifest, 0))).items()}
    state = create_train_state(config, 48, 6)
    one = OneOfMany(1, recompute_in_backward=how == "as on a TPU")
    program = lower_step(config, create_train_state(config, 48, 6, one), one)
    np.savez(tmp_path / "arguments.npz", **arguments_of(program, state, batch))
    (tmp_path / "step.hlo").write_bytes(program.hlo)
    files = ["--arguments", tmp_path / "arguments.npz", "--results", tmp_path / "results.npz", "--steps", "3"]
    script = PROJECT / "pipelines" / "plan" / "program.py"
    said = subprocess.run([PYTHON, script, "run", tmp_path / "step.hlo", *files], check=True, capture_output=True, text=True)
    about = json.loads(said.stdout)
    assert about["platform"] == "cpu"

    step = make_train_step(config, state)
    for _ in range(3):
        metrics = step(batch)
    with np.load(tmp_path / "results.npz") as stored:
        results = [stored[name] for name in stored.files]
    found = dict(zip(program.metrics, results, strict=False))
    arguments = list(program.arguments)
    found |= {arguments[argument]: results[int(result)] for result, argument in about["next_of"].items()}
    for name, value in metrics.items():
        np.testing.assert_allclose(found[name], value, rtol=2e-4, atol=2e-5, err_msg=name)
    arrays = state.arrays()
    assert set(found) == set(metrics) | set(arrays)
    for name, expected in arrays.items():
        scale = np.abs(expected).max() + 1e-6
        np.testing.assert_allclose(found[name], expected, rtol=0, atol=2e-3 * scale, err_msg=name)


@needs_compiler
def test_a_machine_with_jax_alone_says_how_fast_it_runs_the_step(tmp_path, one_block):
    portable_step.write("demo", [*TINY, "depth=50"], tmp_path / "step")
    said = subprocess.run(
        [PYTHON, portable_step.__file__, "run", tmp_path / "step", "--repeat", "2"], check=True, capture_output=True, text=True
    )
    found = json.loads(said.stdout)
    assert found["device"] == "cpu"
    assert found["share_of_bfloat16_peak"] is None
    assert found["samples_per_second"] == pytest.approx(16 / found["step_seconds"])
    rate = found["flops"] / found["step_seconds"]
    assert found["share_of_product"] == pytest.approx(rate / found["product_flops_per_second"])
    # Two views a sample, forward and twice as much backward, of the stem and one block at least.
    stem = 2 * 3 * 3 * 3 * 4 * 32 * 32
    assert found["flops"] > 16 * 2 * 3 * stem
    assert "samples/s" in said.stderr


@pytest.mark.thorough
def test_a_replica_s_program_has_the_negatives_of_the_whole_slice():
    config = resolve("demo", [*TINY, "global_batch_size=64"])
    alone, among = lower(config, 48, 6), lower(config, 48, 6, replicas=4)
    assert not alone.collectives
    assert among.arguments["batch/views"][0][0] == 16
    received = [shape for name, (shape, _) in among.arguments.items() if name.startswith("received/")]
    assert (48, 2, config.encoder.projection_dim) in received
    state = create_train_state(config, 48, 6)
    gradients = 4 * sum(int(np.prod(v.shape)) for v in state.trainable)
    assert gradients in [one.bytes for one in among.collectives if one.kind == "all-reduce"]
    kinds = [one.kind for one in among.collectives]
    # Moments of every BN, forward and backward.
    norms = sum(name.endswith("/moving_mean") for name in state.variables())
    assert norms == 15
    assert kinds.count("all-reduce") > 2 * norms
    assert kinds.count("reduce-scatter") == 1
    with pytest.raises(UserError, match="does not divide"):
        lower(config, 48, 6, replicas=5)


@needs_compiler
def test_a_tpu_s_compiler_takes_the_step(one_block):
    config = resolve("demo", [*TINY, "depth=50", "blur=true", "precision=bfloat16", "optimizer=lars"])
    needs = compiler.compile_program(lower(config, 48, 6, replicas=8).hlo, DEVICES["v5e"], PYTHON, quick=True)
    assert needs["fits"]
    assert needs["compiler"] == "libtpu 0.0.30"
    assert needs["flops"] > 1e6
    assert needs["temp_bytes"] > 1e4


@needs_compiler
@pytest.mark.parametrize("what", ["forward", "official", "fine-tuning"])
def test_a_tpu_s_compiler_takes_the_steps_of_an_evaluation(one_block, what):
    """A forward pass; training a classifier on three of 8 images; training all of the network on one of 4 replicas."""
    config = resolve("demo", [*TINY, "depth=50", "precision=bfloat16", "linear_eval.batch_size=8"])
    recipe = Recipe(num_images=48, epochs=1, batch_size=20, base_learning_rate=0.1, seed=0, frozen=what == "official")
    if what == "forward":
        program = lower_forward(config, 8)
        assert program.arguments["batch/image"] == ((8, 32, 32, 3), "uint8")
    else:
        program = lower_labelled_step(config, recipe, 6, replicas=1 if what == "official" else 4)
    needs = compiler.compile_program(program.hlo, DEVICES["v5e"], PYTHON, quick=True)
    assert needs["fits"]
    assert needs["flops"] > 1e6


@needs_compiler
@pytest.mark.parametrize(
    ("what", "reason"),
    [("a dynamic shape", "known only at run time"), ("a string", "AsString|string"), ("a host callback", "PyFunc")],
)
def test_a_step_that_no_tpu_can_run_is_refused_with_the_reason(what, reason):
    def step(values):
        if what == "a dynamic shape":
            return tf.where(values > 0.0)
        if what == "a string":
            return tf.strings.length(tf.strings.as_string(values))
        return tf.numpy_function(np.sin, [values], tf.float32)

    def compiled():
        hlo = to_hlo(tf.function(step, jit_compile=True), [tf.TensorSpec([8])])
        return compiler.compile_program(hlo, DEVICES["v5e"], PYTHON, quick=True)

    with pytest.raises(UserError, match=reason):
        compiled()

"""The plan of a run, pretraining and evaluation: what it reckons from what a compiler said, what it refuses, what it keeps."""

import json
import re
from pathlib import Path

import pytest

from eval.measure import programs, protocols
from eval.measure.protocols import Work
from pipelines import cli
from pipelines.code import PROJECT
from pipelines.plan import compiler, estimate, evaluation, machines, tables
from pipelines.plan.evaluation import Limits
from pipelines.vertex import accelerators
from trainer import encoder_cost
from trainer.config import Config, replace
from trainer.encoder import make_encoder
from trainer.presets import resolve
from trainer.settings import EncoderSettings

PYTHON = compiler.tpu_python(PROJECT)

PLANNED = "sogclr_imagenet_r50_b512"


def planned(tmp_path, monkeypatch, compiled, preset=PLANNED, accelerator="v5e-8", **known):
    """A plan on what a compiler said before, as the cache keeps it."""
    machine, config = accelerators.get(accelerator), resolve(preset)
    assumed = estimate.assumptions(preset, machine, **known)
    stored = {"state_bytes": 300e6, "collectives": [{"kind": "all-reduce", "bytes": 100e6}]} | compiled
    monkeypatch.setattr(estimate, "_lower_and_compile", lambda *args: stored)
    return estimate.make_estimate(preset, config, machine, assumed, python=PYTHON, cache=tmp_path, version="1")


COMPILED = {
    "compiled": {
        "fits": True,
        "compiler": "libtpu 0",
        "compile_seconds": 1.0,
        "arguments_bytes": 300e6,
        "results_bytes": 0,
        "temp_bytes": 4e9,
        "code_bytes": 1e8,
        "flops": 1.97e12,
        "bytes_accessed": 40.95e9,
    }
}


def test_a_plan_says_what_binds_and_what_it_costs(tmp_path, monkeypatch):
    values = planned(tmp_path, monkeypatch, COMPILED).as_json()
    assert values["fits"]
    assert values["bound_by"] == "memory"
    assert values["memory_seconds"] == pytest.approx(0.05)
    assert values["compute_seconds"] == pytest.approx(0.01)
    assert values["interconnect_seconds"] == pytest.approx(2 * 100e6 * 7 / 8 / 200e9 + 10e-6)
    assert values["step_seconds"] == pytest.approx(values["memory_seconds"] + values["interconnect_seconds"])
    assert values["bytes_per_sample"] == pytest.approx(40.95e9 / 64)
    assert values["steps"] == 1_281_167 * 800 // 512 + 1
    assert values["total_hours"] == pytest.approx(values["steps"] * values["step_seconds"] / 3600)
    assert values["price"] == pytest.approx(values["total_hours"] * 8 * values["dollars_per_device_hour"])
    assert 512 < values["largest_batch"] < 512 * 4
    for key in ("fits", "bytes_per_sample", "flops_per_sample", "temp_bytes", "arguments_bytes", "step_seconds", "price"):
        assert values["sources"][key] in ("compiled", "computed", "assumed", "measured")


def test_a_host_that_is_too_slow_binds(tmp_path, monkeypatch):
    values = planned(tmp_path, monkeypatch, COMPILED, images_a_core=10.0).as_json()
    assert values["input_starved"]
    assert values["bound_by"] == "input"
    assert values["step_seconds"] == pytest.approx(512 / (224 * 10.0))
    assert values["host_cores_needed"] > 224


def test_a_step_too_large_says_what_would_fit(tmp_path, monkeypatch):
    values = planned(tmp_path, monkeypatch, {"compiled": {"fits": False, "used_bytes": 32e9}}).as_json()
    assert not values["fits"]
    assert 0 < values["largest_batch"] < 512
    assert "step_seconds" not in values


def test_without_the_compiler_there_is_the_arithmetic(tmp_path, monkeypatch):
    monkeypatch.setattr(estimate, "_lower_and_compile", lambda *args: {"state_bytes": 1.0, "collectives": []})
    machine = accelerators.get("v5e-8")
    found = estimate.make_estimate(
        PLANNED, resolve(PLANNED), machine, estimate.assumptions(PLANNED, machine), python=None, cache=tmp_path, version="1"
    )
    assert "make tpu-check" in found.notes[0]
    assert found.values["steps"] > 1e6
    assert tables.pretraining(found)


def test_a_plan_is_compiled_once_for_a_config_and_a_code_version(tmp_path, monkeypatch):
    planned(tmp_path, monkeypatch, COMPILED)
    monkeypatch.setattr(estimate, "_lower_and_compile", lambda *args: pytest.fail("it is in the cache"))
    machine = accelerators.get("v5e-8")
    again = {"python": PYTHON, "cache": tmp_path}
    assumed = estimate.assumptions(PLANNED, machine, price=0.5)
    found = estimate.make_estimate(PLANNED, resolve(PLANNED), machine, assumed, version="1", **again)
    assert found.values["dollars_per_device_hour"] == 0.5
    with pytest.raises(pytest.fail.Exception):
        estimate.make_estimate(PLANNED, resolve(PLANNED), machine, assumed, version="2", **again)


def test_a_change_of_the_evaluation_compiles_no_step_again(tmp_path, monkeypatch):
    planned(tmp_path, monkeypatch, COMPILED)
    monkeypatch.setattr(estimate, "_lower_and_compile", lambda *args: pytest.fail("it is in the cache"))
    machine, config = (
        accelerators.get("v5e-8"),
        resolve(PLANNED, ["linear_eval.seed=1", "linear_eval.protocols=official"]),
    )
    assumed = estimate.assumptions(PLANNED, machine)
    assert estimate.make_estimate(PLANNED, config, machine, assumed, python=PYTHON, cache=tmp_path, version="1").values["fits"]


# ---- Tables


@pytest.mark.parametrize("name", accelerators.ACCELERATORS)
def test_every_accelerator_has_a_device_a_host_and_a_price(name):
    accelerator = accelerators.get(name)
    device, host = machines.device_of(accelerator), machines.host_of(accelerator)
    assert device.flops_per_second >= device.rate("float32") > 0
    assert machines.dollars_per_hour(accelerator) > 0
    assert host.cpus > 0
    assert host.memory_bytes or name.startswith("v2")
    assert bool(device.topology) == (accelerator.build == "tpu")


@pytest.mark.thorough
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"depth": 18, "image_size": 32, "cifar_stem": True, "width_multiplier": 0.25},
        {"depth": 34, "image_size": 96, "precision": "bfloat16"},
        {"image_size": 65, "width_multiplier": 2.0},
        {"depth": 101, "selective_kernel_ratio": 0.0625, "image_size": 64},
        {"selective_kernel_ratio": 0.0625, "image_size": 32, "cifar_stem": True},
    ],
    ids=str,
)
def test_the_count_of_convolutions_is_that_of_the_encoder(settings):
    config = replace(Config(), **settings)
    expected = []
    for layer in make_encoder(config.encoder, config.views.image_size, config.run.seed).layers:
        if hasattr(layer, "kernel"):
            (_, height, width, channels), (kernel, _, channels_in, _) = layer.output.shape, layer.kernel.shape
            assert height == width
            expected.append((height, channels, channels_in, kernel))
    counted = list(encoder_cost.convolutions(config.encoder, config.views.image_size))
    assert sorted((one.side, one.channels, one.channels_in, one.kernel) for one in counted) == sorted(expected)
    cost = encoder_cost.forward_cost(config.encoder, config.views.image_size)
    assert cost.flops == sum(2 * kernel**2 * inputs * channels * side**2 for side, channels, inputs, kernel in expected)
    written = sum(side**2 * channels for side, channels, _, _ in expected) * (2 if config.encoder.precision == "bfloat16" else 4)
    assert written < cost.bytes < 4 * written


def test_a_resnet_50_takes_8_gflops_an_image():
    # 4.1 G multiplications and additions (He et al. 2016), counted twice.
    assert encoder_cost.forward_cost(EncoderSettings(), 224).flops == pytest.approx(8.2e9, rel=0.01)


# ---- The evaluation


FORWARD = {"fits": True, "flops": 256 * 8e9, "bytes_accessed": 256 * 40e6}


@pytest.fixture
def evaluated(tmp_path, monkeypatch):
    """Plans an evaluation of `work` on what a compiler said of 256 images, with round figures."""
    monkeypatch.setattr(evaluation, "IMAGES_A_CORE", 1000.0)
    monkeypatch.setattr(protocols, "memory_bytes", lambda config, sizes: 40e9)
    monkeypatch.setattr(protocols, "disk_bytes", lambda config, sizes: 150e9)

    def evaluated(work, accelerator="v5e-8", forward=FORWARD, overrides=(), **limits):
        monkeypatch.setattr(evaluation, "_compiled_forward", lambda *args: None if accelerator == "cpu" else forward)
        monkeypatch.setattr(protocols, "work_of", lambda config, sizes: work)
        machine = accelerators.get(accelerator)
        return evaluation.make_evaluation_estimate(
            resolve(PLANNED, overrides),
            machine,
            estimate.assumptions(PLANNED, machine),
            Limits(**limits),
            python=None,
            cache=tmp_path,
            version="1",
        )

    return evaluated


def seconds(one):
    return one.hours * 3600


def test_images_of_a_frozen_encoder_take_the_longest_of_compute_memory_and_input(evaluated):
    work = {"official": Work(forward=8_000_000)}
    found = evaluated(work).protocols["official"]
    assert found.bound_by == "memory"
    assert seconds(found) == pytest.approx(1_000_000 * 40e6 / 819e9)
    assert found.price == pytest.approx(found.hours * 8 * 1.20)
    found = evaluated(work, forward={**FORWARD, "flops": 256 * 20e9}).protocols["official"]
    assert (found.bound_by, seconds(found)) == ("compute", pytest.approx(1_000_000 * 20e9 / 197e12))
    found = evaluated(work, forward={**FORWARD, "bytes_accessed": 1.0, "flops": 1.0}).protocols["official"]
    assert (found.bound_by, seconds(found)) == ("input", pytest.approx(8_000_000 / 224 / 1000))
    # Two hosts with four chips each have as many devices, and other virtual CPUs.
    found = evaluated(work, "v5e-16", forward={**FORWARD, "bytes_accessed": 1.0, "flops": 1.0}).protocols["official"]
    assert seconds(found) == pytest.approx(8_000_000 / 4 / 112 / 1000)


def test_an_image_of_fine_tuning_takes_three_passes_and_is_decoded_once(evaluated):
    found = evaluated({"finetune-100": Work(forward=800_000, trained=8_000_000)})
    assert seconds(found.protocols["finetune-100"]) == pytest.approx((100_000 + 3 * 1_000_000) * 40e6 / 819e9)
    assert any("3 forward passes" in note for note in found.notes)
    small = {**FORWARD, "bytes_accessed": 1.0, "flops": 1.0}
    found = evaluated({"finetune-100": Work(trained=8_000_000)}, forward=small)
    assert seconds(found.protocols["finetune-100"]) == pytest.approx(8_000_000 / 224 / 1000)


def test_a_fit_is_shared_by_the_devices_and_computed_in_float32(evaluated):
    found = evaluated({"cached": Work(flops=8 * 197e12 * 60)}).protocols["cached"]
    assert (found.bound_by, seconds(found)) == ("fit", pytest.approx(60))
    found = evaluated({"cached": Work(flops=4 * 156e12 * 60)}, "a100-4").protocols["cached"]
    assert seconds(found) == pytest.approx(60)


def test_a_cpu_decodes_and_computes_one_after_the_other(evaluated):
    found = evaluated({"features": Work(forward=1_600_000), "cached": Work(flops=1e15)}, "cpu")
    flops = encoder_cost.forward_cost(resolve(PLANNED).encoder, 224).flops
    passing = 1_600_000 * flops / 16 / machines.CORE_FLOPS_PER_SECOND + 1_600_000 / 16 / 1000
    assert seconds(found.protocols["features"]) == pytest.approx(passing)
    fit = 1e15 / 16 / machines.CORE_FLOPS_PER_SECOND
    assert seconds(found.protocols["cached"]) == pytest.approx(fit)
    assert found.values["total_hours"] == pytest.approx((passing + fit) / 3600)
    assert found.values["price"] == pytest.approx(found.values["total_hours"] * 0.77694)
    assert "at best" not in found.summary
    assert "at best" in evaluated({"features": Work(forward=1)}).summary


def test_every_figure_of_an_evaluation_says_where_it_is_from(evaluated):
    compiled, counted = evaluated({"knn": Work(flops=1e12)}), evaluated({"knn": Work(flops=1e12)}, forward=None)
    assert compiled.sources["forward_flops"] == "compiled"
    assert counted.sources["forward_flops"] == "computed"
    assert counted.values["forward_flops"] == encoder_cost.forward_cost(resolve(PLANNED).encoder, 224).flops
    for found in (compiled, counted):
        assert set(found.sources) == {*found.values, "protocols"}
        assert json.loads(json.dumps(found.as_json()))["protocols"]["knn"]["fit_flops"] == 1e12


def test_times_are_in_the_unit_that_people_use():
    assert [evaluation.duration(hours) for hours in (1234.56, 1, 0.5, 1 / 3600, 0)] == [
        "1,234.6 hours",
        "1.0 hours",
        "30.0 minutes",
        "1.0 seconds",
        "0.0 seconds",
    ]


A_WEEK_ON_A_CPU = {"official": Work(forward=160_000_000)}


@pytest.mark.parametrize(
    ("work", "machine", "limits", "said"),
    [
        (A_WEEK_ON_A_CPU, "cpu", {}, r"takes \d+\.\d hours on cpu, more than a day: take --eval-accelerator \S+ \("),
        (A_WEEK_ON_A_CPU, "cpu", {"option": "--accelerator"}, "more than a day: take --accelerator "),
        (A_WEEK_ON_A_CPU, "v5e-1", {"timeout_hours": 1.5}, "more than --timeout-hours 1.5: take --eval-accelerator "),
        ({"official": Work(forward=10**12)}, "cpu", {}, "more than a day: no machine ends in time; take fewer"),
        ({}, "t4-1", {}, "needs 40 GB of memory, and a host of t4-1 has 32: take --eval-accelerator "),
        ({}, "v5e-8", {"disk_gb": 100}, "features take 150 GB of disk, more than --disk-gb 100: take --disk-gb 150"),
    ],
)
def test_an_evaluation_that_cannot_end_is_refused_with_what_could(evaluated, work, machine, limits, said):
    (problem,) = evaluated(work, machine, **limits).problems
    assert "\n" not in problem
    assert re.search(said, problem), problem


def test_the_machine_that_is_named_is_the_cheapest_that_ends_in_time(evaluated):
    (problem,) = evaluated(A_WEEK_ON_A_CPU, "cpu").problems
    named = problem.partition("--eval-accelerator ")[2].partition(" ")[0]
    best = evaluated(A_WEEK_ON_A_CPU, named, forward=None)
    assert not best.problems
    for one in accelerators.ACCELERATORS.values():
        other = evaluated(A_WEEK_ON_A_CPU, one.name, forward=None)
        if one.hosts == 1 and not other.problems and not one.name.startswith("v2"):
            assert best.values["price"] <= other.values["price"] + 0.01
    # us-central2 has the v4 and no other TPU.
    (problem,) = evaluated(A_WEEK_ON_A_CPU, "cpu", region="us-central2").problems
    assert not re.search("--eval-accelerator v[235]", problem)


def test_a_forward_pass_too_large_for_a_device_names_a_smaller_batch(evaluated):
    (problem,) = evaluated({}, forward={"fits": False}).problems
    assert "256 images at once do not fit into a device of v5e-8: take --set linear_eval.batch_size=128" in problem
    # Of a GPU the compiler says nothing.
    assert not evaluated({}, "a100-1", forward={"fits": False}).problems


def test_a_forward_pass_is_compiled_once_for_its_shapes(tmp_path, monkeypatch):
    asked = []

    def compile_program(hlo, device, python):
        asked.append(device.topology)
        return {**FORWARD, "arguments_bytes": 1e8, "results_bytes": 0, "temp_bytes": 1e9, "code_bytes": 1e7}

    monkeypatch.setattr(evaluation, "compile_program", compile_program)
    monkeypatch.setattr(programs, "lower_forward", lambda config, images: programs.Program(b"", {}, (), ()))

    def evaluated(accelerator, *overrides, version="1", python=Path("python")):
        machine = accelerators.get(accelerator)
        return evaluation.make_evaluation_estimate(
            resolve(PLANNED, overrides),
            machine,
            estimate.assumptions(PLANNED, machine),
            Limits(),
            python=python,
            cache=tmp_path,
            version=version,
        )

    evaluated("v5e-8")
    for accelerator, override in (
        ("v5e-8", "linear_eval.seed=3"),
        ("v5e-8", "linear_eval.protocols=official"),
        ("v5e-4", "epochs=10"),
        ("l4-1", "seed=2"),
        ("cpu", "seed=2"),
    ):
        evaluated(accelerator, override)
    assert asked == ["v5e:2x4"]
    assert evaluated("v5e-8", python=None).sources["forward_bytes"] == "compiled"
    for number, changed in enumerate((("v3-8",), ("v5e-8", "linear_eval.batch_size=64"), ("v5e-8", "depth=101")), 2):
        evaluated(*changed)
        assert len(asked) == number
    evaluated("v5e-8", version="2")
    assert len(asked) == 5


def test_sogclr_plan_shows_pretraining_and_then_the_evaluation(tmp_path, monkeypatch, capsys):
    stored = {"state_bytes": 300e6, "collectives": [], **COMPILED}
    monkeypatch.setattr(estimate, "_lower_and_compile", lambda *args: stored)
    monkeypatch.setattr(compiler, "tpu_python", lambda project: None)
    arguments = ["plan", "--preset", PLANNED, "--accelerator", "v5e-8", "--root", str(tmp_path)]
    assert cli.main(arguments) == 0
    said = capsys.readouterr().out
    assert said.index(f"{PLANNED} on v5e-8") < said.index("its evaluation on v5e-8") < said.index("whole evaluation")
    assert "cannot end" not in said
    official = ["--eval-accelerator", "cpu", "--set", "linear_eval.protocols=official"]
    assert cli.main([*arguments, *official]) == 0
    assert "cannot end: the evaluation takes" in capsys.readouterr().out
    assert cli.main([*arguments, *official, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["fits"]
    assert found["total_hours"] == pytest.approx(found["steps"] * found["step_seconds"] / 3600)
    evaluation = found["evaluation"]
    assert (evaluation["accelerator"], evaluation["fits"]) == ("cpu", False)
    assert evaluation["total_hours"] > 24
    assert evaluation["protocols"]["official"]["forward_images"] >= 90 * 1_281_167
    assert cli.main([*arguments, "--disk-gb", "1", "--json"]) == 0
    assert "--disk-gb 1: take --disk-gb" in json.loads(capsys.readouterr().out)["evaluation"]["problems"][0]

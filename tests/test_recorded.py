"""What a change of the code's shape must not change: bits of training, fingerprints, machines. Compared with recorded values.

A failed comparison shows the new value. A change that is meant to alter one writes it into goldens/recorded.json, and says so in
the CHANGELOG.
"""

import contextlib
import io
import json
import platform
import re
from pathlib import Path

import pytest
import tensorflow as tf
import yaml

from beam_jobs.build_tfrecords import build
from pipelines.cli import main
from trainer.presets import resolve
from trainer.train import train

RECORDED = Path(__file__).parent / "goldens" / "recorded.json"
TINY = ("depth=10", "width_multiplier=0.0625", "image_size=16", "global_batch_size=20", "epochs=2", "linear_eval.batch_size=8")
WAYS = {
    "SogCLR, momentum": (),
    "SimCLR, LARS": ("loss=nt_xent", "optimizer=lars", "learning_rate_scaling=sqrt"),
    "SogCLR of the official code, AdamW": (
        *("variant=tf_official", "optimizer=adamw", "blur=true", "precision=bfloat16", "projection_layers=3"),
        *("crop_interpolation=bicubic", "cache=true", "epochs=1"),
    ),
}
ACCELERATORS = ("cpu", "t4-1", "v5e-1", "v5e-8", "v2-8")


def machine() -> str:
    """Returns what the bits of training depend on besides the code: the same on machines of the same kind."""
    about = Path("/proc/cpuinfo")
    flags = re.search(r"^flags\s*:(.*)$", about.read_text() if about.exists() else "", re.MULTILINE)
    vector = sorted(one for one in (flags[1].split() if flags else ()) if re.match("avx|fma|amx", one))
    return f"{platform.machine()} {' '.join(vector)}, TensorFlow {tf.__version__}"


def states(data: Path, folder: Path) -> dict[str, str]:
    """Returns the state_sha256 of each of WAYS after training on `data`."""
    return {
        name: train(resolve("demo", [*TINY, *ways]), str(data), str(folder / str(number))).state_sha256
        for number, (name, ways) in enumerate(WAYS.items())
    }


def fingerprint(raw: Path, folder: Path) -> str:
    return build(str(raw), str(folder / "built"), num_shards=2).fingerprint


def machines(folder: Path) -> dict[str, object]:
    """Returns by accelerator the machines, limits and retries that stand in the compiled pipeline."""
    found = {}
    for name in ACCELERATORS:
        output = folder / f"{name}.yaml"
        with contextlib.redirect_stdout(io.StringIO()):
            arguments = ["--preset", "demo", "--accelerator", name, "--tag", "recorded", "--output", str(output)]
            assert main(["compile", *arguments]) == 0
        spec, *_ = yaml.safe_load_all(output.read_text())
        given = {
            component: one.get("inputDefinitions", {}).get("parameters", {}) for component, one in spec["components"].items()
        }
        found[name] = {
            "jobs": {component: job(one) for component, one in given.items() if "worker_pool_specs" in one},
            "retries": {task: one.get("retryPolicy") for dag in dags(spec) for task, one in dag["tasks"].items()},
        }
    return found


def job(parameters: dict) -> dict[str, object]:
    """Returns what a custom job is made with, without the code that its container runs."""
    values = {name: one["defaultValue"] for name, one in parameters.items() if "defaultValue" in one}
    pools = values.pop("worker_pool_specs")
    for pool in pools:
        container = pool["container_spec"]
        pool["container_spec"] = {"image_uri": container["image_uri"], "env": [one["name"] for one in container.get("env", ())]}
    return {**values, "pools": pools}


def dags(spec: dict) -> list[dict]:
    return [one["dag"] for one in (spec["root"], *spec["components"].values()) if "dag" in one]


@pytest.fixture(scope="module")
def recorded() -> dict:
    return json.loads(RECORDED.read_text())


@pytest.mark.thorough
def test_training_ends_with_the_recorded_bits_on_a_machine_of_the_recorded_kind(recorded, dataset, tmp_path):
    if machine() != recorded["machine"]:
        pytest.skip(f"recorded on {recorded['machine']}, not on {machine()}")
    assert states(dataset, tmp_path) == recorded["states"]


def test_the_same_raw_data_have_the_recorded_fingerprint(recorded, raw, tmp_path):
    assert fingerprint(raw, tmp_path) == recorded["fingerprint"]


@pytest.mark.thorough
def test_the_compiled_pipeline_asks_for_the_recorded_machines(recorded, tmp_path):
    assert json.loads(json.dumps(machines(tmp_path))) == recorded["machines"]

"""Files and folders on gs:// as TensorFlow's own file system has them, with Cloud Storage on a loopback address."""

import json
import sys

import pytest
from support.processes import run_module
from vertex import container
from vertex.scenarios import SCENARIOS

from trainer.presets import resolve
from trainer.train import train

TINY = ["depth=10", "width_multiplier=0.0625", "global_batch_size=24", "epochs=1", "warmup_epochs=0", "base_learning_rate=1"]
FILES = [
    "README.md",
    "encoder.keras",
    "encoder.py",
    "encoder.safetensors",
    *(f"saved_model/{name}" for name in ("fingerprint.pb", "saved_model.pb")),
    *(f"saved_model/variables/variables.{name}" for name in ("data-00000-of-00001", "index")),
]


def in_a_world(module: str, argument: str) -> str:
    """Runs a module in a network in which loopback addresses are Google's hosts; returns what it printed."""
    return run_module("vertex.world", sys.executable, "-m", module, argument)


@pytest.mark.parametrize("name", SCENARIOS)
def test_on_cloud_storage(name):
    in_a_world("vertex.scenarios", name)


pytestmark = [pytest.mark.cloud, pytest.mark.skipif(bool(container.possible()), reason=container.possible())]


@pytest.fixture(scope="module")
def answers(dataset, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pretrained")
    train(resolve("demo", TINY), str(dataset), str(folder), preset="demo")
    return json.loads(in_a_world("vertex.on_gs", str(folder)).splitlines()[-1])


def test_a_file_is_sent_once_and_nothing_is_copied_or_deleted(answers):
    assert answers["whole"] == ["result.json"]
    assert all("upload" in request for request in answers["written"]), answers["written"]


def test_a_deletion_whose_answer_is_lost_ends_no_training(answers):
    assert answers["saved"] == [f"gs://bucket/saved/checkpoint-0000000{step}.npz" for step in (1, 2)]
    assert answers["kept"] == ["checkpoint-00000002.npz"]


def test_an_export_that_failed_in_the_middle_is_made_again(answers):
    said, files = answers["half"]
    assert "Error" in said
    assert "README.md" not in files
    for attempt in ("again", "replaced"):
        assert answers[attempt] == ["gs://bucket/export", FILES]
        assert not any("rewriteTo" in request for request in answers[f"{attempt} requests"]), "a folder cannot be renamed at once"
    assert answers["loads"] == ["images", "serving_default"]


def test_a_folder_without_a_lease_is_told_by_its_files(answers):
    assert answers["claimed"].endswith("-1")
    assert answers["beside"].endswith("-2")

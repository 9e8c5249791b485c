"""The evaluation on several replicas, and after the process died anywhere."""

import json
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from support.copies import Copies
from support.datasets import write_dataset

from eval.measure.evaluation import read_evaluation
from eval.measure.features import read_features
from eval.measure.linear_eval import linear_eval
from trainer.presets import resolve
from trainer.shared.errors import UserError
from trainer.train import train

TINY = ["depth=10", "width_multiplier=0.0625", "image_size=16", "global_batch_size=24", "epochs=1", "warmup_epochs=0"]
SETTINGS = [
    "linear_eval.protocols=cached,knn,online,official,global-objective",
    "linear_eval.batch_size=5",
    "linear_eval.l2_penalties=1e-1,1e-2",
    "linear_eval.official_batch_size=12",
    "linear_eval.official_epochs=3",
    "linear_eval.official_base_learning_rate=2",
    "linear_eval.knn_k=7",
]


@pytest.fixture(scope="module")
def odd(tmp_path_factory) -> Path:
    """A dataset whose counts of images, 47 and 17, divide by nothing."""
    folder = tmp_path_factory.mktemp("odd")
    write_dataset(folder, train=47)
    return folder


@pytest.fixture(scope="module")
def checkpoint(odd, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pretrained")
    train(resolve("demo", [*TINY, "base_learning_rate=1"]), str(odd), str(folder))
    return folder


@pytest.fixture(scope="module")
def evaluated(copies: Copies, odd, checkpoint, tmp_path_factory) -> Path:
    """The folder where `support.evaluations` leaves the evaluations on 1, 2 and 4 replicas."""
    folder = tmp_path_factory.mktemp("evaluations")
    copies.printed_by("support.evaluations", odd, checkpoint, folder, "1,2,4", *SETTINGS)
    return folder


@pytest.mark.thorough
@pytest.mark.parametrize("replicas", [2, 4])
def test_several_replicas_measure_what_one_measures(evaluated, replicas):
    """Features and classifiers to float's accuracy, accuracies to the digit."""
    one, several = (read_evaluation(str(evaluated / str(count))) for count in (1, replicas))
    for split, count in {"train": 47, "validation": 17}.items():
        expected, found = (read_features(of.result["features"][split]["path"]).whole() for of in (one, several))
        assert len(found.labels) == count
        np.testing.assert_array_equal(found.labels, expected.labels)
        np.testing.assert_allclose(found.values, expected.values, rtol=1e-4, atol=1e-5)
    assert [row.column for row in several.rows] == ["cached", "untrained_cached", "knn", "online", "official"]
    assert [row.top_1 for row in several.rows] == [row.top_1 for row in one.rows]
    assert [row.settings for row in several.rows] == [row.settings for row in one.rows]
    expected, found = (of.measurement("global-objective").values for of in (one, several))
    assert found == pytest.approx(expected, rel=1e-4)
    # An optimum is found to a gradient of 1e-5, and the last step of SGD to rounding.
    for name, tolerance in {"classifier": 3e-3, "classifier-official": 1e-4}.items():
        expected, found = (np.load(evaluated / str(count) / f"{name}.npz") for count in (1, replicas))
        np.testing.assert_allclose(found["weights"], expected["weights"], rtol=0, atol=tolerance)
    tuned, expected = (np.load(evaluated / str(count) / "fine-tuned.npz") for count in (replicas, 1))
    for name in expected.files:
        scale = np.abs(expected[name]).max() + 1e-6
        np.testing.assert_allclose(tuned[name], expected[name], rtol=0, atol=2e-3 * scale, err_msg=name)


class Replicas:
    """A strategy, as far as it is looked at before anything is computed."""

    num_replicas_in_sync = 5


@pytest.mark.parametrize(
    ("protocol", "setting", "near"),
    [("official", "official_batch_size=12", "10 or 15"), ("finetune-100", "finetune_batch_size=47", "45 or 50")],
)
def test_replicas_that_do_not_divide_a_batch_are_refused_before_anything_is_computed(
    odd, checkpoint, tmp_path, protocol, setting, near
):
    settings = [*SETTINGS, f"linear_eval.protocols={protocol}", f"linear_eval.{setting}"]
    with pytest.raises(UserError, match=f"linear_eval.{setting} does not divide over 5 replicas: take {near}"):
        linear_eval(str(odd), str(checkpoint), str(tmp_path / "out"), settings, strategy=Replicas())
    assert not (tmp_path / "out").exists()


def endings(copies: Copies, places: str, folder: Path, data: Path, checkpoint: Path) -> list[tuple[int, str, str]]:
    """Returns exit code, stdout and stderr of eval.task, run again for each of `places`, which `support.ending` explains."""
    given = ["--data", data, "--checkpoint", checkpoint, "--output", folder / "out"]
    settings = [*SETTINGS, "linear_eval.protocols=official,finetune-100", "linear_eval.finetune_batch_size=12"]
    settings += ["linear_eval.finetune_100_epochs=2"]
    copies.printed_by("support.ending", "eval.task", places, folder / "endings.json", *given, "--set", *settings)
    return json.loads((folder / "endings.json").read_text())


@pytest.mark.thorough
def test_killed_anywhere_it_ends_with_the_bits_of_one_left_alone(copies, odd, checkpoint, tmp_path):
    """SIGKILL in the forward pass, in a fit, three times in `official`, once while it saves; SIGTERM there and in fine-tuning."""
    (tmp_path / "alone").mkdir()
    (alone,) = endings(copies, "end", tmp_path / "alone", odd, checkpoint)
    (tmp_path / "killed").mkdir()
    places = [
        "kill:features:5",
        "kill:fit:2",
        "kill:official:2",
        "torn:official/checkpoint-00000006",
        "kill:official:4",
        "kill:official:3",
        "term:official:1",
        "kill:finetune-100:2",
        "term:finetune-100:2",
        "end",
    ]
    *ended, finished = endings(copies, ",".join(places), tmp_path / "killed", odd, checkpoint)
    assert [code for code, _, _ in ended] == [{"kill": -9, "torn": -9, "term": 75}[one.split(":")[0]] for one in places[:-1]]
    # From step 9, which the attempt before saved; from the beginning it would be step 2.
    assert "stopped at step 11 of 12 of supervised training, saved " in ended[6][2]
    assert "start the same command again to continue" in ended[6][2]
    assert alone[0] == finished[0] == 0
    for name in ("classifier", "classifier-official", "classifier-finetune-100"):
        expected, found = ((tmp_path / how / "out" / f"{name}.npz").read_bytes() for how in ("alone", "killed"))
        assert found == expected, name
    expected, found = (read_evaluation(str(tmp_path / how / "out")) for how in ("alone", "killed"))
    assert found.result["metrics"] == expected.result["metrics"]
    left = {path.name.partition("-")[0] for path in (tmp_path / "killed" / "out").iterdir()}
    assert left == {"features", "predictions.parquet", "classifier.npz", "classifier", "result.json"}


def test_a_disk_that_is_full_in_the_middle_of_features_costs_one_line_and_nothing_else(copies, odd, checkpoint, tmp_path):
    """A limit on the size of files in the place of a full disk: the index of the features fits into it, a part does not."""
    given = ["--data", odd, "--checkpoint", checkpoint, "--output", tmp_path / "out", "--set", *SETTINGS]
    command = ["eval.task", *given, "linear_eval.protocols=cached"]
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1500, 1500))  # noqa: E731
    full = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True, preexec_fn=limit)
    assert full.returncode == 2
    said = [line for line in full.stderr.splitlines() if line.startswith("error: ")]
    assert len(said) == 1
    assert "part-00000.parquet cannot be written: " in said[0]
    assert "Traceback" not in full.stderr
    assert not list(tmp_path.glob("out/*/*"))
    assert copies.run(*command).returncode == 0

"""The protocol `global-objective`: what it measures and records, what it needs, and how a report and a comparison show it."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from eval import task
from eval.measure.evaluation import read_evaluation
from eval.measure.features import load_encoder
from eval.measure.linear_eval import linear_eval
from eval.measure.objective import global_objective
from eval.measure.projections import load_head, projected_views, views_digest
from eval.measure.protocols import PROTOCOLS, Sizes, disk_bytes, memory_bytes, work_of
from eval.show.comparison import as_dict, as_text, compare, read_candidate, to_html
from eval.show.report import write_report
from trainer import checkpoint as checkpoints
from trainer.preemption import PreemptedError
from trainer.presets import resolve
from trainer.shared.errors import UserError
from trainer.shared.records import read_manifest
from trainer.train import train

TINY = ["depth=10", "width_multiplier=0.0625", "image_size=16", "global_batch_size=24", "epochs=1", "warmup_epochs=0"]
SETTINGS = [
    "linear_eval.protocols=global-objective",
    "linear_eval.l2_penalties=1e-2",
    "linear_eval.control_images=0",
    "linear_eval.batch_size=7",
]
NAMES = ["", "_standard_error", "_alignment", "_contrast", "_gradient_norm", "_gradient_norm_standard_error"]


@pytest.fixture(scope="module")
def checkpoint(dataset, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pretrained")
    train(resolve("demo", [*TINY, "base_learning_rate=1"]), str(dataset), str(folder), preset="demo")
    return folder


@pytest.fixture(scope="module")
def evaluated(dataset, checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluated")
    phases: dict[str, tuple[int, int]] = {}

    def on_progress(phase: str, done: int = 0, total: int = 0, text: str = "") -> None:
        phases[phase] = done, total

    result = linear_eval(str(dataset), str(checkpoint), str(folder), SETTINGS, on_progress=on_progress)
    return result, folder, phases


def without(checkpoint: Path, part: str, folder: Path) -> Path:
    """A copy of a checkpoint that lacks a part, as an imported encoder does."""
    found = checkpoints.open_checkpoint(str(checkpoint))
    arrays = {name: array for name, array in found.arrays.items() if not name.startswith(part)}
    folder.mkdir()
    (folder / "config.json").write_bytes((checkpoint / "config.json").read_bytes())
    checkpoints.save(str(folder), replace(found, arrays=arrays), keep=1)
    return folder


def test_it_is_the_objective_of_the_projections_of_every_training_image(evaluated, dataset, checkpoint):
    result, folder, phases = evaluated
    config = resolve("demo", [*TINY, *SETTINGS])
    stored = checkpoints.open_checkpoint(str(checkpoint))
    data = str(dataset), read_manifest(str(dataset))
    projections = projected_views(load_encoder(config, stored), load_head(config, stored), config, *data, str(folder))
    assert len(projections) == 48
    expected = global_objective(projections, config.loss.temperature)
    assert result.metrics["eval/global_objective"] == expected.value
    assert result.metrics["eval/global_objective_gradient_norm"] == expected.gradient_norm > 0
    assert result.metrics["eval/global_objective_alignment"] == expected.alignment
    assert result.metrics["eval/global_objective_contrast"] == expected.contrast
    assert result.metrics["eval/global_objective_standard_error"] == 0
    assert result.metrics["eval/global_objective_gradient_norm_standard_error"] == 0
    assert phases["projections of two views, images"] == (48, 48)
    assert phases["global objective, images"] == (48, 48)


def test_the_result_has_it_beside_the_accuracies(evaluated):
    result, folder, _ = evaluated
    written = json.loads((folder / "result.json").read_text())
    assert [row["protocol"] for row in written["accuracies"]] == ["cached"]
    (row,) = written["measurements"]
    assert row["protocol"] == "global-objective"
    assert list(written["metrics"]) == sorted(result.metrics)
    assert {f"eval/{name}": value for name, value in row["values"].items()}.items() <= written["metrics"].items()
    config = resolve("demo", [*TINY, *SETTINGS])
    conditions = {"temperature": config.loss.temperature, "images": 48, "views": views_digest(config)}
    assert row["conditions"] == conditions
    assert row["settings"] == {"anchors": 48}
    evaluation = read_evaluation(str(folder))
    assert evaluation.measurement("global-objective") == result.measurements[0]
    assert evaluation.measurement("global-objective").headline == result.metrics["eval/global_objective"]
    assert list(evaluation.predictions) == ["cached"]


def test_an_evaluation_of_an_earlier_version_has_none(evaluated, tmp_path):
    _, folder, _ = evaluated
    written = json.loads((folder / "result.json").read_text())
    del written["measurements"]
    (tmp_path / "result.json").write_text(json.dumps(written))
    (tmp_path / "predictions.parquet").write_bytes((folder / "predictions.parquet").read_bytes())
    assert read_evaluation(str(tmp_path)).measurements == ()


def test_an_evaluation_that_stops_in_it_keeps_the_projections_and_ends_with_the_same_numbers(
    evaluated, dataset, checkpoint, tmp_path
):
    result, folder, _ = evaluated
    begun: list[str] = []

    def evaluate(output: str, stop_in: str = "", **how):
        begun.clear()
        return linear_eval(
            str(dataset),
            str(checkpoint),
            str(tmp_path / output),
            SETTINGS,
            workspace=str(tmp_path / "work"),
            features_dir=str(folder),
            on_progress=lambda phase, *_: begun.append(phase),
            should_stop=lambda: bool(stop_in) and stop_in in begun[-1],
        )

    with pytest.raises(PreemptedError, match="stopped in the global objective, kept the projections"):
        evaluate("first", "global objective")
    assert evaluate("first").measurements[0].values == result.measurements[0].values
    evaluate("second")
    assert not any("objective" in phase or "fit" in phase for phase in begun), "the finished rows are in the workspace"


def test_a_part_that_a_checkpoint_lacks_is_named_before_anything_is_computed(dataset, checkpoint, tmp_path):
    for part, protocol in {"projection": "global-objective", "classifier": "online"}.items():
        folder = without(checkpoint, part, tmp_path / part)
        given = [*SETTINGS, f"linear_eval.protocols=knn,{protocol}"]
        said = f"has no {part}, which the protocol {protocol} needs: set linear_eval.protocols=knn"
        with pytest.raises(UserError, match=said):
            linear_eval(str(dataset), str(folder), str(tmp_path / "out"), given)
    assert not (tmp_path / "out").exists()


def test_one_training_image_has_no_objective(dataset):
    manifest = read_manifest(str(dataset))
    one = replace(manifest.splits["train"], records=1)
    few = replace(manifest, splits={**manifest.splits, "train": one})
    with pytest.raises(UserError, match="global-objective needs two training images or more"):
        PROTOCOLS["global-objective"].check(resolve("demo", SETTINGS), few, 1)


def test_an_estimate_counts_its_passes_products_memory_and_disk():
    sizes, anchors, n, d = Sizes(1_281_167, 50_000, 1000, 2048), 100_000, 1_281_167, 128
    without, with_it = (
        resolve("sogclr_imagenet_r50_b512", [f"linear_eval.protocols={protocols}"])
        for protocols in ("cached", "global-objective")
    )
    assert list(work_of(with_it, sizes)) == ["features", "cached", "untrained", "global-objective"]
    work = work_of(with_it, sizes)["global-objective"]
    assert work.forward == 2 * n
    assert work.flops == 4 * d * (2 * anchors) * (2 * n + 2 * anchors / 10)
    assert disk_bytes(with_it, sizes) - disk_bytes(without, sizes) == n * 2 * d * 4
    more = memory_bytes(with_it, sizes) - memory_bytes(without, sizes)
    assert n * 2 * d * 4 < more < 5e9
    small = replace(sizes, train=20_000)
    assert work_of(with_it, small)["global-objective"].flops == 4 * d * 40_000 * 80_000


def test_the_command_prints_it(dataset, checkpoint, evaluated, capsys):
    result, folder, _ = evaluated
    given = ["--data", str(dataset), "--checkpoint", str(checkpoint), "--output", str(folder), "--set", *SETTINGS]
    task.main(given)
    lines = capsys.readouterr().out.splitlines()
    assert f"{'global objective':46} {result.metrics['eval/global_objective']:.6g}" in lines
    assert sum(line.startswith("global objective") for line in lines) == len(NAMES)


@pytest.fixture(scope="module")
def candidate(evaluated):
    return read_candidate("1" * 32, str(evaluated[1]), {})


def test_the_report_shows_it_in_a_section_of_its_own(evaluated, dataset, tmp_path):
    result, folder, _ = evaluated
    page = write_report(str(tmp_path / "report.html"), str(folder), str(dataset)).html
    assert '<section id="measurement-global-objective">' in page
    for name in NAMES:
        assert f"{result.metrics[f'eval/global_objective{name}']:.6g}" in page
    assert "lower is better. Compare only values of the same dataset and the same images, temperature, views" in page


def changed(candidate, number: int, value: float, seed: int = 0, **conditions):
    """The candidate as another run with another objective."""
    (row,) = candidate.evaluation.measurements
    row = replace(row, values={**row.values, "global_objective": value}, conditions={**row.conditions, **conditions})
    evaluation = replace(candidate.evaluation, measurements=(row,))
    return replace(candidate, run_id=str(number) * 32, evaluation=evaluation, settings={**candidate.settings, "seed": seed})


def test_a_comparison_shows_it_side_by_side_with_its_mean_over_seeds(candidate):
    found = compare([changed(candidate, seed, value, seed) for seed, value in enumerate((-0.125, -0.25, -0.375))])
    text, page = "\n".join(as_text(found)), to_html(found)
    for said in ("-0.125", "-0.25", "-0.375", "standard error", "gradient norm", "temperature=", "views="):
        assert said in text
        assert said in page
    line = "global-objective, 3 seeds (00000000, 11111111, 22222222): mean -0.25, standard deviation 0.125, 95% -0.56"
    assert line in text
    assert line in page
    assert "not comparable" not in text
    as_json = json.loads(json.dumps(as_dict(found)))
    assert [one["measurements"][0]["values"]["global_objective"] for one in as_json["runs"].values()] == [-0.125, -0.25, -0.375]
    assert as_json["not_comparable"] == []


def test_a_comparison_says_which_runs_are_not_comparable_and_why(candidate):
    hotter = changed(candidate, 2, -0.5, temperature=0.7, views="other")
    elsewhere = replace(candidate.evaluation, result={**candidate.evaluation.result, "dataset_fingerprint": "f" * 64})
    found = compare([candidate, hotter, replace(candidate, run_id="3" * 32, evaluation=elsewhere)])
    text = "\n".join(as_text(found))
    usual = candidate.evaluation.measurements[0].conditions
    why = f"not comparable by global-objective: temperature {usual['temperature']} and 0.7, views {usual['views']} and other"
    assert why in text
    assert why in to_html(found)
    assert f"not comparable by global-objective: dataset {candidate.evaluation.fingerprint[:12]} and ffffffffffff" in text
    assert len(as_dict(found)["not_comparable"]) == 3


def test_a_run_without_it_is_compared_by_its_accuracies(candidate):
    none = replace(candidate, run_id="2" * 32, evaluation=replace(candidate.evaluation, measurements=()))
    found = compare([candidate, none])
    assert len([line for line in as_text(found) if line.startswith("11111111") and "views=" in line]) == 1
    assert not [line for line in as_text(found) if line.startswith("22222222") and "views=" in line]
    assert "measurement-" not in to_html(compare([none, replace(none, run_id="4" * 32)]))
    assert np.isfinite(candidate.evaluation.measurements[0].headline)

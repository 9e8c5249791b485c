"""The evidence, with made-up runs: which runs are due, and the numbers that the page states of those that there are."""

import json
import subprocess
import sys
import tarfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from benchmarks import evidence, evidence_page, evidence_runs
from benchmarks.evidence_runs import ARMS, Cell, Run, best_rate, due, planned, rates_to_try

from trainer.presets import resolve

PLANNED = len(list(planned()))


def line(run: Run) -> dict:
    """SimCLR's objective is higher the smaller its batch is, and so is SogCLR .9's, a tenth as much. 0.3 is the best rate."""
    of_arm = {"SimCLR": 8.0, "SogCLR .9": 0.8}.get(run.cell.arm, 0.0) / run.cell.batch
    value = -0.5 + of_arm + 0.01 * run.seed * (run.cell.batch == 16) + (0.0 if run.rate == 0.3 else 0.1)
    temperatures = ("0.1", "0.05") if run.group == "untrained" else (f"{run.cell.temperature:g}",)
    objective = {one: {"value": value, "alignment": 0.5, "contrast": 0.0, "gradient_norm": 0.25} for one in temperatures}
    measured = {"objective": objective, "top_1": 0.5, "knn_top_1": 0.4}
    return {
        "name": run.name,
        "group": run.group,
        "arm": run.cell.arm,
        "batch": run.cell.batch,
        "temperature": run.cell.temperature,
        "seed": run.seed,
        "rate": run.rate,
        "settings": list(run.settings),
        "dataset_fingerprint": "f" * 64,
        "code": "c" * 40,
        "command": run.command,
        "own_objective": value,
        **measured,
        "with_statistics_of_large_batches": measured,
        **({} if run.group == "untrained" else {"steps": 10, "state_sha256": "5" * 64, "core_minutes": 1.5}),
    }


def all_runs() -> list[dict]:
    """Does every run as soon as it is due."""
    done: dict[str, dict] = {}
    while run := next(due(done), None):
        done[run.name] = line(run)
    return list(done.values())


EVERY = all_runs()


def page(tmp_path: Path, lines: list[dict]) -> str:
    (tmp_path / "results.md").write_text(f"# Before\n\n{evidence_page.BEGIN}\nold\n{evidence_page.END}\n\nAfter\n")
    (tmp_path / "evidence.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    given = ["--results", str(tmp_path / "evidence.jsonl"), "--docs", str(tmp_path)]
    subprocess.run([sys.executable, evidence.__file__, "page", *given], check=True)
    return (tmp_path / "results.md").read_text()


def test_a_rate_is_probed_until_it_has_worse_neighbours():
    assert list(rates_to_try({})) == [0.15, 0.3, 0.6]
    assert list(rates_to_try({0.15: 1.0, 0.6: 3.0})) == [0.3]
    assert list(rates_to_try({0.15: 1.0, 0.3: 0.5, 0.6: 3.0})) == []
    assert list(rates_to_try({0.15: 0.4, 0.3: 0.5, 0.6: 3.0})) == [0.075]
    # The largest diverged, the best is next to it.
    assert list(rates_to_try({0.15: 0.4, 0.3: 0.3, 0.6: 0.2, 1.2: None})) == []
    assert best_rate({0.6: 0.2, 1.2: None}) == 0.6


def test_a_cells_rate_is_chosen_by_its_own_probes_only():
    """Cells of other arms, batches and temperatures have other best rates."""
    cell, other = Cell("SimCLR", 16, 0.1), Cell("SimCLR", 128, 0.1)
    lines = {}
    for own, best in ((cell, 0.15), (other, 0.6)):
        for rate in (0.075, 0.15, 0.3, 0.6, 1.2):
            run = Run("probe", own, 100, rate, (), f"-r{rate:g}")
            lines[run.name] = line(run) | {"own_objective": abs(rate - best)}
    rates = {run.cell: run.rate for run in due(lines) if run.group == "main"}
    assert rates == {cell: 0.15, other: 0.6}


def test_at_a_temperature_of_05_probes_are_as_long_as_runs():
    cell = Cell("SimCLR", 16, 0.05)
    by_rate = {one["rate"]: one for one in EVERY if one["group"] == "probe" and evidence_runs.cell_of(one) == cell}
    assert set(by_rate) == {0.15, 0.3, 0.6}
    assert all(" epochs=60 " in one["command"] for one in by_rate.values())
    short = {one["name"]: one | {"command": one["command"].replace(" epochs=60 ", " epochs=10 ")} for one in by_rate.values()}
    assert evidence_runs.chosen_rate(by_rate.values(), cell) == 0.3
    assert evidence_runs.chosen_rate(short.values(), cell) is None


def test_a_run_at_a_rate_that_was_not_chosen_has_a_row_of_its_own_and_is_no_part_of_a_mean():
    cell = Cell("SimCLR", 16, 0.05)
    other = line(Run("main", cell, 0, 0.6, (), "-r0.6"))
    text, without = (evidence_page.tables(lines, PLANNED) for lines in ([*EVERY, other], EVERY))
    assert f"{PLANNED} of {PLANNED} runs are recorded" in text
    assert "| 0.05 | 16 | SimCLR | 0.6 | 0 | 0.1000 | 0.000 | 50.0 |" in text
    assert "### Runs at other rates" not in without
    before, _, _ = without.partition("### Every run")
    assert all(row in text for row in before.splitlines())


def test_half_the_rate_is_half_of_what_the_probes_chose():
    halves = [one for one in EVERY if one["group"] == evidence_runs.HALF_RATE]
    assert {(one["arm"], one["batch"], one["rate"]) for one in halves} == {(arm, 16, 0.15) for arm in evidence_runs.GHOST_ARMS}
    assert all("base_learning_rate=0.15" in one["command"] for one in halves)


def test_a_run_is_due_once_and_not_when_it_is_done():
    names = [run.name for run in due({})]
    assert len(names) == len(set(names))
    assert all(name.startswith(("probe", "untrained")) for name in names)
    done = {one["name"]: one for one in EVERY}
    assert not list(due(done))
    dropped = done.pop("main-SogCLR.1-t0.05-b16-r0.3-s2")
    assert [run.name for run in due(done)] == [dropped["name"]]


def test_every_command_is_one_that_the_trainer_takes():
    from trainer.presets import resolve

    for one in EVERY:
        settings = one["command"].partition(" --set ")[2].split()
        config = resolve(evidence_runs.PRESET, settings)
        assert config.optimizer.global_batch_size == one["batch"]
        assert config.run.seed == one["seed"]


def test_the_page_states_what_the_runs_reached(tmp_path):
    text = page(tmp_path, EVERY)
    assert text.startswith("# Before\n")
    assert text.endswith("\n\nAfter\n")
    assert "old" not in text
    assert f"{PLANNED} of {PLANNED} runs are recorded" in text
    # SimCLR: 8/16 - 8/128 = .4375, and .01 more for each seed: mean .4475, t = 4.303 over sqrt(3) times a deviation of .01.
    row = next(row for row in text.splitlines() if row.startswith("| 0.1 | F | SimCLR |"))
    assert "| SimCLR | +0.4475 ([+0.4227, +0.4723], 3) | +0.3937 ([+0.3937, +0.3937], 3) |" in row
    assert "| F | 16 | 0.0100 ± 0.0100 (3) |" in text
    assert all(one["name"] in text for one in EVERY)
    assert (tmp_path / "images" / "evidence.png").read_bytes().startswith(b"\x89PNG")


def test_few_negatives_are_compared_with_many_in_batches_of_one_size():
    def moved(one: dict) -> dict:
        """SimCLR loses .2 by few negatives, and .01 more with each seed."""
        by = 0.2 + 0.01 * one["seed"] if one["group"] == evidence_runs.CONTRAST and one["arm"] == "SimCLR" else 0.0
        value = one["objective"]["0.1"] | {"value": one["objective"]["0.1"]["value"] + by} if by else None
        return one | ({"objective": {"0.1": value}} if by else {})

    text = evidence_page.tables(list(map(moved, EVERY)), PLANNED)
    _, _, section = text.partition("### Contrast of 16 images in a batch of 128")
    row = next(row for row in section.splitlines() if row.startswith("| F | SimCLR |"))
    assert row == (
        "| F | SimCLR | -0.2275 ± 0.0100 (3) | +0.2100 ([+0.1852, +0.2348], 3) | +0.2100 ([+0.1852, +0.2348], 3) | "
        "+0.2100 ([+0.1852, +0.2348], 3) |"
    )
    commands = [one["command"] for one in EVERY if one["group"] == evidence_runs.CONTRAST]
    assert len(commands) == 15
    assert all("global_batch_size=128 " in one and one.endswith("contrast_batch_size=16") for one in commands)


def test_ghosts_with_views_together_have_rows_of_their_own_and_are_no_part_of_the_plan():
    ghosts = [one for one in EVERY if one["group"] == "ghost"]
    together = [{**one, "group": evidence_runs.VIEWS_TOGETHER, "name": f"together-{one['name']}"} for one in ghosts]
    text = evidence_page.tables([*EVERY, *together], PLANNED)
    assert f"{PLANNED} of {PLANNED} runs are recorded" in text
    for how in ("", ", views together"):
        assert f"| SimCLR | 128, ghosts of 16{how} |" in text
    assert "| SimCLR | 16, half the rate |" in text
    done = {one["name"]: one for one in [*EVERY, *together]}
    assert list(due(done)) == []


def test_the_page_is_made_of_any_runs():
    """Each first run of a group stands alone; two thirds, at random, have gaps everywhere."""
    chosen = np.random.default_rng(0).random(len(EVERY)) < 0.66
    firsts = {one["group"]: one for one in reversed(EVERY)}
    for subset in [[], *([one] for one in firsts.values()), [EVERY[i] for i in np.flatnonzero(chosen)]]:
        text = evidence_page.tables(subset, PLANNED)
        assert "nan" not in text
        assert all(one["name"] in text for one in subset)
        if evidence_page.main_runs(subset):
            evidence_page.figure(subset)


def test_a_probe_that_diverged_is_listed_and_its_neighbour_may_be_the_best():
    cell = Cell("SimCLR", 16, 0.1)
    others = [line(Run("probe", cell, 100, rate, (), f"-r{rate:g}")) for rate in (0.15, 0.3)]
    diverged = line(Run("probe", cell, 100, 0.6, (), "-r0.6"))
    del diverged["state_sha256"]
    diverged |= {"objective": None, "own_objective": None, "diverged": "the loss is nan"}
    text = evidence_page.tables([*others, diverged], PLANNED)
    assert "| the loss is nan |" in text
    row = next(row for row in text.splitlines() if row.startswith("| 0.1 | 16 | SimCLR | 0.3 | 0.15: "))
    assert row.endswith("; 0.6: diverged |")
    assert "nan" not in text.replace("the loss is nan", "")


def test_a_difference_is_of_seeds_that_both_arms_have():
    main = [one for one in EVERY if one["group"] in ("main", "probe") and one["temperature"] == 0.1]
    fewer = [one for one in main if not (one["arm"] == "SogCLR .9" and one["batch"] == 16 and one["seed"] == 2)]
    rows = evidence_page.tables(fewer, PLANNED).splitlines()
    row = next(row for row in rows if row.startswith("| 0.1 | F | SimCLR |"))
    assert ", 3) | +0.3937 (" in row
    assert ", 2) | " in row


def test_a_page_without_the_marks_is_left_alone(tmp_path):
    (tmp_path / "results.md").write_text("mine")
    with pytest.raises(ValueError, match="must have the lines"):
        evidence_page.write_page([], 1, tmp_path)
    assert (tmp_path / "results.md").read_text() == "mine"


def _tar(path: Path, members: Iterable[tuple[str, bytes]]) -> bytes:
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            (path.parent / "member").write_bytes(content)
            archive.add(path.parent / "member", name)
    return path.read_bytes()


def test_the_first_images_of_each_class_are_kept(tmp_path):
    raw = tmp_path / "raw"
    raw.mkdir()
    classes = [
        (f"n0000000{number}.tar", _tar(tmp_path / "class", [(f"{i}.JPEG", b"%d" % (10 * number + i) * 600) for i in range(4)]))
        for number in range(2)
    ]
    _tar(tmp_path / "train", classes)
    (tmp_path / "train").rename(raw / "ILSVRC2012_img_train.tar")
    (raw / "labels.txt").write_text("labels")
    evidence.first_images(raw, tmp_path / "few", 3)
    found = {}
    with tarfile.open(tmp_path / "few" / "ILSVRC2012_img_train.tar") as train:
        for member in train:
            with tarfile.open(fileobj=train.extractfile(member)) as images:
                found[member.name] = {image.name: images.extractfile(image).read() for image in images}
    assert found == {
        f"n0000000{number}.tar": {f"{i}.JPEG": b"%d" % (10 * number + i) * 600 for i in range(3)} for number in range(2)
    }
    assert (tmp_path / "few" / "labels.txt").read_text() == "labels"


def test_the_loss_of_batches_is_that_of_nt_xent():
    """Batches of all images are one batch, whose loss is known in float64."""
    projections = np.random.default_rng(0).normal(size=(8, 2, 4)).astype(np.float32)
    z = projections.astype(np.float64) / np.linalg.norm(projections.astype(np.float64), axis=2, keepdims=True)
    flat = z.reshape(16, 4)
    logits = np.where(np.eye(16, dtype=bool), -np.inf, flat @ flat.T / 0.1)
    positives = logits[np.arange(16), np.arange(16) ^ 1]
    expected = 0.1 * np.mean(np.log(np.exp(logits).sum(axis=1)) - positives)
    assert evidence.loss_of_batches(projections, 8, 0.1, decoupled=False) == pytest.approx(expected, rel=1e-5)


def test_each_arm_has_a_colour_of_its_own():
    assert len(set(evidence_page.COLOURS.values())) == len(ARMS)


IN_PARTS = [one for one in EVERY if one["group"] in ("ghost", evidence_runs.CONTRAST) and one["seed"] == 0]


@pytest.mark.parametrize("run", IN_PARTS, ids=lambda run: run["name"])
def test_statistics_of_large_batches_are_taken_without_parts(run):
    config = resolve(evidence_runs.PRESET, run["command"].partition("--set ")[2].split())
    assert config.optimizer.ghost_batch_size in evidence_runs.GHOST_SIZES or config.optimizer.contrast_batch_size == 16
    whole = evidence.in_large_batches(config).optimizer
    assert (whole.ghost_batch_size, whole.contrast_batch_size) == (0, 0)

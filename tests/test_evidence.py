"""The page of the evidence, of made-up runs: the numbers that stand in it, whatever runs there are."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from benchmarks import evidence, evidence_page

IMAGES = 203
"""No multiple of 8."""


def line(run: evidence.Run, right: int) -> dict:
    """A run that classifies the first `right` images rightly, but for one a seed."""
    correct = np.arange(IMAGES) < right
    correct[run.seed % 100] = False
    return {
        "name": run.name,
        "group": run.group,
        "arm": run.arm,
        "batch": run.batch,
        "seed": run.seed,
        "top_1": float(correct.mean()),
        "untrained_top_1": 0.3,
        "steps": 10,
        "state_sha256": "5" * 64,
        "dataset_fingerprint": "f" * 64,
        "code": "c" * 40,
        "core_minutes": 1.5,
        "command": run.command,
        "correct": np.packbits(correct).tobytes().hex(),
    }


def right_of(run: evidence.Run) -> int:
    """SogCLR has 150 at every batch; SimCLR less the smaller the batch is."""
    return {"simclr": 130 - 320 // run.batch, "decoupled": 140}.get(run.arm, 150)


def page(tmp_path: Path, lines: list[dict]) -> str:
    (tmp_path / "results.md").write_text(f"# Before\n\n{evidence_page.BEGIN}\nold\n{evidence_page.END}\n\nAfter\n")
    (tmp_path / "evidence.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    given = ["--results", str(tmp_path / "evidence.jsonl"), "--docs", str(tmp_path)]
    subprocess.run([sys.executable, evidence.__file__, "page", *given], check=True)
    return (tmp_path / "results.md").read_text()


def test_the_page_says_what_the_runs_came_to(tmp_path):
    every = list(evidence.runs())
    text = page(tmp_path, [line(run, right_of(run)) for run in every])
    assert text.startswith("# Before\n")
    assert text.endswith("\n\nAfter\n")
    assert "old" not in text
    assert f"{len(every)} of {len(every)} runs are recorded, 36 of them of the three arms at a temperature of .3." in text
    # 149 of 203 at each seed; 109 of SimCLR at batch 16, 126.5 at 128, where it counts down to 127.
    assert "| 73.4 ± 0.0 (3) [" in text
    assert "| SogCLR | 0, 1, 2 | +0.0 [+0.0, +0.0] |  |" in text
    assert "| SimCLR | 0, 1, 2 | -8.9 [" in text
    assert "| 16 | SimCLR | 3 | +19.7 [" in text
    # 109 of 203 at batch 16, at both temperatures.
    assert text.count("| 16 | 53.7 ± 0.0 (3) [") == 2
    assert "### From batch 128 to batch 16, at a temperature of .1" in text
    assert all(run.name in text for run in every)
    assert (tmp_path / "images" / "evidence.png").read_bytes().startswith(b"\x89PNG")


def test_the_page_is_made_of_any_runs(tmp_path):
    """Each run alone is as good as its whole group; two thirds, at random, have gaps everywhere."""
    every = list(evidence.runs())
    chosen = np.random.default_rng(0).random(len(every)) < 0.66
    subsets = [[], every[:1], every[:4], every[4:5], every[4:10:5], every[-1:], [every[i] for i in np.flatnonzero(chosen)]]
    for subset in subsets:
        lines = [line(run, right_of(run)) for run in subset]
        text = evidence_page.tables(lines, len(every))
        assert text.startswith(f"{len(subset)} of {len(every)} runs are recorded")
        assert "nan" not in text
        assert all(run.name in text for run in subset)
        if evidence_page.of_group(lines, "main"):
            evidence_page.figure(lines)


def test_what_a_small_batch_loses_is_told_of_the_same_seeds():
    """A third seed that SogCLR lacks at the large batch, where all fare worse, moves no loss of SogCLR's."""
    main = [line(run, right_of(run)) for run in evidence.runs() if run.group == "main" and run.seed < 2]
    late = [
        line(run, 40)
        for run in evidence.runs()
        if run.group == "main" and run.seed == 2 and (run.arm, run.batch) != ("sogclr", 128)
    ]
    text = evidence_page.tables([*main, *late], 76)
    assert "| SogCLR | 0, 1 | +0.0 [+0.0, +0.0] |  |" in text
    row = next(row for row in text.splitlines() if row.startswith("| SimCLR | 0, 1, 2 | -5.9 ["))
    # Of the two seeds that SogCLR has too.
    assert "| +8.9 [" in row


def test_a_page_without_the_marks_is_left_alone(tmp_path):
    (tmp_path / "results.md").write_text("mine")
    with pytest.raises(ValueError, match="must have the lines"):
        evidence_page.write_page([], 1, tmp_path)
    assert (tmp_path / "results.md").read_text() == "mine"

"""Measurements that are not accuracies: as rows of a report, and side by side with a note on which runs are comparable."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from eval.measure.evaluation import Evaluation, Measurement
from eval.measure.statistics import mean_and_spread


def values_in_words(row: Measurement) -> list[tuple[str, str]]:
    """Returns name and text of each number, first of the one that stands for the protocol, whose words the others' names lack."""
    values = {row.name: row.headline, **row.values}
    return [(name.removeprefix(f"{row.name}_").replace("_", " "), _number(value)) for name, value in values.items()]


def about(row: Measurement) -> str:
    """Returns the conditions and settings of a measurement in words."""
    return ", ".join(f"{name}={value}" for name, value in {**row.conditions, **row.settings}.items())


def protocols_of(runs: Mapping[str, Evaluation]) -> list[str]:
    """Returns the protocols of all measurements of `runs`, which are evaluations by the name of their run."""
    return list(dict.fromkeys(row.protocol for one in runs.values() for row in one.measurements))


def side_by_side(runs: Mapping[str, Evaluation], protocol: str) -> list[tuple[str, ...]]:
    """Returns a table of the runs that have a measurement by `protocol`: the names of the columns, then a row for each run."""
    rows = _of_protocol(runs, protocol)
    names = [name for name, _ in values_in_words(next(iter(rows.values())))]
    cells = [(run, *(text for _, text in values_in_words(row)), about(row)) for run, row in rows.items()]
    return [("run", *names, "settings"), *cells]


def not_comparable(runs: Mapping[str, Evaluation], protocol: str) -> list[str]:
    """Returns a line for each pair of runs whose measurements differ in their dataset or in another condition."""
    lines = []
    for (first, a), (second, b) in itertools.combinations(_of_protocol(runs, protocol).items(), 2):
        ours, theirs = ({"dataset": runs[run].fingerprint[:12], **row.conditions} for run, row in ((first, a), (second, b)))
        differing = [f"{name} {ours[name]} and {theirs[name]}" for name in ours if ours[name] != theirs[name]]
        if differing:
            lines.append(f"{first} and {second} are not comparable by {protocol}: {', '.join(differing)}")
    return lines


def over_seeds(runs: Mapping[str, Evaluation], groups: Sequence[Sequence[str]], protocol: str) -> list[str]:
    """Returns a line for each of `groups` of two or more runs, which differ only in their seeds."""
    rows = _of_protocol(runs, protocol)
    lines = []
    for names in groups:
        if len(names) < 2 or any(name not in rows for name in names):
            continue
        found = mean_and_spread([rows[name].headline for name in names])
        mean, deviation, low, high = map(_number, (found.mean, found.deviation, *found.interval))
        short = ", ".join(name.split()[0] for name in names)
        lines.append(f"{found.count} seeds ({short}): mean {mean}, standard deviation {deviation}, 95% {low} to {high} (t)")
    return lines


def as_dicts(one: Evaluation) -> list[dict[str, Any]]:
    """Returns the measurements of an evaluation in types that JSON has."""
    return [asdict(row) for row in one.measurements]


def _of_protocol(runs: Mapping[str, Evaluation], protocol: str) -> dict[str, Measurement]:
    return {run: row for run, one in runs.items() if (row := one.measurement(protocol))}


def _number(value: float) -> str:
    return f"{value:.6g}"

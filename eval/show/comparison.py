"""The comparison of several evaluated runs: accuracies by protocol, paired tests, different settings, curves."""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from eval.measure.evaluation import Accuracy, Evaluation, read_evaluation
from eval.measure.protocols import description_of
from eval.measure.statistics import MeanAndSpread, PairedTest, holm_correction, mean_and_spread, paired_test
from eval.show import figures, measurements
from eval.show.figures import SERIES, History, Interval
from trainer.checkpoint import run_folder
from trainer.config import pretraining_of
from trainer.folder import read_config
from trainer.shared.errors import UserError
from trainer.shared.page import Section, between, percent, render

_NAMED_SETTINGS = 2
"""Maximum number of different settings in the name of a run."""
_TEMPLATE = Path(__file__).with_name("comparison.html.jinja")


@dataclass(frozen=True)
class Candidate:
    """A run in a comparison."""

    run_id: str
    evaluation: Evaluation
    settings: Mapping[str, Any]
    """Settings of pretraining and evaluation by name, and everything else that the result depends on."""
    history: History


@dataclass(frozen=True)
class Pair:
    """The paired test of two runs on the same validation images."""

    protocol: str
    first: str
    """Name of the first run."""
    second: str
    """Name of the second run."""
    test: PairedTest
    corrected_p_value: float
    """p-value corrected for the number of pairs of this protocol (Holm 1979)."""


@dataclass(frozen=True)
class Comparison:
    runs: Mapping[str, Candidate]
    """Runs by name. The name contains the settings in which the run differs from the others."""
    differences: Mapping[str, Sequence[Any]]
    """Settings that differ: name -> values, one for each run."""
    pairs: Sequence[Pair]
    apart: Sequence[tuple[str, str]]
    """Pairs of runs that were evaluated on different images, and therefore are not tested."""
    seeds: Mapping[tuple[str, str], MeanAndSpread]
    """(protocol, names of runs) -> top-1 accuracy over these runs, which differ only in their seeds."""
    alike: Sequence[Sequence[str]]
    """Names of runs that differ only in their seeds, in groups. A run without another like it is a group of its own."""

    @property
    def protocols(self) -> list[str]:
        rows = [row for one in self.runs.values() for row in one.evaluation.rows if row.encoder == "pretrained"]
        return list(dict.fromkeys(row.protocol for row in rows))

    @property
    def evaluations(self) -> dict[str, Evaluation]:
        return {name: one.evaluation for name, one in self.runs.items()}


def read_candidate(run_id: str, folder: str, history: History) -> Candidate:
    """Reads a run from the folder of its evaluation. Raises UserError if the evaluation or its checkpoint's config is missing."""
    evaluation = read_evaluation(folder)
    config, about = read_config(run_folder(evaluation.result["checkpoint"]))
    settings = pretraining_of(config)
    settings |= {f"linear_eval.{name}": value for name, value in evaluation.result["linear_eval"].items()}
    rest = {
        "preset": about.get("preset", ""),
        "step of the checkpoint": evaluation.result["step"],
        "dataset": evaluation.fingerprint[:12],
        "pretrained on": evaluation.result["pretraining_dataset_fingerprint"][:12],
        "code of pretraining": about.get("code_version", ""),
    }
    return Candidate(run_id, evaluation, settings | rest, history)


def compare(candidates: Sequence[Candidate]) -> Comparison:
    """Compares runs. Raises UserError if there are fewer than two, or the same run twice."""
    ids = [one.run_id for one in candidates]
    if len(set(ids)) < 2 or len(set(ids)) < len(ids):
        raise UserError(f"{', '.join(run_id[:8] for run_id in ids)}: name two runs or more, each once")
    names = list(dict.fromkeys(name for one in candidates for name in one.settings))
    by_name = {name: [one.settings.get(name) for one in candidates] for name in names}
    differences = {name: values for name, values in by_name.items() if any(value != values[0] for value in values)}
    naming = [name for name in differences if name not in ("preset", "dataset", "pretrained on", "code of pretraining")]
    runs = {
        " ".join([one.run_id[:8], *(f"{name}={one.settings.get(name)}" for name in naming[:_NAMED_SETTINGS])]): one
        for one in candidates
    }
    pairs: list[Pair] = []
    apart = []
    for (first, a), (second, b) in itertools.combinations(runs.items(), 2):
        if a.evaluation.fingerprint != b.evaluation.fingerprint:
            apart.append((first, second))
            continue
        for protocol in a.evaluation.predictions:
            if a.evaluation.row(protocol) and b.evaluation.row(protocol) and protocol in b.evaluation.predictions:
                test = paired_test(a.evaluation.correct(protocol), b.evaluation.correct(protocol))
                pairs.append(Pair(protocol, first, second, test, test.p_value))
    alike = _alike(runs)
    return Comparison(runs, differences, _corrected(pairs), apart, dict(_over_seeds(runs, alike)), alike)


def _corrected(pairs: Sequence[Pair]) -> list[Pair]:
    corrected = []
    for protocol in dict.fromkeys(pair.protocol for pair in pairs):
        family = [pair for pair in pairs if pair.protocol == protocol]
        p_values = holm_correction([pair.test.p_value for pair in family])
        corrected += [replace(pair, corrected_p_value=p_value) for pair, p_value in zip(family, p_values, strict=True)]
    return corrected


def _alike(runs: Mapping[str, Candidate]) -> list[list[str]]:
    groups: dict[str, list[str]] = {}
    for name, one in runs.items():
        groups.setdefault(repr({key: value for key, value in one.settings.items() if key != "seed"}), []).append(name)
    return list(groups.values())


def _over_seeds(runs: Mapping[str, Candidate], alike: Sequence[Sequence[str]]) -> Iterable[tuple[tuple[str, str], MeanAndSpread]]:
    for names in alike:
        evaluations = [runs[name].evaluation for name in names]
        for protocol in evaluations[0].predictions:
            rows = [row for evaluation in evaluations if (row := evaluation.row(protocol))]
            if len(rows) == len(names) > 1:
                yield (protocol, ", ".join(name.split()[0] for name in names)), mean_and_spread([row.top_1 for row in rows])


def as_dict(found: Comparison) -> dict[str, Any]:
    """Returns a comparison in types that JSON has."""
    measured = measurements.protocols_of(found.evaluations)
    return {
        "runs": {
            name: {
                "run_id": one.run_id,
                "accuracies": [asdict(row) for row in one.evaluation.rows],
                "measurements": measurements.as_dicts(one.evaluation),
            }
            for name, one in found.runs.items()
        },
        "differences": {name: dict(zip(found.runs, values, strict=True)) for name, values in found.differences.items()},
        "pairs": [asdict(pair) for pair in found.pairs],
        "not_tested": [list(names) for names in found.apart],
        "not_comparable": [line for one in measured for line in measurements.not_comparable(found.evaluations, one)],
        "seeds": [{"protocol": protocol, "runs": names, **asdict(one)} for (protocol, names), one in found.seeds.items()],
    }


def as_text(found: Comparison) -> list[str]:
    """Returns a comparison as lines for a terminal."""
    lines = []
    for protocol in found.protocols:
        rows = [
            (name, percent(row.top_1), between(row.top_1_interval), row.settings_in_words)
            for name, row in _of_protocol(found, protocol)
        ]
        lines += [*_aligned([(protocol, "top-1", "95% interval", "settings"), *rows]), ""]
        if tests := _tests(found, protocol):
            head = (f"{protocol}, run A", "run B", "A - B, points", "95% interval", "p", "p, Holm")
            lines += [*_aligned([head, *tests]), ""]
    lines += [_why_not(names) for names in found.apart]
    lines += [f"{protocol}, {line}" for protocol in found.protocols for line in _seeds(found, protocol)]
    for protocol in measurements.protocols_of(found.evaluations):
        (_, *names), *cells = measurements.side_by_side(found.evaluations, protocol)
        lines += ["", *_aligned([(protocol, *names), *cells]), *_on_measurement(found, protocol)]
    if found.differences:
        table = [["setting", *(name.split()[0] for name in found.runs)]]
        table += [[name, *map(str, values)] for name, values in found.differences.items()]
        lines += ["", *_aligned(table)]
    return lines


def to_html(found: Comparison) -> str:
    """Returns a comparison as a self-contained HTML page."""
    sections = [_section(found, protocol) for protocol in found.protocols]
    for protocol in measurements.protocols_of(found.evaluations):
        head, *rows = measurements.side_by_side(found.evaluations, protocol)
        kinds = ["", *("number" for _ in head[2:]), "small"]
        content = {"columns": list(zip(head, kinds, strict=True)), "rows": rows, "notes": _on_measurement(found, protocol)}
        title = protocol.replace("-", " ").capitalize()
        sections.append(Section(f"measurement-{protocol}", title, description_of(protocol), content))
    if found.apart:
        lede = "A paired test needs the same validation images."
        sections.append(Section("apart", "Not tested", lede, {"reasons": list(map(_why_not, found.apart))}))
    names = [name.split()[0] for name in found.runs]
    if found.differences:
        columns = [("setting", ""), *((name, "code") for name in names)]
        content = {"columns": columns, "rows": [(name, *values) for name, values in found.differences.items()]}
        sections.append(Section("settings", "Different settings", "All other settings are equal.", content))
    if drawn := figures.curves({name: one.history for name, one in found.runs.items()}):
        lede = "Metrics recorded during pretraining. Different losses have different scales."
        svg = figures.svg(drawn, "curves of pretraining of all runs")
        sections.append(Section("curves", "Pretraining", lede, {"svg": svg}))
    runs = {"facts": [(name, (one.run_id,)) for name, one in zip(names, found.runs.values(), strict=True)]}
    sections.append(Section("runs", "The runs", "IDs of the linear-eval runs, as sogclr ui shows them.", runs))
    presets = dict.fromkeys(str(one.settings["preset"]) for one in found.runs.values() if one.settings["preset"])
    title = f"{len(found.runs)} runs compared"
    return render(_TEMPLATE, title=title, sections=sections, presets=", ".join(presets))


def _section(found: Comparison, protocol: str) -> Section:
    rows = _of_protocol(found, protocol)
    colours = dict(zip(found.runs, SERIES * len(found.runs), strict=False))
    intervals = [Interval(name, row.top_1, *row.top_1_interval, colours[name]) for name, row in rows]
    said = "; ".join(f"{one.label} {percent(one.value)}" for one in intervals)
    columns = [
        ("run", ""),
        ("top-1", "strong"),
        ("95% interval", "number"),
        ("top-5", "number"),
        ("untrained", "number"),
        ("settings", "small"),
    ]
    cells = [_cells(name, row, found.runs[name].evaluation.row(protocol, "untrained")) for name, row in rows]
    shown = [number for number in range(len(columns)) if any(row[number] for row in cells)]
    content = {
        "svg": figures.svg(figures.intervals(intervals), f"top-1 by {protocol} with intervals: {said}"),
        "columns": [columns[number] for number in shown],
        "rows": [[row[number] for number in shown] for row in cells],
        "tests": _tests(found, protocol),
        "seeds": _seeds(found, protocol),
    }
    return Section(f"protocol-{protocol}", f"Top-1, {protocol}", description_of(protocol), content)


def _cells(name: str, row: Accuracy, control: Accuracy | None) -> tuple[str, ...]:
    top_5 = "" if row.top_5 is None else percent(row.top_5)
    untrained = percent(control.top_1) if control else ""
    return name, percent(row.top_1), between(row.top_1_interval), top_5, untrained, row.settings_in_words


def _of_protocol(found: Comparison, protocol: str) -> list[tuple[str, Accuracy]]:
    return [(name, row) for name, one in found.runs.items() if (row := one.evaluation.row(protocol))]


def _tests(found: Comparison, protocol: str) -> list[tuple[str, ...]]:
    """Returns a row for each pair: both names, difference in points, interval, p-value and corrected p-value."""
    return [
        (
            pair.first,
            pair.second,
            _points(pair.test.difference),
            " to ".join(map(_points, pair.test.interval)),
            f"{pair.test.p_value:.2g}",
            f"{pair.corrected_p_value:.2g}",
        )
        for pair in found.pairs
        if pair.protocol == protocol
    ]


def _points(difference: float) -> str:
    return f"{100 * difference:+.1f}"


def _seeds(found: Comparison, protocol: str) -> list[str]:
    """Returns a line for each group of runs that differ only in their seeds."""
    return [
        f"{one.count} seeds ({names}): mean {one.mean:.1%}, standard deviation {100 * one.deviation:.1f} points, "
        f"95% {between(one.interval)} (t)"
        for (of_protocol, names), one in found.seeds.items()
        if of_protocol == protocol
    ]


def _on_measurement(found: Comparison, protocol: str) -> list[str]:
    lines = measurements.not_comparable(found.evaluations, protocol)
    return lines + [f"{protocol}, {line}" for line in measurements.over_seeds(found.evaluations, found.alike, protocol)]


def _why_not(names: tuple[str, str]) -> str:
    return f"{names[0]} and {names[1]} were evaluated on different datasets: no paired test"


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]

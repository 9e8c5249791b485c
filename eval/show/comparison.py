"""Several evaluated runs beside each other: accuracies by protocol, paired tests, settings that differ, curves."""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from eval.measure.evaluation import Accuracy, Evaluation, read_evaluation
from eval.measure.protocols import description_of
from eval.measure.statistics import MeanAndSpread, PairedTest, holm_correction, mean_and_spread, paired_test
from eval.show import figures, page
from eval.show.figures import SERIES, History, Interval
from eval.show.words import settings_in_words
from trainer.checkpoint import run_folder
from trainer.shared.errors import UserError
from trainer.train import read_config

_NAMED_SETTINGS = 2
"""That differ, as many as go into the name of a run."""


@dataclass(frozen=True)
class Candidate:
    """A run that is compared."""

    run_id: str
    evaluation: Evaluation
    settings: Mapping[str, Any]
    """All of pretraining's, and what else a result depends on."""
    history: History


@dataclass(frozen=True)
class Pair:
    """Two runs on the same validation images."""

    protocol: str
    first: str
    second: str
    """Names of the runs."""
    test: PairedTest
    corrected_p_value: float
    """For the number of pairs of this protocol, by Holm's method (1979)."""


@dataclass(frozen=True)
class Comparison:
    runs: Mapping[str, Candidate]
    """By a name that says what is special about each."""
    differences: Mapping[str, Sequence[Any]]
    """Settings that differ, by name, with each run's."""
    pairs: Sequence[Pair]
    apart: Sequence[tuple[str, str]]
    """Pairs of runs that were not evaluated on the same images, and so are not tested."""
    seeds: Mapping[tuple[str, str], MeanAndSpread]
    """By protocol and the names of the runs: top-1 of runs that differ in nothing but their seed."""

    @property
    def protocols(self) -> list[str]:
        rows = [row for one in self.runs.values() for row in one.evaluation.rows if row.encoder == "pretrained"]
        return list(dict.fromkeys(row.protocol for row in rows))


def read_candidate(run_id: str, folder: str, history: History) -> Candidate:
    """Returns a run by what its evaluation left in `folder`. Raises UserError where that, or its checkpoint's config, is gone."""
    evaluation = read_evaluation(folder)
    config, about = read_config(run_folder(evaluation.result["checkpoint"]))
    settings = {name: value for name, value in asdict(config).items() if name != "linear_eval"}
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
    """Compares runs. Raises UserError where there are fewer than two, or one twice."""
    ids = [one.run_id for one in candidates]
    if len(set(ids)) < 2 or len(set(ids)) < len(ids):
        raise UserError(f"{', '.join(run_id[:8] for run_id in ids)}: name two runs or more, each once")
    names = list(dict.fromkeys(name for one in candidates for name in one.settings))
    by_name = {name: [one.settings.get(name) for one in candidates] for name in names}
    differences = {name: values for name, values in by_name.items() if any(value != values[0] for value in values)}
    told = [name for name in differences if name not in ("preset", "dataset", "pretrained on", "code of pretraining")]
    runs = {
        " ".join([one.run_id[:8], *(f"{name}={one.settings.get(name)}" for name in told[:_NAMED_SETTINGS])]): one
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
    return Comparison(runs, differences, _corrected(pairs), apart, dict(_over_seeds(runs)))


def _corrected(pairs: Sequence[Pair]) -> list[Pair]:
    corrected = []
    for protocol in dict.fromkeys(pair.protocol for pair in pairs):
        family = [pair for pair in pairs if pair.protocol == protocol]
        p_values = holm_correction([pair.test.p_value for pair in family])
        corrected += [replace(pair, corrected_p_value=p_value) for pair, p_value in zip(family, p_values, strict=True)]
    return corrected


def _over_seeds(runs: Mapping[str, Candidate]) -> Iterable[tuple[tuple[str, str], MeanAndSpread]]:
    groups: dict[str, list[str]] = {}
    for name, one in runs.items():
        groups.setdefault(repr({key: value for key, value in one.settings.items() if key != "seed"}), []).append(name)
    for names in groups.values():
        evaluations = [runs[name].evaluation for name in names]
        for protocol in evaluations[0].predictions:
            rows = [row for evaluation in evaluations if (row := evaluation.row(protocol))]
            if len(rows) == len(names) > 1:
                yield (protocol, ", ".join(name.split()[0] for name in names)), mean_and_spread([row.top_1 for row in rows])


def as_dict(found: Comparison) -> dict[str, Any]:
    """Returns a comparison as what JSON can say."""
    return {
        "runs": {
            name: {"run_id": one.run_id, "accuracies": [asdict(row) for row in one.evaluation.rows]}
            for name, one in found.runs.items()
        },
        "differences": {name: dict(zip(found.runs, values, strict=True)) for name, values in found.differences.items()},
        "pairs": [asdict(pair) for pair in found.pairs],
        "not_tested": [list(names) for names in found.apart],
        "seeds": [{"protocol": protocol, "runs": names, **asdict(one)} for (protocol, names), one in found.seeds.items()],
    }


def as_text(found: Comparison) -> list[str]:
    """Returns a comparison as lines for a terminal."""
    lines = []
    for protocol in found.protocols:
        rows = [
            (name, page.percent(row.top_1), page.between(*row.top_1_interval), settings_in_words(row.settings))
            for name, row in _of_protocol(found, protocol)
        ]
        lines += [*_aligned([(protocol, "top-1", "95% interval", "settings"), *rows]), ""]
        tests = [
            (pair.first, pair.second, _points(pair.test.difference), _interval(pair.test), *_p_values(pair))
            for pair in found.pairs
            if pair.protocol == protocol
        ]
        if tests:
            head = (f"{protocol}, the first", "less the second", "points", "95% interval", "p", "p, Holm")
            lines += [*_aligned([head, *tests]), ""]
    lines += [_why_not(names) for names in found.apart]
    for (protocol, names), one in found.seeds.items():
        lines.append(f"{protocol}, {one.count} seeds ({names}): {_mean(one)}")
    if found.differences:
        table = [["what differs", *(name.split()[0] for name in found.runs)]]
        table += [[name, *map(str, values)] for name, values in found.differences.items()]
        lines += ["", *_aligned(table)]
    return lines


def to_html(found: Comparison) -> str:
    """Returns a comparison as a page that needs no other file."""
    sections = [_accuracies(found, protocol) for protocol in found.protocols]
    if found.apart:
        body = "".join(page.paragraph(_why_not(names)) for names in found.apart)
        sections.append(page.Section("apart", "Not tested", "A paired test needs the same validation images.", body))
    if found.differences:
        head = ["setting", *(page.text(name.split()[0]) for name in found.runs)]
        rows = [[page.text(name), *map(page.code, values)] for name, values in found.differences.items()]
        sections.append(page.Section("settings", "What differs", "All other settings are equal.", page.table(head, rows)))
    if drawn := figures.curves({name: one.history for name, one in found.runs.items()}):
        svg = figures.svg(drawn, "curves of the runs over each other")
        lede = "What was recorded while pretraining. Losses of different kinds have different scales."
        sections.append(page.Section("curves", "Pretraining", lede, page.chart(svg, wide=True)))
    listed = [(name.split()[0], page.code(one.run_id)) for name, one in found.runs.items()]
    sections.append(page.Section("runs", "The runs", "Of the linear eval, as sogclr ui shows them.", page.facts(listed)))
    presets = ", ".join(dict.fromkeys(str(one.settings["preset"]) for one in found.runs.values() if one.settings["preset"]))
    header = f'<p class="eyebrow"><b>{page.text(presets)}</b></p><h1 class="name">{len(found.runs)} runs compared</h1>'
    return page.page(f"{len(found.runs)} runs compared", header, sections, "Made by sogclr.")


def _accuracies(found: Comparison, protocol: str) -> page.Section:
    rows, intervals = [], []
    colours = dict(zip(found.runs, SERIES * len(found.runs), strict=False))
    for name, row in _of_protocol(found, protocol):
        control = found.runs[name].evaluation.row(protocol, "untrained")
        rows.append(
            [
                page.text(name),
                f"<b>{page.percent(row.top_1)}</b>",
                page.between(*row.top_1_interval),
                page.percent(row.top_5) if row.top_5 is not None else "",
                page.percent(control.top_1) if control else "",
                f"<small>{page.text(settings_in_words(row.settings))}</small>" if row.settings else "",
            ]
        )
        intervals.append(Interval(name, row.top_1, *row.top_1_interval, colours[name]))
    said = "; ".join(f"{one.label} {page.percent(one.value)}" for one in intervals)
    body = page.chart(figures.svg(figures.intervals(intervals), f"top-1 by {protocol} with intervals: {said}"))
    head = ["run", "top-1", "95% interval", "top-5", "untrained", "settings"]
    shown = [column for column in range(len(head)) if any(row[column] for row in rows)]
    body += page.table(
        [head[column] for column in shown],
        [[row[column] for column in shown] for row in rows],
        numbers=[number for number, column in enumerate(shown) if 1 <= column <= 4],
    )
    tests = [
        [
            page.text(pair.first),
            page.text(pair.second),
            f"<b>{_points(pair.test.difference)}</b>",
            _interval(pair.test),
            *_p_values(pair),
        ]
        for pair in found.pairs
        if pair.protocol == protocol
    ]
    if tests:
        head = ["the first", "less the second", "points", "95% interval", "p", "p, Holm"]
        body += "<h3>On the same images</h3>" + page.table(head, tests, numbers=(2, 3, 4, 5))
        body += page.note(
            "Interval of the difference: bootstrap over images. p: McNemar's exact test, two-sided; by Holm's method, corrected "
            "for the number of pairs. It says nothing of other seeds."
        )
    for (of_protocol, names), one in found.seeds.items():
        if of_protocol == protocol:
            body += page.note(f"{one.count} seeds ({names}): {_mean(one)}")
    return page.Section(f"protocol-{protocol}", f"Top-1, {protocol}", description_of(protocol), body)


def _of_protocol(found: Comparison, protocol: str) -> list[tuple[str, Accuracy]]:
    return [(name, row) for name, one in found.runs.items() if (row := one.evaluation.row(protocol))]


def _points(difference: float) -> str:
    return f"{100 * difference:+.1f}"


def _interval(test: PairedTest) -> str:
    return f"{_points(test.interval[0])} to {_points(test.interval[1])}"


def _p_values(pair: Pair) -> tuple[str, str]:
    return f"{pair.test.p_value:.2g}", f"{pair.corrected_p_value:.2g}"


def _mean(one: MeanAndSpread) -> str:
    low, high = one.interval
    return f"mean {one.mean:.1%}, standard deviation {100 * one.deviation:.1f} points, 95% {page.between(low, high)} (t)"


def _why_not(names: tuple[str, str]) -> str:
    return f"{names[0]} and {names[1]} were evaluated on different datasets: no paired test"


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]

"""The page of the evidence: the tables in docs/results.md and the figure beside them, made of whatever runs there are."""

import itertools
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.evidence_runs import (
    ARMS,
    BATCHES,
    CONTRAST,
    ENDS,
    GHOST_SIZES,
    HALF_RATE,
    TEMPERATURES,
    VIEWS_TOGETHER,
    Cell,
    Line,
    cell_of,
    chosen_rate,
    own_objectives,
)
from eval.measure.statistics import MeanAndSpread, mean_and_spread

BEGIN, END = "<!-- evidence: written by tests/benchmarks/evidence.py page -->", "<!-- end of the evidence -->"
FIGURE = "images/evidence.png"
COLOURS = dict(zip(ARMS, ("#b7791f", "#66727f", "#1f4e8c", "#4f8fdc", "#9cc5f5"), strict=True))
PAPER = {
    "SimCLR": {128: 64.5, 256: 66.5, 512: 67.4, 1024: 68.3, 2048: 68.8, 4096: 69.1, 8192: 69.1},
    "SogCLR .9": {128: 67.8, 256: 69.3, 512: 69.5, 1024: 69.4, 2048: 69.3, 4096: 69.4, 8192: 69.1},
}
"""Linear top-1 on ImageNet-1K, ResNet-50, 800 epochs, by global batch size: the official repository's figure, read to .1."""

Value = Callable[[Line], float]


def objective(line: Line) -> float:
    return line["objective"][f"{line['temperature']:g}"]["value"]


def gradient_norm(line: Line) -> float:
    return line["objective"][f"{line['temperature']:g}"]["gradient_norm"]


def contrast(line: Line) -> float:
    return line["objective"][f"{line['temperature']:g}"]["contrast"]


def top_1(line: Line) -> float:
    return 100 * line["top_1"]


def knn_top_1(line: Line) -> float:
    return 100 * line["knn_top_1"]


def anew_objective(line: Line) -> float:
    return line["with_statistics_of_large_batches"]["objective"][f"{line['temperature']:g}"]["value"]


def anew_top_1(line: Line) -> float:
    return 100 * line["with_statistics_of_large_batches"]["top_1"]


def write_page(lines: Sequence[Line], planned: int, docs: Path) -> None:
    """Puts the tables between the two marks of `docs`/results.md, and draws the figure that they show.

    Raises ValueError if the marks are not there.
    """
    put_between(docs / "results.md", BEGIN, END, tables(lines, planned))
    if main_runs(lines):
        (docs / FIGURE).parent.mkdir(exist_ok=True)
        figure(lines).savefig(docs / FIGURE, dpi=160)


def put_between(page: Path, begin: str, end: str, text: str) -> None:
    """Puts `text` between the lines `begin` and `end` of a page. Raises ValueError if one of them is not there once."""
    found = page.read_text()
    if found.count(begin) != 1 or found.count(end) != 1:
        raise ValueError(f"{page} must have the lines {begin} and {end}, each once: the tables go between them")
    before, _, rest = found.partition(begin)
    page.write_text(f"{before}{begin}\n{text}\n{end}{rest.partition(end)[2]}")


def tables(lines: Sequence[Line], planned: int) -> str:
    """Returns the page's part in Markdown. It counts the runs that are missing."""
    probes = [line for line in lines if line["group"] == "probe"]
    main, other_rates = main_runs(lines), at_other_rates(lines)
    counted = [line for line in lines if line["group"] not in ("probe", "untrained", VIEWS_TOGETHER)]
    finished = [line for line in counted if line not in other_rates]
    parts = [f"{len(finished)} of {planned} runs are recorded, and {len(probes)} probes."]
    if main:
        parts.append(f"![The objective and top-1 against batch size]({FIGURE})")
        text = wrapped(
            "Each cell is the mean over seeds ± the sample standard deviation (number of seeds). Lower is better for F and the "
            "norm of its gradient."
        )
        parts += ["### What the arms reach", text]
    for temperature in TEMPERATURES:
        there = [line for line in main if line["temperature"] == temperature]
        if there:
            parts += [f"Temperature {temperature:g}:", _arms(there, [line for line in lines if line["group"] == "untrained"])]
    parts += _losses(main)
    parts += _contrast_alone(main, of_group(lines, CONTRAST))
    parts += _what_all_lose(main, lines)
    parts += _isogclr(of_group(lines, "isogclr"), main)
    parts += _rates(probes) + _other_rates(other_rates)
    parts += _runs(lines)
    return "\n\n".join(parts)


def of_group(lines: Iterable[Line], group: str) -> list[Line]:
    """Returns the runs of a group that did not diverge."""
    return [line for line in lines if line["group"] == group and line["objective"] is not None]


def at_other_rates(lines: Sequence[Line]) -> list[Line]:
    """Returns the main runs at a rate that their cell's probes have not chosen."""
    return [line for line in of_group(lines, "main") if line["rate"] != chosen_rate(lines, cell_of(line))]


def main_runs(lines: Sequence[Line]) -> list[Line]:
    """Returns the main runs that the means are of."""
    other_rates = at_other_rates(lines)
    return [line for line in of_group(lines, "main") if line not in other_rates]


def figure(lines: Sequence[Line]) -> Figure:
    """Draws the objective (upper row) and top-1 (lower row) against batch size, and the paper's top-1 beside them.

    Points are means over seeds. Bars are 95% intervals over seeds, if there are at least two. Dots are single runs.
    """
    main = main_runs(lines)
    temperatures = [one for one in TEMPERATURES if any(line["temperature"] == one for line in main)]
    drawn = Figure(figsize=(3.7 * (len(temperatures) + 1), 6.4), layout="constrained", facecolor="#ffffff")
    panels = drawn.subplots(2, len(temperatures) + 1, sharex="col")
    for column, temperature in enumerate(temperatures):
        there = [line for line in main if line["temperature"] == temperature]
        for row, (value, name) in enumerate(((objective, "global objective F"), (top_1, "top-1, %, linear eval"))):
            _draw(panels[row, column], there, value)
            dress(panels[row, column], f"temperature {temperature:g}", BATCHES)
            panels[row, column].set_ylabel(name)
    paper, empty = panels[:, -1]
    for arm, tops in PAPER.items():
        paper.plot(list(tops), list(tops.values()), color=COLOURS[arm], marker="o", linewidth=1.8)
    dress(paper, "the paper: ImageNet, ResNet-50,\n800 epochs (temperature .1)", (128, 512, 2048, 8192))
    paper.set_ylabel("top-1, %, linear eval")
    paper.tick_params(labelbottom=True)
    empty.set_axis_off()
    handles, labels = panels[0, 0].get_legend_handles_labels()
    empty.legend(handles, labels, frameon=False, loc="center")
    return drawn


def dress(axes: Axes, title: str, batches: Sequence[int]) -> None:
    """Makes `axes` a panel over batch sizes, which are each named."""
    axes.set_title(title, fontsize=10)
    axes.set_xscale("log", base=2)
    axes.set_xticks(batches, [str(batch) for batch in batches])
    axes.minorticks_off()
    axes.set_xlabel("global batch size")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e3e8ee")


def _draw(axes: Axes, runs: Sequence[Line], value: Value) -> None:
    for shift, arm in enumerate(ARMS):
        by_batch = {batch: values for batch in BATCHES if (values := list(map(value, _of(runs, arm, batch))))}
        if not by_batch:
            continue
        spreads = [mean_and_spread(values) for values in by_batch.values()]
        xs = np.array(list(by_batch)) * 2.0 ** (0.07 * (shift - len(ARMS) // 2))
        axes.plot(xs, [spread.mean for spread in spreads], color=COLOURS[arm], label=arm, marker="o", linewidth=1.8)
        for x, spread, values in zip(xs, spreads, by_batch.values(), strict=True):
            axes.plot([x] * len(values), values, ".", color=COLOURS[arm], alpha=0.5, markersize=5)
            if spread.count > 1:
                axes.vlines(x, *spread.interval, color=COLOURS[arm], linewidth=1.2)


def _of(lines: Iterable[Line], arm: str, batch: int) -> list[Line]:
    return sorted((line for line in lines if (line["arm"], line["batch"]) == (arm, batch)), key=lambda line: line["seed"])


def _arms(main: Sequence[Line], untrained: Sequence[Line]) -> str:
    temperature = f"{main[0]['temperature']:g}"
    rows = []
    for name, value, digits in _OUTCOMES:
        for batch in BATCHES:
            cells = [_spread([value(line) for line in _of(main, arm, batch)], digits) for arm in ARMS]
            if any(cells):
                rows.append([name, str(batch), *cells])
        if untrained:
            starts = [value(line | {"temperature": float(temperature)}) for line in untrained]
            rows.append([name, "untrained", *[_spread(starts, digits)] * len(ARMS)])
    return table(["", "batch", *ARMS], rows)


_OUTCOMES: Sequence[tuple[str, Value, int]] = (
    ("F", objective, 4),
    ("norm of F's gradient", gradient_norm, 4),
    ("top-1, %", top_1, 1),
    ("k-NN top-1, %", knn_top_1, 1),
)


def _spread(values: Sequence[float], digits: int) -> str:
    if not values:
        return ""
    spread = mean_and_spread(values)
    deviation = f" ± {spread.deviation:.{digits}f}" if spread.count > 1 else ""
    return f"{spread.mean:.{digits}f}{deviation} ({spread.count})"


def losses_of_small_batches(main: Sequence[Line], arm: str, value: Value) -> dict[int, float]:
    """Returns `value` at the smallest batch minus at the largest, by seed, for the seeds that `arm` has at both."""
    small, large = (_of(main, arm, batch) for batch in ENDS)
    return _paired(small, large, value)


def _paired(runs: Iterable[Line], others: Iterable[Line], value: Value) -> dict[int, float]:
    """Returns `value` of the runs minus that of the others, by seed, for the seeds that both have."""
    own, other = ({line["seed"]: value(line) for line in of} for of in (runs, others))
    return {seed: own[seed] - other[seed] for seed in sorted(own.keys() & other.keys())}


def _losses(main: Sequence[Line]) -> list[str]:
    """What the claim is about: how much the objective depends on the batch."""
    small, large = ENDS
    rows = []
    for temperature in TEMPERATURES:
        there = [line for line in main if line["temperature"] == temperature]
        for name, value, digits in _OUTCOMES:
            by_arm = {arm: losses_of_small_batches(there, arm, value) for arm in ARMS}
            rows += [[f"{temperature:g}", name, *row] for row in _against_ours(by_arm, digits)]
    if not rows:
        return []
    text = wrapped(
        f"Each value at batch {small} minus the one at batch {large}, mean over seeds. In brackets: the 95% interval over seeds "
        "by Student's t, and the number of seeds. The last columns are the arm's difference minus SogCLR's, paired by seed: "
        "above 0 for F, the arm's objective depends on the batch more than SogCLR's."
    )
    header = ["temperature", "", "arm", f"{small} minus {large}", *(f"minus {ours}'s" for ours in _OURS)]
    return [f"### From batch {large} to batch {small}", text, table(header, rows)]


def _contrast_alone(main: Sequence[Line], runs: Sequence[Line]) -> list[str]:
    """What few negatives alone do: nothing else differs from the largest batch."""
    small, large = ENDS
    rows = []
    for name, value, digits in _OUTCOMES:
        there = [line for line in main if line["temperature"] == TEMPERATURES[0]]
        by_arm = {arm: _paired(_of(runs, arm, large), _of(there, arm, large), value) for arm in ARMS}
        values = {arm: _spread([value(line) for line in _of(runs, arm, large)], digits) for arm in ARMS}
        rows += [[name, arm, values[arm], *row] for arm, *row in _against_ours(by_arm, digits)]
    if not rows:
        return []
    text = wrapped(
        f"Temperature {TEMPERATURES[0]:g}, batch {large}, each image with the negatives of {small} images "
        f"(`contrast_batch_size={small}`), minus the same with those of all {large}. All else is as in the table above."
    )
    header = ["", "arm", f"contrast of {small}", f"minus that of {large}", *(f"minus {ours}'s" for ours in _OURS)]
    return [f"### Contrast of {small} images in a batch of {large}", text, table(header, rows)]


_OURS = ("SogCLR .9", "SogCLR .1")


def _against_ours(by_arm: Mapping[str, Mapping[int, float]], digits: int) -> Iterator[list[str]]:
    """Yields a row for each arm that has values, which are given by seed: the arm, its mean, and how far it is from SogCLR's."""
    for arm, own in by_arm.items():
        if own:
            against = [_difference(own, by_arm[ours], digits) if ours != arm else "" for ours in _OURS]
            yield [arm, _interval(list(own.values()), digits), *against]


def _difference(own: Mapping[int, float], ours: Mapping[int, float], digits: int) -> str:
    """Returns the mean of `own` minus `ours` over the seeds that both have, with its interval."""
    return _interval([own[seed] - ours[seed] for seed in own if seed in ours], digits)


def _interval(values: Sequence[float], digits: int) -> str:
    if not values:
        return ""
    spread: MeanAndSpread = mean_and_spread(values)
    interval = f"[{spread.interval[0]:+.{digits}f}, {spread.interval[1]:+.{digits}f}], " if spread.count > 1 else ""
    return f"{spread.mean:+.{digits}f} ({interval}{spread.count})"


def _what_all_lose(main: Sequence[Line], lines: Sequence[Line]) -> list[str]:
    """Where the objective and the accuracy go that all arms lose: the images that batch norm sees, or the rate."""
    ghosts, together, half = (of_group(lines, group) for group in ("ghost", VIEWS_TOGETHER, HALF_RATE))
    rows = []
    outcomes: Sequence[tuple[Value, int]] = ((objective, 4), (anew_objective, 4), (top_1, 1), (anew_top_1, 1))
    temperature = TEMPERATURES[0]
    for arm in ARMS:
        own = [line for line in main if (line["arm"], line["temperature"]) == (arm, temperature)]
        cases = [(f"{ENDS[-1]}", _of(own, arm, ENDS[-1]))]
        for size, (runs, how) in itertools.product(reversed(GHOST_SIZES), ((ghosts, ""), (together, ", views together"))):
            setting = f"ghost_batch_size={size}"
            found = [line for line in runs if line["arm"] == arm and setting in line["settings"]]
            cases.append((f"{ENDS[-1]}, ghosts of {size}{how}", found))
        cases.append((f"{ENDS[0]}", _of(own, arm, ENDS[0])))
        cases.append((f"{ENDS[0]}, half the rate", _of(half, arm, ENDS[0])))
        largest = cases[0][1]
        for name, found in cases:
            if found:
                lost = "" if found is largest else _interval(list(_paired(found, largest, objective).values()), 4)
                rows.append([arm, name, *(_spread(list(map(value, found)), digits) for value, digits in outcomes), lost])
    if not rows:
        return []
    text = wrapped(
        f"Temperature {temperature:g}. Ghosts: batch norm takes its statistics over groups of so many images while it trains. "
        "Views together: an earlier program, in which both views of an image were always in the same group. "
        "Anew: the final encoder, after batch norm has taken its statistics from large batches. "
        f"The last column is F minus F at batch {ENDS[-1]}, paired by seed, as in the table above."
    )
    header = ["arm", "batch", "F", "F, anew", "top-1, %", "top-1, anew", f"F minus {ENDS[-1]}'s"]
    return ["### What all arms lose", text, table(header, rows)]


def _isogclr(runs: Sequence[Line], main: Sequence[Line]) -> list[str]:
    if not runs:
        return []
    rows = []
    for line in sorted(runs, key=lambda line: line["batch"]):
        same = [
            one
            for one in _of(main, line["arm"], line["batch"])
            if (one["temperature"], one["seed"]) == (line["temperature"], line["seed"])
        ]
        rows += [
            [name, str(one["batch"]), f"{objective(one):.4f}", f"{top_1(one):.1f}"]
            for name, one in (("iSogCLR", line), *((line["arm"], one) for one in same))
        ]
    text = wrapped(
        f"iSogCLR learns a temperature for each image. F is at {TEMPERATURES[0]:g} for both, which iSogCLR does not minimise. "
        "One seed, with the rates of the same arm without learned temperatures."
    )
    return ["### Learned temperatures", text, table(["", "batch", "F", "top-1, %"], rows)]


def _rates(probes: Sequence[Line]) -> list[str]:
    """The rate that each cell's probes chose, with all that were tried."""
    if not probes:
        return []
    rows = []
    for temperature in TEMPERATURES:
        for batch in BATCHES:
            for arm in ARMS:
                cell = Cell(arm, batch, temperature)
                tried = own_objectives(probes, cell)
                if tried:
                    values = "; ".join(f"{rate:g}: {_or_diverged(tried[rate])}" for rate in sorted(tried))
                    chosen = chosen_rate(probes, cell)
                    rows.append([f"{temperature:g}", str(batch), arm, "" if chosen is None else f"{chosen:g}", values])
    text = wrapped(
        "Base learning rates, and what an arm's own objective came to with another seed, after ten epochs at a temperature of .1 "
        "and after 60 at .05. Lower is better."
    )
    return ["### The rate", text, table(["temperature", "batch", "arm", "chosen", "rate: own objective"], rows)]


def _other_rates(runs: Sequence[Line]) -> list[str]:
    if not runs:
        return []
    rows = [
        [
            *(f"{line[name]:g}" if name != "arm" else line[name] for name in ("temperature", "batch", "arm", "rate", "seed")),
            f"{objective(line):.4f}",
            f"{contrast(line):.3f}",
            f"{top_1(line):.1f}",
        ]
        for line in runs
    ]
    text = wrapped(
        "Runs at rates that probes of ten epochs chose, and that those of 60 epochs have not chosen. They are part of no mean. "
        "Contrast is about the similarity of two images: near 1, all projections point the same way."
    )
    return [
        "### Runs at other rates",
        text,
        table(["temperature", "batch", "arm", "rate", "seed", "F", "contrast", "top-1, %"], rows),
    ]


def _or_diverged(value: float | None) -> str:
    return "diverged" if value is None else f"{value:.4f}"


def _runs(lines: Sequence[Line]) -> list[str]:
    if not lines:
        return []
    rows = [
        [
            line["name"],
            str(line.get("steps", "")),
            f"{line['core_minutes']:.1f}" if "core_minutes" in line else "",
            f"`{line['state_sha256'][:12]}`" if "state_sha256" in line else line.get("diverged", ""),
            f"`{line['code'][:12]}`",
            f"`{line['command'].partition('--set ')[2]}`",
        ]
        for line in lines
    ]
    command = lines[0]["command"].partition(" --set ")[0]
    datasets = ", ".join(f"`{one}`" for one in sorted({line["dataset_fingerprint"] for line in lines}))
    minutes = sum(line.get("core_minutes", 0.0) for line in lines)
    header = ["run", "steps", "core minutes", "state_sha256", "code", "settings"]
    return [
        "### Every run",
        f"Each run is this command, on one core ({minutes / 60:.1f} core hours of training in all):",
        f"    {command} --set SETTINGS",
        f"Dataset fingerprint: {datasets}.",
        f"<details><summary>{len(lines)} runs</summary>\n\n{table(header, rows)}\n\n</details>",
    ]


def wrapped(text: str) -> str:
    """Returns prose in lines of at most 100 columns."""
    return textwrap.fill(text, 100, break_long_words=False, break_on_hyphens=False)


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Returns a table in Markdown."""
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header), *rows))

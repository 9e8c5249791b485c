"""The page of the evidence: the tables in docs/results.md and the figure beside it, of whatever runs there are."""

import re
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from eval.measure.statistics import bootstrap_interval, mean_and_spread, paired_test

BEGIN, END = "<!-- evidence: written by tests/benchmarks/evidence.py page -->", "<!-- end of the evidence -->"
FIGURE = "images/evidence.png"
NAMES = {"simclr": "SimCLR", "decoupled": "decoupled (gamma = 1)", "sogclr": "SogCLR"}
COLOURS = {"simclr": "#b7791f", "decoupled": "#66727f", "sogclr": "#2f6db5"}
OURS = "sogclr"
PANELS = {"main": "temperature .3", "temperature": "temperature .1"}
"""Of the figure: a group of runs, and what tells it from the other."""

Line = dict
"""What `evidence.py run` recorded of a run."""


def write_page(lines: Sequence[Line], planned: int, docs: Path) -> None:
    """Puts the tables between the two marks of `docs`/results.md, and draws the figure that they show.

    Raises ValueError where the marks are not there.
    """
    put_between(docs / "results.md", BEGIN, END, tables(lines, planned))
    if of_group(lines, "main"):
        (docs / FIGURE).parent.mkdir(exist_ok=True)
        figure(lines).savefig(docs / FIGURE, dpi=160)


def put_between(page: Path, begin: str, end: str, text: str) -> None:
    """Puts `text` between the lines `begin` and `end` of a page. Raises ValueError where one of them is not there once."""
    found = page.read_text()
    if found.count(begin) != 1 or found.count(end) != 1:
        raise ValueError(f"{page} must have the lines {begin} and {end}, each once: the tables go between them")
    before, _, rest = found.partition(begin)
    page.write_text(f"{before}{begin}\n{text}\n{end}{rest.partition(end)[2]}")


def tables(lines: Sequence[Line], planned: int) -> str:
    """Returns the page's part in Markdown. Says of what is missing that it is."""
    main = of_group(lines, "main")
    parts = [f"{len(lines)} of {planned} runs are recorded, {len(main)} of them of the three arms at a temperature of .3."]
    if main:
        parts += [f"![Top-1 against batch size]({FIGURE})", *_comparison(main)]
    parts += _ablations(main, of_group(lines, "ablation"))
    parts += _comparison(of_group(lines, "temperature"), ", at a temperature of .1")
    parts += _probe(of_group(lines, "probe"))
    parts += _runs(lines)
    return "\n\n".join(parts)


def of_group(lines: Iterable[Line], group: str) -> list[Line]:
    return [line for line in lines if line["group"] == group]


def correct(line: Line) -> np.ndarray:
    """Returns which validation images a run classifies rightly, by ID, [n] bool."""
    bits = np.unpackbits(np.frombuffer(bytes.fromhex(line["correct"]), np.uint8))
    # The last byte is filled up with zeros.
    images = round(bits.sum() / line["top_1"]) if line["top_1"] else len(bits)
    return bits[:images].astype(bool)


def mean_correct(lines: Sequence[Line]) -> np.ndarray:
    """Returns how many of the runs classify each image rightly, as a part, [n] float64."""
    return np.mean([correct(line) for line in lines], axis=0)


def figure(lines: Sequence[Line]) -> Figure:
    """Draws top-1 against batch size, a line an arm: means over seeds with 95% over images, and each seed as a dot."""
    groups = {title: of_group(lines, group) for group, title in PANELS.items()}
    drawn = Figure(figsize=(8.4, 4.2), layout="constrained", facecolor="#ffffff")
    panels = drawn.subplots(1, len(groups), sharex=True, sharey=True)
    batches = sorted({line["batch"] for runs in groups.values() for line in runs})
    for axes, (title, runs) in zip(panels, groups.items(), strict=True):
        _draw(axes, runs)
        dress(axes, title, batches)
    panels[0].set_ylabel("top-1, %, linear eval (cached)")
    panels[0].legend(frameon=False)
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


def _draw(axes: Axes, runs: Sequence[Line]) -> None:
    batches = sorted({line["batch"] for line in runs})
    for shift, arm in enumerate(NAMES):
        by_batch = {batch: _of(runs, arm, batch) for batch in batches}
        there = [batch for batch in batches if by_batch[batch]]
        if not there:
            continue
        values = [mean_correct(by_batch[batch]) for batch in there]
        means = np.array([100 * value.mean() for value in values])
        ends = np.array([100 * np.array(bootstrap_interval(value)) for value in values])
        xs = np.array(there) * 2.0 ** (0.06 * (shift - 1))
        errors = np.abs(ends.T - means)
        axes.errorbar(xs, means, errors, color=COLOURS[arm], label=NAMES[arm], marker="o", capsize=3, linewidth=1.8)
        for x, batch in zip(xs, there, strict=True):
            tops = [100 * line["top_1"] for line in by_batch[batch]]
            axes.plot([x] * len(tops), tops, ".", color=COLOURS[arm], alpha=0.45, markersize=5)


def _of(main: Iterable[Line], arm: str, batch: int) -> list[Line]:
    return sorted((line for line in main if (line["arm"], line["batch"]) == (arm, batch)), key=lambda line: line["seed"])


def _comparison(main: Sequence[Line], where: str = "") -> list[str]:
    """What the arms came to in `main`, runs that differ in nothing but arm, batch size and seed; `where` ends the titles."""
    return [*_arms(main, where), *_small_batch(main, where), *_paired(main, where)] if main else []


def _arms(main: Sequence[Line], where: str) -> list[str]:
    rows = []
    for batch in sorted({line["batch"] for line in main}):
        cells = []
        for arm in NAMES:
            runs = _of(main, arm, batch)
            cells.append(_accuracy(runs) if runs else "")
        of_batch = [line["untrained_top_1"] for line in main if line["batch"] == batch]
        rows.append([str(batch), *cells, f"{100 * np.mean(of_batch):.1f}"])
    text = wrapped(
        "Top-1 of the final checkpoint in per cent, by the protocol `cached`: mean over seeds ± sample standard deviation "
        "(number of seeds). In brackets: the 95% interval by bootstrap over the validation images."
    )
    return [f"### The three arms{where}", text, table(["batch", *NAMES.values(), "untrained"], rows)]


def _accuracy(runs: Sequence[Line]) -> str:
    spread = mean_and_spread([line["top_1"] for line in runs])
    low, high = bootstrap_interval(mean_correct(runs))
    deviation = f" ± {100 * spread.deviation:.1f}" if spread.count > 1 else ""
    return f"{100 * spread.mean:.1f}{deviation} ({spread.count}) [{100 * low:.1f}, {100 * high:.1f}]"


def _small_batch(main: Sequence[Line], where: str) -> list[str]:
    """What the claim is about: what an arm loses when its batch is small."""
    batches = sorted({line["batch"] for line in main})
    small, large = batches[0], batches[-1]
    if small == large:
        return []

    def lost(arm: str, seeds: set[int]) -> np.ndarray:
        there = [line for line in main if line["seed"] in seeds]
        return mean_correct(_of(there, arm, small)) - mean_correct(_of(there, arm, large))

    seeds = {
        arm: {line["seed"] for line in _of(main, arm, small)} & {line["seed"] for line in _of(main, arm, large)} for arm in NAMES
    }
    rows = []
    for arm, own in seeds.items():
        shared = own & seeds[OURS]
        less = _points(lost(OURS, shared) - lost(arm, shared)) if shared and arm != OURS else ""
        if own:
            rows.append([NAMES[arm], ", ".join(map(str, sorted(own))), _points(lost(arm, own)), less])
    title = f"### From batch {large} to batch {small}{where}"
    text = wrapped(
        "Change: points of top-1 that an arm gains (+) or loses (-) with the small batch, over the seeds that it has at both "
        "sizes. The last column is SogCLR's change with the same seeds, minus the arm's change. In brackets: the 95% interval "
        "by bootstrap over the same images. If the last column is above 0, SogCLR needs a large batch less than the arm does."
    )
    return [title, text, table(["arm", "seeds", "change", "SogCLR's minus this one's"], rows)] if rows else []


def _paired(main: Sequence[Line], where: str) -> list[str]:
    rows = []
    for batch in sorted({line["batch"] for line in main}):
        for other in NAMES:
            pairs = [
                (a, b)
                for a in _of(main, OURS, batch)
                for b in _of(main, other, batch)
                if other != OURS and a["seed"] == b["seed"]
            ]
            if not pairs:
                continue
            change = mean_correct([a for a, _ in pairs]) - mean_correct([b for _, b in pairs])
            p_values = ", ".join(_p_value(paired_test(correct(a), correct(b)).p_value) for a, b in pairs)
            seeds = mean_and_spread([a["top_1"] - b["top_1"] for a, b in pairs])
            by_seed = f"[{100 * seeds.interval[0]:+.1f}, {100 * seeds.interval[1]:+.1f}]" if seeds.count > 1 else ""
            rows.append([str(batch), NAMES[other], str(seeds.count), _points(change), by_seed, p_values])
    if not rows:
        return []
    text = wrapped(
        "SogCLR minus the other arm, in points, for runs with the same seed on the same images. Over images: bootstrap of the "
        "mean over seeds. Over seeds: Student's t interval, the only one that contains the variation from one seed's encoder to "
        "another's. p: McNemar's exact test, one value a seed. Nothing is corrected for the number of comparisons."
    )
    header = ["batch", "against", "seeds", "difference, 95% over images", "95% over seeds", "p"]
    return [f"### Paired comparisons{where}", text, table(header, rows)]


def _ablations(main: Sequence[Line], ablations: Sequence[Line]) -> list[str]:
    rows = []
    for arm in dict.fromkeys(line["arm"] for line in ablations):
        runs = [line for line in ablations if line["arm"] == arm]
        pairs = [(a, b) for a in runs for b in _of(main, OURS, a["batch"]) if a["seed"] == b["seed"]]
        change = _points(mean_correct([a for a, _ in pairs]) - mean_correct([b for _, b in pairs])) if pairs else ""
        rows.append([arm, ", ".join(sorted({str(line["batch"]) for line in runs})), _accuracy(runs), change])
    if not rows:
        return []
    text = wrapped(
        "Each row is SogCLR (gamma = .9, variant `paper`) with one change. The difference is to SogCLR without the change, with "
        "the same seeds and images."
    )
    return ["### Ablations", text, table(["changed", "batch", "top-1", "difference"], rows)]


def _probe(probe: Sequence[Line]) -> list[str]:
    if not probe:
        return []
    rows = [[line["arm"], str(line["batch"]), _accuracy([line])] for line in sorted(probe, key=lambda line: line["arm"])]
    text = "Short runs to choose the base learning rate. Their loss is SimCLR's, not SogCLR's."
    return ["### The rate", text, table(["run", "batch", "top-1"], rows)]


def _runs(lines: Sequence[Line]) -> list[str]:
    if not lines:
        return []
    rows = [
        [
            line["name"],
            f"{100 * line['top_1']:.2f}",
            str(line["steps"]),
            f"{line['core_minutes']:.1f}" if "core_minutes" in line else "",
            f"`{line['state_sha256'][:12]}`",
            f"`{line['code'][:12]}`",
            f"`{line['command'].partition('--set ')[2]}`",
        ]
        for line in lines
    ]
    command = lines[0]["command"].partition(" --set ")[0]
    datasets = ", ".join(f"`{one}`" for one in sorted({line["dataset_fingerprint"] for line in lines}))
    header = ["run", "top-1", "steps", "core minutes", "state_sha256", "code", "settings"]
    return [
        "### Every run",
        "Each run is this command, on one core:",
        f"    {command} --set data.allow_other_counts=true SETTINGS",
        f"Dataset fingerprint: {datasets}.",
        f"<details><summary>{len(lines)} runs</summary>\n\n{table(header, rows)}\n\n</details>",
    ]


def wrapped(text: str) -> str:
    """Returns prose in lines of at most 100 columns."""
    return textwrap.fill(text, 100, break_long_words=False, break_on_hyphens=False)


def _points(change: np.ndarray) -> str:
    low, high = bootstrap_interval(change)
    return f"{100 * change.mean():+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"


def _p_value(p_value: float) -> str:
    return f"{p_value:.3f}" if p_value >= 0.001 else re.sub(r"e-0?", "e-", f"{p_value:.0e}")


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Returns a table in Markdown."""
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header), *rows))

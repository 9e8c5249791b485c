"""Charts of a run, for MLflow as picture files and for HTML pages as SVG.

In a page, a chart takes the page's font and its light or dark colours.
"""

import io
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter, MaxNLocator, PercentFormatter

INK, GREY, LINE, PAPER = "#1f2933", "#66727f", "#b8c2cc", "#ffffff"
BLUE, GREEN, RED, AMBER = "#2f6db5", "#2e8b6f", "#c0392b", "#b7791f"
SERIES = (BLUE, "#c8641e", GREEN, "#8a4fa3", AMBER, "#1c8ca8", RED, GREY)
"""Colours of several runs in one chart."""
_OF_PAGE = {INK: "--ink", GREY: "--muted", LINE: "--line", BLUE: "--accent", GREEN: "--good", RED: "--bad", AMBER: "--warn"}

History = Mapping[str, Sequence[tuple[int, float]]]
"""Metric -> [(step, value), ...], in order of the steps."""
_TRAINING = (
    ("train/contrastive_loss", "loss"),
    ("train/learning_rate", "learning rate"),
    ("train/online_top_1_accuracy", "online top-1"),
    ("train/global_objective", "global objective"),
    ("train/alignment", "alignment"),
    ("train/uniformity", "uniformity"),
    ("train/gradient_norm", "gradient norm"),
    ("train/u_mean", "mean of u"),
    ("train/images_per_second", "images a second"),
)
"""Metrics that `curves` shows, in this order."""


class Interval(NamedTuple):
    """An accuracy in [0, 1] and its interval."""

    label: str
    value: float
    low: float
    high: float
    colour: str = BLUE


def svg(figure: Figure, description: str) -> str:
    """Returns a chart as an SVG element without generated IDs. `description` is its alternative text."""
    out = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "sogclr", "font.family": "sans-serif"}):
        figure.savefig(
            out, format="svg", transparent=True, metadata={"Date": None, "Creator": None, "Format": None, "Type": None}
        )
    text = re.sub(r' id="[a-zA-Z]\w*_\d+"', "", out.getvalue()[out.getvalue().index("<svg") :])
    text = re.sub(r"(font: [\w. ]*?[\d.]+px) [^;\"]+", r"\1 var(--font)", text)
    for colour, name in _OF_PAGE.items():
        text = text.replace(colour, f"var({name})")
    size = re.compile(r' width="[\d.]+pt" height="[\d.]+pt"')
    label = description.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    return size.sub(f' role="img" aria-label="{label}"', text, count=1).strip()


def curves(runs: Mapping[str, History]) -> Figure | None:
    """Draws the metrics of pretraining over the steps. `runs` maps names to histories. Returns None if none has metrics."""
    shown = [(key, title) for key, title in _TRAINING if any(len(history.get(key, ())) > 1 for history in runs.values())]
    if not shown:
        return None
    columns = min(3, len(shown))
    rows = -(-len(shown) // columns)
    top = 0.35 if len(runs) > 1 else 0.0
    figure = Figure(figsize=(3.5 * columns, 2.3 * rows + top), facecolor=PAPER)
    figure.set_layout_engine("constrained", hspace=0.06, wspace=0.04)
    for number, (key, title) in enumerate(shown):
        axes = figure.add_subplot(rows, columns, number + 1)
        for (name, history), colour in zip(runs.items(), SERIES * len(runs), strict=False):
            if points := history.get(key):
                steps, values = zip(*points, strict=True)
                axes.plot(steps, values, color=colour, linewidth=1.5, label=name, solid_joinstyle="round")
        axes.set_title(title, size=10, color=INK, loc="left", weight="bold")
        if key.endswith("accuracy"):
            axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        _plain(axes)
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(4))
        if number >= len(shown) - columns:
            axes.set_xlabel("step", size=8, color=GREY)
    if len(runs) > 1:
        handles = [axes.plot([], [], color=colour, label=name)[0] for name, colour in zip(runs, SERIES * len(runs), strict=False)]
        figure.legend(handles=handles, loc="outside upper left", ncols=4, frameon=False, fontsize=9, labelcolor=INK)
    return figure


def u_over_training(history: History) -> Figure | None:
    """Draws mean and quantiles of u over the steps. Returns None if u was not recorded."""
    names = [f"train/u_p{quantile}" for quantile in ("01", "10", "50", "90", "99")]
    if any(len(history.get(name, ())) < 2 for name in names):
        return None
    steps = [step for step, _ in history[names[0]]]
    low, lower, median, upper, high = ([value for _, value in history[name]] for name in names)
    figure = Figure(figsize=(10.5, 3.1), layout="constrained", facecolor=PAPER)
    axes = figure.add_subplot()
    axes.fill_between(steps, low, high, color=BLUE, alpha=0.13, linewidth=0)
    axes.fill_between(steps, lower, upper, color=BLUE, alpha=0.22, linewidth=0)
    axes.plot(steps, median, color=BLUE, linewidth=1.8)
    if mean := history.get("train/u_mean"):
        axes.plot(*zip(*mean, strict=True), color=AMBER, linewidth=1.3, linestyle=(0, (4, 2)))
    ends = [(high[-1], "99%", GREY), (upper[-1], "90%", GREY), (median[-1], "median", BLUE), (low[-1], "1%", GREY)]
    if mean:
        ends.append((mean[-1][1], "mean", AMBER))
    axes.set_yscale("log")
    for formatted in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        formatted(LogFormatter(minor_thresholds=(2, 0.6)))
    _label_ends(axes, steps[-1], ends)
    axes.set_xlabel("step", size=8, color=GREY)
    axes.set_title("u, logarithmic", size=10, color=INK, loc="left", weight="bold")
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    _plain(axes)
    axes.tick_params(which="minor", colors=LINE, labelsize=7, labelcolor=GREY)
    return figure


def _label_ends(axes: Axes, step: float, ends: Sequence[tuple[float, str, str]]) -> None:
    """Writes names at the right ends of lines on a logarithmic axis, far enough apart to be legible."""
    bottom, top = np.log(axes.get_ylim())
    least, position = (top - bottom) * 0.075, -np.inf
    for value, name, colour in sorted(ends):
        position = max(np.log(value), position + least)
        axes.annotate(
            name,
            (step, np.exp(position)),
            (6, 0),
            textcoords="offset points",
            size=8,
            color=colour,
            va="center",
            annotation_clip=False,
        )


def intervals(rows: Sequence[Interval], title: str = "top-1, 95% interval") -> Figure:
    """Draws each accuracy as a dot with its interval, in the given order."""
    figure = Figure(figsize=(7, 0.7 + 0.34 * len(rows)), layout="constrained", facecolor=PAPER)
    axes = figure.add_subplot()
    for y, row in enumerate(rows):
        axes.plot([row.low, row.high], [y, y], color=row.colour, linewidth=5, alpha=0.3, solid_capstyle="round")
        axes.plot([row.value], [y], color=row.colour, marker="o", markersize=6, markeredgewidth=0)
        axes.annotate(
            f"{row.value:.1%}",
            (row.high, y),
            (8, 0),
            textcoords="offset points",
            size=9,
            color=INK,
            va="center",
            weight="bold",
        )
    axes.set_yticks(range(len(rows)), [row.label for row in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    low, high = min(row.low for row in rows), max(row.high for row in rows)
    room = max(0.02, 0.12 * (high - low))
    axes.set_xlim(max(0.0, low - room), high + 2.2 * room)
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.xaxis.set_major_locator(MaxNLocator(7))
    axes.set_title(title, size=10, color=INK, loc="left", weight="bold")
    _plain(axes)
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x", color=LINE, linewidth=0.6, alpha=0.5)
    axes.set_axisbelow(True)
    axes.tick_params(axis="y", length=0, labelsize=9, labelcolor=INK)
    return figure


def per_class_accuracy(accuracy: Sequence[float] | np.ndarray, classes: Sequence[str]) -> Figure:
    """Draws a bar for each class, the best first. Omits classes without images (nan)."""
    order = [i for i in np.argsort(accuracy)[::-1] if not np.isnan(accuracy[i])]
    named = len(order) <= 60
    figure = Figure(figsize=(7, 0.7 + 0.22 * len(order)) if named else (7, 3), layout="constrained", facecolor=PAPER)
    axes = figure.add_subplot()
    values = np.asarray(accuracy)[order]
    _plain(axes)
    if named:
        axes.barh([classes[i] for i in order], values, color=BLUE, height=0.62)
        for y, value in enumerate(values):
            axes.annotate(f"{value:.0%}", (value, y), (4, 0), textcoords="offset points", size=8, color=GREY, va="center")
        axes.set(xlim=(0, 1.06), ylim=(len(order) - 0.4, -0.6))
        axes.xaxis.set_major_formatter(PercentFormatter(1))
        axes.tick_params(axis="y", length=0, labelcolor=INK)
        axes.spines["left"].set_visible(False)
    else:
        axes.fill_between(np.arange(len(order)), values, color=BLUE, step="mid", linewidth=0)
        axes.set(xlabel="classes, best first", ylim=(0, 1))
        axes.yaxis.set_major_formatter(PercentFormatter(1))
        axes.xaxis.label.set(size=8, color=GREY)
    axes.set_title("top-1 by class", size=10, color=INK, loc="left", weight="bold")
    return figure


def confusion(matrix: np.ndarray, classes: Sequence[str]) -> Figure:
    """Draws the confusion matrix: class (row) by prediction (column), as a fraction of the row."""
    count = len(classes)
    figure = Figure(figsize=(7, 6.6), layout="constrained", facecolor=PAPER)
    axes = figure.add_subplot()
    parts = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    # Empty cells are transparent, so that the chart fits a light page and a dark one.
    cells = np.zeros((*matrix.shape, 4))
    cells[..., :3] = to_rgb(BLUE)
    cells[..., 3] = parts**0.7
    axes.imshow(cells, interpolation="none")
    axes.set_xlabel("predicted", size=9, color=GREY)
    axes.set_ylabel("class", size=9, color=GREY)
    if count <= 60:
        axes.set_xticks(range(count), classes, rotation=90)
        axes.set_yticks(range(count), classes)
    if count <= 25:
        for row, column in zip(*np.nonzero(parts >= 0.005), strict=True):
            colour = PAPER if parts[row, column] > 0.45 else INK
            axes.text(
                column,
                row,
                f"{100 * parts[row, column]:.0f}",
                size=7.5 if count > 12 else 9,
                color=colour,
                ha="center",
                va="center",
            )
    _plain(axes)
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.tick_params(length=0, labelsize=7 if count > 12 else 8, labelcolor=INK)
    axes.set_title("confusion, % of the class's images", size=10, color=INK, loc="left", weight="bold")
    return figure


def _plain(axes: Axes) -> None:
    axes.set_facecolor("none")
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(LINE)
    axes.tick_params(labelsize=8, color=LINE, labelcolor=GREY)

"""The picture of a pipeline run's lineage. Knows no MLflow."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from components.lineage import Artifact, Lineage, Step, short
from eval.show.figures import AMBER, BLUE, GREEN, GREY, INK, LINE, PAPER, RED

_HEIGHT, _MARGIN, _DISTANCE = 4.5, 0.35, 3.217
_BOX_WIDTH, _STEP_HEIGHT, _THING_HEIGHT = 2.65, 1.05, 1.4
_STEP_Y, _THING_Y = 2.95, 1.05
_PLACES = {
    "pretrain": {"raw archives": 0, "dataset": 1, "encoder": 2, "linear-eval top-1": 3},
    "import-encoder": {"source": 0, "encoder": 1, "linear-eval top-1": 2, "dataset": 3, "raw archives": 4},
}
"""Places of what the steps read and make, from left to right, by the component that makes the encoder."""
_ENDS: dict[str, dict[str, tuple[tuple[str, ...], str]]] = {
    "pretrain": {
        "build-tfrecords": (("raw archives",), "dataset"),
        "pretrain": (("dataset",), "encoder"),
        "linear-eval": (("encoder",), "linear-eval top-1"),
    },
    "import-encoder": {
        "build-tfrecords": (("raw archives",), "dataset"),
        "import-encoder": (("source",), "encoder"),
        "linear-eval": (("encoder", "dataset"), "linear-eval top-1"),
    },
}
"""What each component reads, and what it makes, as far as arrows show it."""


def lineage(chain: Lineage) -> Figure:
    """Draws the raw data, steps, dataset, encoder and result of a pipeline run. Reused steps have dashed outlines.

    The lineage of an imported encoder begins at its source, on the left.
    """
    steps = {step.component: step for step in chain.steps}
    source = "import-encoder" if "import-encoder" in steps else "pretrain"
    places = _PLACES[source]
    width = 2 * _MARGIN + _BOX_WIDTH + _DISTANCE * (len(places) - 1)
    figure = Figure(figsize=(width, _HEIGHT), facecolor=PAPER)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(0, _HEIGHT))
    axes.set_axis_off()
    axes.text(_MARGIN, _HEIGHT - 0.42, chain.name, size=15, weight="bold", color=INK, va="center")
    run = f"pipeline run {short(chain.run_id)}"
    axes.text(width - _MARGIN, _HEIGHT - 0.42, run, size=10, color=GREY, va="center", ha="right")

    xs = {title: _MARGIN + _BOX_WIDTH / 2 + _DISTANCE * place for title, place in places.items()}
    things = _things(chain, steps)
    for title, x in xs.items():
        lines, there = things[title]
        _box(
            axes,
            x,
            _THING_Y,
            _THING_HEIGHT,
            title,
            lines,
            face="#f4f7fa" if there else PAPER,
            edge=LINE,
            ink=INK if there else LINE,
        )
    for component, (read, made) in _ENDS[source].items():
        step = steps.get(component)
        x = sum(xs[title] for title in (*read, made)) / (len(read) + 1)
        reused = step is not None and chain.reused(step)
        colour = _colour(step)
        filled = step is not None and not reused
        face, ink = (colour, PAPER) if filled else (PAPER, colour)
        _box(axes, x, _STEP_Y, _STEP_HEIGHT, component, _step_lines(step, reused), face=face, edge=colour, ink=ink, dashed=reused)
        top, bottom = _THING_Y + _THING_HEIGHT / 2, _STEP_Y - _STEP_HEIGHT / 2
        for title in read:
            side = np.sign(x - xs[title])
            _arrow(axes, (xs[title] + 0.2 * side, top), (x - 0.75 * side, bottom), GREY if step else LINE)
        side = np.sign(x - xs[made])
        _arrow(axes, (x - 0.75 * side, bottom), (xs[made] + 0.2 * side, top), GREY if step and step.outputs else LINE)
    _bars(axes, xs["linear-eval top-1"], chain.output("metrics"))
    return figure


def _colour(step: Step | None) -> str:
    if step is None:
        return LINE
    return {"FINISHED": BLUE, "RUNNING": AMBER}.get(step.status, RED)


def _step_lines(step: Step | None, reused: bool) -> list[str]:
    if step is None:
        return ["not run"]
    minutes, seconds = divmod(round(step.seconds), 60)
    took = f"{minutes} min {seconds} s" if minutes else f"{seconds} s"
    state = {"FINISHED": took, "RUNNING": "running"}.get(step.status, step.status.lower())
    return [f"run {short(step.run_id)}", f"reused from run {short(step.pipeline_id)}" if reused else state]


def _things(chain: Lineage, steps: Mapping[str, Step]) -> dict[str, tuple[list[str], bool]]:
    """Returns for each input and output of a step, by its title, its lines and whether it exists."""
    dataset, model = chain.output("dataset"), chain.output("model")
    conversion, making = steps.get("build-tfrecords"), steps.get("import-encoder") or steps.get("pretrain")
    imported = steps.get("import-encoder")
    return {
        "raw archives": ([_end_of(conversion.arguments.get("raw", ""))] if conversion else [], conversion is not None),
        "dataset": (_dataset_lines(dataset) if dataset else [], dataset is not None),
        "source": (_source_lines(imported, model) if imported else [], imported is not None),
        "encoder": (_encoder_lines(model, making) if model and making else [], model is not None),
        "linear-eval top-1": ([], chain.output("metrics") is not None),
    }


def _end_of(path: str) -> str:
    return "…/" + "/".join(path.rstrip("/").split("/")[-2:]) if path else ""


def _source_lines(imported: Step, model: Artifact | None) -> list[str]:
    found = [model.short("format", 36), f"sha256 {model.short('source_sha256', 16)}"] if model else []
    return [_end_of(str(imported.arguments.get("encoder", "")))[-36:], *found]


def _dataset_lines(dataset: Artifact) -> list[str]:
    return [
        dataset.short("fingerprint", 16),
        f"{dataset.count('train_images'):,} train, {dataset.count('validation_images'):,} validation",
        f"{dataset.count('classes'):,} classes",
    ]


def _encoder_lines(model: Artifact, making: Step) -> list[str]:
    loss = making.metrics.get("train/contrastive_loss")
    return [
        f"{model.metadata.get('model_name')} v{model.metadata.get('model_version')}",
        str(model.metadata.get("preset", "")),
        f"{model.count('steps'):,} steps" + (f", loss {loss:.3f}" if loss is not None else ""),
    ]


def _box(
    axes: Axes,
    x: float,
    y: float,
    height: float,
    title: str,
    lines: Sequence[str],
    *,
    face: str,
    edge: str,
    ink: str,
    dashed: bool = False,
) -> None:
    corner = (x - _BOX_WIDTH / 2, y - height / 2)
    style = "round,pad=0,rounding_size=0.12"
    line = (0, (4, 2)) if dashed else "solid"
    axes.add_patch(
        FancyBboxPatch(corner, _BOX_WIDTH, height, style, facecolor=face, edgecolor=edge, linewidth=1.6, linestyle=line)
    )
    axes.text(x, y + height / 2 - 0.27, title, size=11.5, weight="bold", color=ink, ha="center", va="center")
    for i, text in enumerate(lines):
        axes.text(x, y + height / 2 - 0.58 - 0.25 * i, text, size=9.5, color=ink, ha="center", va="center")


def _arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], colour: str) -> None:
    axes.add_patch(
        FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=13, color=colour, linewidth=1.4, shrinkA=3, shrinkB=3)
    )


def _bars(axes: Axes, x: float, metrics: Artifact | None) -> None:
    """Draws bars of the top-1 accuracy and the untrained control in the result's box, whose width is 100%."""
    if metrics is None:
        return
    left, width = x - _BOX_WIDTH / 2 + 0.2, _BOX_WIDTH - 0.4
    for name, key, y, colour in (
        ("pretrained", "top_1_accuracy", _THING_Y - 0.06, GREEN),
        ("untrained control", "untrained_top_1_accuracy", _THING_Y - 0.5, LINE),
    ):
        if key not in metrics.metadata:
            continue
        value = float(metrics.metadata[key])
        axes.barh(y, width, height=0.12, left=left, color="#e3e8ee")
        axes.barh(y, width * value, height=0.12, left=left, color=colour)
        axes.text(left, y + 0.18, name, size=9, color=INK, va="center")
        axes.text(left + width, y + 0.18, f"{value:.1%}", size=9.5, weight="bold", color=INK, va="center", ha="right")

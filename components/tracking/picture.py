"""The picture of a pipeline run's lineage. Knows no MLflow."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from components.lineage import COMPONENTS, Artifact, Lineage, Step, short
from eval.show.figures import AMBER, BLUE, GREEN, GREY, INK, LINE, PAPER, RED

_WIDTH, _HEIGHT = 13.0, 4.5
_BOX_WIDTH, _STEP_HEIGHT, _THING_HEIGHT = 2.65, 1.05, 1.4
_STEP_Y, _THING_Y = 2.95, 1.05


def lineage(chain: Lineage) -> Figure:
    """Draws the raw data, steps, dataset, encoder and result of a pipeline run. Reused steps have dashed outlines."""
    figure = Figure(figsize=(_WIDTH, _HEIGHT), facecolor=PAPER)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, _WIDTH), ylim=(0, _HEIGHT))
    axes.set_axis_off()
    axes.text(0.35, _HEIGHT - 0.42, chain.name, size=15, weight="bold", color=INK, va="center")
    axes.text(_WIDTH - 0.35, _HEIGHT - 0.42, f"pipeline run {short(chain.run_id)}", size=10, color=GREY, va="center", ha="right")

    steps = {step.component: step for step in chain.steps}
    things = _things(chain, steps)
    thing_xs = np.linspace(0.35 + _BOX_WIDTH / 2, _WIDTH - 0.35 - _BOX_WIDTH / 2, len(things))
    for x, (title, lines, there) in zip(thing_xs, things, strict=True):
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
    for i, component in enumerate(COMPONENTS):
        step = steps.get(component)
        x = (thing_xs[i] + thing_xs[i + 1]) / 2
        reused = step is not None and chain.reused(step)
        colour = _colour(step)
        filled = step is not None and not reused
        face, ink = (colour, PAPER) if filled else (PAPER, colour)
        _box(axes, x, _STEP_Y, _STEP_HEIGHT, component, _step_lines(step, reused), face=face, edge=colour, ink=ink, dashed=reused)
        top, bottom = _THING_Y + _THING_HEIGHT / 2, _STEP_Y - _STEP_HEIGHT / 2
        _arrow(axes, (thing_xs[i] + 0.2, top), (x - 0.75, bottom), GREY if step else LINE)
        _arrow(axes, (x + 0.75, bottom), (thing_xs[i + 1] - 0.2, top), GREY if step and step.outputs else LINE)
    _bars(axes, thing_xs[-1], chain.output("metrics"))
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


def _things(chain: Lineage, steps: Mapping[str, Step]) -> list[tuple[str, list[str], bool]]:
    """Returns for each input and output of a step its title, its lines, and whether it exists."""
    dataset, model = chain.output("dataset"), chain.output("model")
    conversion, pretraining = steps.get("build-tfrecords"), steps.get("pretrain")
    raw = str(conversion.arguments.get("raw", "")) if conversion else ""
    return [
        ("raw archives", ["…/" + "/".join(raw.rstrip("/").split("/")[-2:])] if raw else [], conversion is not None),
        ("dataset", _dataset_lines(dataset) if dataset else [], dataset is not None),
        ("encoder", _encoder_lines(model, pretraining) if model and pretraining else [], model is not None),
        ("linear-eval top-1", [], chain.output("metrics") is not None),
    ]


def _dataset_lines(dataset: Artifact) -> list[str]:
    return [
        dataset.short("fingerprint", 16),
        f"{dataset.count('train_images'):,} train, {dataset.count('validation_images'):,} validation",
        f"{dataset.count('classes'):,} classes",
    ]


def _encoder_lines(model: Artifact, pretraining: Step) -> list[str]:
    loss = pretraining.metrics.get("train/contrastive_loss")
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

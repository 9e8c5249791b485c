"""The report of a run: an HTML page with the accuracy of the encoder, what it learned, and its data and settings.

The page omits sections for which the run has no data: SimCLR has no u, for example.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure

from eval.measure.evaluation import Accuracy, Measurement
from eval.measure.protocols import description_of
from eval.show import figures, measurements, samples
from eval.show.figures import History, Interval
from eval.show.run import Run, read_run
from trainer import checkpoint as checkpoints
from trainer.config import Config, as_dict, pretraining_of
from trainer.presets import PRESETS
from trainer.shared.files import write_whole
from trainer.shared.page import Facts, Section, between, percent, render

_MOST_CONFUSED = 8
"""Maximum number of pairs of classes in the table."""


class Report(NamedTuple):
    html: str
    figures: Mapping[str, Figure]
    """Charts of the page, by file name."""


class Stat(NamedTuple):
    """A number below the title."""

    name: str
    value: str
    more: str
    is_control: bool = False


def write_report(
    path: str,
    evaluation: str,
    data_dir: str,
    *,
    history: History | None = None,
    runs: Mapping[str, str] | None = None,
) -> Report:
    """Writes the report of the evaluation in the folder `evaluation` as an HTML file `path`.

    `data_dir` is the dataset of the evaluation. The checkpoint is read from the path that the evaluation recorded. `history`
    holds the metrics of pretraining, `runs` the ID of each component's run. Raises UserError if evaluation, dataset or checkpoint
    is missing.
    """
    run = read_run(evaluation, data_dir, history or {}, runs or {})
    drawn = _figures(run)
    sections = [
        _accuracies(run, drawn),
        *map(_measurement, run.evaluation.measurements),
        _training(run, drawn),
        _u(run, drawn),
        samples.views(run),
        *samples.of_features(run),
        _classes(run, drawn),
        _provenance(run),
    ]
    row = run.evaluation.headline
    html = render(
        Path(__file__).with_name("report.html.jinja"),
        title=f"{run.preset or 'encoder'}: {percent(row.top_1)} top-1 ({row.protocol})",
        sections=[one for one in sections if one is not None],
        **_header(run),
    )
    write_whole(path, html.encode())
    return Report(html, drawn)


def _figures(run: Run) -> dict[str, Figure]:
    """Draws the charts of a run, by file name. Omits charts for which the run has no data."""
    found = run.evaluation
    drawn: dict[str, Figure | None] = {
        "accuracies.png": figures.intervals(
            [
                Interval(row.protocol, row.top_1, *row.top_1_interval)
                if row.encoder == "pretrained"
                else Interval(f"{row.protocol}, untrained", row.top_1, *row.top_1_interval, figures.GREY)
                for row in found.rows
            ]
        ),
        "curves.png": figures.curves({"": run.history}),
    }
    if run.config.loss.name == "global_contrastive":
        drawn["u.png"] = figures.u_over_training(run.history)
    if _has_classes(run):
        matrix = found.confusion(found.headline.column)
        drawn["per_class_accuracy.png"] = figures.per_class_accuracy(_per_class_accuracy(matrix), found.classes)
        drawn["confusion.png"] = figures.confusion(matrix, found.classes)
    return {file: figure for file, figure in drawn.items() if figure is not None}


# ---- How good it is


def _header(run: Run) -> dict[str, Any]:
    row, found = run.evaluation.headline, run.evaluation
    control = found.row(row.protocol, "untrained")
    stats = [
        Stat("Protocol", row.protocol, description_of(row.protocol)),
        Stat("95% interval", between(row.top_1_interval), f"bootstrap over the {len(found.labels):,} validation images"),
        Stat("Untrained control", percent(control.top_1) if control else "none", found.about_control, control is not None),
    ]
    if knn := found.row("knn"):
        stats.append(Stat("k-NN", percent(knn.top_1), between(knn.top_1_interval)))
    if run.preset in PRESETS:
        published = PRESETS[run.preset]
        value, _, rest = published.published.partition(" ")
        if value.replace(".", "").isdigit():
            said = f"{rest}, protocol official. {published.source}"
            stats.append(Stat("Published for the preset", f"{value}%", said))
        else:
            stats.append(Stat("Published for the preset", "none", ""))
    shape, training = run.config.encoder, run.config.optimizer
    width = f", width {shape.width_multiplier:g}" if shape.width_multiplier != 1 else ""
    return {
        "preset": run.preset or "pretrained encoder",
        "about": f"ResNet-{shape.depth}{width} · {training.epochs} epochs at batch {training.global_batch_size} · "
        f"{run.manifest.name}, {run.manifest.num_classes:,} classes",
        "headline": row,
        "control": control,
        "chance": 1 / run.manifest.num_classes,
        "stats": stats,
    }


def _accuracies(run: Run, drawn: Mapping[str, Figure]) -> Section:
    rows = run.evaluation.rows
    published = PRESETS.get(run.preset)
    said = "; ".join(f"{row.column} {percent(row.top_1)}" for row in rows)
    return Section(
        "accuracies",
        "Accuracies",
        f"On all {len(run.evaluation.labels):,} validation images, at step {run.checkpoint.step:,} of pretraining. Compare only "
        "results of the same protocol.",
        {
            "svg": figures.svg(drawn["accuracies.png"], f"top-1 with intervals: {said}"),
            "rows": list(map(_row, rows)),
            "note": f"Published for {run.preset}: {published.published} ({published.source})." if published else "",
        },
    )


def _measurement(row: Measurement) -> Section:
    text = description_of(row.protocol)
    return Section(
        f"measurement-{row.protocol}",
        row.protocol.replace("-", " ").capitalize(),
        f"{text[:1].upper()}{text[1:]}. Compare only values of the same dataset and the same {', '.join(row.conditions)}.",
        {
            "rows": measurements.values_in_words(row),
            "note": f"Measured with {measurements.about(row)}, in {row.seconds:,.0f} s.",
        },
    )


def _row(row: Accuracy) -> tuple[Any, ...]:
    """Returns the cells of an accuracy's row in the table."""
    protocol = row.protocol, description_of(row.protocol) if row.encoder == "pretrained" else ""
    top_5 = "" if row.top_5 is None else percent(row.top_5)
    took = f"{row.seconds:,.0f} s"
    return protocol, row.encoder, percent(row.top_1), between(row.top_1_interval), top_5, row.settings_in_words, took


# ---- How it was trained


def _training(run: Run, drawn: Mapping[str, Figure]) -> Section | None:
    if "curves.png" not in drawn:
        return None
    last = "; ".join(f"{name} {points[-1][1]:.4g}" for name, points in run.history.items() if points)
    return Section(
        "training",
        "Pretraining",
        "Each point is the mean since the previous point."
        + (
            " The loss is a surrogate whose gradient estimates the objective's."
            if run.config.loss.name == "global_contrastive"
            else ""
        ),
        {"svg": figures.svg(drawn["curves.png"], f"curves of pretraining; at the end {last}")},
    )


def _u(run: Run, drawn: Mapping[str, Figure]) -> Section | None:
    if run.config.loss.name != "global_contrastive":
        return None
    svg = figures.svg(drawn["u.png"], "mean and quantiles of u over the steps") if "u.png" in drawn else ""
    rows = samples.extremes_of_u(run)
    if not svg and not rows:
        return None
    return Section(
        "u",
        "u, the estimator",
        "Each image has a value u: the moving average of its contrast to the images of its batches. It estimates the contrast to "
        f"all images. gamma = {run.config.loss.gamma:g}, variant {run.config.loss.variant}.",
        {"svg": svg, "rows": rows},
    )


# ---- What it learned


def _has_classes(run: Run) -> bool:
    return run.evaluation.headline.column in run.evaluation.predictions and len(run.evaluation.classes) > 1


def _per_class_accuracy(confusion: np.ndarray) -> np.ndarray:
    """Returns the top-1 accuracy of each class, [C]; nan for a class without images."""
    count = confusion.sum(axis=1)
    return np.where(count > 0, np.diag(confusion) / np.maximum(count, 1), np.nan)


def _classes(run: Run, drawn: Mapping[str, Figure]) -> Section | None:
    if not _has_classes(run):
        return None
    found = run.evaluation
    matrix, classes = found.confusion(found.headline.column), found.classes
    accuracy = _per_class_accuracy(matrix)
    told = "; ".join(f"{name} {value:.0%}" for name, value in zip(classes, accuracy, strict=True) if not np.isnan(value))
    wrong = matrix - np.diag(np.diag(matrix))
    pairs = np.argsort(-wrong, axis=None, kind="stable")[:_MOST_CONFUSED]
    confused = [
        (classes[label], classes[taken], wrong[label, taken], percent(wrong[label, taken] / matrix[label].sum()))
        for label, taken in (np.unravel_index(pair, wrong.shape) for pair in pairs)
        if wrong[label, taken] > 0
    ]
    label = "confusion matrix; the table below lists the most confused pairs"
    return Section(
        "classes",
        "Classes",
        f"Protocol {found.headline.protocol}.",
        {
            "by_class": figures.svg(drawn["per_class_accuracy.png"], f"top-1 by class: {told[:2000]}"),
            "confusion": figures.svg(drawn["confusion.png"], label),
            "confused": confused,
        },
    )


# ---- Where it came from


def _provenance(run: Run) -> Section:
    found, manifest = run.evaluation.result, run.manifest
    train, validation = manifest.splits["train"], manifest.splits["validation"]
    facts: list[tuple[str, str | tuple[str, ...]]] = [
        ("dataset", f"{manifest.name}: {train.records:,} training and {validation.records:,} validation images"),
        ("fingerprint", (manifest.fingerprint,)),
    ]
    if found["pretraining_dataset_fingerprint"] != manifest.fingerprint:
        facts.append(("pretrained on", (found["pretraining_dataset_fingerprint"],)))
    repaired, rejected = (sum(len(getattr(split, name)) for split in (train, validation)) for name in ("repaired", "rejected"))
    if repaired or rejected:
        facts.append(("images", f"{repaired:,} repaired, {rejected:,} left out"))
    if run.preset:
        facts += [("preset", (run.preset,)), ("changed", _changed(run.config, run.preset))]
    facts.append(("checkpoint", f"step {run.checkpoint.step:,}"))
    facts.append(("state_sha256", (checkpoints.sha256_of(run.checkpoint.arrays),)))
    if run.about.get("code_version"):
        facts.append(("code of pretraining", (run.about["code_version"],)))
    facts += [(f"run of {component}", (run_id,)) for component, run_id in run.runs.items()]
    return Section(
        "provenance",
        "Provenance",
        "The same settings, data and code give the same bits on the same machine.",
        {"facts": facts, "settings": _settings(run.config, found["linear_eval"])},
    )


def _settings(config: Config, linear_eval: Mapping[str, Any]) -> Facts:
    pretraining = [(name, (str(value),)) for name, value in pretraining_of(config).items()]
    return pretraining + [(f"linear_eval.{name}", (str(value),)) for name, value in linear_eval.items()]


def _changed(config: Config, preset: str) -> str | tuple[str, ...]:
    """Returns the settings that differ from the preset's, or a sentence if there are none to show."""
    if preset not in PRESETS:
        return "this version does not know the preset"
    now, usual = as_dict(config), as_dict(PRESETS[preset].config)
    changed = (f"{name}={value}" for name, value in now.items() if name != "linear_eval" and value != usual[name])
    return tuple(changed) or "nothing"

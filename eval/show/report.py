"""The report of a run: one page that says how good the encoder is, and shows what it learned and from what.

What a run lacks, such as u of SimCLR or the curves of a run elsewhere, its page leaves out.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from eval.measure.evaluation import Accuracy, Evaluation, read_evaluation
from eval.measure.features import Features, StoredFeatures, read_features
from eval.measure.neighbours import nearest_neighbours
from eval.measure.protocols import description_of
from eval.show import figures, page, pictures
from eval.show.figures import History, Interval
from eval.show.words import settings_in_words
from trainer import checkpoint as checkpoints
from trainer.checkpoint import Checkpoint
from trainer.config import Config
from trainer.presets import PRESETS, describe
from trainer.shared.errors import UserError
from trainer.shared.files import write_whole
from trainer.shared.records import Manifest, read_manifest, reading_places
from trainer.train import read_config

_SIDE = 96
"""Pixels of a picture, at most."""
_EXTREMES = 10
_QUERIES = 8
_NEIGHBOURS = 7
_AUGMENTED = 9
_MAPPED = 2000
"""Images on the map, at most."""
_MAP_SIDE = 48
_MAP_COLUMNS = 45
_CLASSES_WITH_COLOURS = 20
"""On the map; of more, colour says what was told right."""


class Report(NamedTuple):
    html: str
    figures: Mapping[str, Figure]
    """Its charts by file name, for whoever shows them elsewhere."""


@dataclass(frozen=True)
class _Run:
    """All that a page is made from."""

    evaluation: Evaluation
    data_dir: str
    manifest: Manifest
    config: Config
    about: Mapping[str, Any]
    """The rest of the checkpoints' config.json."""
    checkpoint: Checkpoint
    history: History
    runs: Mapping[str, str]

    @property
    def preset(self) -> str:
        return str(self.about.get("preset") or "")

    def thumbnails(self, split: str, image_ids: Sequence[int], side: int = _SIDE) -> dict[int, Image.Image]:
        """Returns pictures of images, cropped as evaluation crops them, by ID in the order given."""
        jpegs = pictures.read_jpegs(self.data_dir, self.manifest, split, image_ids)
        proportion = self.config.eval_crop_proportion
        return {int(image_id): pictures.thumbnail(jpegs[int(image_id)], side, proportion) for image_id in image_ids}


def write_report(
    path: str,
    evaluation: str,
    data_dir: str,
    *,
    history: History | None = None,
    runs: Mapping[str, str] | None = None,
) -> Report:
    """Writes the report on what an evaluation left in the folder `evaluation` as one HTML file, `path`.

    `data_dir` is the dataset it was made on; the checkpoint is the one that the evaluation names. `history` is what was recorded
    while pretraining, `runs` the ID of each component's run. Raises UserError where evaluation, dataset or checkpoint are not
    there.
    """
    found = read_evaluation(evaluation)
    checkpoint = checkpoints.load(found.result["checkpoint"])
    config, about = read_config(checkpoints.run_folder(checkpoint.path))
    run = _Run(found, data_dir, read_manifest(data_dir), config, about, checkpoint, history or {}, runs or {})
    drawn: dict[str, Figure] = {}
    sections = [
        _accuracies(run, drawn),
        _training(run, drawn),
        _u(run, drawn),
        _views(run),
        *_of_features(run),
        _classes(run, drawn),
        _provenance(run),
    ]
    row = found.headline
    title = f"{about.get('preset') or 'encoder'}: {page.percent(row.top_1)} top-1 ({row.protocol})"
    text = page.page(title, _header(run), [one for one in sections if one is not None], "Made by sogclr.")
    write_whole(path, text.encode())
    return Report(text, drawn)


# ---- How good it is


def _header(run: _Run) -> str:
    found = run.evaluation
    row = found.headline
    control = found.row(row.protocol, "untrained")
    preset = run.preset
    stats = [
        ("Protocol", page.text(row.protocol), description_of(row.protocol)),
        ("95% interval", page.between(*row.top_1_interval), f"bootstrap over the {len(found.labels):,} validation images"),
    ]
    key = '<span class="key control"></span>' + page.percent(control.top_1) if control else "none"
    stats.append(("Untrained control", key, found.about_control))
    if knn := found.row("knn"):
        stats.append(("k-NN", page.percent(knn.top_1), page.between(*knn.top_1_interval)))
    if preset in PRESETS:
        published = describe(preset)
        value, _, rest = published["published"].partition(" ")
        number = value.replace(".", "").isdigit()
        said = f"{rest}, protocol official. {published['source']}" if number else published["published"].partition(";")[0]
        stats.append(("Published for the preset", page.text(f"{value}%") if number else "none", said if number else ""))
    listed = "".join(
        f"<div><dt>{page.text(name)}</dt><dd>{value}<small>{page.text(more)}</small></dd></div>" for name, value, more in stats
    )
    width = f", width {run.config.width_multiplier:g}" if run.config.width_multiplier != 1 else ""
    size = f"ResNet-{run.config.depth}{width}"
    return (
        f'<p class="eyebrow"><b>{page.text(preset or "pretrained encoder")}</b> · {size} · {run.config.epochs} epochs at batch '
        f"{run.config.global_batch_size} · {page.text(run.manifest.name)}, {run.manifest.num_classes:,} classes</p>"
        f"<h1>{page.percent(row.top_1)}<small>top-1</small></h1>{_scale(row, control, run.manifest.num_classes)}"
        f'<dl class="stats">{listed}</dl>'
    )


def _scale(row: Accuracy, control: Accuracy | None, num_classes: int) -> str:
    """Returns 0 to 100% as a bar with the result, its control and chance on it."""
    chance = 1 / num_classes
    marks = f'<u style="left:{100 * chance:.2f}%" title="chance, {page.percent(chance)}"></u>'
    said = [f"chance {page.percent(chance)}"]
    for one, kind in ((control, "control"), (row, "ours")):
        if one is not None:
            said.insert(0, f"{one.encoder} {page.percent(one.top_1)}")
            low, high = one.top_1_interval
            marks += f'<i class="{kind}" style="left:{100 * low:.2f}%;width:{100 * (high - low):.2f}%"></i>'
            marks += f'<b class="{kind}" style="left:{100 * one.top_1:.2f}%" title="{said[0]}"></b>'
    label = f"top-1: {', '.join(said)}"
    return f'<div class="scale" role="img" aria-label="{label}">{marks}<span>0</span><span>100%</span></div>'


def _accuracies(run: _Run, drawn: dict[str, Figure]) -> page.Section:
    found = run.evaluation
    cells = [
        [
            page.text(row.protocol)
            + (f"<small>{page.text(description_of(row.protocol))}</small>" if row.encoder == "pretrained" else ""),
            row.encoder,
            f"<b>{page.percent(row.top_1)}</b>",
            page.between(*row.top_1_interval),
            page.percent(row.top_5) if row.top_5 is not None else "",
            f"<small>{page.text(settings_in_words(row.settings))}</small>",
            f"{row.seconds:,.0f} s",
        ]
        for row in found.rows
    ]
    head = ["protocol", "encoder", "top-1", "95% interval", "top-5", "settings", "took"]
    note = ""
    if (preset := run.preset) in PRESETS:
        published = describe(preset)
        note = f"Published for {preset}: {published['published']} ({published['source']})."
    drawn["accuracies.png"] = figures.intervals(
        [
            Interval(row.protocol, row.top_1, *row.top_1_interval)
            if row.encoder == "pretrained"
            else Interval(f"{row.protocol}, untrained", row.top_1, *row.top_1_interval, figures.GREY)
            for row in found.rows
        ]
    )
    said = "; ".join(f"{row.column} {page.percent(row.top_1)}" for row in found.rows)
    return page.Section(
        "accuracies",
        "Accuracies",
        f"On all {len(found.labels):,} validation images, of the checkpoint at step {run.checkpoint.step:,}. Compare only what "
        "has the same protocol.",
        page.chart(figures.svg(drawn["accuracies.png"], f"top-1 with intervals: {said}"))
        + page.table(head, cells, numbers=(2, 3, 4, 6))
        + page.note(note),
    )


# ---- How it was trained


def _training(run: _Run, drawn: dict[str, Figure]) -> page.Section | None:
    figure = figures.curves({"": run.history})
    if figure is None:
        return None
    drawn["curves.png"] = figure
    last = "; ".join(f"{name} {points[-1][1]:.4g}" for name, points in run.history.items() if points)
    return page.Section(
        "training",
        "Pretraining",
        "What was recorded; a point is the mean since the one before it."
        + (" The loss is a surrogate that has the objective's gradient." if run.config.loss == "global_contrastive" else ""),
        page.chart(figures.svg(figure, f"curves of pretraining; at the end {last}"), wide=True),
    )


def _u(run: _Run, drawn: dict[str, Figure]) -> page.Section | None:
    if run.config.loss != "global_contrastive":
        return None
    parts = []
    if figure := figures.u_over_training(run.history):
        drawn["u.png"] = figure
        parts.append(page.chart(figures.svg(figure, "mean and quantiles of u over the steps"), wide=True))
    u = run.checkpoint.arrays.get("u")
    same_images = run.evaluation.result["pretraining_dataset_fingerprint"] == run.manifest.fingerprint
    if u is not None and same_images and len(u) == run.manifest.splits["train"].records and np.any(u > 0):
        seen = np.flatnonzero(u > 0)
        order = seen[np.argsort(u[seen], kind="stable")]
        count = min(_EXTREMES, len(order) // 2)
        smallest, largest = order[:count], order[::-1][:count]
        shown = run.thumbnails("train", [*smallest, *largest])
        for title, of_row in (("Largest u: much in the batch is like them", largest), ("Smallest u: little is", smallest)):
            row = "".join(
                page.picture(pictures.data_uri(shown[int(i)]), f"training image {i} with u = {u[i]:.4g}", f"{u[i]:.4g}")
                for i in of_row
            )
            parts.append(f'<h3>{title}</h3><div class="row">{row}</div>')
    if not parts:
        return None
    lede = (
        "u is kept for each image: a moving average of its contrast to the images of its batches, which stands for that to all "
        f"others. gamma = {run.config.gamma:g}, variant {run.config.variant}."
    )
    return page.Section("u", "u, the estimator", lede, "".join(parts))


def _views(run: _Run) -> page.Section:
    count = run.manifest.splits["train"].records
    chosen = _drawn(run, count, min(_AUGMENTED, count))
    jpegs = pictures.read_jpegs(run.data_dir, run.manifest, "train", chosen)
    made = pictures.views([(image_id, jpegs[image_id]) for image_id in chosen], run.config, epoch=0)
    cards = []
    for image_id, pair in zip(chosen, made, strict=True):
        original = pictures.data_uri(pictures.thumbnail(jpegs[image_id], _SIDE))
        shown = [page.picture(original, f"training image {image_id}", f"image {image_id}")]
        for number, pixels in enumerate(pair, 1):
            view = pictures.from_array(pixels)
            view.thumbnail((_SIDE, _SIDE))
            shown.append(page.picture(pictures.data_uri(view), f"view {number} of training image {image_id}", f"view {number}"))
        cards.append(f"<div>{''.join(shown)}</div>")
    return page.Section(
        "views",
        "What the network sees",
        "Training images drawn by chance, with their two views in the first epoch, as the trainer's own code makes them at "
        f"{run.config.image_size} px.",
        f'<div class="cards">{"".join(cards)}</div>',
    )


# ---- What it learned


def _of_features(run: _Run) -> list[page.Section | None]:
    train, validation = (_stored_features(run.evaluation, split) for split in ("train", "validation"))
    if train is None or validation is None:
        return []
    whole = validation.whole()
    return [_neighbours(run, train, whole), _map(run, whole)]


def _stored_features(evaluation: Evaluation, split: str) -> StoredFeatures | None:
    """Returns the features of a split: where the evaluation left them, or in its folder, with which they may have moved.

    Features are large, and may have been deleted since: then None.
    """
    path = str(evaluation.result["features"][split]["path"])
    for folder in (path, f"{evaluation.folder}/{path.rpartition('/')[2]}"):
        try:
            return read_features(folder)
        except UserError:
            continue
    return None


def _neighbours(run: _Run, train: StoredFeatures, validation: Features) -> page.Section:
    queries = _drawn(run, len(validation.labels), min(_QUERIES, len(validation.labels)))
    similarities, nearest = nearest_neighbours(train, validation.values[queries], min(_NEIGHBOURS, train.count))
    count = nearest.shape[1]
    label_of = train.labels_by_id()
    asked = run.thumbnails("validation", queries)
    answers = run.thumbnails("train", np.unique(nearest).tolist())
    classes = run.evaluation.classes
    cells = [page.heading("validation image"), page.heading("nearest training images", count)]
    for query, row, of_row in zip(queries, nearest, similarities, strict=True):
        label = int(validation.labels[query])
        alt = f"validation image {query} of class {classes[label]}"
        cells.append(page.picture(pictures.data_uri(asked[query]), alt, classes[label]))
        for image_id, cosine in zip(row.tolist(), of_row, strict=True):
            same = label_of[image_id] == label
            alt = f"training image {image_id} of class {classes[int(label_of[image_id])]}, cosine {cosine:.3f}"
            cells.append(page.picture(pictures.data_uri(answers[image_id]), alt, f"{cosine:.3f}", "right" if same else "wrong"))
    right = float(np.mean(label_of[nearest] == validation.labels[queries][:, None]))
    return page.Section(
        "neighbours",
        "Nearest neighbours",
        f"Validation images drawn by chance, and the training images whose features are nearest by cosine (the number). ✓ is of "
        f"the same class, ✗ of another; {right:.0%} of those shown are right.",
        f'<div class="neighbours" style="--columns:{count + 1}">{"".join(cells)}</div>',
    )


def _map(run: _Run, validation: Features) -> page.Section | None:
    # The places are in no order of classes, and of the first ones the records lie together.
    chosen = np.flatnonzero(reading_places(len(validation.labels)) < _MAPPED)
    if len(chosen) < 10:
        return None
    classes, labels = run.evaluation.classes, validation.labels[chosen]
    correct = run.evaluation.correct(run.evaluation.headline.column)[chosen]
    titles = [
        f"{classes[label]}, image {image_id}, told {'right' if right else 'wrong'}"
        for label, image_id, right in zip(labels, chosen, correct, strict=True)
    ]
    by_class = len(classes) <= _CLASSES_WITH_COLOURS
    if by_class:
        kinds, names, colours = labels, classes, _colours(len(classes))
    else:
        kinds, names, colours = np.where(correct, 0, 1), ["told right", "told wrong"], ["var(--good)", "var(--bad)"]
    shown = run.thumbnails("validation", chosen.tolist(), _MAP_SIDE)
    columns = min(_MAP_COLUMNS, len(chosen))
    sheet = pictures.data_uri(pictures.sheet(shown, _MAP_SIDE, columns), quality=80)
    body = page.scatter(_spread(validation.values[chosen]), kinds.tolist(), titles, names, colours, sheet, columns)
    sort = "sorts classes" if by_class else "tells right from wrong"
    return page.Section(
        "map",
        "Map of features",
        f"{len(chosen):,} validation images, laid out by t-SNE (seed 0) of the first principal components of their features: "
        f"near is alike, distances between groups mean little. Colour {sort}; a dot shows its picture under the pointer.",
        body,
    )


def _spread(values: np.ndarray) -> np.ndarray:
    """Lays features, [n, F], out in the plane, [n, 2] within [0, 1]: PCA to 50 dimensions, then t-SNE. A function of `values`."""
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits

    unit = _unit(values)
    reduced = PCA(min(50, *unit.shape), random_state=0).fit_transform(unit)
    perplexity = min(30.0, (len(values) - 1) / 3)
    # One thread adds in one order; several wait for each other at each of a thousand small steps.
    with threadpool_limits(1):
        at = TSNE(perplexity=perplexity, init="pca", random_state=0).fit_transform(reduced)
    least, most = at.min(axis=0), at.max(axis=0)
    return np.asarray((at - least) / np.maximum(most - least, 1e-9))


def _unit(values: np.ndarray) -> np.ndarray:
    return np.asarray(values / np.maximum(np.linalg.norm(values, axis=1, keepdims=True), 1e-12))


def _colours(count: int) -> list[str]:
    """Returns colours that can be told apart on light and dark ground."""
    return [f"oklch({(64, 74, 56)[i % 3]}% .16 {360 * i / count:.0f})" for i in range(count)]


def _classes(run: _Run, drawn: dict[str, Figure]) -> page.Section | None:
    found = run.evaluation
    key = found.headline.column
    if key not in found.predictions or len(found.classes) < 2:
        return None
    matrix, classes = found.confusion(key), found.classes
    count = matrix.sum(axis=1)
    accuracy = np.where(count > 0, np.diag(matrix) / np.maximum(count, 1), np.nan)
    drawn["per_class_accuracy.png"] = figures.per_class_accuracy(accuracy, classes)
    drawn["confusion.png"] = figures.confusion(matrix, classes)
    told = "; ".join(f"{name} {value:.0%}" for name, value in zip(classes, accuracy, strict=True) if not np.isnan(value))
    wrong = matrix - np.diag(np.diag(matrix))
    pairs = np.argsort(-wrong, axis=None, kind="stable")[:8]
    rows = [
        [
            page.text(classes[label]),
            page.text(classes[taken]),
            str(wrong[label, taken]),
            page.percent(wrong[label, taken] / count[label]),
        ]
        for label, taken in (np.unravel_index(pair, wrong.shape) for pair in pairs)
        if wrong[label, taken] > 0
    ]
    confused = (
        "<h3>Most often confused</h3>" + page.table(["class", "taken for", "images", "of the class"], rows, numbers=(2, 3))
        if rows
        else ""
    )
    body = (
        page.chart(figures.svg(drawn["per_class_accuracy.png"], f"top-1 by class: {told[:2000]}"))
        + page.chart(
            figures.svg(drawn["confusion.png"], "confusion matrix; the pairs that are confused most are in the table below")
        )
        + confused
    )
    return page.Section("classes", "Classes", f"Protocol {found.headline.protocol}.", body)


# ---- Where it came from


def _provenance(run: _Run) -> page.Section:
    found, manifest = run.evaluation.result, run.manifest
    train, validation = manifest.splits["train"], manifest.splits["validation"]
    pairs = [
        ("dataset", f"{page.text(manifest.name)}: {train.records:,} training and {validation.records:,} validation images"),
        ("fingerprint", page.code(manifest.fingerprint)),
    ]
    if found["pretraining_dataset_fingerprint"] != manifest.fingerprint:
        pairs.append(("pretrained on", page.code(found["pretraining_dataset_fingerprint"])))
    repaired, rejected = (sum(len(getattr(split, name)) for split in (train, validation)) for name in ("repaired", "rejected"))
    if repaired or rejected:
        pairs.append(("images", f"{repaired:,} repaired, {rejected:,} left out"))
    preset = run.preset
    if preset:
        pairs.append(("preset", page.code(preset)))
        pairs.append(("changed", _changed(run.config, preset)))
    pairs.append(("checkpoint", f"step {run.checkpoint.step:,}"))
    pairs.append(("state_sha256", page.code(checkpoints.sha256_of(run.checkpoint.arrays))))
    if run.about.get("code_version"):
        pairs.append(("code of pretraining", page.code(run.about["code_version"])))
    pairs += [(f"run of {component}", page.code(run_id)) for component, run_id in run.runs.items()]
    settings = [(name, page.code(value)) for name, value in asdict(run.config).items() if name != "linear_eval"]
    settings += [(f"linear_eval.{name}", page.code(value)) for name, value in found["linear_eval"].items()]
    return page.Section(
        "provenance",
        "Where it comes from",
        "The same settings, data and code make the same bits on the same machine.",
        page.facts(pairs) + page.details("All settings", page.facts(settings)),
    )


def _changed(config: Config, preset: str) -> str:
    if preset not in PRESETS:
        return "this version does not know the preset"
    now, usual = asdict(config), asdict(PRESETS[preset]())
    changed = [page.code(f"{name}={value}") for name, value in now.items() if name != "linear_eval" and value != usual[name]]
    return ", ".join(changed) or "nothing"


def _drawn(run: _Run, count: int, number: int) -> list[int]:
    """Returns `number` of 0..count-1, drawn by the evaluation's seed."""
    random = np.random.Generator(np.random.Philox(key=[run.config.linear_eval.seed, 1]))
    return [int(i) for i in np.sort(random.choice(count, number, replace=False))]

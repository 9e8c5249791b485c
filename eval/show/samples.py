"""The sections of a report with images of the dataset, which show what the encoder learned."""

from typing import NamedTuple

import numpy as np

from eval.measure.features import Features, StoredFeatures
from eval.measure.neighbours import nearest_neighbours
from eval.show import pictures
from eval.show.run import SIDE, Run
from trainer.shared.page import Picture, Section, data_uri
from trainer.shared.records import reading_positions

_EXTREMES = 10
_QUERIES = 8
_NEIGHBOURS = 7
_AUGMENTED = 9
_MAPPED = 2000
"""Maximum number of images on the map."""
_MAP_SIDE = 48
_MAP_COLUMNS = 45
_MAP_RATIO = 8 / 5
_PICTURED = 0.036
"""Side of a picture on the map, as a fraction of the map's width."""
_CLASSES_WITH_COLOURS = 20
"""Maximum number of classes that the map shows by colour. With more, colour shows whether the prediction is correct."""


class Mark(NamedTuple):
    """An image on the map."""

    kind: int
    title: str
    pictured: bool
    """Whether the mark is a picture. It is a dot if it would cover another picture."""
    left: float
    """Fraction of the map's width."""
    top: float
    """Fraction of the map's height."""
    column: int
    """Column of its picture on the sheet."""
    row: int
    """Row of its picture on the sheet."""


def extremes_of_u(run: Run) -> list[tuple[str, list[Picture]]]:
    """Returns (title, pictures) of the training images of largest u and of smallest u. Empty if u is not known."""
    u = run.checkpoint.arrays.get("u")
    same_images = run.evaluation.result["pretraining_dataset_fingerprint"] == run.manifest.fingerprint
    if u is None or not same_images or len(u) != run.manifest.splits["train"].records or not np.any(u > 0):
        return []
    seen = np.flatnonzero(u > 0)
    order = seen[np.argsort(u[seen], kind="stable")]
    count = min(_EXTREMES, len(order) // 2)
    smallest, largest = order[:count], order[::-1][:count]
    shown = run.thumbnails("train", [*smallest, *largest])
    return [
        (title, [Picture(data_uri(shown[int(i)]), f"training image {i} with u = {u[i]:.4g}", f"{u[i]:.4g}") for i in of_row])
        for title, of_row in (
            ("Largest u: similar to many images of their batches", largest),
            ("Smallest u: similar to few images of their batches", smallest),
        )
    ]


def views(run: Run) -> Section:
    chosen = run.drawn(run.manifest.splits["train"].records, _AUGMENTED)
    jpegs = pictures.read_jpegs(run.data_dir, run.manifest, "train", chosen)
    made = pictures.views([(image_id, jpegs[image_id]) for image_id in chosen], run.config, epoch=0)
    cards = []
    for image_id, pair in zip(chosen, made, strict=True):
        original = data_uri(pictures.thumbnail(jpegs[image_id], SIDE))
        card = [Picture(original, f"training image {image_id}", f"image {image_id}")]
        for number, pixels in enumerate(pair, 1):
            view = pictures.from_array(pixels)
            view.thumbnail((SIDE, SIDE))
            card.append(Picture(data_uri(view), f"view {number} of training image {image_id}", f"view {number}"))
        cards.append(card)
    return Section(
        "views",
        "Training views",
        "Randomly drawn training images with their two views in the first epoch, made by the trainer's code at "
        f"{run.config.views.image_size} px.",
        {"cards": cards},
    )


def of_features(run: Run) -> list[Section | None]:
    """Returns the sections that need features: nearest neighbours and map. Empty if the features were deleted."""
    train, validation = run.features("train"), run.features("validation")
    if train is None or validation is None:
        return []
    whole = validation.whole()
    return [_neighbours(run, train, whole), _map(run, whole)]


def _neighbours(run: Run, train: StoredFeatures, validation: Features) -> Section:
    queries = run.drawn(len(validation.labels), _QUERIES)
    similarities, nearest = nearest_neighbours(train, validation.values[queries], min(_NEIGHBOURS, train.count))
    label_of, classes = train.labels_by_id(), run.evaluation.classes
    asked = run.thumbnails("validation", queries)
    answers = run.thumbnails("train", np.unique(nearest).tolist())
    rows = []
    for query, of_query, cosines in zip(queries, nearest, similarities, strict=True):
        label = int(validation.labels[query])
        alt = f"validation image {query} of class {classes[label]}"
        row = [Picture(data_uri(asked[query]), alt, classes[label])]
        for image_id, cosine in zip(of_query.tolist(), cosines, strict=True):
            alt = f"training image {image_id} of class {classes[int(label_of[image_id])]}, cosine {cosine:.3f}"
            is_right = label_of[image_id] == label
            row.append(Picture(data_uri(answers[image_id]), alt, f"{cosine:.3f}", "right" if is_right else "wrong"))
        rows.append(row)
    right = float(np.mean(label_of[nearest] == validation.labels[queries][:, None]))
    return Section(
        "neighbours",
        "Nearest neighbours",
        f"Randomly drawn validation images, and the training images with the nearest features by cosine (the number). ✓ is the "
        f"same class, ✗ another class; {right:.0%} of the shown neighbours are of the same class.",
        {"count": nearest.shape[1], "rows": rows},
    )


def _map(run: Run, validation: Features) -> Section | None:
    # The first positions are a random sample of the classes, and their records lie together in the shards.
    chosen = np.flatnonzero(reading_positions(len(validation.labels)) < _MAPPED)
    if len(chosen) < 10:
        return None
    classes, labels = run.evaluation.classes, validation.labels[chosen]
    correct = run.evaluation.correct(run.evaluation.headline.column)[chosen]
    titles = [
        f"{classes[label]}, image {image_id}, predicted {'correctly' if right else 'wrongly'}"
        for label, image_id, right in zip(labels, chosen, correct, strict=True)
    ]
    by_class = len(classes) <= _CLASSES_WITH_COLOURS
    if by_class:
        kinds, legend = labels, list(zip(classes, _colours(len(classes)), strict=True))
    else:
        kinds, legend = np.where(correct, 0, 1), [("predicted correctly", "var(--good)"), ("predicted wrongly", "var(--bad)")]
    columns = min(_MAP_COLUMNS, len(chosen))
    sheet = pictures.sheet(run.thumbnails("validation", chosen.tolist(), _MAP_SIDE), _MAP_SIDE, columns)
    shown = "the class" if by_class else "whether the prediction is correct"
    return Section(
        "map",
        "Map of features",
        f"{len(chosen):,} validation images, laid out by t-SNE (seed 0) of the first principal components of their features. "
        "Images that are close have similar features; distances between groups mean little. "
        f"Colour shows {shown}. Point at a dot to see its picture.",
        {
            "marks": _marks(spread(validation.values[chosen]), kinds.tolist(), titles, columns),
            "legend": legend,
            "sheet": data_uri(sheet, quality=80),
            "columns": columns,
            "side": _PICTURED,
        },
    )


def spread(values: np.ndarray) -> np.ndarray:
    """Lays out features, [n, F], in the plane by PCA to 50 dimensions, then t-SNE. Returns [n, 2] in [0, 1]. Deterministic."""
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits

    unit = np.asarray(values / np.maximum(np.linalg.norm(values, axis=1, keepdims=True), 1e-12))
    reduced = PCA(min(50, *unit.shape), random_state=0).fit_transform(unit)
    perplexity = min(30.0, (len(values) - 1) / 3)
    # One thread sums in a fixed order. Several threads would wait for each other at each of a thousand small steps.
    with threadpool_limits(1):
        at = TSNE(perplexity=perplexity, init="pca", random_state=0).fit_transform(reduced)
    least, most = at.min(axis=0), at.max(axis=0)
    return np.asarray((at - least) / np.maximum(most - least, 1e-9))


def _marks(at: np.ndarray, kinds: list[int], titles: list[str], columns: int) -> list[Mark]:
    """Returns the marks of images at the points `at`, [n, 2] in [0, 1]. A mark that would cover an earlier picture is a dot."""
    pictured: list[tuple[float, float]] = []
    marks = []
    for number, ((x, y), kind, title) in enumerate(zip(at, kinds, titles, strict=True)):
        left, top = 0.03 + 0.94 * x, 0.04 + 0.92 * y
        apart, below = 1.2 * _PICTURED, 1.2 * _PICTURED * _MAP_RATIO
        free = all(abs(left - other) > apart or abs(top - above) > below for other, above in pictured)
        if free:
            pictured.append((left, top))
        row, column = divmod(number, columns)
        marks.append(Mark(kind, title, free, left, top, column, row))
    return marks


def _colours(count: int) -> list[str]:
    """Returns colours that are distinguishable on a light and on a dark page."""
    return [f"oklch({(64, 74, 56)[i % 3]}% .16 {360 * i / count:.0f})" for i in range(count)]

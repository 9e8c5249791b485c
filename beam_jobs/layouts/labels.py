"""The labels of validation images without synset folders: a file with one synset a line, in the order of the images' names.

Without such a file, the ground truth of the devkit has them.
"""

import importlib.util
import itertools
import sys
from collections.abc import Set
from pathlib import Path

from beam_jobs import files
from beam_jobs.layouts import devkit
from beam_jobs.layouts.layout import Archive, Found, and_more
from trainer.shared.errors import UserError

VALIDATION_LABELS = "validation_labels.txt"


def find_labels(folder: str) -> files.FileInfo | None:
    """Returns the file of labels in a raw folder, or None if there is none."""
    found = files.find(files.join(folder, VALIDATION_LABELS))
    return found._replace(name=VALIDATION_LABELS) if found else devkit.find(folder)


def read_labels(folder: str, found: Found, known: Set[str] | None) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Returns the synset of each validation image in the order of names, and the problems of the labels.

    Without a file of labels, uses ImageNet's own, which tensorflow_datasets ships. A synset that is not in `known` is a problem,
    unless `known` is None. Raises UserError if the file is empty, or if it is missing and tensorflow_datasets is not installed.
    """
    path = files.join(folder, found.labels.name) if found.labels else _imagenets_labels(folder)
    # Interned, so that a plan holds each synset once instead of once for each of 50,000 images.
    if found.labels and found.labels.name != VALIDATION_LABELS:
        named = devkit.read(folder, found.labels.name)
    else:
        named = files.read(path).decode(errors="replace").split()
    synsets = tuple(map(sys.intern, named))
    if not synsets:
        raise UserError(f"{path} is empty: it must have a synset a line, in the order of the validation images' names")
    unknown = [(line, synset) for line, synset in enumerate(synsets, start=1) if known is not None and synset not in known]
    problems = tuple(
        f"{path} line {line}: {synset} is not a synset of the training images{and_more(unknown)}; "
        f"put the right {VALIDATION_LABELS} in {folder}"
        for line, synset in unknown[:1]
    )
    return synsets, problems


def synsets_by_order(archive: Archive, names: list[str]) -> tuple[list[str], tuple[str, ...]]:
    """Returns the synset of each image of an archive, in the order of `names`, and problems. A missing label is ""."""
    if len(names) in (0, len(archive.synsets)):
        return list(archive.synsets[: len(names)]), ()
    problem = (
        f"{archive.name} has {len(names)} images and there are {len(archive.synsets)} labels for them: "
        f"give {VALIDATION_LABELS} one line for each image"
    )
    return list(itertools.islice(itertools.chain(archive.synsets, itertools.repeat("")), len(names))), (problem,)


def _imagenets_labels(folder: str) -> str:
    # Found without importing the package, which would import TensorFlow.
    package = importlib.util.find_spec("tensorflow_datasets")
    if package is None or package.origin is None:
        raise UserError(f"{folder} has no {VALIDATION_LABELS}, and tensorflow_datasets, which has ImageNet's, is not installed")
    return str(Path(package.origin).parent / "datasets" / "imagenet2012" / "validation_labels.txt")

"""The labels of validation images without synset folders: a file with one label a line.

A line is a synset, in the order of the images' names, or NAME and SYNSET with a tab, a comma or a space between them. Without
such a file, the ground truth of ImageNet's devkit has the labels.
"""

import functools
import importlib.util
import itertools
import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path

from beam_jobs import files
from beam_jobs.layouts import devkit
from beam_jobs.layouts.layout import Archive, and_more
from beam_jobs.layouts.names import IMAGES, base_name, canonical, out_of_order
from beam_jobs.listings import FileInfo
from trainer.shared.errors import UserError, first_few
from trainer.shared.files import is_local

VALIDATION_LABELS = "validation_labels.txt"
_Split = Callable[[str], tuple[str, str] | None]
"""Returns the name and the label of a line, or None if it has no two parts."""


@dataclass(frozen=True)
class Labels:
    """The labels of a split's images."""

    synsets: tuple[str, ...]
    """Synset of each image."""
    names: tuple[str, ...] = ()
    """Name of each image without folders; empty if the labels are in the order of the images' names."""
    file: str = ""
    """The file that they come from: a path relative to the raw folder, or a path of its own. Empty for ImageNet's list."""


def find_labels(folder: str) -> FileInfo | None:
    """Returns the file of labels in a raw folder, or None if there is none."""
    found = files.find(files.join(folder, VALIDATION_LABELS))
    return found._replace(name=VALIDATION_LABELS) if found else devkit.find(folder)


def read_labels(
    folder: str, labels: FileInfo | None, known: Set[str] | None, images: Iterable[str] = ()
) -> tuple[Labels, tuple[str, ...]]:
    """Returns the labels of the validation images in the file `labels`, and the problems of the labels.

    images: names of the images, if they are known

    Without such a file, uses ImageNet's own, which tensorflow_datasets ships. A synset that is not in `known` is a problem,
    unless `known` is None. Raises UserError if the file is empty, or if it is missing and tensorflow_datasets is not installed.
    """
    if labels and devkit.is_ground_truth(labels.name):
        path = path_of(folder, labels.name)
        lines = devkit.read(path)
        read = Labels(_interned(lines), file=labels.name)
    else:
        path = path_of(folder, labels.name) if labels else _imagenets_labels(folder)
        lines = files.read_lines(path)
        read = replace(parse_labels(lines, known, _PAIRS.get(base_name(path)), images), file=labels.name if labels else "")
    if not lines:
        raise UserError(f"{path} is empty: it must have a synset a line, in the order of the validation images' names")
    skipped = len(lines) - len(read.synsets)
    unknown = [
        (line, synset) for line, synset in enumerate(read.synsets, start=1 + skipped) if known is not None and synset not in known
    ]
    remedy = f"put the right {VALIDATION_LABELS} in {folder}"
    if unknown and known and known <= set(read.synsets):
        remedy = "get the training images of all classes, or give the classes that are there with --subset FILE"
    problems = tuple(
        f"{path} line {line}: {synset} is not a synset of the training images{and_more(unknown)}; {remedy}"
        for line, synset in unknown[:1]
    )
    return read, problems


def path_of(folder: str, name: str) -> str:
    """Returns the path of a file of labels: `name` is relative to the raw folder, or a path of its own."""
    return name if os.path.isabs(name) or not is_local(name) else files.join(folder, name)


def archive_of(name: str, file: str, size: int, labels: Labels) -> Archive:
    """Returns the archive of all validation images, whose labels come from a file."""
    return Archive(
        "validation",
        name,
        file,
        0,
        size,
        synsets=labels.synsets,
        names=labels.names,
        labels_file=labels.file or VALIDATION_LABELS,
    )


def parse_labels(lines: Sequence[str], known: Set[str] | None, split: _Split | None = None, images: Iterable[str] = ()) -> Labels:
    """Returns the labels of a file's lines.

    split: how the lines are divided, if that is known
    images: names of the images, if they are known

    Else the lines are read in the way that gives the fewest labels that are not in `known`. If `known` is None, lines that all
    begin with one of `images` or the name of an image file have names, and others do not.
    """
    if split and (pairs := _pairs(lines, split)):
        return pairs
    plain = Labels(_interned(lines))
    bases = {canonical(base_name(name)) for name in images}
    bases |= {name.rpartition(".")[0] for name in bases}
    by_space = functools.partial(_by_space, known=known or frozenset(), names=bases)
    ways = [plain, *(pairs for way in (_by_tab, _by_comma, by_space) if (pairs := _pairs(lines, way)))]
    if known is None:
        named = (one for one in ways if one.names)
        return next((one for one in named if all(name in bases or name.lower().endswith(IMAGES) for name in one.names)), plain)
    return min(ways, key=lambda one: sum(synset not in known for synset in one.synsets))


def synsets_of(archive: Archive, names: list[str]) -> tuple[list[str], tuple[str, ...]]:
    """Returns the synset of each image of an archive, and problems. A missing label is "".

    names: the images' paths, in the order of `names.base_name_first`
    """
    if not names:
        return [], ()
    return _by_name(archive, names) if archive.names else _by_order(archive, names)


def _by_order(archive: Archive, names: list[str]) -> tuple[list[str], tuple[str, ...]]:
    pairs = f"give {VALIDATION_LABELS} the lines NAME SYNSET"
    bases = [canonical(base_name(name)) for name in names]
    problems = []
    if swapped := out_of_order(bases):
        problems.append(
            f"{archive.name} has {swapped[0]}, which comes before {swapped[1]} by name and after it by number, so labels without "
            f"names may be in either order: {pairs}"
        )
    if len(names) != len(archive.synsets):
        problems.append(
            f"{archive.name} has {len(names)} images and there are {len(archive.synsets)} labels for them: "
            f"give {VALIDATION_LABELS} one line for each image"
        )
    missing = [""] * (len(names) - len(archive.synsets))
    return [*archive.synsets[: len(names)], *missing], tuple(problems)


def _by_name(archive: Archive, names: list[str]) -> tuple[list[str], tuple[str, ...]]:
    labels = dict(zip(archive.names, archive.synsets, strict=True))
    problems = []
    if len(labels) < len(archive.names):
        ordered = sorted(archive.names)
        twice = [name for name, following in itertools.pairwise(ordered) if name == following]
        problems.append(f"{archive.labels_file} has {first_few(twice, ', ')} twice: give each image one line")
    keys = [_key(name, labels) for name in names]
    if unlabelled := [name for name, key in zip(names, keys, strict=True) if key not in labels]:
        problems.append(f"{archive.labels_file} has no line for {first_few(unlabelled, ', ')} of {archive.name}")
    if missing := sorted(labels.keys() - set(keys)):
        problems.append(f"{archive.labels_file} has {first_few(missing, ', ')}, of which {archive.name} has no image")
    bases = [canonical(base_name(name)) for name in names]
    if twice := [name for name, following in itertools.pairwise(bases) if name == following]:
        problems.append(f"{archive.name} has {first_few(twice, ', ')} in two folders, so a name does not say which label it has")
    return [labels.get(key, "") for key in keys], tuple(problems)


def _key(name: str, labels: dict[str, str]) -> str:
    """Returns the name that `labels` may have for an image: with its ending, or without."""
    base = canonical(base_name(name))
    return base if base in labels else base.rpartition(".")[0] or base


def _pairs(lines: Sequence[str], split: _Split) -> Labels | None:
    """Returns the labels of lines NAME SYNSET, or None if not all lines are. A header, which names no image, is left out."""
    pairs = [split(line) for line in lines]
    if len(pairs) > 1 and pairs[0] and not re.search("[0-9.]", pairs[0][0]):
        del pairs[0]
    if not all(pair and all(pair) for pair in pairs):
        return None
    names = tuple(canonical(base_name(pair[0])) for pair in pairs if pair)
    return Labels(_interned(pair[1] for pair in pairs if pair), names)


def _interned(synsets: Iterable[str]) -> tuple[str, ...]:
    """Returns synsets in canonical form, each once in memory instead of once for each of 50,000 images."""
    return tuple(sys.intern(canonical(synset)) for synset in synsets)


def _by_tab(line: str) -> tuple[str, str] | None:
    """Returns name and label. More columns, such as the box in Tiny-ImageNet's file, are ignored."""
    fields = [field.strip() for field in line.split("\t")]
    return (fields[0], fields[1]) if len(fields) > 1 else None


def _by_comma(line: str) -> tuple[str, str] | None:
    """Returns name and label. More columns are ignored, and the boxes after the label in Kaggle's file."""
    fields = [field.strip() for field in line.split(",")]
    return (fields[0], re.sub("( -?[0-9.]+){4}( .*)?$", "", fields[1])) if len(fields) > 1 else None


def _by_space(line: str, known: Set[str], names: Set[str]) -> tuple[str, str] | None:
    """Returns name and label, divided by the last space that leaves a label in `known` or a name in `names`, else by the last."""
    words = line.split(" ")
    splits = [(" ".join(words[:place]).strip(), " ".join(words[place:])) for place in range(len(words) - 1, 0, -1)]
    fits = (one for one in splits if canonical(one[1]) in known or canonical(base_name(one[0])) in names)
    return next(fits, splits[0] if splits else None)


_PAIRS: dict[str, _Split] = {"LOC_val_solution.csv": _by_comma, "val_annotations.txt": _by_tab}
"""How the lines of Kaggle's and Tiny-ImageNet's files are divided."""


def _imagenets_labels(folder: str) -> str:
    # Found without importing the package, which would import TensorFlow.
    package = importlib.util.find_spec("tensorflow_datasets")
    if package is None or package.origin is None:
        raise UserError(f"{folder} has no {VALIDATION_LABELS}, and tensorflow_datasets, which has ImageNet's, is not installed")
    return str(Path(package.origin).parent / "datasets" / "imagenet2012" / "validation_labels.txt")

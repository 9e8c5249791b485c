"""Subsets of the training images for fine-tuning: drawn class by class, or read from a published list."""

from collections.abc import Sequence

import numpy as np
import tensorflow as tf

from trainer.shared.errors import UserError
from trainer.shared.records import Manifest


def balanced_subset(labels: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Returns the sorted IDs of a subset with the same number of images of every class, at least one, `fraction` of all in total.

    `labels`, [n] int64, is indexed by image ID. A class with too few images contributes all of them. The subset depends only on
    the arguments. With the same seed, the subset of a smaller fraction is part of that of a larger one.
    """
    order = np.random.Generator(np.random.Philox(key=[seed, 1])).permutation(len(labels))
    per_class = np.bincount(labels)
    by_class = order[np.argsort(labels[order], kind="stable")]
    rank = np.arange(len(labels)) - np.repeat(np.cumsum(per_class) - per_class, per_class)
    return np.sort(by_class[rank < np.repeat(balanced_counts(per_class, fraction), per_class)])


def balanced_counts(per_class: Sequence[int] | np.ndarray, fraction: float) -> np.ndarray:
    """Returns the number of images of each class in `balanced_subset`, [C] int64. `per_class` counts all images of each class."""
    return np.minimum(per_class, max(1, round(fraction * sum(per_class) / len(per_class))))


def read_subset(path: str, manifest: Manifest, names: str = "") -> np.ndarray:
    """Returns the sorted IDs of the images that a file lists, one a line, as IDs or, as in published lists, as file names.

    For file names it needs `names`, the path of a file with the name of every training image: in sorted order, these have the IDs
    0, 1, ... Raises UserError if a line is not a training image, or occurs twice.
    """
    lines = _lines(path)
    count = manifest.splits["train"].records
    if all(line.isdigit() for line in lines):
        ids = [int(line) for line in lines]
    elif not names:
        raise UserError(
            f"{path} lists names, but records hold no names: set linear_eval.train_names=FILE, a file with the name of every "
            "training image, or list image IDs"
        )
    else:
        rank = _ranks(names, manifest)
        unknown = next((line for line in lines if _base(line) not in rank), None)
        if unknown is not None:
            raise UserError(f"{path} lists {unknown}, which is missing in {names}")
        ids = [rank[_base(line)] for line in lines]
    if not ids:
        raise UserError(f"{path} lists no images")
    beyond = next((one for one in ids if one >= count), None)
    if beyond is not None:
        raise UserError(f"{path} lists image ID {beyond}: training images have the IDs 0..{count - 1}")
    seen: set[int] = set()
    for one in ids:
        if one in seen:
            raise UserError(f"{path} lists image ID {one} twice")
        seen.add(one)
    return np.sort(np.array(ids, np.int64))


def _ranks(path: str, manifest: Manifest) -> dict[str, int]:
    """Returns the ID of each training image by file name.

    IDs are in the order of (synset, name). This is the sorted order of the names, because a name begins with its synset.
    """
    split = manifest.splits["train"]
    left_out = {_base(str(one["source"])) for one in split.rejected}
    names = sorted({_base(line) for line in _lines(path)} - left_out)
    if len(names) != split.records:
        raise UserError(f"{path} names {len(names)} training images, but the dataset has {split.records}: list all of them")
    return {name: rank for rank, name in enumerate(names)}


def _lines(path: str) -> list[str]:
    if not tf.io.gfile.exists(path) or tf.io.gfile.isdir(path):
        raise UserError(f"{path} is not a file: name a file that lists one image a line")
    with tf.io.gfile.GFile(path) as file:
        return [line.strip() for line in file.read().splitlines() if line.strip()]


def _base(name: str) -> str:
    return name.rpartition("/")[2]

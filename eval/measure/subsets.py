"""Which training images keep their labels: a part of each class, by image ID."""

from collections.abc import Sequence

import numpy as np
import tensorflow as tf

from trainer.shared.errors import UserError
from trainer.shared.records import Manifest


def balanced_subset(labels: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Returns the IDs, in order, of as many images of every class: `fraction` of all images in all, at least one of each.

    `labels` is [n] int64, by image ID. A class with fewer images gives all of them. A function of its arguments; for the same
    seed, a smaller fraction's images are among a larger one's.
    """
    order = np.random.Generator(np.random.Philox(key=[seed, 1])).permutation(len(labels))
    each = balanced_counts(np.bincount(labels), fraction)
    return np.sort(np.concatenate([order[labels[order] == label][:count] for label, count in enumerate(each)]))


def balanced_counts(per_class: Sequence[int] | np.ndarray, fraction: float) -> np.ndarray:
    """Returns how many images `balanced_subset` takes of each class, [C] int64, where there are `per_class`."""
    return np.minimum(per_class, max(1, round(fraction * sum(per_class) / len(per_class))))


def read_subset(path: str, manifest: Manifest, names: str = "") -> np.ndarray:
    """Returns the image IDs, in order, that a file lists, one a line: as numbers, or as files' names, as published lists do.

    To tell the IDs of names it needs `names`, a file with the name of every training image: sorted, they have the IDs 0, 1, ...
    Raises UserError for a line that is no training image, and for one that is there twice.
    """
    lines = _lines(path)
    count = manifest.splits["train"].records
    if all(line.isdigit() for line in lines):
        ids = [int(line) for line in lines]
    elif not names:
        raise UserError(
            f"{path} lists names, of which records hold none: give linear_eval.train_names=FILE, with the name of every "
            "training image, or list image IDs"
        )
    else:
        rank = _ranks(names, manifest)
        unknown = next((line for line in lines if _base(line) not in rank), None)
        if unknown is not None:
            raise UserError(f"{path} lists {unknown}, which {names} does not name")
        ids = [rank[_base(line)] for line in lines]
    if not ids:
        raise UserError(f"{path} lists no image")
    beyond = next((one for one in ids if one >= count), None)
    if beyond is not None:
        raise UserError(f"{path} lists image ID {beyond}: those of the training images are 0..{count - 1}")
    if len(set(ids)) < len(ids):
        again = next(one for place, one in enumerate(ids) if one in ids[:place])
        raise UserError(f"{path} lists image ID {again} twice")
    return np.sort(np.array(ids, np.int64))


def _ranks(path: str, manifest: Manifest) -> dict[str, int]:
    """Returns image IDs by name: those of train are in the order of (synset, name), and a name begins with its synset."""
    split = manifest.splits["train"]
    left_out = {_base(str(one["source"])) for one in split.rejected}
    names = sorted({_base(line) for line in _lines(path)} - left_out)
    if len(names) != split.records:
        raise UserError(f"{path} names {len(names)} training images, and the dataset has {split.records}: it must name them all")
    return {name: rank for rank, name in enumerate(names)}


def _lines(path: str) -> list[str]:
    if not tf.io.gfile.exists(path) or tf.io.gfile.isdir(path):
        raise UserError(f"{path} is not a file: a list of images has one a line")
    with tf.io.gfile.GFile(path) as file:
        return [line.strip() for line in file.read().splitlines() if line.strip()]


def _base(name: str) -> str:
    return name.rpartition("/")[2]

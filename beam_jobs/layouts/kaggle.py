"""ImageNet as Kaggle has it:

    ILSVRC/Data/CLS-LOC/train/SYNSET/*    the training images
    ILSVRC/Data/CLS-LOC/val/*             the validation images, whose labels are in LOC_val_solution.csv
    LOC_val_solution.csv                  a line for each image: its name and its boxes, each a synset and four numbers

The raw folder holds ILSVRC, or is ILSVRC, Data or CLS-LOC itself. The file of labels lies beside ILSVRC.
"""

import os
import posixpath
from collections.abc import Set
from dataclasses import replace

from beam_jobs import files
from beam_jobs.layouts.folders import Folders
from beam_jobs.layouts.layout import Contents, Found
from beam_jobs.layouts.names import why_passed_over
from beam_jobs.layouts.passed_over import PassedOver, unlabelled_images
from beam_jobs.listings import FileInfo
from trainer.shared.files import is_local

LABELS = "LOC_val_solution.csv"
_BESIDE = ("LOC_sample_submission.csv", "LOC_synset_mapping.txt", "LOC_train_solution.csv")
_BASES = ("ILSVRC/Data/CLS-LOC", "Data/CLS-LOC", "CLS-LOC", "")
"""Where the folders of the splits lie in the raw folder. In the nth, the file of labels lies n levels above the raw folder."""


class Kaggle(Folders):
    """Extracted folders, deep within Kaggle's, with labels by name."""

    def expects(self, split: str) -> str:
        return f"{_BASES[0]}/{super().expects(split)}"

    def recognise(self, folder: str, split: str) -> Found | None:
        for levels, base in enumerate(_BASES):
            labels = _find_labels(folder, levels)
            if not base and not labels:
                return None  # without Kaggle's labels, these are any extracted folders
            found = self.find(folder, split, base)
            if found and split == "train":
                return replace(
                    found, others=(*found.others, *_beside(folder), *unlabelled_images(folder, posixpath.join(base, "test")))
                )
            if found:
                why = f"{found.why}, {labels.name} is there" if labels else found.why
                return replace(found, why=why, labels=labels or found.labels)
        return None

    def validation_archives(self, folder: str, found: Found, known: Set[str] | None) -> Contents:
        labels = found.labels
        if labels and labels.name.startswith("../"):
            found = replace(found, labels=labels._replace(name=_path(folder, labels.name)))
        return super().validation_archives(folder, found, known)


def _find_labels(folder: str, levels: int) -> FileInfo | None:
    """Returns the file of labels in the raw folder or up to `levels` above it, or None."""
    for up in range(levels + 1):
        name = "../" * up + LABELS
        if found := files.find(_path(folder, name)):
            return found._replace(name=name)
    return None


def _beside(folder: str) -> list[PassedOver]:
    """Returns Kaggle's other files in the raw folder."""
    found = [(name, files.find(files.join(folder, name))) for name in _BESIDE]
    return [PassedOver(name, why_passed_over(name), info.size) for name, info in found if info]


def _path(folder: str, name: str) -> str:
    """Returns the path of a file in a folder or above it. In a bucket, ".." is a name like any other."""
    up = name.count("../")
    if is_local(folder):
        return os.path.join(os.path.abspath(folder), name)
    return files.join("/".join(folder.rstrip("/").split("/")[: -up or None]), name[3 * up :])


LAYOUT = Kaggle()

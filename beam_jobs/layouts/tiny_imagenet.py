"""Tiny-ImageNet as it is unzipped:

wnids.txt                  the synsets, one a line
train/SYNSET/images/*      the training images, beside train/SYNSET/SYNSET_boxes.txt
val/images/*               the validation images
val/val_annotations.txt    a line for each of them, separated by tabs: name, synset, box
"""

from dataclasses import replace

from beam_jobs import files
from beam_jobs.layouts.folders import Folders, find_folder
from beam_jobs.layouts.layout import Contents, Found
from beam_jobs.layouts.names import canonical
from beam_jobs.layouts.passed_over import unlabelled_images

SYNSETS = "wnids.txt"
TRAIN, IMAGES, VALIDATION = "train", "images", "val/images"
LABELS = "val/val_annotations.txt"
_TOPS = {"train": TRAIN, "validation": VALIDATION}
_LABELS = {"train": SYNSETS, "validation": LABELS}


class TinyImageNet(Folders):
    """Folders of images within folders of synsets, and a file of validation labels by name."""

    def expects(self, split: str) -> str:
        return f"{SYNSETS} and {TRAIN}/SYNSET/{IMAGES}/" if split == "train" else f"{VALIDATION}/ and {LABELS}"

    def recognise(self, folder: str, split: str) -> Found | None:
        labels = files.find(files.join(folder, _LABELS[split]))
        found = find_folder(folder, _TOPS[split]) if labels else None
        if labels is None or found is None:
            return None
        if split == "train" and not any(f"/{IMAGES}/" in info.name for info in found.files):
            return None
        others = (*found.others, *unlabelled_images(folder, "test")) if split == "train" else found.others
        why = f"{_LABELS[split]} is there, and {found.why}"
        return replace(found, why=why, labels=labels._replace(name=_LABELS[split]), others=others)

    def training_archives(self, folder: str, found: Found) -> Contents:
        contents = super().training_archives(folder, found)
        named = {canonical(line) for line in files.read_lines(files.join(folder, SYNSETS))}
        there = {archive.synset for archive in contents.archives}
        problems = [
            f"{TRAIN}/{synset}/{IMAGES}/ has no images, and {SYNSETS} names {synset}: get it again"
            for synset in sorted(named - there)
        ]
        problems += [f"{TRAIN}/{synset} is not a synset of {SYNSETS}" for synset in sorted(there - named)]
        return replace(contents, problems=(*contents.problems, *problems))


LAYOUT = TinyImageNet()

"""Tiny-ImageNet as it is unzipped:

wnids.txt                  the synsets, one a line
train/SYNSET/images/*      the training images, beside train/SYNSET/SYNSET_boxes.txt
val/images/*               the validation images
val/val_annotations.txt    a line for each of them, separated by tabs: name, synset, box
"""

import posixpath
import sys
from collections.abc import Set

from beam_jobs import files
from beam_jobs.layouts.layout import Archive, Contents, Found, Layout, ListedImage, Listing, name_problems
from beam_jobs.layouts.pairs import synsets_by_name

SYNSETS = "wnids.txt"
TRAIN, IMAGES, VALIDATION = "train", "images", "val/images"
LABELS = "val/val_annotations.txt"
_LABELS = {"train": SYNSETS, "validation": LABELS}


class TinyImageNet(Layout):
    """Folders of images within folders of synsets, and a file of validation labels by name."""

    def expects(self, split: str) -> str:
        return f"{SYNSETS} and train/SYNSET/images/" if split == "train" else f"{VALIDATION}/ and {LABELS}"

    def recognise(self, folder: str, split: str) -> Found | None:
        labels = files.find(files.join(folder, _LABELS[split]))
        if labels is None:
            return None
        within = TRAIN if split == "train" else VALIDATION
        infos = files.tree(files.join(folder, within), depth=2 if split == "train" else 0)
        if not any(split == "validation" or f"/{IMAGES}/" in info.name for info in infos):
            return None
        found = tuple(info._replace(name=posixpath.join(within, info.name)) for info in infos)
        why = f"{_LABELS[split]} is there, and {within}/ holds {len(found):,} files"
        return Found(found, why, labels._replace(name=_LABELS[split]))

    def training_archives(self, folder: str, found: Found) -> Contents:
        sizes: dict[str, int] = {}
        problems = []
        for info in found.files:
            synset, _, rest = info.name.removeprefix(f"{TRAIN}/").partition("/")
            if rest.startswith(f"{IMAGES}/"):
                sizes[synset] = sizes.get(synset, 0) + info.size
            elif rest != f"{synset}_boxes.txt":
                problems.append(f"{info.name} is not in {TRAIN}/SYNSET/{IMAGES}/, as the training images of Tiny-ImageNet are")
        named = files.read(files.join(folder, SYNSETS)).decode("utf-8-sig", errors="replace").split()
        for synset in sorted(set(named) - sizes.keys()):
            problems.append(f"{TRAIN}/{synset}/{IMAGES}/ has no images, and {SYNSETS} names {synset}: get it again")
        for synset in sorted(sizes.keys() - set(named)):
            problems.append(f"{TRAIN}/{synset} is not a synset of {SYNSETS}")
        archives = (Archive("train", f"{TRAIN}/{synset}/{IMAGES}", "", 0, sizes[synset], synset) for synset in sorted(sizes))
        return Contents(tuple(archives), tuple(problems))

    def validation_archives(self, folder: str, found: Found, known: Set[str] | None) -> Contents:
        lines = files.read(files.join(folder, LABELS)).decode("utf-8-sig", errors="replace").splitlines()
        pairs = {name: sys.intern(synset) for name, synset, *_ in (line.split("\t") for line in lines if line.count("\t"))}
        names = [posixpath.basename(info.name) for info in found.files]
        synsets, problems = synsets_by_name(LABELS, pairs, names, known)
        size = sum(info.size for info in found.files)
        return Contents((Archive("validation", VALIDATION, "", 0, size, synsets=synsets),), problems)

    def list_images(self, folder: str, archive: Archive) -> Listing:
        infos = files.tree(files.join(folder, archive.name), depth=0)
        synsets = archive.synsets or (archive.synset,) * len(infos)
        images = (
            ListedImage("", posixpath.join(archive.name, info.name), 0, info.size, synset, "")
            for info, synset in zip(infos, synsets, strict=True)
        )
        return Listing(tuple(images), name_problems(archive.name, [info.name for info in infos]))


LAYOUT = TinyImageNet()

"""ImageNet extracted:

    train/SYNSET/*      or train/SYNSET.tar, a tar of images
    val/SYNSET/*        or val/*, whose labels are in validation_labels.txt; the folder may be valid/ or validation/, too

Links are followed. Names that begin with a dot are skipped, because file managers leave such files anywhere.
"""

import posixpath
from collections.abc import Set

from beam_jobs import files
from beam_jobs.layouts.archives import list_tar
from beam_jobs.layouts.labels import find_labels, read_labels, synsets_by_order
from beam_jobs.layouts.layout import Archive, Contents, Found, Layout, ListedImage, Listing, and_more, name_problems

TRAIN_FOLDER = "train"
VALIDATION_FOLDER = "val"
_FOLDERS = {"train": (TRAIN_FOLDER,), "validation": (VALIDATION_FOLDER, "valid", "validation")}


class Folders(Layout):
    """A folder for each split. It has images, or a folder or tar for each synset."""

    def expects(self, split: str) -> str:
        return f"{_FOLDERS[split][0]}/ with images"

    def recognise(self, folder: str, split: str) -> Found | None:
        for name in _FOLDERS[split]:
            if infos := files.tree(files.join(folder, name), depth=1):
                found = tuple(info._replace(name=posixpath.join(name, info.name)) for info in infos)
                labels = find_labels(folder) if split == "validation" else None
                return Found(found, f"{name}/ holds {len(found):,} files", labels)
        return None

    def training_archives(self, folder: str, found: Found) -> Contents:
        archives: dict[str, Archive] = {}
        sizes: dict[str, int] = {}
        problems = []
        for info in found.files:
            synset, slash, _ = info.name.removeprefix(f"{TRAIN_FOLDER}/").partition("/")
            if slash:
                sizes[synset] = sizes.get(synset, 0) + info.size
            elif synset.endswith(".tar"):
                synset = synset.removesuffix(".tar")
                archives[synset] = Archive("train", info.name, info.name, 0, info.size, synset)
            else:
                problems.append(
                    f"{TRAIN_FOLDER}/ holds {synset}: it must hold a folder or a tar for each synset and nothing else"
                )
        for synset, size in sizes.items():
            if synset in archives:
                problems.append(f"{TRAIN_FOLDER}/ holds {synset} both as a folder and as a tar: one of them must go")
            archives[synset] = Archive("train", f"{TRAIN_FOLDER}/{synset}", "", 0, size, synset)
        return Contents(tuple(archives[synset] for synset in sorted(archives)), tuple(problems))

    def validation_archives(self, folder: str, found: Found, known: Set[str] | None) -> Contents:
        size = sum(info.size for info in found.files)
        name = found.files[0].name.partition("/")[0]
        synsets = [info.name.split("/")[1] for info in found.files if info.name.count("/") > 1]
        if not synsets:
            labels, wrong = read_labels(folder, found, known)
            return Contents((Archive("validation", name, "", 0, size, synsets=labels),), wrong)
        problems = []
        if len(synsets) < len(found.files):
            flat = next(info.name for info in found.files if info.name.count("/") == 1)
            problems.append(f"{flat} is beside folders of synsets: all validation images must be in such folders, or none")
        if known is not None and (unknown := sorted(set(synsets) - known)):
            problems.append(f"{name}/{unknown[0]} is not a synset of the training images{and_more(unknown)}")
        return Contents((Archive("validation", name, "", 0, size),), tuple(problems))

    def list_images(self, folder: str, archive: Archive) -> Listing:
        if archive.file:
            return list_tar(folder, archive)
        in_synsets = not archive.synset and not archive.synsets
        infos = files.tree(files.join(folder, archive.name), depth=1 if in_synsets else 0)
        infos.sort(key=lambda info: _base_name_first(info.name))
        names = [info.name for info in infos]
        of_labels: tuple[str, ...] = ()
        if in_synsets:
            synsets = [name.partition("/")[0] for name in names]
        elif archive.synset:
            synsets = [archive.synset] * len(names)
        else:
            synsets, of_labels = synsets_by_order(archive, names)
        images = (
            ListedImage("", posixpath.join(archive.name, info.name), 0, info.size, synset, "")
            for info, synset in zip(infos, synsets, strict=True)
        )
        return Listing(tuple(images), name_problems(archive.name, names) + of_labels)


def _base_name_first(name: str) -> tuple[str, str]:
    """Returns a sort key for images: the name without its folder first, like in the flat validation archive."""
    folder, _, base = name.rpartition("/")
    return base, folder


LAYOUT = Folders()

"""ImageNet extracted:

    train/SYNSET/**     or train/SYNSET.tar, a tar of images
    val/SYNSET/**       or val/*, whose labels are in validation_labels.txt; the folder may be valid/ or validation/, too

Images lie at any depth below the folder of their synset. Links are followed. What file managers and annotation tools leave among
images is passed over.
"""

import itertools
import posixpath
from collections.abc import Set
from dataclasses import replace

from beam_jobs import files
from beam_jobs.layouts.archives import list_tar
from beam_jobs.layouts.labels import archive_of, find_labels, read_labels, synsets_of
from beam_jobs.layouts.layout import Archive, Contents, Found, Layout, ListedImage, Listing, and_more, name_problems
from beam_jobs.layouts.names import base_name_first, canonical, why_passed_over
from beam_jobs.layouts.passed_over import EMPTY_FOLDER, PassedOver, tally
from beam_jobs.listings import FileInfo, FileTable, Tree
from trainer.shared.errors import first_few

TRAIN_FOLDER = "train"
VALIDATION_FOLDER = "val"
_FOLDERS = {"train": (TRAIN_FOLDER,), "validation": (VALIDATION_FOLDER, "valid", "validation")}
_PACKED = {".tar": "tar -xf", ".tar.gz": "tar -xzf", ".tgz": "tar -xzf", ".zip": "unzip"}
"""Command that unpacks a file, by the end of its name."""


class Folders(Layout):
    """A folder for each split. It has images, or a folder or tar for each synset."""

    def expects(self, split: str) -> str:
        return f"{_FOLDERS[split][0]}/ with images"

    def recognise(self, folder: str, split: str) -> Found | None:
        return self.find(folder, split, "")

    def shares_folder(self, found: Found, split: str) -> bool:
        """Returns whether this layout itself, not one that is made of it, would find files that are `found` already."""
        return found.top.partition("/")[0] in _FOLDERS[split]

    def find(self, folder: str, split: str, base: str) -> Found | None:
        """Returns the files of a split whose folder lies in the folder `base` of a raw folder, or None if there are none."""
        for name in _FOLDERS[split]:
            if found := find_folder(folder, posixpath.join(base, name)):
                return replace(found, labels=find_labels(folder)) if split == "validation" else found
        return None

    def training_archives(self, folder: str, found: Found) -> Contents:
        archives: dict[str, Archive] = {}
        problems = []
        sizes, forms = _classes(found)
        strays = []
        for info in found.files:
            name = _within(found.top, info.name)
            if "/" in name:
                continue
            if name.endswith(".tar"):
                synset = canonical(name.removesuffix(".tar"))
                archives[synset] = Archive("train", info.name, info.name, 0, info.size, synset)
            else:
                strays.append(name)
        if strays:
            problems.append(
                f"{found.top}/ holds {first_few(strays, ', ')}: it must hold a folder or a tar for each synset "
                f"and nothing else{_unpack(found.top, strays[0])}"
            )
        for synset, size in sizes.items():
            if synset in archives:
                problems.append(f"{found.top}/ holds {synset} both as a folder and as a tar: one of them must go")
            if len(forms[synset]) > 1:
                problems.append(
                    f"{found.top}/ holds {synset} twice, composed (NFC) and decomposed (NFD), which is the same name: put the "
                    "images into one folder"
                )
            archives[synset] = Archive("train", f"{found.top}/{forms[synset][0]}", "", 0, size, synset)
        problems += _one_folder_deeper(found, set(archives))
        of_classes = {one for names in forms.values() for one in names}
        outside = (other for other in found.others if _class_of(found.top, other.name) not in of_classes)
        return Contents(tuple(archives[synset] for synset in sorted(archives)), tuple(problems), tally(outside))

    def validation_archives(self, folder: str, found: Found, known: Set[str] | None) -> Contents:
        size = sum(info.size for info in found.files)
        flat = [info.name for info in found.files if "/" not in _within(found.top, info.name)]
        packed = [
            f"{name} is packed{_unpack(found.top, _within(found.top, name))}" for name in flat if name.endswith(tuple(_PACKED))
        ]
        sizes, forms = _classes(found)
        if len(flat) == len(found.files):
            labels, wrong = read_labels(folder, found.labels, known)
            archive = archive_of(found.top, "", size, labels)
            return Contents((archive,), (*wrong, *packed[:1]), synsets=frozenset(labels.synsets))
        problems = packed[:1]
        if flat and not packed:
            problems.append(f"{flat[0]} is beside folders of synsets: all validation images must be in such folders, or none")
        with_images = {_class_of(found.top, info.name) for info in found.files}
        if empty := [synset for synset in sizes if with_images.isdisjoint(forms[synset])]:
            problems.append(_empty(found.top, empty))
        if known is not None and (unknown := sorted(sizes.keys() - known)):
            problems += _one_folder_deeper(found, set(sizes)) or [
                f"{found.top}/{unknown[0]} is not a synset of the training images{and_more(unknown)}"
            ]
        return Contents((Archive("validation", found.top, "", 0, size),), tuple(problems), synsets=frozenset(sizes))

    def list_images(self, folder: str, archive: Archive) -> Listing:
        if archive.file:
            return list_tar(folder, archive)
        return self.list_tree(archive, files.walk(files.join(folder, archive.name)))

    def list_tree(self, archive: Archive, tree: Tree) -> Listing:
        found, passed_over = _sorted_out(archive.name, tree)
        infos = sorted(found, key=lambda info: canonical(info.name) if archive.synset else base_name_first(info.name))
        names = [info.name for info in infos]
        of_labels: tuple[str, ...] = ()
        if archive.synset:
            synsets = [archive.synset] * len(names)
        elif archive.synsets:
            synsets, of_labels = synsets_of(archive, names)
        else:
            synsets = [canonical(name.partition("/")[0]) for name in names]
        images = (
            ListedImage("", posixpath.join(archive.name, info.name), 0, info.size, synset, "")
            for info, synset in zip(infos, synsets, strict=True)
        )
        problems = name_problems(archive.name, names, seen=len(passed_over)) + of_labels
        seen = len(tree.files) + len(tree.empty_folders)
        return Listing(tuple(images), problems, passed_over=tuple(passed_over), seen=seen)


def find_folder(folder: str, top: str) -> Found | None:
    """Returns the files in the folder `top` of a raw folder, or None if it holds no images."""
    tree = files.walk(files.join(folder, top))
    found, others = _sorted_out(top, tree)
    if not found:
        return None
    why = f"{top}/ holds {len(found):,} files"
    return Found(found.within(f"{top}/"), why, others=tuple(others), top=top, tree=tree)


def _sorted_out(folder: str, tree: Tree) -> tuple[FileTable, list[PassedOver]]:
    """Returns the files that may be images, and what is none."""
    passed_over = [PassedOver(posixpath.join(folder, name), EMPTY_FOLDER, 0) for name in tree.empty_folders]

    def may_be_image(info: FileInfo) -> bool:
        # The name of the listed folder itself is the user's choice, even if it begins with a dot.
        if reason := why_passed_over(info.name):
            passed_over.append(PassedOver(posixpath.join(folder, info.name), reason, info.size))
        return not reason

    return tree.files.chosen(may_be_image), sorted(passed_over)


def _classes(found: Found) -> tuple[dict[str, int], dict[str, list[str]]]:
    """Returns by synset the size of its images, and the names of its folders: more than one if they differ in Unicode's form."""
    sizes: dict[str, int] = {}
    forms: dict[str, list[str]] = {}
    below = ((info.name, info.size) for info in found.files if "/" in _within(found.top, info.name))
    # A folder that holds no image is a class too, and the reason of a problem.
    without = ((other.name, 0) for other in found.others if _may_be_class(found.top, other))
    for name, size in itertools.chain(below, without):
        of_class = _class_of(found.top, name)
        synset = canonical(of_class)
        sizes[synset] = sizes.get(synset, 0) + size
        if of_class not in forms.setdefault(synset, []):
            forms[synset].append(of_class)
    return sizes, forms


def _may_be_class(top: str, other: PassedOver) -> bool:
    if not other.name.startswith(f"{top}/"):
        return False
    is_folder = other.reason == EMPTY_FOLDER or "/" in _within(top, other.name)
    return is_folder and not why_passed_over(posixpath.join(_class_of(top, other.name), "image"))


def _within(top: str, name: str) -> str:
    """Returns a path relative to the folder `top`."""
    return name.removeprefix(f"{top}/")


def _class_of(top: str, name: str) -> str:
    """Returns the first part of a path relative to the folder `top`: the folder of a class, or a file beside them."""
    return _within(top, name).partition("/")[0]


def _empty(folder: str, synsets: list[str]) -> str:
    return f"{folder}/ has folders without images, {first_few(synsets, ', ')}: get their images, or remove the folders"


def _unpack(folder: str, name: str) -> str:
    """Returns the end of a message that says how to unpack a file of a folder; "" if it is not packed."""
    command = next((command for end, command in _PACKED.items() if name.endswith(end)), "")
    return f"; unpack it: cd {folder} && {command} {name} && rm {name}" if command else ""


def _one_folder_deeper(found: Found, synsets: set[str]) -> list[str]:
    """Returns a problem if all images lie in the folders of one folder, which then is no class but holds the classes."""
    if len(synsets) != 1 or not found.files or any(_within(found.top, info.name).count("/") < 2 for info in found.files):
        return []
    parts = (_within(found.top, info.name).split("/") for info in found.files)
    folders = {(one[0], one[1]) for one in parts}
    outer = f"{found.top}/{min(folders)[0]}"
    inner = sorted({one for _, one in folders})
    return [
        f"{outer} holds the folders {first_few(inner, ', ')}, so the images are one folder deeper than the synsets: "
        f"mv {outer}/* {found.top}/ && rmdir {outer}"
    ]


LAYOUT = Folders()

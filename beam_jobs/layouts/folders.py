"""ImageNet extracted:

    train/SYNSET/**     or train/SYNSET.tar, a tar of images
    val/SYNSET/**       or val/*, whose labels are in validation_labels.txt

Images lie at any depth below the folder of their synset. Links are followed. What file managers and annotation tools leave among
images is passed over.
"""

import posixpath
from collections.abc import Set

from beam_jobs import files
from beam_jobs.layouts.archives import list_tar
from beam_jobs.layouts.labels import find_labels, read_labels, synsets_of
from beam_jobs.layouts.layout import (
    EMPTY_FOLDER,
    Archive,
    Contents,
    Found,
    Layout,
    ListedImage,
    Listing,
    PassedOver,
    and_more,
    name_problems,
)
from beam_jobs.layouts.names import base_name_first, canonical, why_passed_over
from trainer.shared.errors import first_few

TRAIN_FOLDER = "train"
VALIDATION_FOLDER = "val"
_FOLDERS = {"train": TRAIN_FOLDER, "validation": VALIDATION_FOLDER}
_PACKED = {".tar": "tar -xf", ".tar.gz": "tar -xzf", ".tgz": "tar -xzf", ".zip": "unzip"}
"""Command that unpacks a file, by the end of its name."""


class Folders(Layout):
    """A folder for each split. It has images, or a folder or tar for each synset."""

    def expects(self, split: str) -> str:
        return f"{_FOLDERS[split]}/ with images"

    def recognise(self, folder: str, split: str) -> Found | None:
        name = _FOLDERS[split]
        infos, others = _sorted_out(name, files.walk(files.join(folder, name)))
        if not infos:
            return None
        found = tuple(info._replace(name=posixpath.join(name, info.name)) for info in infos)
        labels = find_labels(folder) if split == "validation" else None
        return Found(found, f"{name}/ holds {len(found):,} files", labels, tuple(others))

    def training_archives(self, folder: str, found: Found) -> Contents:
        archives: dict[str, Archive] = {}
        problems = []
        sizes, forms = _classes(TRAIN_FOLDER, found)
        strays = []
        for info in found.files:
            name = info.name.removeprefix(f"{TRAIN_FOLDER}/")
            if "/" in name:
                continue
            if name.endswith(".tar"):
                synset = canonical(name.removesuffix(".tar"))
                archives[synset] = Archive("train", info.name, info.name, 0, info.size, synset)
            else:
                strays.append(name)
        if strays:
            problems.append(
                f"{TRAIN_FOLDER}/ holds {first_few(strays, ', ')}: it must hold a folder or a tar for each synset "
                f"and nothing else{_unpack(TRAIN_FOLDER, strays[0])}"
            )
        for synset, size in sizes.items():
            if synset in archives:
                problems.append(f"{TRAIN_FOLDER}/ holds {synset} both as a folder and as a tar: one of them must go")
            if len(forms[synset]) > 1:
                problems.append(
                    f"{TRAIN_FOLDER}/ holds {synset} twice, composed (NFC) and decomposed (NFD), which is the same name: put the "
                    "images into one folder"
                )
            archives[synset] = Archive("train", f"{TRAIN_FOLDER}/{forms[synset][0]}", "", 0, size, synset)
        problems += _one_folder_deeper(TRAIN_FOLDER, found, set(archives))
        of_classes = {top for names in forms.values() for top in names}
        passed_over = tuple(other for other in found.others if _top(other.name) not in of_classes)
        return Contents(tuple(archives[synset] for synset in sorted(archives)), tuple(problems), passed_over)

    def validation_archives(self, folder: str, found: Found, known: Set[str] | None) -> Contents:
        size = sum(info.size for info in found.files)
        flat = [info.name for info in found.files if info.name.count("/") == 1]
        packed = [
            f"{name} is packed{_unpack(VALIDATION_FOLDER, name.partition('/')[2])}"
            for name in flat
            if name.endswith(tuple(_PACKED))
        ]
        sizes, forms = _classes(VALIDATION_FOLDER, found)
        if len(flat) == len(found.files):
            labels, wrong = read_labels(folder, found, known)
            archive = Archive("validation", VALIDATION_FOLDER, "", 0, size, synsets=labels.synsets, names=labels.names)
            return Contents((archive,), (*wrong, *packed[:1]), synsets=frozenset(labels.synsets))
        problems = packed[:1]
        if flat and not packed:
            problems.append(f"{flat[0]} is beside folders of synsets: all validation images must be in such folders, or none")
        if empty := [
            synset for synset, size in sizes.items() if not any(_top(info.name) in forms[synset] for info in found.files)
        ]:
            problems.append(_empty(VALIDATION_FOLDER, empty))
        if known is not None and (unknown := sorted(sizes.keys() - known)):
            problems += _one_folder_deeper(VALIDATION_FOLDER, found, set(sizes)) or [
                f"{VALIDATION_FOLDER}/{unknown[0]} is not a synset of the training images{and_more(unknown)}"
            ]
        archive = Archive("validation", VALIDATION_FOLDER, "", 0, size)
        return Contents((archive,), tuple(problems), synsets=frozenset(sizes))

    def list_images(self, folder: str, archive: Archive) -> Listing:
        if archive.file:
            return list_tar(folder, archive)
        tree = files.walk(files.join(folder, archive.name))
        infos, passed_over = _sorted_out(archive.name, tree)
        infos.sort(key=lambda info: canonical(info.name) if archive.synset else base_name_first(info.name))
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


def _sorted_out(folder: str, tree: files.Tree) -> tuple[list[files.FileInfo], list[PassedOver]]:
    """Returns the files that may be images, and what is none."""
    infos = []
    passed_over = [PassedOver(posixpath.join(folder, name), EMPTY_FOLDER, 0) for name in tree.empty_folders]
    for info in tree.files:
        path = posixpath.join(folder, info.name)
        # The name of the listed folder itself is the user's choice, even if it begins with a dot.
        if reason := why_passed_over(info.name):
            passed_over.append(PassedOver(path, reason, info.size))
        else:
            infos.append(info)
    return infos, sorted(passed_over)


def _classes(folder: str, found: Found) -> tuple[dict[str, int], dict[str, list[str]]]:
    """Returns by synset the size of its images, and the names of its folders: more than one if they differ in Unicode's form."""
    sizes: dict[str, int] = {}
    forms: dict[str, list[str]] = {}
    below = [(info.name, info.size) for info in found.files if info.name.count("/") > 1]
    # A folder that holds no image is a class too, and the reason of a problem.
    below += [(other.name, 0) for other in found.others if _may_be_class(other)]
    for name, size in below:
        top = _top(name)
        synset = canonical(top)
        sizes[synset] = sizes.get(synset, 0) + size
        if top not in forms.setdefault(synset, []):
            forms[synset].append(top)
    return sizes, forms


def _may_be_class(other: PassedOver) -> bool:
    is_folder = other.reason == EMPTY_FOLDER or other.name.count("/") > 1
    return is_folder and not why_passed_over(posixpath.join(_top(other.name), "image"))


def _top(name: str) -> str:
    """Returns the second part of a path."""
    return name.split("/", 2)[1]


def _empty(folder: str, synsets: list[str]) -> str:
    return f"{folder}/ has folders without images, {first_few(synsets, ', ')}: get their images, or remove the folders"


def _unpack(folder: str, name: str) -> str:
    """Returns the end of a message that says how to unpack a file of a folder; "" if it is not packed."""
    command = next((command for end, command in _PACKED.items() if name.endswith(end)), "")
    return f"; unpack it: cd {folder} && {command} {name} && rm {name}" if command else ""


def _one_folder_deeper(folder: str, found: Found, synsets: set[str]) -> list[str]:
    """Returns a problem if all images lie in the folders of one folder, which then is no class but holds the classes."""
    depths = {info.name.count("/") for info in found.files}
    if len(synsets) != 1 or min(depths, default=0) < 3:
        return []
    (top,) = synsets
    inner = sorted({info.name.split("/", 3)[2] for info in found.files})
    return [
        f"{folder}/{top} holds the folders {first_few(inner, ', ')}, so the images are one folder deeper than the synsets: "
        f"mv {folder}/{top}/* {folder}/ && rmdir {folder}/{top}"
    ]


LAYOUT = Folders()

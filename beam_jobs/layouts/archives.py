"""ImageNet's official archives:

ILSVRC2012_img_train.tar    a tar of SYNSET.tar, each a tar of that synset's images
ILSVRC2012_img_val.tar      a flat tar of images, whose labels are in validation_labels.txt
"""

from collections.abc import Set
from typing import BinaryIO, cast

from beam_jobs import files, tars
from beam_jobs.forward import Forward
from beam_jobs.layouts.labels import archive_of, find_labels, read_labels, synsets_of
from beam_jobs.layouts.layout import Archive, Contents, Found, Layout, ListedImage, Listing, name_problems
from beam_jobs.layouts.names import base_name, base_name_first, canonical, why_passed_over
from beam_jobs.layouts.passed_over import EMPTY_FOLDER, PassedOver, tally
from trainer.shared.errors import first_few
from trainer.shared.files import is_local

TRAIN_ARCHIVE = "ILSVRC2012_img_train.tar"
VALIDATION_ARCHIVE = "ILSVRC2012_img_val.tar"
_ARCHIVES = {"train": TRAIN_ARCHIVE, "validation": VALIDATION_ARCHIVE}


class Archives(Layout):
    """One downloaded tar for each split."""

    def expects(self, split: str) -> str:
        return _ARCHIVES[split]

    def recognise(self, folder: str, split: str) -> Found | None:
        name = _ARCHIVES[split]
        info = files.find(files.join(folder, name))
        if info is None:
            return None
        return Found((info._replace(name=name),), f"{name} is there", find_labels(folder) if split == "validation" else None)

    def training_archives(self, folder: str, found: Found) -> Contents:
        with files.open_to_read(files.join(folder, TRAIN_ARCHIVE), files.SPARSE) as file:
            members = tars.members(file, TRAIN_ARCHIVE, 0, found.files[0].size)
        outer, passed_over = _sorted_out(TRAIN_ARCHIVE, members)
        names = [base_name(member.name) for member in outer]
        problems = members.problems or list(name_problems(TRAIN_ARCHIVE, names, seen=len(passed_over)))
        archives = {}
        others = []
        for member in outer:
            base = base_name(member.name)
            synset = canonical(base.removesuffix(".tar"))
            if member.fault:
                problems.append(f"{TRAIN_ARCHIVE}/{member.name} {member.fault}")
            elif not synset or synset == canonical(base):
                others.append(member.name)
            else:
                name, end = f"{TRAIN_ARCHIVE}/{base}", member.offset + member.size
                archives[synset] = Archive("train", name, TRAIN_ARCHIVE, member.offset, end, synset)
        if others:
            problems.append(
                f"{TRAIN_ARCHIVE} holds {first_few(others, ', ')}: it must hold one SYNSET.tar for each synset and nothing else; "
                + _remedy(folder, others)
            )
        return Contents(tuple(archives[synset] for synset in sorted(archives)), tuple(problems), tally(passed_over))

    def validation_archives(self, folder: str, found: Found, known: Set[str] | None) -> Contents:
        labels, problems = read_labels(folder, found.labels, known)
        archive = archive_of(VALIDATION_ARCHIVE, VALIDATION_ARCHIVE, found.files[0].size, labels)
        return Contents((archive,), problems, synsets=frozenset(labels.synsets))

    def list_images(self, folder: str, archive: Archive) -> Listing:
        return list_tar(folder, archive)


def list_tar(folder: str, archive: Archive) -> Listing:
    """Returns the images of a tar: of one synset sorted by path, of several sorted by name without folders."""
    path = files.join(folder, archive.file)
    with cast(BinaryIO, Forward(path)) if is_local(path) else files.open_to_read(path) as file:
        found = tars.members(file, archive.name, archive.start, archive.end)
    members, passed_over = _sorted_out(archive.name, found)
    members.sort(key=lambda member: canonical(member.name) if archive.synset else base_name_first(member.name))
    names = [member.name for member in members]
    synsets, of_labels = ([archive.synset] * len(names), ()) if archive.synset else synsets_of(archive, names)
    # posixpath.join would take a tenth of the time of indexing.
    within = archive.name.removeprefix(archive.file + "/") + "/" if archive.name != archive.file else ""
    images = (
        ListedImage(within + member.name, archive.file, member.offset, member.size, synset, member.fault)
        for member, synset in zip(members, synsets, strict=True)
    )
    unique = names if archive.synset or archive.names else [base_name(name) for name in names]
    # A truncated tar lacks names and labels. Reporting that too would not help.
    problems = tuple(found.problems) or name_problems(archive.name, unique, seen=len(passed_over)) + of_labels
    seen = len(found.files) + len(found.empty_folders)
    return Listing(tuple(images), problems, passed_over=tuple(passed_over), seen=seen)


def _sorted_out(archive: str, found: tars.Members) -> tuple[list[tars.Member], list[PassedOver]]:
    """Returns the members that may be images, and what is none."""
    passed_over = [PassedOver(f"{archive}/{name}", EMPTY_FOLDER, 0) for name in found.empty_folders]
    members = []
    for member in found.files:
        if reason := why_passed_over(member.name):
            passed_over.append(PassedOver(f"{archive}/{member.name}", reason, member.size))
        else:
            members.append(member)
    return members, passed_over


def _remedy(folder: str, others: list[str]) -> str:
    """Returns what to do with a training archive that holds `others` and no tars."""
    path = files.join(folder, TRAIN_ARCHIVE)
    depth = others[0].count("/")
    if not depth:
        return "put its images in folders, train/SYNSET/*, and move the archive away"
    train = files.join(folder, "train")
    return f"mkdir -p {train} && tar -xf {path} -C {train} --strip-components={depth - 1}, and move the archive away"


LAYOUT = Archives()

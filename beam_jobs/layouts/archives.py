"""ImageNet's official archives:

ILSVRC2012_img_train.tar    a tar of SYNSET.tar, each a tar of that synset's images
ILSVRC2012_img_val.tar      a flat tar of images, whose labels are in validation_labels.txt
"""

from collections.abc import Set

from beam_jobs import files, tars
from beam_jobs.layouts.labels import find_labels, read_labels, synsets_by_order
from beam_jobs.layouts.layout import Archive, Contents, Found, Layout, ListedImage, Listing, name_problems

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
            members, problems = tars.members(file, TRAIN_ARCHIVE, 0, found.files[0].size)
        problems += name_problems(TRAIN_ARCHIVE, [member.name for member in members])
        archives = {}
        for member in members:
            synset = member.name.removesuffix(".tar")
            if member.fault:
                problems.append(f"{TRAIN_ARCHIVE}/{member.name} {member.fault}")
            elif not synset or synset == member.name:
                problems.append(
                    f"{TRAIN_ARCHIVE} holds {member.name}: it must hold one SYNSET.tar for each synset and nothing else"
                )
            else:
                name, end = f"{TRAIN_ARCHIVE}/{member.name}", member.offset + member.size
                archives[synset] = Archive("train", name, TRAIN_ARCHIVE, member.offset, end, synset)
        return Contents(tuple(archives[synset] for synset in sorted(archives)), tuple(problems))

    def validation_archives(self, folder: str, found: Found, known: Set[str] | None) -> Contents:
        synsets, problems = read_labels(folder, found, known)
        archive = Archive("validation", VALIDATION_ARCHIVE, VALIDATION_ARCHIVE, 0, found.files[0].size, synsets=synsets)
        return Contents((archive,), problems)

    def list_images(self, folder: str, archive: Archive) -> Listing:
        return list_tar(folder, archive)


def list_tar(folder: str, archive: Archive) -> Listing:
    """Returns the images of a tar, sorted by name without folders."""
    with files.open_to_read(files.join(folder, archive.file)) as file:
        members, problems = tars.members(file, archive.name, archive.start, archive.end)
    names = [member.name for member in members]
    synsets, of_labels = ([archive.synset] * len(names), ()) if archive.synset else synsets_by_order(archive, names)
    # posixpath.join would take a tenth of the time of indexing.
    within = archive.name.removeprefix(archive.file + "/") + "/" if archive.name != archive.file else ""
    images = (
        ListedImage(within + member.name, archive.file, member.offset, member.size, synset, member.fault)
        for member, synset in zip(members, synsets, strict=True)
    )
    # A truncated tar lacks names and labels. Reporting that too would not help.
    return Listing(tuple(images), tuple(problems) or name_problems(archive.name, names) + of_labels)


LAYOUT = Archives()

"""The raw data: ImageNet's own archives, indexed by their headers alone.

ILSVRC2012_img_train.tar   a tar of per-synset tars SYNSET.tar, each with that synset's training images
ILSVRC2012_img_val.tar     a flat tar of the validation images
validation_labels.txt      a synset a line, in the order of the validation images' names; where it is missing, the list
                           that tensorflow_datasets ships for ImageNet is taken
"""

import hashlib
import importlib.util
import itertools
import posixpath
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

from beam_jobs import files
from trainer.records import UserError

TRAIN_ARCHIVE = "ILSVRC2012_img_train.tar"
VALIDATION_ARCHIVE = "ILSVRC2012_img_val.tar"
VALIDATION_LABELS = "validation_labels.txt"


class RawImage(NamedTuple):
    """Where one image lies in the raw data."""

    name: str
    """Path within `file`."""
    label: int
    file: str
    """Name, within the raw folder, of the file that holds it."""
    offset: int
    size: int


@dataclass(frozen=True)
class Archive:
    """A tar of images, a file of its own or within one: what one worker indexes."""

    split: str
    name: str
    """Path within the raw folder; where that goes into `file`, as if `file` were a folder."""
    file: str
    start: int
    end: int
    labels: tuple[int, ...]
    """One for all of its images, or one for each in the order of their names."""

    @property
    def size(self) -> int:
        return self.end - self.start

    def labels_of(self, count: int) -> tuple[int, ...]:
        """Returns the labels of its `count` images in the order of their names."""
        return self.labels * count if len(self.labels) == 1 else self.labels


@dataclass(frozen=True)
class Raw:
    """A folder of raw data, as far as the headers of its outer archives tell."""

    folder: str
    synsets: tuple[str, ...]
    """In label order."""
    archives: tuple[Archive, ...]
    """Those of a split together, in the order that their images have in it."""

    def of_split(self, split: str) -> list[int]:
        """Returns the numbers of a split's archives."""
        return [number for number, archive in enumerate(self.archives) if archive.split == split]


def open_raw(folder: str) -> Raw:
    """Reads what raw data there is in `folder`: outer headers and labels, no image.

    Raises UserError where an archive is missing, empty, cut off or not one of ImageNet's layout, and where a validation
    label is not a training synset.
    """
    sizes = {name: size for name, size, _ in _raw_files(folder)}
    with files.open_to_read(files.join(folder, TRAIN_ARCHIVE)) as file:
        inner = list(_members(file, TRAIN_ARCHIVE, 0, sizes[TRAIN_ARCHIVE]))
    for name, _, _ in inner:
        if not name.removesuffix(".tar") or not name.endswith(".tar"):
            raise UserError(f"{TRAIN_ARCHIVE} holds {name}: it must hold one SYNSET.tar for each synset and nothing else")
    _check_names(TRAIN_ARCHIVE, [name for name, _, _ in inner])
    synsets = sorted(name.removesuffix(".tar") for name, _, _ in inner)
    ranks = {synset: rank for rank, synset in enumerate(synsets)}
    train = [
        Archive("train", f"{TRAIN_ARCHIVE}/{name}", TRAIN_ARCHIVE, offset, offset + size, (ranks[name.removesuffix(".tar")],))
        for name, offset, size in sorted(inner)
    ]
    labels = _validation_labels(folder, ranks)
    validation = Archive("validation", VALIDATION_ARCHIVE, VALIDATION_ARCHIVE, 0, sizes[VALIDATION_ARCHIVE], labels)
    return Raw(folder, tuple(synsets), (*train, validation))


def index(folder: str, archive: Archive) -> list[RawImage]:
    """Returns the images of an archive in the order of their names, from its headers.

    Raises UserError where it is empty, cut off, no tar, has a name twice or what is no file, or has not as many images as
    there are labels for it.
    """
    with files.open_to_read(files.join(folder, archive.file)) as file:
        members = sorted(_members(file, archive.name, archive.start, archive.end))
    _check_names(archive.name, [name for name, _, _ in members])
    if archive.split == "validation" and len(members) != len(archive.labels):
        raise UserError(
            f"{archive.name} has {len(members)} images and there are {len(archive.labels)} labels for them: "
            f"give {VALIDATION_LABELS} one line for each image"
        )
    within = archive.name.removeprefix(archive.file).lstrip("/")
    return [
        RawImage(posixpath.join(within, name), label, archive.file, offset, size)
        for (name, offset, size), label in zip(members, archive.labels_of(len(members)), strict=True)
    ]


def read(file: BinaryIO, image: RawImage) -> bytes:
    """Returns the bytes of an image from the open `image.file`."""
    file.seek(image.offset)
    return file.read(image.size)


def raw_identity(raw: str) -> str:
    """Returns a short hex digest that changes when the raw data in the folder `raw` does: of names, sizes and times.

    Raises UserError naming what is missing where it holds no raw data.
    """
    return hashlib.sha256(repr(_raw_files(raw)).encode()).hexdigest()[:16]


def _raw_files(folder: str) -> list[tuple[str, int, float]]:
    """The raw files that are there: name, size in bytes, time of the last change in seconds."""
    found = {name: files.find(files.join(folder, name)) for name in (TRAIN_ARCHIVE, VALIDATION_ARCHIVE, VALIDATION_LABELS)}
    missing = [name for name in (TRAIN_ARCHIVE, VALIDATION_ARCHIVE) if not found[name]]
    if missing:
        raise UserError(f"{folder} holds no raw ImageNet: it lacks {' and '.join(missing)}")
    return [(name, data.size_in_bytes, data.last_updated_in_seconds) for name, data in found.items() if data]


def _validation_labels(folder: str, ranks: dict[str, int]) -> tuple[int, ...]:
    path = files.join(folder, VALIDATION_LABELS)
    if not files.find(path):
        # Found without importing the package, which would import TensorFlow.
        package = importlib.util.find_spec("tensorflow_datasets")
        if package is None or package.origin is None:
            raise UserError(
                f"{folder} has no {VALIDATION_LABELS}, and tensorflow_datasets, which has ImageNet's, is not installed"
            )
        path = str(Path(package.origin).parent / "datasets" / "imagenet2012" / "validation_labels.txt")
    with files.open_to_read(path) as file:
        synsets = file.read().decode(errors="replace").split()
    if not synsets:
        raise UserError(f"{path} is empty: it must have a synset a line, in the order of the validation images' names")
    for line, synset in enumerate(synsets, start=1):
        if synset not in ranks:
            raise UserError(
                f"{path} line {line}: {synset} is not a synset of {TRAIN_ARCHIVE}; put the right {VALIDATION_LABELS} in {folder}"
            )
    return tuple(ranks[synset] for synset in synsets)


def _members(file: BinaryIO, name: str, start: int, end: int) -> Iterator[tuple[str, int, int]]:
    """Yields base name, offset in `file` and size of each file in the tar that lies at start..end of it."""
    cut_off = UserError(f"{name} is cut off: its {end - start} bytes do not end as a tar does; get it again")
    file.seek(start)
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            while (member := tar.next()) is not None:
                tar.members = []  # type: ignore[attr-defined]  # or tarfile keeps every header in memory
                if member.offset_data + member.size > end:
                    raise cut_off
                if member.isdir():
                    continue
                if not member.isreg() or member.issparse():
                    raise UserError(f"{name} holds {member.name}, which is a link or a device: it must hold plain files only")
                yield member.name.rsplit("/", 1)[-1], member.offset_data, member.size
            # tarfile takes whatever is no header for the end of the archive.
            file.seek(tar.offset)
            if tar.offset + tarfile.BLOCKSIZE > end or file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise cut_off
    except tarfile.ReadError as error:
        raise UserError(f"{name} cannot be read as a tar ({error}); get it again") from error


def _check_names(archive: str, names: list[str]) -> None:
    if not names:
        raise UserError(f"{archive} is empty; get it again")
    for name, following in itertools.pairwise(sorted(names)):
        if name == following:
            raise UserError(f"{archive} has {name} twice: each name must be there once")

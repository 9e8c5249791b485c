"""The raw data: ImageNet as it is downloaded or extracted, indexed by headers and file names alone.

The training images are either of

    ILSVRC2012_img_train.tar   a tar of per-synset tars SYNSET.tar, each with that synset's images
    train/                     a folder of SYNSET/ with images, or of SYNSET.tar

and the validation images either of

    ILSVRC2012_img_val.tar     a flat tar of images
    val/                       a folder of images, or of SYNSET/ with images

Where validation images lie flat, their labels are in validation_labels.txt, a synset a line in the order of the images'
names; where that is missing, the list that tensorflow_datasets ships for ImageNet is taken. Images have the same IDs in
whatever way they lie: those of `train` in the order of (synset, name), those of `validation` in that of their names.
"""

import hashlib
import importlib.util
import itertools
import posixpath
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from beam_jobs import files
from trainer.shared.errors import UserError

TRAIN_ARCHIVE = "ILSVRC2012_img_train.tar"
VALIDATION_ARCHIVE = "ILSVRC2012_img_val.tar"
VALIDATION_LABELS = "validation_labels.txt"
TRAIN_FOLDER = "train"
VALIDATION_FOLDER = "val"

_LAST_BLOCK = bytes(tarfile.BLOCKSIZE)
_NO_LABEL = -1
"""Of an image that is in none of the synsets that were chosen."""


class RawImage(NamedTuple):
    """Where one image lies in the raw data."""

    name: str
    """Path within `file`, "" where it is the file."""
    label: int
    file: str
    """Path within the raw folder."""
    offset: int
    size: int

    @property
    def source(self) -> str:
        """What a person knows it by."""
        return posixpath.join(self.file, self.name) if self.name else self.file


@dataclass(frozen=True)
class Archive:
    """Images that one worker indexes: a tar, a file of its own or within one, or a folder."""

    split: str
    name: str
    """Path within the raw folder; where that goes into `file`, as if `file` were a folder."""
    file: str
    """The file that it is or is in; "" where it is a folder."""
    start: int
    end: int
    """Where in `file` it lies; of a folder, 0 and the bytes of its images."""
    labels: tuple[int, ...]
    """One for all of its images, or one for each in the order of their names; none where their folders tell."""

    @property
    def size(self) -> int:
        return self.end - self.start


@dataclass(frozen=True)
class Raw:
    """A folder of raw data, as far as it is known without looking into what one worker indexes."""

    folder: str
    synsets: tuple[str, ...]
    """Those chosen, in label order."""
    images_per_class: int | None
    """At most, of training images: the first by name."""
    archives: tuple[Archive, ...]
    """Those of a split together, in the order that their images have in it."""
    problems: tuple[str, ...]
    """What is wrong with it, and cannot be left out."""
    identity: str
    """Changes when a file does."""

    def of_split(self, split: str) -> list[int]:
        """Returns the numbers of a split's archives."""
        return [number for number, archive in enumerate(self.archives) if archive.split == split]


@dataclass(frozen=True)
class Index:
    """What is in an archive."""

    images: list[RawImage]
    """Those chosen, in the order of their IDs."""
    found: int
    """How many there are of the chosen synsets, before a limit for each class and whatever cannot be read."""
    rejected: list[dict[str, Any]]
    """What is no plain file; as `trainer.shared.records.Split` has it."""
    problems: list[str]
    """What is wrong with the archive as a whole."""


class _Member(NamedTuple):
    name: str
    offset: int
    size: int
    fault: str


def open_raw(folder: str, *, synsets: Sequence[str] | None = None, images_per_class: int | None = None) -> Raw:
    """Reads what raw data there is in `folder`: outer headers, file names and labels, no image.

    `synsets` are those to take, all where None. What is wrong with it is in `problems`; raises UserError where there is
    nothing to go on with: no training images, no validation images, no labels for them, or synsets that are not there.
    """
    found = _raw_files(folder)
    train, problems = _train_archives(folder, found)
    if not train:
        raise UserError("; ".join(problems))
    chosen = tuple(sorted(synsets or train))
    if missing := sorted(set(chosen) - set(train)):
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise UserError(f"{folder} has no training images of {', '.join(missing[:3])}{more}, which the subset has")
    ranks = {synset: label for label, synset in enumerate(chosen)}
    # Where the training images are those of a subset already, the labels of all validation images are as good.
    known = None if synsets and len(chosen) == len(train) else set(train)
    validation, of_validation = _validation_archive(folder, found, ranks, known)
    archives = [
        Archive("train", name, file, start, end, (ranks[synset],))
        for synset, (name, file, start, end) in sorted(train.items())
        if synset in ranks
    ]
    return Raw(folder, chosen, images_per_class, (*archives, validation), (*problems, *of_validation), _identity(found))


def index(raw: Raw, archive: Archive) -> Index:
    """Returns what is in an archive, in the order of names, from its headers."""
    if archive.file:
        with files.open_to_read(files.join(raw.folder, archive.file)) as file:
            members, problems = _members(file, archive.name, archive.start, archive.end)
        within = archive.name.removeprefix(archive.file).lstrip("/")
        located = [(posixpath.join(within, member.name), archive.file, member) for member in members]
    else:
        of_folder = files.tree(files.join(raw.folder, archive.name), depth=0 if archive.labels else 1)
        members = sorted((_Member(info.name, 0, info.size, "") for info in of_folder), key=lambda one: _by_base_name(one.name))
        located = [("", posixpath.join(archive.name, member.name), member) for member in members]
        problems = []
    names = [member.name for member in members]
    labels, of_labels = _labels(raw, archive, names)
    if not problems:  # or more would only follow from them
        problems = _check_names(archive.name, names) + of_labels
    images, rejected = [], []
    found = 0
    for (name, path, member), label in zip(located, labels, strict=True):
        if label == _NO_LABEL:
            continue
        found += 1
        image = RawImage(name, label, path, member.offset, member.size)
        if member.fault:
            rejected.append({"source": image.source, "reason": member.fault})
        else:
            images.append(image)
    limit = raw.images_per_class if archive.split == "train" else None
    return Index(images[:limit], found, rejected, problems)


def raw_identity(raw: str) -> str:
    """Returns a short hex digest that changes when the raw data in the folder `raw` does: of names, sizes and times.

    Raises UserError naming what is missing where it holds no raw data.
    """
    return _identity(_raw_files(raw))


@dataclass(frozen=True)
class _RawFiles:
    train: list[files.FileInfo]
    """The archive alone, or what is in the folder."""
    validation: list[files.FileInfo]
    labels: list[files.FileInfo]


def _raw_files(folder: str) -> _RawFiles:
    def look(archive: str, extracted: str) -> list[files.FileInfo]:
        if info := files.find(files.join(folder, archive)):
            return [info._replace(name=archive)]
        return [
            info._replace(name=posixpath.join(extracted, info.name))
            for info in files.tree(files.join(folder, extracted), depth=1)
        ]

    train, validation = look(TRAIN_ARCHIVE, TRAIN_FOLDER), look(VALIDATION_ARCHIVE, VALIDATION_FOLDER)
    missing = [
        f"{archive} (or {extracted}/ with images)"
        for archive, extracted, there in (
            (TRAIN_ARCHIVE, TRAIN_FOLDER, train),
            (VALIDATION_ARCHIVE, VALIDATION_FOLDER, validation),
        )
        if not there
    ]
    if missing:
        raise UserError(f"{folder} holds no raw ImageNet: it lacks {' and '.join(missing)}")
    labels = files.find(files.join(folder, VALIDATION_LABELS))
    return _RawFiles(train, validation, [labels._replace(name=VALIDATION_LABELS)] if labels else [])


def _identity(found: _RawFiles) -> str:
    digest = hashlib.sha256()
    for info in (*found.train, *found.validation, *found.labels):
        digest.update(repr(tuple(info)).encode())
    return digest.hexdigest()[:16]


_Place = tuple[str, str, int, int]
"""Name, file, start and end of an archive."""


def _train_archives(folder: str, found: _RawFiles) -> tuple[dict[str, _Place], list[str]]:
    """Returns where the images of each synset lie, and what is wrong."""
    places: dict[str, _Place] = {}
    if found.train[0].name == TRAIN_ARCHIVE:
        with files.open_to_read(files.join(folder, TRAIN_ARCHIVE), files.SPARSE) as file:
            members, problems = _members(file, TRAIN_ARCHIVE, 0, found.train[0].size)
        problems += _check_names(TRAIN_ARCHIVE, [member.name for member in members])
        for member in members:
            synset = member.name.removesuffix(".tar")
            if member.fault:
                problems.append(f"{TRAIN_ARCHIVE}/{member.name} {member.fault}")
            elif not synset or synset == member.name:
                problems.append(
                    f"{TRAIN_ARCHIVE} holds {member.name}: it must hold one SYNSET.tar for each synset and nothing else"
                )
            else:
                end = member.offset + member.size
                places[synset] = (f"{TRAIN_ARCHIVE}/{member.name}", TRAIN_ARCHIVE, member.offset, end)
        return places, problems
    problems = []
    folders: dict[str, int] = {}
    for info in found.train:
        synset, slash, _ = info.name.removeprefix(f"{TRAIN_FOLDER}/").partition("/")
        if slash:
            folders[synset] = folders.get(synset, 0) + info.size
        elif synset.endswith(".tar"):
            places[synset.removesuffix(".tar")] = (info.name, info.name, 0, info.size)
        else:
            problems.append(f"{TRAIN_FOLDER}/ holds {synset}: it must hold a folder or a tar for each synset and nothing else")
    for synset, size in folders.items():
        if synset in places:
            problems.append(f"{TRAIN_FOLDER}/ holds {synset} both as a folder and as a tar: one of them must go")
        places[synset] = (f"{TRAIN_FOLDER}/{synset}", "", 0, size)
    return places, problems


def _validation_archive(
    folder: str, found: _RawFiles, ranks: dict[str, int], known: set[str] | None
) -> tuple[Archive, list[str]]:
    """Returns the validation images, and what is wrong; a label must be of the synsets `known`, where that is given."""
    if found.validation[0].name == VALIDATION_ARCHIVE:
        labels, problems = _validation_labels(folder, ranks, known)
        return Archive("validation", VALIDATION_ARCHIVE, VALIDATION_ARCHIVE, 0, found.validation[0].size, labels), problems
    size = sum(info.size for info in found.validation)
    folders = [info.name.split("/")[1] for info in found.validation if info.name.count("/") > 1]
    if not folders:
        labels, problems = _validation_labels(folder, ranks, known)
        return Archive("validation", VALIDATION_FOLDER, "", 0, size, labels), problems
    problems = []
    if len(folders) < len(found.validation):
        flat = next(info.name for info in found.validation if info.name.count("/") == 1)
        problems.append(f"{flat} lies beside folders of synsets: each validation image must lie in one, or none of them")
    if known is not None and (unknown := sorted(set(folders) - known)):
        problems.append(f"{VALIDATION_FOLDER}/{unknown[0]} is not a synset of the training images{_and_more(unknown)}")
    return Archive("validation", VALIDATION_FOLDER, "", 0, size, ()), problems


def _validation_labels(folder: str, ranks: dict[str, int], known: set[str] | None) -> tuple[tuple[int, ...], list[str]]:
    path = files.join(folder, VALIDATION_LABELS)
    if not files.find(path):
        # Found without importing the package, which would import TensorFlow.
        package = importlib.util.find_spec("tensorflow_datasets")
        if package is None or package.origin is None:
            raise UserError(
                f"{folder} has no {VALIDATION_LABELS}, and tensorflow_datasets, which has ImageNet's, is not installed"
            )
        path = str(Path(package.origin).parent / "datasets" / "imagenet2012" / "validation_labels.txt")
    synsets = files.read(path).decode(errors="replace").split()
    if not synsets:
        raise UserError(f"{path} is empty: it must have a synset a line, in the order of the validation images' names")
    unknown = [(line, synset) for line, synset in enumerate(synsets, start=1) if known is not None and synset not in known]
    problems = [
        f"{path} line {line}: {synset} is not a synset of the training images{_and_more(unknown)}; "
        f"put the right {VALIDATION_LABELS} in {folder}"
        for line, synset in unknown[:1]
    ]
    return tuple(ranks.get(synset, _NO_LABEL) for synset in synsets), problems


def _labels(raw: Raw, archive: Archive, names: list[str]) -> tuple[list[int], list[str]]:
    """Returns the label of each image of an archive by the order of their names, and what is wrong."""
    if archive.split == "train":
        return list(archive.labels) * len(names), []
    if not archive.labels:
        ranks = {synset: label for label, synset in enumerate(raw.synsets)}
        return [ranks.get(name.partition("/")[0], _NO_LABEL) for name in names], []
    if len(names) in (0, len(archive.labels)):
        return list(archive.labels[: len(names)]), []
    problem = (
        f"{archive.name} has {len(names)} images and there are {len(archive.labels)} labels for them: "
        f"give {VALIDATION_LABELS} one line for each image"
    )
    # Any label will do where there will be no dataset: the images are still looked at.
    return list(itertools.islice(itertools.chain(archive.labels, itertools.repeat(0)), len(names))), [problem]


def _members(file: BinaryIO, name: str, start: int, end: int) -> tuple[list[_Member], list[str]]:
    """Returns the files in the tar that lies at start..end of `file`, in the order of their base names, and what is wrong."""
    members: list[_Member] = []
    try:
        for member in _walk(file, start, end):
            members.append(member)  # one by one, to have those before what is wrong
    except _CutOffError:
        return sorted(members), [f"{name} is cut off: its {end - start} bytes do not end as a tar does; get it again"]
    except tarfile.ReadError as error:
        return [], [f"{name} cannot be read as a tar ({error}); get it again"]
    return sorted(members), []


class _CutOffError(Exception):
    """A tar does not end as a tar does."""


def _walk(file: BinaryIO, start: int, end: int) -> Iterator[_Member]:
    """Yields the files in a tar. Raises _CutOffError, and tarfile.ReadError where it is no tar at all."""
    position = start
    while position + tarfile.BLOCKSIZE <= end:
        file.seek(position)
        header = file.read(tarfile.BLOCKSIZE)
        if header == _LAST_BLOCK:
            return
        try:
            member = _plain_member(header, position) or _any_member(file, position)
        except tarfile.ReadError as error:
            if position > start:
                raise _CutOffError from error
            raise
        size = member.size if member.isreg() else 0
        position = member.offset_data - -size // tarfile.BLOCKSIZE * tarfile.BLOCKSIZE
        if member.offset_data + size > end:
            break
        if not member.isdir():
            yield _Member(member.name.rsplit("/", 1)[-1], member.offset_data, size, _fault(member))
    if start == end:
        raise tarfile.ReadError("empty file")
    raise _CutOffError


def _plain_member(header: bytes, position: int) -> tarfile.TarInfo | None:
    """Returns what a header says where that is a usual one, of a file and short name; tarfile takes three times as long."""
    if header[156] != 0x30 or header[257:262] != b"ustar" or header[345]:
        return None
    try:
        checksum, size = int(header[148:156].strip(b"\0 "), 8), int(header[124:136].strip(b"\0 "), 8)
    except ValueError:
        return None
    if checksum != 256 + sum(header) - sum(header[148:156]):
        return None
    member = tarfile.TarInfo(header[:100].partition(b"\0")[0].decode(errors="surrogateescape"))
    member.size, member.offset_data = size, position + tarfile.BLOCKSIZE
    return None if member.name.endswith("/") else member


def _any_member(file: BinaryIO, position: int) -> tarfile.TarInfo:
    file.seek(position)
    with tarfile.open(fileobj=file, mode="r:") as tar:
        member = tar.next()
    if member is None:
        raise tarfile.ReadError("it ends too early")
    return member


def _fault(member: tarfile.TarInfo) -> str:
    if not member.isreg() or member.issparse():
        return "is a link or a device, not a file"
    if member.name.startswith("/") or ".." in member.name.split("/"):
        return f"has the path {member.name}, which leaves the archive"
    return ""


def _check_names(archive: str, names: list[str]) -> list[str]:
    if not names:
        return [f"{archive} is empty; get it again"]
    return [
        f"{archive} has {name} twice: each name must be there once"
        for name, following in itertools.pairwise(sorted(names))
        if name == following
    ]


def _by_base_name(name: str) -> tuple[str, str]:
    folder, _, base = name.rpartition("/")
    return base, folder


def _and_more(problems: Sequence[object]) -> str:
    return f", nor are {len(problems) - 1} more" if len(problems) > 1 else ""

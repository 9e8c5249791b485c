"""The interface of a raw layout: it recognises the files of a split, groups them into archives, lists and reads their images."""

import itertools
import posixpath
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

from beam_jobs import files
from beam_jobs.layouts.names import canonical
from beam_jobs.layouts.passed_over import PassedOver, Tallies
from beam_jobs.listings import FileInfo, Tree


class RawImage(NamedTuple):
    """The position of one image in the raw data, and its label."""

    name: str
    """Path within `file`; "" if the image is the whole file."""
    label: int
    file: str
    """Path relative to the raw folder."""
    offset: int
    """Start of the image in `file`, in bytes."""
    size: int
    """Size in bytes."""

    @property
    def source(self) -> str:
        """The image's path for people. An archive's member is written as if the archive were a folder."""
        return posixpath.join(self.file, self.name) if self.name else self.file


class ListedImage(NamedTuple):
    """One image of an archive, before its synset becomes a label."""

    name: str
    file: str
    offset: int
    size: int
    """`name`, `file`, `offset` and `size` are those of `RawImage`."""
    synset: str
    """The image's synset; "" if no label is known, which is also a problem of the listing."""
    fault: str
    """Why the image cannot be read; "" if no reason is known."""


@dataclass(frozen=True)
class Archive:
    """Images of one split that one worker lists: a tar, a tar within a tar, or a folder."""

    split: str
    name: str
    """Path relative to the raw folder. A tar within a tar is written as if the outer tar were a folder."""
    file: str
    """The tar that holds the images, as a path relative to the raw folder; "" for a folder."""
    start: int
    end: int
    """Range of the archive's bytes in `file`. For a folder: 0 and the total size of its images."""
    synset: str = ""
    """Synset of all images, in `names.canonical` form; "" if there are several synsets, as among validation images."""
    synsets: tuple[str, ...] = ()
    """Synset of each image, in canonical form; empty if the labels do not come from a file."""
    names: tuple[str, ...] = ()
    """Name of the image of each of `synsets`; empty if they are in the order of the images' names."""
    labels_file: str = ""
    """The file that `synsets` come from, for messages."""

    @property
    def size(self) -> int:
        """Size in bytes."""
        return self.end - self.start


@dataclass(frozen=True)
class Found:
    """The files of a split in a layout, recognised by their names alone."""

    files: Sequence[FileInfo]
    """Files that hold images. Names are paths relative to the raw folder."""
    why: str
    """Why the layout was recognised, for people."""
    labels: FileInfo | None = None
    """The file of labels, or None if there is none."""
    others: tuple[PassedOver, ...] = ()
    """Files and empty folders that hold no images to take. They do not count in the identity of the raw data."""
    top: str = ""
    """The folder that holds `files`, as a path relative to the raw folder, if the layout has one for each split."""
    tree: Tree | None = None
    """All that lies in `top`, if the layout has listed it."""


@dataclass(frozen=True)
class Contents:
    """The archives of a split."""

    archives: tuple[Archive, ...]
    """Archives in the order of image IDs: all IDs of one archive come before those of the next."""
    problems: tuple[str, ...]
    """Faults that stop the conversion."""
    passed_over: Tallies = field(default_factory=dict)
    """What is in the split, but in none of the archives, and no image."""
    synsets: frozenset[str] | None = None
    """Synsets of validation images, in canonical form, if they are known before the images are listed."""


@dataclass(frozen=True)
class Listing:
    """The images of an archive."""

    images: tuple[ListedImage, ...]
    """Images in the order of their IDs."""
    problems: tuple[str, ...]
    """Faults of the archive as a whole; they stop the conversion."""
    passed_over: tuple[PassedOver, ...] = ()
    """What is in the archive and no image."""
    seen: int | None = None
    """Number of files or members, and of empty folders, in the archive. None if the layout lists nothing but images."""
    repaired: tuple[dict[str, Any], ...] | None = None
    """Source and repair of each image that will be repaired; None if the images were not checked yet."""


class Recogniser(ABC):
    """Recognises one layout of a split's images in a raw folder."""

    @abstractmethod
    def expects(self, split: str) -> str:
        """Returns a description for error messages of what this layout expects in the raw folder."""

    @abstractmethod
    def recognise(self, folder: str, split: str) -> Found | None:
        """Returns the files of a split if they have this layout, else None. Opens no file."""


class Reader(ABC):
    """Groups the images of a split into archives, lists them and reads them. The plan takes it to the workers.

    A reader accounts for all that it sees: every file, member of a tar and empty folder of a split is either an image of a
    `Listing`, or in `passed_over` of a `Listing` or of the `Contents`, or the reason of a problem. `names.why_passed_over` knows
    what people leave among images. The job refuses a `Listing` whose `seen` is not the number of its images and `passed_over`.
    """

    @abstractmethod
    def training_archives(self, folder: str, found: Found) -> Contents:
        """Returns one archive for each class, in label order: sorted by synset."""

    @abstractmethod
    def validation_archives(self, folder: str, found: Found, known: Set[str] | None) -> Contents:
        """Returns the archives of the validation images. A synset that is not in `known` is a problem, unless `known` is None.

        Raises UserError if no labels are found.
        """

    @abstractmethod
    def list_images(self, folder: str, archive: Archive) -> Listing:
        """Returns the images of an archive, sorted by name in every layout. Reads headers only."""

    def list_tree(self, archive: Archive, tree: Tree) -> Listing:
        """Does the same for an archive that is a folder, from all that lies in it. Needed only of a layout with `Found.tree`."""
        raise NotImplementedError

    def read(self, folder: str, image: RawImage, start: int, size: int) -> bytes:
        """Returns `size` bytes of an image from byte `start`; fewer if the file ends before. Thread-safe."""
        return files.read_range(files.join(folder, image.file), image.offset + start, size)


class Layout(Recogniser, Reader):
    """A layout whose images can be listed and read in any order. Stateless."""


class StreamedImage(NamedTuple):
    """An image of a `Stream`."""

    name: str
    """The image's official name, for example n01440764_18.JPEG."""
    synset: str
    """The image's synset; it becomes `names.canonical`."""
    data: bytes
    """The image's bytes; b"" if the stream is read in place."""
    offset: int = 0
    """Start of the image in its file, in bytes, if the stream is read in place."""
    size: int = 0
    """Size in bytes, if the stream is read in place."""
    fault: str = ""
    """Why the image cannot be read; "" if no reason is known."""


class StreamError(Exception):
    """The rest of a stream's file cannot be read. The message names the file and says why."""


class Stream(Recogniser):
    """A layout whose files must be read from beginning to end before any image can be found. Stateless.

    `beam_jobs.unpack` reads each file once and writes its images to a file that can be read in any order.
    """

    in_place: ClassVar[bool] = False
    """Whether an image's bytes can be read where they are once their place is known. Then only their places are written."""
    takes_labels: ClassVar[bool] = False
    """Whether the labels of validation images come from a file of labels."""

    @abstractmethod
    def images(self, folder: str, name: str, labels: FileInfo | None) -> Iterator[StreamedImage | PassedOver]:
        """Yields all that one of `Found.files` holds, in any order: images, and what is none. Holds few of them in memory.

        labels: `Found.labels`

        Raises StreamError if the rest of the file cannot be read.
        """


def name_problems(archive: str, names: list[str], *, seen: int = 0) -> tuple[str, ...]:
    """Returns the problems of the names of an archive's images: there are none, or a name occurs twice.

    seen: number of files, members and empty folders in the archive
    """
    if not names:
        if seen:
            return (f"{archive} holds no image, only {seen:,} other entries: get its images, or remove it",)
        return (f"{archive} is empty: get its images, or remove it",)
    ordered = sorted(names, key=canonical)
    return tuple(
        f"{archive} has {name} twice: each name must occur once"
        if name == following
        else f"{archive} has {name} twice, composed (NFC) and decomposed (NFD), which is the same name: remove one"
        for name, following in itertools.pairwise(ordered)
        if canonical(name) == canonical(following)
    )


def and_more(unknown: list) -> str:
    """Returns the end of a message that names only the first of `unknown`."""
    return f", nor are {len(unknown) - 1} more" if len(unknown) > 1 else ""

"""What a raw layout must do: recognise the files of a split, say which archives they make up, list and read their images."""

import itertools
import posixpath
from abc import ABC, abstractmethod
from collections.abc import Set
from dataclasses import dataclass
from typing import NamedTuple

from beam_jobs import files
from beam_jobs.files import FileInfo


class RawImage(NamedTuple):
    """Where one image lies in the raw data, and its label."""

    name: str
    """Path within `file`; "" if the image is the whole file."""
    label: int
    file: str
    """Path within the raw folder."""
    offset: int
    """Where the image begins in `file`, bytes."""
    size: int
    """Bytes."""

    @property
    def source(self) -> str:
        """The path by which a person knows the image: an archive's member is written as if the archive were a folder."""
        return posixpath.join(self.file, self.name) if self.name else self.file


class ListedImage(NamedTuple):
    """One image of an archive, before its synset becomes a label."""

    name: str
    file: str
    offset: int
    size: int
    """These four as in `RawImage`."""
    synset: str
    """"" if no label is known; a problem of the listing then says so."""
    fault: str
    """Why the image cannot be read, "" if nothing is known against it."""


@dataclass(frozen=True)
class Archive:
    """Images of one split that one worker lists: a tar, a tar within a tar, or a folder."""

    split: str
    name: str
    """Path within the raw folder. A tar within a tar is written as if the outer tar were a folder."""
    file: str
    """The tar that holds the images, as a path within the raw folder; "" for a folder."""
    start: int
    end: int
    """The archive's bytes in `file`. For a folder: 0 and the total size of its images."""
    synset: str = ""
    """Synset of all images; "" if there are several synsets, as among validation images."""
    synsets: tuple[str, ...] = ()
    """Synset of each image, in the order of the images' names, if a file of labels says it."""

    @property
    def size(self) -> int:
        """Bytes."""
        return self.end - self.start


@dataclass(frozen=True)
class Found:
    """The files of a split that lie in a layout, known by their names alone."""

    files: tuple[FileInfo, ...]
    """Files that hold images. Names are paths within the raw folder."""
    why: str
    """By what the layout was recognised."""
    labels: FileInfo | None = None
    """The file of labels, if there is one."""


@dataclass(frozen=True)
class Contents:
    """The archives of a split."""

    archives: tuple[Archive, ...]
    """In the order of image IDs: all images of one archive come before those of the next."""
    problems: tuple[str, ...]
    """Faults that stop the conversion."""


@dataclass(frozen=True)
class Listing:
    """The images of an archive."""

    images: tuple[ListedImage, ...]
    """In the order of image IDs."""
    problems: tuple[str, ...]
    """Faults of the archive as a whole; they stop the conversion."""


class Layout(ABC):
    """One way in which the images of a split can lie in a raw folder. Holds no state: the plan takes it to the workers."""

    @abstractmethod
    def expects(self, split: str) -> str:
        """Returns what must be in the raw folder for this layout, in words for an error."""

    @abstractmethod
    def recognise(self, folder: str, split: str) -> Found | None:
        """Returns the files of a split if they lie in this layout, else None. Opens no file."""

    @abstractmethod
    def training_archives(self, folder: str, found: Found) -> Contents:
        """Returns one archive for each class, in label order: sorted by synset."""

    @abstractmethod
    def validation_archives(self, folder: str, found: Found, known: Set[str] | None) -> Contents:
        """Returns the archives of the validation images; a synset that is not in `known` is a problem, unless that is None.

        Raises UserError if no labels are found.
        """

    @abstractmethod
    def list_images(self, folder: str, archive: Archive) -> Listing:
        """Returns the images of an archive, sorted by name, whichever way they lie. Reads headers only."""

    def read(self, folder: str, image: RawImage, start: int, size: int) -> bytes:
        """Returns `size` bytes of an image from its byte `start` on, fewer if the file ends before. Safe in any thread."""
        return files.read_range(files.join(folder, image.file), image.offset + start, size)


def name_problems(archive: str, names: list[str]) -> tuple[str, ...]:
    """Returns what is wrong with the names of an archive's images: there are none, or one is there twice."""
    if not names:
        return (f"{archive} is empty; get it again",)
    return tuple(
        f"{archive} has {name} twice: each name must be there once"
        for name, following in itertools.pairwise(sorted(names))
        if name == following
    )


def and_more(unknown: list) -> str:
    """Returns the end of a message that names the first of `unknown` only."""
    return f", nor are {len(unknown) - 1} more" if len(unknown) > 1 else ""

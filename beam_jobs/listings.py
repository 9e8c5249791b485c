"""What lies in a folder, in arrays: 24 bytes a file and its path."""

import bisect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, overload

import numpy as np

from beam_jobs.texts import Texts, decoded, encoded

_FILES_AT_A_TIME = 2**14


class FileInfo(NamedTuple):
    """What is known of a file without opening it."""

    name: str
    """Path relative to the listed folder. Its bytes are UTF-8 in every locale; others are lone surrogates (PEP 383)."""
    size: int
    """Size in bytes."""
    changed: float
    """Time of the last change, in seconds since 1970."""


@dataclass(frozen=True, eq=False)
class FileTable(Sequence[FileInfo]):
    """Files, sorted by their folders and then by their names."""

    names: Texts
    """Paths of the files below the folder `prefix`."""
    sizes: np.ndarray
    """int64 [n], in bytes"""
    times: np.ndarray
    """Times of the last change, float64 [n], in seconds since 1970."""
    prefix: str = ""
    """What each `FileInfo.name` begins with: "", or a folder and a slash."""

    @classmethod
    def of(cls, infos: Sequence[FileInfo]) -> "FileTable":
        """Returns the table of `infos`, in their order."""
        if isinstance(infos, cls):
            return infos
        names, sizes, times = zip(*infos, strict=True) if infos else ((), (), ())
        return cls(Texts.of([*map(encoded, names)]), np.array(sizes, np.int64), np.array(times, np.float64))

    @classmethod
    def joined(cls, parts: Sequence["FileTable"]) -> "FileTable":
        """Returns the table of the files of all `parts`, which have no prefix, in their order."""
        if not parts:
            return cls.of([])
        names = Texts.joined([part.names for part in parts])
        return cls(names, np.concatenate([part.sizes for part in parts]), np.concatenate([part.times for part in parts]))

    def __len__(self) -> int:
        return len(self.sizes)

    def __iter__(self) -> Iterator[FileInfo]:
        for begin in range(0, len(self), _FILES_AT_A_TIME):
            numbers = np.arange(begin, min(begin + _FILES_AT_A_TIME, len(self)))
            columns = self.sizes[numbers].tolist(), self.times[numbers].tolist()
            for name, size, time in zip(self.names.take(numbers), *columns, strict=True):
                yield FileInfo(self.prefix + decoded(name), size, time)

    @overload
    def __getitem__(self, number: int) -> FileInfo: ...
    @overload
    def __getitem__(self, number: slice) -> Sequence[FileInfo]: ...
    def __getitem__(self, number: int | slice) -> FileInfo | Sequence[FileInfo]:
        if isinstance(number, slice):
            return [self[one] for one in range(*number.indices(len(self)))]
        one = range(len(self))[number]
        return FileInfo(self.prefix + decoded(self.names[one]), int(self.sizes[one]), float(self.times[one]))

    def within(self, prefix: str) -> "FileTable":
        """Returns the same files as seen from the folder that holds the listed one."""
        return replace(self, prefix=prefix + self.prefix)

    def below(self, folder: str) -> "FileTable":
        """Returns the files at any depth in `folder`, with paths relative to it.

        folder: its path below `prefix`
        """
        start = encoded(f"{folder}/")
        places = range(len(self))
        begin = bisect.bisect_left(places, start, key=self._folder_of)
        end = bisect.bisect_left(places, start[:-1] + b"0", key=self._folder_of)  # "0" follows "/"
        relative = [name[len(start) :] for name in self.names.take(np.arange(begin, end))]
        return FileTable(Texts.of(relative), self.sizes[begin:end], self.times[begin:end])

    def chosen(self, keep: Callable[[FileInfo], bool]) -> "FileTable":
        """Returns the files that are to be kept. Returns this table if all are."""
        kept = np.fromiter(map(keep, self), bool, len(self))
        if kept.all():
            return self
        names = Texts.of([*self.names.take(np.flatnonzero(kept))])
        return FileTable(names, self.sizes[kept], self.times[kept], self.prefix)

    def _folder_of(self, number: int) -> bytes:
        folder, slash, _ = self.names[number].rpartition(b"/")
        return folder + slash


class Tree(NamedTuple):
    """All that lies in a folder, at any depth."""

    files: FileTable
    empty_folders: list[str]
    """Paths relative to the listed folder, sorted."""

    def below(self, folder: str) -> "Tree":
        """Returns what lies in `folder`, a path relative to the listed folder."""
        empty = [name.removeprefix(f"{folder}/") for name in self.empty_folders if name.startswith(f"{folder}/")]
        return Tree(self.files.below(folder), empty)

"""ImageNet's official archives, compressed with gzip:

ILSVRC2012_img_train.tar.gz    a tar of SYNSET.tar, each a tar of that synset's images
ILSVRC2012_img_val.tar.gz      a flat tar of images, whose labels are those of the archive that is not compressed
"""

import gzip
import io
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO, ClassVar, cast

from beam_jobs import files, tars
from beam_jobs.layouts.archives import TRAIN_ARCHIVE, VALIDATION_ARCHIVE
from beam_jobs.layouts.labels import archive_of, find_labels, read_labels, synsets_of
from beam_jobs.layouts.layout import Found, Stream, StreamedImage, StreamError, name_problems
from beam_jobs.layouts.names import base_name, base_name_first, canonical, why_passed_over
from beam_jobs.layouts.passed_over import EMPTY_FOLDER, PassedOver
from beam_jobs.listings import FileInfo
from beam_jobs.tars import Member
from trainer.shared.errors import first_few

_FILES = {"train": f"{TRAIN_ARCHIVE}.gz", "validation": f"{VALIDATION_ARCHIVE}.gz"}
_PIECE = 2**20


class GzipArchives(Stream):
    """One compressed tar for each split."""

    takes_labels: ClassVar[bool] = True

    def expects(self, split: str) -> str:
        return _FILES[split]

    def recognise(self, folder: str, split: str) -> Found | None:
        name = _FILES[split]
        info = files.find(files.join(folder, name))
        if info is None:
            return None
        return Found((info._replace(name=name),), f"{name} is there", find_labels(folder) if split == "validation" else None)

    def images(self, folder: str, name: str, labels: FileInfo | None) -> Iterator[StreamedImage | PassedOver]:
        if name == _FILES["validation"]:
            yield from _validation_images(folder, name, labels)
            return
        yield from _training_images(folder, name)


def _training_images(folder: str, name: str) -> Iterator[StreamedImage | PassedOver]:
    names = []
    with opened(folder, name) as file:
        for outer in members(file, name):
            if isinstance(outer, PassedOver):
                yield outer
                continue
            if outer.fault:
                raise StreamError(f"{name}/{outer.name} {outer.fault}")
            inner = base_name(outer.name)
            synset = canonical(inner.removesuffix(".tar"))
            if not synset or synset == canonical(inner):
                raise StreamError(f"{name} holds {outer.name}: it must hold one SYNSET.tar for each synset and nothing else")
            names.append(inner)
            taken = passed_over = 0
            for one in members(file, f"{name}/{inner}", outer.offset, outer.offset + outer.size):
                if isinstance(one, PassedOver):
                    passed_over += 1
                    yield one
                else:
                    taken += 1
                    yield image_of(file, one, one.name, synset)
            if not taken:
                raise StreamError(first_few(name_problems(f"{name}/{inner}", [], seen=passed_over)))
    if problems := name_problems(name, names):
        raise StreamError(first_few(problems))


def _validation_images(folder: str, name: str, labels: FileInfo | None) -> Iterator[StreamedImage | PassedOver]:
    # Labels are in the order of the names, or have them, and the names are known at the end of a first reading.
    with opened(folder, name) as file:
        names = sorted((one.name for one in members(file, name) if isinstance(one, Member)), key=base_name_first)
    of_images, _ = read_labels(folder, labels, None, names)
    synsets, problems = synsets_of(archive_of(name, name, 0, of_images), names)
    unique = names if of_images.names else [base_name(one) for one in names]
    if problems := name_problems(name, unique) + problems:
        raise StreamError(first_few(problems))
    synset_of = dict(zip(names, synsets, strict=True))
    with opened(folder, name) as file:
        for one in members(file, name):
            yield one if isinstance(one, PassedOver) else image_of(file, one, one.name, synset_of[one.name])


@contextmanager
def opened(folder: str, name: str) -> Iterator[BinaryIO]:
    """Gives the unpacked bytes of a gzip file, to be read forwards. In the block, a damaged file raises StreamError."""
    try:
        with files.open_to_read(files.join(folder, name)) as file, gzip.GzipFile(fileobj=file) as unzipped:
            forwards = _Forwards(cast(BinaryIO, unzipped))
            yield cast(BinaryIO, forwards)
            while unzipped.read(_PIECE):
                pass  # to the checksum at its end
    except tars.BadTarError as error:
        raise StreamError(str(error)) from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise StreamError(f"{name} cannot be read to its end ({error}); get it again") from error


def members(file: BinaryIO, name: str, start: int = 0, end: int = sys.maxsize) -> Iterator[Member | PassedOver]:
    """Yields the members of the tar `name` at bytes start..end that may be images, and what is none.

    Raises tars.BadTarError if the tar is not whole.
    """
    for one in tars.walk(file, name, start, end):
        if not isinstance(one, Member):
            yield PassedOver(f"{name}/{one}", EMPTY_FOLDER, 0)
        elif reason := why_passed_over(one.name):
            yield PassedOver(f"{name}/{one.name}", reason, one.size)
        else:
            yield one


def image_of(file: BinaryIO, member: Member, name: str, synset: str) -> StreamedImage:
    """Returns the image of a member. It has fewer bytes if the file is cut off, which going on with the tar shows."""
    if member.fault:
        return StreamedImage(name, synset, b"", fault=member.fault)
    file.seek(member.offset)
    return StreamedImage(name, synset, file.read(member.size))


class _Forwards:
    """A file that is read forwards. Seeks back within what it read last, because seeking in gzip begins at its beginning."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._position = 0
        self._kept = b""
        self._begin = 0
        """Where `_kept` begins."""

    def tell(self) -> int:
        return self._position

    def seek(self, position: int) -> int:
        if position < self._begin:
            raise io.UnsupportedOperation("seeks back")
        while position > self._begin + len(self._kept):
            self._begin += len(self._kept)
            self._kept = self._file.read(min(position - self._begin, _PIECE))
            if not self._kept:
                break
        self._position = position
        return position

    def read(self, size: int) -> bytes:
        skipped = self._position - self._begin
        if skipped + size > len(self._kept):
            self._kept = self._kept[skipped:] + self._file.read(skipped + size - len(self._kept))
            self._begin, skipped = self._position, 0
        data = self._kept[skipped : skipped + size]
        self._position += len(data)
        return data


LAYOUT = GzipArchives()

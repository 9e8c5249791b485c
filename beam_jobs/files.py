"""Files by path, local or gs:// alike: all that the rooms here know of file systems."""

import functools
import os
import re
import shutil
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO, NamedTuple

from apache_beam.io.filesystem import BeamIOError, CompressionTypes
from apache_beam.io.filesystems import FileSystems
from apache_beam.io.gcp.gcsio import GcsIO

from trainer.shared.errors import UserError
from trainer.shared.files import is_local, whole_file

WHOLE = 16 * 2**20
"""Bytes a request, where a remote file is read from its beginning to its end."""
SPARSE = 2**10
"""Bytes a request, where little of a remote file is read."""
_TEMPORARY = re.compile(r".+\.[0-9a-f]{32}\.tmp")


class FileInfo(NamedTuple):
    """What is known of a file without opening it."""

    name: str
    """Path within the folder that was asked for."""
    size: int
    """Bytes."""
    changed: float
    """Time of the last change, seconds."""


def join(folder: str, name: str) -> str:
    return os.path.join(folder, name) if is_local(folder) else FileSystems.join(folder, name)


def find(path: str) -> FileInfo | None:
    """Returns what is known of a file, or None where there is none."""
    if is_local(path):
        return _info("", path) if os.path.isfile(path) else None
    if not FileSystems.exists(path):
        return None
    found = FileSystems.get_filesystem(path).metadata(path)
    return FileInfo("", found.size_in_bytes, found.last_updated_in_seconds)


def tree(folder: str, depth: int) -> list[FileInfo]:
    """Returns the files in `folder` and in its folders, `depth` of them deep, sorted by name; links are followed.

    What begins with a dot is passed over, as file managers leave such files anywhere. None where there is no such folder.
    """
    return sorted(_walk(folder, "", depth) if is_local(folder) else _match(folder, depth))


def names(folder: str) -> list[str]:
    """Returns the names of the files in `folder`, sorted; none where there is no such folder."""
    if is_local(folder):
        try:
            return sorted(entry.name for entry in os.scandir(folder) if not entry.is_dir())
        except (FileNotFoundError, NotADirectoryError):
            return []
    (found,) = FileSystems.match([join(_literal(folder), "*")])
    return sorted(FileSystems.split(metadata.path)[1] for metadata in found.metadata_list)


def open_to_read(path: str, request: int = WHOLE) -> BinaryIO:
    """Opens a file; `request` is how many bytes a request to a remote one asks for at least."""
    if is_local(path):
        return open(path, "rb")
    if FileSystems.get_scheme(path) == "gs":
        return GcsIO().open(path, "rb", read_buffer_size=request)
    return FileSystems.open(path, compression_type=CompressionTypes.UNCOMPRESSED)


def read(path: str) -> bytes:
    with open_to_read(path) as file:
        return file.read()


def read_range(path: str, offset: int, size: int) -> bytes:
    """Returns the `size` bytes at `offset`, fewer where the file ends before. Any thread may."""
    if is_local(path):
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            return os.pread(descriptor, size, offset)
        finally:
            os.close(descriptor)
    file = _opened_by(threading.get_ident(), path)
    file.seek(offset)
    return file.read(size)


@functools.lru_cache(maxsize=64)
def _opened_by(thread: int, path: str) -> BinaryIO:
    """A remote file: opening one takes a request of its own, and its position is one thread's."""
    return open_to_read(path, SPARSE)


@contextmanager
def open_to_write(path: str) -> Iterator[BinaryIO]:
    """Gives a file to write to; it is at `path` once the block ends, and never in part.

    Raises UserError where there is no room for it, or none may be written there.
    """
    temporary = f"{path}.{uuid.uuid4().hex}.tmp"
    if is_local(path):
        with whole_file(path, temporary) as file:
            yield file
        return
    try:
        with _create(temporary) as file:
            yield file
        FileSystems.rename([temporary], [path])
    except BaseException:
        delete([temporary])
        raise


def _create(path: str) -> BinaryIO:
    try:
        return FileSystems.create(path, compression_type=CompressionTypes.UNCOMPRESSED)
    except (OSError, BeamIOError) as error:
        raise UserError(f"{path} cannot be written: {getattr(error, 'strerror', None) or error}") from error


def write(path: str, content: bytes) -> None:
    """Writes a file; whole or not at all."""
    with open_to_write(path) as file:
        file.write(content)


def delete(paths: list[str]) -> None:
    """Deletes what is there of `paths`."""
    for path in paths:
        if is_local(path) and os.path.lexists(path):
            os.unlink(path)
    if there := [_literal(path) for path in paths if not is_local(path) and FileSystems.exists(path)]:
        FileSystems.delete(there)


def delete_temporary(folder: str) -> None:
    """Deletes what `open_to_write` left in `folder` when it was killed."""
    delete([join(folder, name) for name in names(folder) if _TEMPORARY.fullmatch(name)])


def delete_folder(folder: str) -> None:
    """Deletes the files in `folder`, and itself where it is more than the beginning of their names."""
    if is_local(folder):
        shutil.rmtree(folder, ignore_errors=True)
    else:
        delete([join(folder, name) for name in names(folder)])


def _info(name: str, path: str) -> FileInfo:
    status = os.stat(path)
    return FileInfo(name, status.st_size, status.st_mtime)


def _walk(folder: str, prefix: str, depth: int) -> Iterator[FileInfo]:
    try:
        entries = list(os.scandir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return
    for entry in entries:
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            if depth:
                yield from _walk(entry.path, f"{prefix}{entry.name}/", depth - 1)
        elif entry.is_file():
            yield _info(prefix + entry.name, entry.path)
        else:  # a link to nothing: empty, so that whoever reads it says so
            yield FileInfo(prefix + entry.name, 0, 0.0)


def _match(folder: str, depth: int) -> Iterator[FileInfo]:
    (found,) = FileSystems.match([join(_literal(folder), "**")])
    for metadata in found.metadata_list:
        name = metadata.path[len(folder.rstrip("/")) + 1 :]
        if name.count("/") <= depth and not any(part.startswith(".") for part in name.split("/")):
            yield FileInfo(name, metadata.size_in_bytes, metadata.last_updated_in_seconds)


def _literal(path: str) -> str:
    """A pattern that matches `path` only."""
    return "".join(f"[{character}]" if character in "*?[" else character for character in path)

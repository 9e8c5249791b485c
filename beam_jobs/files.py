"""Files by path, local or gs://. No other module of this package depends on the file system."""

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
"""Bytes of a request for a remote file that is read from its beginning to its end."""
SPARSE = 2**10
"""Bytes of a request for a remote file of which little is read."""
_TEMPORARY = re.compile(r".+\.[0-9a-f]{32}\.tmp")


class FileInfo(NamedTuple):
    """What is known of a file without opening it."""

    name: str
    """Path relative to the listed folder."""
    size: int
    """Size in bytes."""
    changed: float
    """Time of the last change, in seconds since 1970."""


def join(folder: str, name: str) -> str:
    return os.path.join(folder, name) if is_local(folder) else FileSystems.join(folder, name)


def find(path: str) -> FileInfo | None:
    """Returns a file's size and time, or None if there is no such file."""
    if is_local(path):
        return _info("", path) if os.path.isfile(path) else None
    if not FileSystems.exists(path):
        return None
    found = FileSystems.get_filesystem(path).metadata(path)
    return FileInfo("", found.size_in_bytes, found.last_updated_in_seconds)


def tree(folder: str, depth: int) -> list[FileInfo]:
    """Returns the files in `folder` and in its subfolders down to `depth` levels, sorted by name. Follows links.

    Skips names that begin with a dot, because file managers leave such files anywhere. Returns none if there is no such folder.
    """
    return sorted(_walk(folder, "", depth) if is_local(folder) else _match(folder, depth))


def starting_with(folder: str, prefix: str) -> list[FileInfo]:
    """Returns the files in `folder` whose names begin with `prefix`, sorted by name. In a bucket, lists no other files."""
    if is_local(folder):
        return [info for info in tree(folder, depth=0) if info.name.startswith(prefix)]
    (found,) = FileSystems.match([join(_literal(folder), f"{_literal(prefix)}*")])
    infos = (
        FileInfo(metadata.path[len(folder.rstrip("/")) + 1 :], metadata.size_in_bytes, metadata.last_updated_in_seconds)
        for metadata in found.metadata_list
    )
    return sorted(info for info in infos if "/" not in info.name)


def names(folder: str) -> list[str]:
    """Returns the sorted names of the files in `folder`; an empty list if there is no such folder."""
    if is_local(folder):
        try:
            return sorted(entry.name for entry in os.scandir(folder) if not entry.is_dir())
        except (FileNotFoundError, NotADirectoryError):
            return []
    (found,) = FileSystems.match([join(_literal(folder), "*")])
    return sorted(FileSystems.split(metadata.path)[1] for metadata in found.metadata_list)


def open_to_read(path: str, request: int = WHOLE) -> BinaryIO:
    """Opens a file. For a remote file, each request asks for at least `request` bytes."""
    if is_local(path):
        return open(path, "rb")
    if FileSystems.get_scheme(path) == "gs":
        return GcsIO().open(path, "rb", read_buffer_size=request)
    return FileSystems.open(path, compression_type=CompressionTypes.UNCOMPRESSED)


def read(path: str) -> bytes:
    with open_to_read(path) as file:
        return file.read()


def read_range(path: str, offset: int, size: int) -> bytes:
    """Returns the `size` bytes at `offset`, fewer if the file ends before. Safe in any thread."""
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
    """Returns an open remote file, one for each thread, because its position is shared. Opening takes a request."""
    return open_to_read(path, SPARSE)


@contextmanager
def open_to_write(path: str) -> Iterator[BinaryIO]:
    """Gives a file to write to. The file appears at `path` when the block ends, whole or not at all.

    Raises UserError if the disk is full or `path` cannot be written.
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
    """Writes a file, whole or not at all."""
    with open_to_write(path) as file:
        file.write(content)


def delete(paths: list[str]) -> None:
    """Deletes those of `paths` that exist."""
    for path in paths:
        if is_local(path) and os.path.lexists(path):
            os.unlink(path)
    if there := [_literal(path) for path in paths if not is_local(path) and FileSystems.exists(path)]:
        FileSystems.delete(there)


def delete_temporary(folder: str) -> None:
    """Deletes the temporary files that a killed `open_to_write` left in `folder`."""
    delete([join(folder, name) for name in names(folder) if _TEMPORARY.fullmatch(name)])


def delete_folder(folder: str) -> None:
    """Deletes `folder` and its files. In a bucket, a folder is only a prefix of its files' names."""
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
        else:  # a broken link counts as an empty file, which is reported when it is read
            yield FileInfo(prefix + entry.name, 0, 0.0)


def _match(folder: str, depth: int) -> Iterator[FileInfo]:
    (found,) = FileSystems.match([join(_literal(folder), "**")])
    for metadata in found.metadata_list:
        name = metadata.path[len(folder.rstrip("/")) + 1 :]
        if name.count("/") <= depth and not any(part.startswith(".") for part in name.split("/")):
            yield FileInfo(name, metadata.size_in_bytes, metadata.last_updated_in_seconds)


def _literal(path: str) -> str:
    """Returns a pattern that matches `path` only."""
    return "".join(f"[{character}]" if character in "*?[" else character for character in path)

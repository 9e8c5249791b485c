"""Files by path, local or gs://. No other module of this package depends on the file system."""

import bisect
import codecs
import functools
import os
import re
import shutil
import threading
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, BinaryIO

from beam_jobs.listings import FileInfo, FileTable, Tree
from beam_jobs.texts import decoded, encoded
from trainer.shared.errors import UserError
from trainer.shared.files import is_local, whole_file

WHOLE = 16 * 2**20
"""Bytes of a request for a remote file that is read from its beginning to its end."""
SPARSE = 2**10
"""Bytes of a request for a remote file of which little is read."""
_FOLDERS_AT_ONCE = 16
_SECONDS_OF_A_SLOW_ENTRY = 1e-4
"""A file system that takes longer for a file or folder, such as NFS, answers many requests at a time."""
_TEMPORARY = re.compile(r".+\.[0-9a-f]{32}\.tmp")


def join(folder: str, name: str) -> str:
    """Returns the path of the `name` of a `FileInfo` in a folder."""
    if is_local(folder):
        return os.path.join(folder, name if name.isascii() else os.fsdecode(name.encode(errors="surrogateescape")))
    return _beam().join(folder, name)


def find(path: str) -> FileInfo | None:
    """Returns a file's size and time, or None if there is no such file."""
    if is_local(path):
        return _info("", path) if os.path.isfile(path) else None
    if not _beam().exists(path):
        return None
    found = _beam().get_filesystem(path).metadata(path)
    return FileInfo("", found.size_in_bytes, found.last_updated_in_seconds)


def tree(folder: str, depth: int) -> list[FileInfo]:
    """Returns the files in `folder` and in its subfolders down to `depth` levels, sorted by name. Follows links.

    Skips names that begin with a dot, because file managers leave such files anywhere. Returns none if there is no such folder.
    """
    found = walk(folder, depth).files
    return sorted(info for info in found if not any(part.startswith(".") for part in info.name.split("/")))


def walk(folder: str, depth: int | None = None) -> Tree:
    """Returns all that lies in `folder` and in its subfolders, down to `depth` levels if that is given. Follows links.

    Returns nothing if there is no such folder. Raises UserError if a folder cannot be read, or if a link leads to a folder that
    holds it.
    """
    if not is_local(folder):
        return _match(folder, depth)
    return _walk(folder, depth) if os.path.isdir(folder) else Tree(FileTable.of([]), [])


def read_lines(path: str) -> list[str]:
    """Returns the lines of a text file that are not empty, without the space around them.

    Reads UTF-8 and, with a byte order mark, UTF-16. Bytes that are neither become lone surrogates, as in `FileInfo.name`.
    """
    data = read(path)
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        text = data.decode("utf-16", errors="replace")
    else:
        text = data.removeprefix(codecs.BOM_UTF8).decode(errors="surrogateescape")
    return [line.strip() for line in re.split("\r\n|\r|\n", text) if line.strip()]


def starting_with(folder: str, prefix: str) -> list[FileInfo]:
    """Returns the files in `folder` whose names begin with `prefix`, sorted by name. In a bucket, lists no other files."""
    if is_local(folder):
        return [info for info in tree(folder, depth=0) if info.name.startswith(prefix)]
    (found,) = _beam().match([join(_literal(folder), f"{_literal(prefix)}*")])
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
    (found,) = _beam().match([join(_literal(folder), "*")])
    return sorted(_beam().split(metadata.path)[1] for metadata in found.metadata_list)


def folders(folder: str) -> list[str]:
    """Returns the sorted names of the folders in a local `folder`; an empty list if there is no such folder."""
    try:
        return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
    except (FileNotFoundError, NotADirectoryError):
        return []


def open_to_read(path: str, request: int = WHOLE) -> BinaryIO:
    """Opens a file. For a remote file, each request asks for at least `request` bytes."""
    if is_local(path):
        return open(path, "rb")
    if _beam().get_scheme(path) == "gs":
        from apache_beam.io.gcp.gcsio import GcsIO

        return GcsIO().open(path, "rb", read_buffer_size=request)
    return _beam().open(path, compression_type="uncompressed")


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


def forget(path: str, offset: int, size: int) -> None:
    """Drops a part of a local file from the system's cache, so that the next reading shows how fast the disk is."""
    if is_local(path) and hasattr(os, "posix_fadvise"):
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.posix_fadvise(descriptor, offset, size, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


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
        _beam().rename([temporary], [path])
    except BaseException:
        delete([temporary])
        raise


def _create(path: str) -> BinaryIO:
    from apache_beam.io.filesystem import BeamIOError

    try:
        return _beam().create(path, compression_type="uncompressed")
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
    if there := [_literal(path) for path in paths if not is_local(path) and _beam().exists(path)]:
        _beam().delete(there)


def delete_temporary(folder: str) -> None:
    """Deletes the temporary files that a killed `open_to_write` left in `folder`."""
    delete([join(folder, name) for name in names(folder) if _TEMPORARY.fullmatch(name)])


def delete_folder(folder: str) -> None:
    """Deletes `folder` and its files. In a bucket, a folder is only a prefix of its files' names."""
    if is_local(folder):
        shutil.rmtree(folder, ignore_errors=True)
    else:
        delete([join(folder, name) for name in names(folder)])


def _beam() -> Any:
    """Returns Beam's file systems. Importing Beam takes two seconds, which local files need not wait for."""
    from apache_beam.io.filesystems import FileSystems

    return FileSystems


def _info(name: str, path: str) -> FileInfo:
    status = os.stat(path)
    return FileInfo(name, status.st_size, status.st_mtime)


def _walk(top: str, depth: int | None) -> Tree:
    """Returns what lies in the local folder `top`. Lists folders in parallel if this file system makes each listing wait."""
    tables: dict[bytes, FileTable] = {}
    empty_folders: list[str] = []
    level = [(top, "", frozenset({_inode(top)}))]
    entries = 0
    slow = False
    with ThreadPoolExecutor(_FOLDERS_AT_ONCE) as pool:
        while level:
            below = []
            begun = time.perf_counter()
            listed = pool.map(_scan, level) if slow else map(_scan, level)
            for (_, prefix, _), (table, is_empty, folders) in zip(level, listed, strict=True):
                if len(table):
                    tables[encoded(prefix)] = table
                empty_folders += [prefix.rstrip("/")] if is_empty and prefix else []
                below += folders
                entries += len(table) + len(folders)
            slow = time.perf_counter() - begun > _SECONDS_OF_A_SLOW_ENTRY * max(entries, 1)
            level = below if depth is None or depth > 0 else []
            depth = None if depth is None else depth - 1
    return Tree(FileTable.joined([tables[prefix] for prefix in sorted(tables)]), sorted(empty_folders))


def _scan(at: tuple[str, str, frozenset]) -> tuple[FileTable, bool, list[tuple[str, str, frozenset]]]:
    """Returns a folder's files sorted by name, whether it is empty, and its subfolders in the form of `at`.

    at: path, prefix of the names, and the inodes of the folder and of those that hold it
    """
    folder, prefix, above = at
    try:
        entries = list(os.scandir(folder))
    except OSError as error:
        raise UserError(f"{folder} cannot be read: {error.strerror}") from error
    found, folders = [], []
    for entry in entries:
        name = prefix + decoded(os.fsencode(entry.name))
        if entry.is_dir():
            inode = _inode(entry.path)
            if inode in above:
                raise UserError(f"{entry.path} is a link to a folder that holds it: remove the link")
            folders.append((entry.path, f"{name}/", above | {inode}))
        elif entry.is_file():
            status = entry.stat()
            found.append(FileInfo(name, status.st_size, status.st_mtime))
        else:  # a broken link counts as an empty file, which is reported when it is read
            found.append(FileInfo(name, 0, 0.0))
    return FileTable.of(sorted(found)), not entries, folders


def _inode(path: str) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_dev, status.st_ino


def _match(folder: str, depth: int | None) -> Tree:
    (matched,) = _beam().match([join(_literal(folder), "**")])
    found, empty = [], []
    for metadata in matched.metadata_list:
        name = metadata.path[len(folder.rstrip("/")) + 1 :]
        if depth is not None and name.rstrip("/").count("/") > depth:
            continue
        if name.endswith("/"):  # Cloud Storage's console stands for a folder by such an object
            empty.append(name.rstrip("/"))
        elif name:
            found.append(FileInfo(name, metadata.size_in_bytes, metadata.last_updated_in_seconds))
    names_of_files = sorted(info.name for info in found)
    found.sort(key=lambda info: (encoded(info.name[: info.name.rfind("/") + 1]), info.name))
    return Tree(FileTable.of(found), [name for name in sorted(empty) if not _has_below(names_of_files, f"{name}/")])


def _has_below(sorted_names: list[str], prefix: str) -> bool:
    place = bisect.bisect_left(sorted_names, prefix)
    return place < len(sorted_names) and sorted_names[place].startswith(prefix)


def _literal(path: str) -> str:
    """Returns a pattern that matches `path` only."""
    return "".join(f"[{character}]" if character in "*?[" else character for character in path)

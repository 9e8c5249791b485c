"""Files by path, local or gs:// alike: all that the rooms here know of file systems."""

import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO

from apache_beam.io.filesystem import CompressionTypes, FileMetadata
from apache_beam.io.filesystems import FileSystems


def join(folder: str, *names: str) -> str:
    return FileSystems.join(folder, *names)


def find(path: str) -> FileMetadata | None:
    """Returns what is known of a file (`size_in_bytes`, `last_updated_in_seconds`), or None where there is none."""
    return FileSystems.get_filesystem(path).metadata(path) if FileSystems.exists(path) else None


def open_to_read(path: str) -> BinaryIO:
    return FileSystems.open(path, compression_type=CompressionTypes.UNCOMPRESSED)


@contextmanager
def open_to_write(path: str) -> Iterator[BinaryIO]:
    """Gives a file to write to; it is at `path` once the block ends, and never in part."""
    temporary = f"{path}.{uuid.uuid4().hex}.tmp"
    try:
        with FileSystems.create(temporary, compression_type=CompressionTypes.UNCOMPRESSED) as file:
            yield file
        FileSystems.rename([temporary], [path])
    except BaseException:
        delete([temporary])
        raise


def names(folder: str) -> list[str]:
    """Returns the names of the files in `folder`, sorted; none where there is no such folder."""
    (found,) = FileSystems.match([join(_literal(folder), "*")])
    return sorted(FileSystems.split(metadata.path)[1] for metadata in found.metadata_list)


def delete(paths: list[str]) -> None:
    """Deletes what is there of `paths`."""
    if there := [_literal(path) for path in paths if FileSystems.exists(path)]:
        FileSystems.delete(there)


def delete_folder(folder: str) -> None:
    """Deletes the files in `folder`, and itself where it is more than the beginning of their names."""
    delete([join(folder, name) for name in names(folder)])
    if FileSystems.get_scheme(folder) is None:
        shutil.rmtree(folder, ignore_errors=True)


def _literal(path: str) -> str:
    """A pattern that matches `path` only."""
    return "".join(f"[{character}]" if character in "*?[" else character for character in path)

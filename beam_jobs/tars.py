"""Finds the files in a tar from its headers alone."""

import tarfile
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

_LAST_BLOCK = bytes(tarfile.BLOCKSIZE)


class Member(NamedTuple):
    """A file in a tar."""

    name: str
    """Name without folders."""
    offset: int
    """Start of the content in the file that holds the tar, in bytes."""
    size: int
    """Size in bytes."""
    fault: str
    """Why the member is not a plain file of this tar; "" if it is one."""


def members(file: BinaryIO, name: str, start: int, end: int) -> tuple[list[Member], list[str]]:
    """Returns the files in the tar at bytes start..end of `file`, sorted by name without folders, and the tar's problems."""
    found: list[Member] = []
    try:
        for member in _walk(file, start, end):
            found.append(member)  # one by one, to keep the files before a fault
    except _CutOffError:
        return sorted(found), [f"{name} is cut off: its {end - start} bytes do not end as a tar does; get it again"]
    except tarfile.ReadError as error:
        return [], [f"{name} cannot be read as a tar ({error}); get it again"]
    return sorted(found), []


class _CutOffError(Exception):
    """A tar is truncated."""


def _walk(file: BinaryIO, start: int, end: int) -> Iterator[Member]:
    """Yields the files in a tar. Raises _CutOffError if it is truncated, or tarfile.ReadError if the bytes are not a tar."""
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
            yield Member(member.name.rsplit("/", 1)[-1], member.offset_data, size, _fault(member))
    if start == end:
        raise tarfile.ReadError("empty file")
    raise _CutOffError


def _plain_member(header: bytes, position: int) -> tarfile.TarInfo | None:
    """Returns the member for the header of a plain file with a short name, else None. Three times as fast as tarfile."""
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

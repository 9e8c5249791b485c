"""Finds the files in a tar from its headers alone."""

import sys
import tarfile
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

_LAST_BLOCK = bytes(tarfile.BLOCKSIZE)
_PIECE = 2**20
_LONGEST_END = 2**20
"""Most zeros that a program writes after the last member, in bytes. tar fills up its last record, which has 10 KiB by default."""
_COMPRESSED = {
    b"\x1f\x8b": ("gzip", "mv {0} {0}.gz && gunzip {0}.gz"),
    b"BZh": ("bzip2", "mv {0} {0}.bz2 && bunzip2 {0}.bz2"),
    b"\xfd7zXZ\0": ("xz", "mv {0} {0}.xz && unxz {0}.xz"),
    b"\x28\xb5\x2f\xfd": ("zstd", "mv {0} {0}.zst && unzstd --rm {0}.zst"),
    b"PK\x03\x04": ("zip", "unzip {0}"),
}
"""Name and remedy of a file by its first bytes."""


class Member(NamedTuple):
    """A file in a tar."""

    name: str
    """Path within the tar. Its bytes are UTF-8; others are lone surrogates (PEP 383)."""
    offset: int
    """Start of the content in the file that holds the tar, in bytes."""
    size: int
    """Size in bytes."""
    fault: str
    """Why the member is not a plain file of this tar; "" if it is one."""


class Members(NamedTuple):
    """What a tar holds."""

    files: list[Member]
    """In the order of the tar."""
    empty_folders: list[str]
    problems: list[str]
    """Faults of the tar as a whole."""


def members(file: BinaryIO, name: str, start: int, end: int) -> Members:
    """Returns what the tar at bytes start..end of `file` holds, and the tar's problems."""
    found: list[Member] = []
    empty_folders = []
    problems = []
    try:
        for one in walk(file, name, start, end):  # one by one, to keep the files before a fault
            if isinstance(one, Member):
                found.append(one)
            else:
                empty_folders.append(one)
    except BadTarError as error:
        problems.append(str(error))
    return Members(found, empty_folders, problems)


class BadTarError(Exception):
    """A tar is not whole. The message is the problem, with the tar's name."""


def walk(file: BinaryIO, name: str, start: int = 0, end: int = sys.maxsize) -> Iterator[Member | str]:
    """Yields the files of the tar at bytes start..end of `file`, then the paths of its empty folders.

    Never seeks back before the last header or piece that it read. Raises BadTarError if it is not a whole tar.
    """
    folders: set[str] = set()
    filled: set[str] = set()
    position = start
    while position + tarfile.BLOCKSIZE <= end:
        file.seek(position)
        header = file.read(tarfile.BLOCKSIZE)
        if len(header) < tarfile.BLOCKSIZE:
            end = position + len(header)
            break
        if header == _LAST_BLOCK:
            _check_rest(file, name, start, position, end)
            yield from sorted(folders - filled)
            return
        try:
            member, following = _plain_member(header, position) or _any_member(file, position)
        except tarfile.ReadError as error:
            if position > start:
                raise _cut_off(name, position - start, end - start) from error
            raise BadTarError(_not_a_tar(name, header, str(error), is_whole_file=start == 0)) from error
        data_end = following if member.issparse() or not member.isreg() else member.offset_data + member.size
        if data_end > end:
            break
        position = following
        path = "/".join(part for part in member.name.split("/") if part not in ("", ".", ".."))
        filled.update(_above(path))
        if member.isdir():
            folders |= {path} - {""}
        else:
            yield Member(path, member.offset_data, member.size if member.isreg() else 0, _fault(member))
    if end - start < tarfile.BLOCKSIZE:
        file.seek(start)
        raise BadTarError(_not_a_tar(name, file.read(end - start), f"it has {end - start} bytes", is_whole_file=start == 0))
    raise _cut_off(name, position - start, end - start)


def _above(path: str) -> Iterator[str]:
    """Yields the folders that hold `path`."""
    while "/" in path:
        path = path.rpartition("/")[0]
        yield path


def _check_rest(file: BinaryIO, name: str, start: int, position: int, end: int) -> None:
    """Raises BadTarError if something other than the usual zeros follows the end of a tar at byte `position`."""
    begin = position
    while position < end:
        file.seek(position)
        piece = file.read(min(_PIECE, end - position))
        if not piece:
            break
        if rest := piece.lstrip(b"\0"):
            junk = position + len(piece) - len(rest)
            raise BadTarError(_what_follows(file, name, junk - start, start, end))
        position += len(piece)
    if position - begin > _LONGEST_END:
        raise BadTarError(
            f"{name} has nothing but zeros from byte {begin - start:,} to its end at byte {position - start:,}: its download "
            "stopped there (a sparse file); go on with it, or start it again"
        )


def _what_follows(file: BinaryIO, name: str, byte: int, start: int, end: int) -> str:
    block = start + byte // tarfile.BLOCKSIZE * tarfile.BLOCKSIZE
    file.seek(block)
    header = file.read(min(tarfile.BLOCKSIZE, end - block))
    try:
        is_tar = len(header) == tarfile.BLOCKSIZE and bool(_plain_member(header, block) or _any_member(file, block))
    except tarfile.ReadError:
        is_tar = False
    if is_tar:
        return (
            f"{name} has a second archive at byte {block - start:,}, after its end: extract both with tar --ignore-zeros -xf, "
            "and give the folder"
        )
    return (
        f"{name} has other bytes at byte {byte:,}, after its end: they are no part of the tar; remove them, or get the tar again"
    )


def _cut_off(name: str, position: int, size: int) -> BadTarError:
    return BadTarError(
        f"{name} is cut off: its {size:,} bytes do not end as a tar does, and the last whole member ends at byte {position:,}; "
        "go on with its download, or start it again"
    )


def _not_a_tar(name: str, head: bytes, error: str, *, is_whole_file: bool) -> str:
    for magic, (kind, remedy) in _COMPRESSED.items():
        if head.startswith(magic):
            how = f"unpack it in the raw folder: {remedy.format(name)}" if is_whole_file else "unpack it"
            return f"{name} is a {kind} file and cannot be read as a tar: {how}"
    if head.lstrip()[:1] == b"<":
        return f"{name} is a web page and cannot be read as a tar: download it again while you are logged in"
    return f"{name} cannot be read as a tar ({error}): it is something else, or damaged; download it again"


def _plain_member(header: bytes, position: int) -> tuple[tarfile.TarInfo, int] | None:
    """Returns the member for the header of a plain file with a short name, and where the next begins; None for other headers.

    Three times as fast as tarfile.
    """
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
    following = member.offset_data - -size // tarfile.BLOCKSIZE * tarfile.BLOCKSIZE
    return None if member.name.endswith("/") else (member, following)


def _any_member(file: BinaryIO, position: int) -> tuple[tarfile.TarInfo, int]:
    file.seek(position)
    with tarfile.open(fileobj=file, mode="r:", encoding="utf-8", errors="surrogateescape") as tar:
        member = tar.firstmember  # type: ignore[attr-defined]  # next() would seek back if it is None
        if member is None:
            raise tarfile.ReadError("it ends too early")
        return member, tar.offset


def _fault(member: tarfile.TarInfo) -> str:
    if member.issparse():
        return "is stored as a sparse file: make the tar again without -S"
    if not member.isreg():
        return "is a link or a device, not a file"
    if member.name.startswith("/") or ".." in member.name.split("/"):
        return f"has the path {member.name}, which leaves the archive"
    return ""

"""What a dataset was made of. A finished dataset records it, so that the same conversion finds the dataset again.

Raw files are the same although their times differ: somebody copied, touched or extracted them again. Their names and sizes are
compared, and pieces of their bytes, because reading all 150 GB of ImageNet may take as long as converting them.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from beam_jobs import files
from beam_jobs.layouts.labels import path_of
from beam_jobs.layouts.layout import Archive, Found
from beam_jobs.listings import FileTable
from beam_jobs.texts import encoded

PIECES = 1024
"""Pieces of the raw files that are compared."""
PIECE_BYTES = 2**16
"""Length of a piece in bytes. Raw files that are no longer than all pieces are compared whole."""
_THREADS = 16


@dataclass(frozen=True)
class Origin:
    """What a dataset was made of."""

    raw: str
    """Digest of the names, sizes and times of the raw files."""
    names: str
    """Digest of the names and sizes."""
    pieces: str
    """Digest of pieces of the raw files and of the labels; "" if they were not read."""
    options: Mapping[str, Any]
    """Options that change what is written. JSON."""
    software: str
    """The versions of this tool and of the codecs."""

    def to_json(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)


def from_json(text: str) -> Origin | None:
    """Returns the origin of `Origin.to_json`, or None if the text is none."""
    try:
        return Origin(**json.loads(text))
    except (ValueError, TypeError):
        return None


def why_another(before: Origin, now: Origin) -> str:
    """Returns what makes a dataset of `now` another than that of `before`; "" if they are the same."""
    if before.names != now.names:
        return "other raw data (other names or sizes of files)"
    if before.raw != now.raw and before.pieces != now.pieces:
        return "other raw data (the same names and sizes, but other bytes)"
    for option, value in now.options.items():
        if before.options.get(option) != value:
            return f"other options ({option} was {before.options.get(option)}, now {value})"
    return ""


def differences(before: Origin, now: Origin, compared: str) -> str:
    """Returns the end of a line that says what differs although the dataset is the same; "" if nothing does.

    compared: what `Origin.pieces` covers, from `read_pieces`
    """
    of_raw = f"; its raw files have other times since, but the same names, sizes and bytes{compared}"
    of_software = f"; it was made with {before.software}, this is {now.software}"
    return (of_raw if before.raw != now.raw else "") + (of_software if before.software != now.software else "")


def digest_of(found: Iterable[Found], *, times: bool) -> str:
    """Returns a short hex digest of the names and sizes of raw files. With `times`, also of their times and the file of labels.

    Without times, a file of labels counts by its content alone: see `read_pieces`.
    """
    digest = hashlib.sha256()
    for one in found:
        table = FileTable.of(one.files)
        columns = (table.names.ends, table.sizes, *((table.times,) if times else ()))
        for part in (encoded(table.prefix), table.names.joint, *(column.tobytes() for column in columns)):
            digest.update(b"%d " % len(part) + part)
        if times and one.labels:
            digest.update(repr(tuple(one.labels)).encode())
    return digest.hexdigest()[:16]


def read_pieces(folder: str, found: Sequence[Found], archives: Iterable[Archive]) -> tuple[str, str]:
    """Returns a digest of pieces of the raw files in `folder` and of all labels, and what it covers, for people.

    found: the files of each split
    archives: the archives; they have the labels that come from a file
    """
    digest = hashlib.sha256()
    for archive in archives:
        digest.update(repr((archive.synsets, archive.names)).encode())
    for labels in (one.labels for one in found if one.labels):
        path = path_of(folder, labels.name)
        digest.update(files.read(path) if files.find(path) else b"")
    pieces, whole = _pieces([FileTable.of(one.files) for one in found])

    def read(piece: tuple[str, int, int]) -> bytes:
        name, offset, size = piece
        try:
            return files.read_range(files.join(folder, name), offset, size)
        except OSError as error:  # the conversion reports it
            return str(error.strerror).encode()

    with ThreadPoolExecutor(_THREADS) as pool:
        for content in pool.map(read, pieces):
            digest.update(hashlib.sha256(content).digest())
    return digest.hexdigest(), "" if whole else f" in {len(pieces):,} pieces of {PIECE_BYTES:,} bytes"


def _pieces(tables: Sequence[FileTable]) -> tuple[list[tuple[str, int, int]], bool]:
    """Returns name, offset and length of evenly spaced pieces of the files, and whether they are all bytes of the files."""
    sizes = np.concatenate([table.sizes for table in tables])
    numbers = np.repeat(np.arange(len(tables)), [len(table) for table in tables])
    firsts = np.cumsum([0, *(len(table) for table in tables)])
    ends = np.cumsum(sizes)
    begins = ends - sizes
    total = int(sizes.sum())
    whole = len(sizes) <= PIECES and total <= PIECES * PIECE_BYTES
    places = begins[sizes > 0] if whole else np.arange(PIECES) * total // PIECES
    found = []
    for place in places.tolist():
        at = int(np.searchsorted(ends, place, side="right"))
        name = tables[numbers[at]][at - int(firsts[numbers[at]])].name
        left = int(ends[at]) - place
        found.append((name, place - int(begins[at]), left if whole else min(left, PIECE_BYTES)))
    return found, whole

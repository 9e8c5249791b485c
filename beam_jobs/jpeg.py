"""The header of a JPEG, read without decoding pixels (ITU-T T.81, annex B)."""

import functools
from dataclasses import dataclass

BASELINE, EXTENDED, PROGRESSIVE = 0xC0, 0xC1, 0xC2
_START_OF_FRAME = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_WITHOUT_LENGTH = frozenset(range(0xD0, 0xD9)) | {0x01}
_HUFFMAN, _END, _START_OF_SCAN, _QUANTIZATION, _RESTART, _ADOBE = 0xC4, 0xD9, 0xDA, 0xDB, 0xDD, 0xEE
_READ = _START_OF_FRAME | {_HUFFMAN, _START_OF_SCAN, _QUANTIZATION, _RESTART, _ADOBE}
"""Markers whose segments matter here. Others may be long."""
_KNOWN = _READ | frozenset(range(0xE0, 0xF0)) | {0xFE}
"""Markers that a header may have: those above, applications' and comments."""
_COEFFICIENTS = 64
_LENGTHS = 16
"""The most bits of a Huffman code."""
_AC = 0x10
"""Bit that marks the tables of AC coefficients in a segment of Huffman tables."""
_TABLES = 4
"""Number of tables of a kind."""
_BLOCKS = 10
"""Most blocks of the unit that an interleaved scan repeats."""
_LARGEST_DC, _LARGEST_SHIFT = 15, 13


@dataclass(frozen=True)
class JpegHeader:
    """The header of a JPEG: everything before its first pixel."""

    process: int
    """The start-of-frame marker: 0xC0 baseline, 0xC1 extended, 0xC2 progressive. Few decoders read the others."""
    precision: int
    """Bits per sample."""
    height: int
    width: int
    components: int
    adobe_transform: int | None
    """Colour transform in Adobe's marker: 0 none, 1 YCbCr, 2 YCCK. None if there is no such marker."""
    scan: int
    """Byte at which the header ends and pixels begin."""
    fault: str
    """Why a decoder may refuse the header, in words; "" if there is no reason. Only for the common processes."""


def read_jpeg_header(data: bytes) -> JpegHeader | None:
    """Returns the header of a JPEG without decoding pixels, or None if `data` has no whole header."""
    if data[:2] != b"\xff\xd8":
        return None
    adobe_transform = None
    frames: list[tuple[int, bytes]] = []
    quantization: set[int] = set()
    huffman: set[int] = set()
    fault = ""
    position = 2
    while position + 4 <= len(data) and data[position] == 0xFF:
        marker = data[position + 1]
        if marker == 0xFF:  # fill byte
            position += 1
            continue
        if marker in _WITHOUT_LENGTH:
            position += 2
            continue
        if marker == _END:
            return None
        end = position + 2 + int.from_bytes(data[position + 2 : position + 4])
        segment = data[position + 4 : end] if marker in _READ else b""
        if marker == _START_OF_SCAN:
            if not frames:
                return None
            process, frame = frames[-1]
            fault = fault or _fault(frames, segment, quantization, huffman)
            height, width = int.from_bytes(frame[1:3]), int.from_bytes(frame[3:5])
            return JpegHeader(process, frame[0], height, width, frame[5], adobe_transform, end, fault)
        if marker in _START_OF_FRAME and len(segment) >= 6:
            frames.append((marker, segment))
        elif marker == _QUANTIZATION:
            tables, wrong = _read_quantization(segment)
            quantization |= tables
            fault = fault or wrong
        elif marker == _HUFFMAN:
            tables, wrong = _read_huffman(segment)
            huffman |= tables
            fault = fault or wrong
        elif marker == _ADOBE and segment[:5] == b"Adobe" and len(segment) >= 12:
            adobe_transform = segment[11]
        elif marker not in _KNOWN or (marker == _RESTART and len(segment) != 2):
            fault = f"segment 0x{marker:02X} makes no sense"
        position = end
    return None


def _fault(frames: list[tuple[int, bytes]], scan: bytes, quantization: set[int], huffman: set[int]) -> str:
    """Returns why a decoder may refuse to begin with the first scan, in words; "" if there is no reason."""
    process, frame = frames[-1]
    if process not in (BASELINE, EXTENDED, PROGRESSIVE):
        return ""
    components = {frame[start]: (frame[start + 1], frame[start + 2]) for start in range(6, len(frame) - 2, 3)}
    if len(frames) > 1 or len(components) != frame[5] or len(frame) != 6 + 3 * frame[5]:
        return "the frame does not describe each component once"
    chosen = {scan[start]: scan[start + 1] for start in range(1, len(scan) - 4, 2)}
    if not chosen or len(scan) != 4 + 2 * len(chosen) or scan[0] != len(chosen) or not chosen.keys() <= components.keys():
        return "the first scan is not of the frame's components"
    if process == PROGRESSIVE and not (scan[-3:-1] == b"\0\0" and scan[-1] <= _LARGEST_SHIFT):
        return "the first scan is not one of DC coefficients"
    if not _samples([sampling for sampling, _ in components.values()], len(chosen)):
        return "the sampling factors do not fit together"
    for component, tables in chosen.items():
        if (table := components[component][1]) not in quantization:
            return f"quantization table {table} is missing"
        needed = [tables >> 4] if process == PROGRESSIVE else [tables >> 4, _AC | tables & 0xF]
        if missing := [table for table in needed if table not in huffman]:
            return f"Huffman table {missing[0] & 0xF} of {'AC' if missing[0] & _AC else 'DC'} coefficients is missing"
    return ""


def _samples(factors: list[int], interleaved: int) -> bool:
    """Returns whether components of these sampling factors can be decoded, if a scan has `interleaved` of them."""
    across, down = [factor >> 4 for factor in factors], [factor & 0xF for factor in factors]
    if not all(1 <= factor <= 4 for factor in across + down):
        return False
    whole = all(max(across) % factor == 0 for factor in across) and all(max(down) % factor == 0 for factor in down)
    blocks = sum(x * y for x, y in zip(across, down, strict=True))
    return whole and (interleaved == 1 or blocks <= _BLOCKS)


@functools.lru_cache(maxsize=256)  # most JPEGs have the same few tables
def _read_quantization(segment: bytes) -> tuple[frozenset[int], str]:
    """Returns the numbers of a segment's tables, and what is wrong with the segment, in words."""
    tables: set[int] = set()
    position = 0
    while position < len(segment):
        wide, number = segment[position] >> 4, segment[position] & 0xF
        position += 1 + _COEFFICIENTS * (2 if wide else 1)
        if position > len(segment) or number >= _TABLES:
            return frozenset(tables), "a quantization table makes no sense"
        tables.add(number)
    return frozenset(tables), ""


@functools.lru_cache(maxsize=256)
def _read_huffman(segment: bytes) -> tuple[frozenset[int], str]:
    """Returns the classes and numbers of a segment's tables, and what is wrong with the segment, in words."""
    tables: set[int] = set()
    position = 0
    while position < len(segment):
        number = segment[position]
        counts = segment[position + 1 : position + 1 + _LENGTHS]
        begin = position + 1 + _LENGTHS
        position = begin + sum(counts)
        right = position <= len(segment) and number & ~_AC < _TABLES and _is_prefix_code(counts)
        if not right or (not number & _AC and max(segment[begin:position], default=0) > _LARGEST_DC):
            return frozenset(tables), "a Huffman table makes no sense"
        tables.add(number)
    return frozenset(tables), ""


def _is_prefix_code(counts: bytes) -> bool:
    """Returns whether so many codes of 1, 2, ... bits can exist of which none begins another (Kraft's inequality)."""
    free = 1
    for count in counts:
        free = 2 * free - count
        if free < 0:
            return False
    return True

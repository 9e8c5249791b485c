"""Reads a file at rising positions, skipping what lies between only where that is faster than reading it.

A hard disk answers 100 requests a second, wherever they lie, but reads 100 KB and more in the time of one. So on such a disk, an
archive's headers are had sooner by reading all of it.
"""

import io
import os
import time
from collections.abc import Callable

PIECE = 2**22
"""Bytes of a request that reads forward."""
_SMALL = 2**12
"""Bytes of a request that skips."""
_TRIED = 8
"""Requests that show how fast skipping is. The first of a file may be answered from the system's cache, so all are watched."""
_BYTES_A_SECOND = 200e6
"""How fast a hard disk reads forward. Skipping must get ahead faster than that."""


class Forward(io.RawIOBase):
    """A local file to read. Its requests skip until some of them get ahead slowly; from then on, all read forward."""

    def __init__(self, path: str, clock: Callable[[], float] = time.perf_counter) -> None:
        self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._clock = clock
        self._position = 0
        self._begin, self._data = 0, b""
        """What was read last, and where it begins."""
        self._requests, self._first, self._seconds = 0, 0, 0.0
        self.reads_forward = False

    def close(self) -> None:
        if not self.closed:
            os.close(self._file)
        super().close()

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        before = {os.SEEK_SET: 0, os.SEEK_CUR: self._position}
        self._position = offset + (before[whence] if whence in before else os.fstat(self._file).st_size)
        return self._position

    def read(self, size: int = -1) -> bytes:
        """Returns `size` bytes, fewer only at the end of the file."""
        if size < 0:
            size = max(os.fstat(self._file).st_size - self._position, 0)
        if not self._begin <= self._position <= self._position + size <= self._begin + len(self._data):
            self._begin, self._data = self._position, self._request(size)
        start = self._position - self._begin
        found = self._data[start : start + size]
        self._position += len(found)
        return found

    def _request(self, size: int) -> bytes:
        begun = self._clock()
        data = os.pread(self._file, max(size, PIECE if self.reads_forward else _SMALL), self._position)
        if self._requests == 0:
            self._first, self._seconds = self._position, 0.0
        self._seconds += self._clock() - begun
        self._requests += 1
        if self._requests == _TRIED:
            self.reads_forward |= self._position - self._first < self._seconds * _BYTES_A_SECOND
            self._requests = 0
        return data

"""Names as bytes, and many of them in two arrays: 8 bytes each and their text. As objects, each takes 41 bytes more."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Texts:
    """Byte strings, one after another."""

    ends: np.ndarray
    """The end of each in `joint`, int64 [n]."""
    joint: bytes

    @classmethod
    def of(cls, texts: Sequence[bytes]) -> "Texts":
        return cls(np.cumsum([len(text) for text in texts], dtype=np.int64), b"".join(texts))

    @classmethod
    def joined(cls, parts: Sequence["Texts"]) -> "Texts":
        before = np.cumsum([0, *(len(part.joint) for part in parts)])
        ends = [part.ends + first for part, first in zip(parts, before.tolist(), strict=False)]
        return cls(np.concatenate(ends), b"".join(part.joint for part in parts))

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, number: int) -> bytes:
        return self.joint[int(self.ends[number - 1]) if number else 0 : int(self.ends[number])]

    def take(self, numbers: np.ndarray) -> Iterator[bytes]:
        """Yields the strings of these numbers, int64 [m]."""
        ends = self.ends[numbers].tolist()
        begins = np.where(numbers > 0, self.ends[numbers - 1], 0).tolist()
        return (self.joint[begin:end] for begin, end in zip(begins, ends, strict=True))


def encoded(name: str) -> bytes:
    """Returns the bytes of a name. Lone surrogates stand for bytes that are not UTF-8 (PEP 383)."""
    return name.encode(errors="surrogateescape")


def decoded(name: bytes) -> str:
    """Returns the name of these bytes, the inverse of `encoded`."""
    return name.decode(errors="surrogateescape")

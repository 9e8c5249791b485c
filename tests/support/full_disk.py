"""A disk that is full, for what `trainer.shared.files` writes."""

import errno
import os
from pathlib import Path

import pytest

from trainer.shared import files


class _Full:
    """A new file that takes nothing."""

    def __init__(self, path: str) -> None:
        Path(path).touch()

    def __enter__(self) -> "_Full":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def write(self, content: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def fill_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fills the disk for the rest of the test."""
    monkeypatch.setattr(files, "_create", _Full)

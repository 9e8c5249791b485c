"""What a layout sees and does not take: each file, member of a tar or empty folder with its reason, and their tallies."""

import posixpath
from collections.abc import Iterable
from typing import Any, NamedTuple

from beam_jobs import files

EMPTY_FOLDER = "an empty folder"
TEST = "test images, which have no labels"
"""Reasons of a `PassedOver`."""
_NAMED = 1000
"""Most names that a tally lists for a reason. Their number is always exact."""

Tallies = dict[str, dict[str, Any]]
"""By reason: number (`entries`), `bytes` and first `names` of what was passed over. JSON."""


class PassedOver(NamedTuple):
    """A file, a member of a tar or an empty folder that is no image to take."""

    name: str
    """Path for people, relative to the raw folder. An archive's member is written as if the archive were a folder."""
    reason: str
    """Why it is passed over. The same words for the same kind, because the manifest counts them by reason."""
    size: int
    """Size in bytes."""


def tally(passed_over: Iterable[PassedOver]) -> Tallies:
    """Returns how much was passed over for each reason."""
    tallies: Tallies = {}
    for one in passed_over:
        add(tallies, one)
    return tallies


def add(tallies: Tallies, one: PassedOver) -> None:
    """Counts one more that is passed over in `tallies`."""
    into = tallies.setdefault(one.reason, {"entries": 0, "bytes": 0, "names": []})
    into["entries"] += 1
    into["bytes"] += one.size
    if len(into["names"]) < _NAMED:
        into["names"].append(one.name)


def merge(parts: Iterable[Tallies]) -> Tallies:
    """Returns how much was passed over for each reason in all of `parts`."""
    merged: Tallies = {}
    for part in parts:
        for reason, one in part.items():
            into = merged.setdefault(reason, {"entries": 0, "bytes": 0, "names": []})
            into["entries"] += one["entries"]
            into["bytes"] += one["bytes"]
            into["names"] += one["names"][: _NAMED - len(into["names"])]
    return merged


def unlabelled_images(folder: str, top: str) -> tuple[PassedOver, ...]:
    """Returns the files of test images in the folder `top` of a raw folder. They count with the training images."""
    return tuple(
        PassedOver(posixpath.join(top, info.name), TEST, info.size) for info in files.walk(files.join(folder, top)).files
    )

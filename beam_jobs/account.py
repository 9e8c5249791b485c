"""The account of a split: all that was seen in the raw folder, and what became of it.

Seen is every file, every member of a tar and every empty folder. Tars and folders are not counted themselves if their contents
are. Each is an image that was taken, one that was rejected, or passed over for a reason.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from beam_jobs.layouts.layout import PassedOver
from trainer.shared.errors import printable
from trainer.shared.records import PassedOverFor, Seen

_NAMED = 1000
"""Most names that an account lists for a reason. Their number is always exact."""

Tallies = dict[str, dict[str, Any]]
"""By reason: number, bytes and first names of what was passed over. JSON."""


def tally(passed_over: Iterable[PassedOver]) -> Tallies:
    """Returns how much was passed over for each reason."""
    tallies: Tallies = {}
    for name, reason, size in passed_over:
        one = tallies.setdefault(reason, {"entries": 0, "bytes": 0, "names": []})
        one["entries"] += 1
        one["bytes"] += size
        if len(one["names"]) < _NAMED:
            one["names"].append(name)
    return tallies


def seen_of(passed_over: Iterable[PassedOver], of_archives: Iterable[Mapping[str, Any]]) -> Seen:
    """Returns the account of a split.

    passed_over: what the split has outside its archives
    of_archives: a mapping for each archive: `entries` and `bytes` seen, `rejected_bytes`, and the `passed_over` tallies
    """
    outside = tally(passed_over)
    entries = sum(one["entries"] for one in outside.values())
    size = sum(one["bytes"] for one in outside.values())
    rejected = 0
    parts = [outside]
    for account in of_archives:
        entries += account["entries"]
        size += account["bytes"]
        rejected += account["rejected_bytes"]
        parts.append(account["passed_over"])
    merged: Tallies = {}
    for part in parts:
        for reason, one in part.items():
            into = merged.setdefault(reason, {"entries": 0, "bytes": 0, "names": []})
            into["entries"] += one["entries"]
            into["bytes"] += one["bytes"]
            into["names"] += one["names"][: _NAMED - len(into["names"])]
    return Seen(
        entries,
        size,
        rejected,
        tuple(
            PassedOverFor(reason, one["entries"], one["bytes"], tuple(map(printable, one["names"])))
            for reason, one in sorted(merged.items())
        ),
    )

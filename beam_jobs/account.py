"""The account of a split: all that was seen in the raw folder, and what became of it.

Seen is every file, every member of a tar and every empty folder. Tars and folders are not counted themselves if their contents
are. Each is an image that was taken, one that was rejected, or passed over for a reason.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from beam_jobs.layouts.passed_over import Tallies, merge
from trainer.shared.errors import printable
from trainer.shared.records import PassedOverFor, Seen


def seen_of(outside: Tallies, of_archives: Iterable[Mapping[str, Any]]) -> Seen:
    """Returns the account of a split.

    outside: what the split has outside its archives
    of_archives: a mapping for each archive: `entries` and `bytes` seen, `rejected_bytes`, and the `passed_over` tallies
    """
    entries = sum(one["entries"] for one in outside.values())
    size = sum(one["bytes"] for one in outside.values())
    rejected = 0
    parts = [outside]
    for account in of_archives:
        entries += account["entries"]
        size += account["bytes"]
        rejected += account["rejected_bytes"]
        parts.append(account["passed_over"])
    return Seen(
        entries,
        size,
        rejected,
        tuple(
            PassedOverFor(reason, one["entries"], one["bytes"], tuple(map(printable, one["names"])))
            for reason, one in sorted(merge(parts).items())
        ),
    )

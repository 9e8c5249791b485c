"""Errors that a user can fix: an exception with a message for the user, and a "did you mean" hint.

Every command prints the message as one line, without a traceback, and exits with 2.
"""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """An error that the user can fix. The message is one line: what is wrong, and what would be right."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Returns "; did you mean X?" if a name in `known` is similar to `name`, else an empty string."""
    known = list(known)
    completions = [candidate for candidate in known if candidate.startswith(name)]
    close = completions or difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    return f"; did you mean {close[0]}?" if close else ""

"""What a user can mend: the exception whose message is for them, and the hint at what they may have meant.

Whoever starts a command shows the message as one line, without a traceback, and exits with 2.
"""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """What the user gave cannot be used, and they can mend it. The message is one line: what is wrong, what would be right."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Returns "; did you mean X?" where something of `known` is like `name`, else nothing."""
    known = list(known)
    begin_so = [candidate for candidate in known if candidate.startswith(name)]
    close = begin_so or difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    return f"; did you mean {close[0]}?" if close else ""

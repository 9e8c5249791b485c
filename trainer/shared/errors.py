"""Errors that a user can fix: an exception with a message for the user, a "did you mean" hint, and names that can be printed.

Every command prints the message as one line, without a traceback, and exits with 2.
"""

import difflib
import io
import re
import sys
from collections.abc import Iterable, Sequence

LISTED_IN_A_LINE = 3
"""Number of items that a one-line message lists."""
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


class UserError(Exception):
    """An error that the user can fix. The message is one line that can be printed: what is wrong, and what would be right."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(" ".join(message.splitlines())))


def nearest(name: str, known: Iterable[str]) -> str:
    """Returns "; did you mean X?" if a name in `known` is similar to `name`, else an empty string."""
    known = list(known)
    completions = [candidate for candidate in known if candidate.startswith(name)]
    close = completions or difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    return f"; did you mean {close[0]}?" if close else ""


def first_few(items: Sequence[str], separator: str = "; ") -> str:
    """Returns the first three items and the number of the others, for a one-line message."""
    more = len(items) - LISTED_IN_A_LINE
    return separator.join(items[:LISTED_IN_A_LINE]) + (f"{separator}and {more:,} more" if more > 0 else "")


def printable(text: str) -> str:
    """Returns `text` with escapes for what no line of UTF-8 can hold: control characters, and bytes of names that are not UTF-8.

    Python keeps such a byte of a file's name as a lone surrogate (PEP 383). It is written as in a bytes literal: caf\\xe9.
    """
    return _UNPRINTABLE.sub(_escape, text)


def print_in_any_locale() -> None:
    """Makes stdout and stderr print escapes for characters that the locale's encoding does not have."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _escape(found: re.Match[str]) -> str:
    code = ord(found[0])
    if 0xDC80 <= code <= 0xDCFF:
        code -= 0xDC00
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"

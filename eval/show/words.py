"""Numbers and settings as people read them, the same on a page and on a terminal."""

from collections.abc import Mapping
from typing import Any


def percent(value: float) -> str:
    return f"{value:.1%}"


def between(low: float, high: float) -> str:
    """Returns an interval of fractions in per cent."""
    return f"{100 * low:.1f} to {100 * high:.1f}%"


def settings_in_words(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value:g}" if isinstance(value, float) else f"{name}={value}" for name, value in settings.items())

"""HTML pages. A page is one self-contained file, in light or dark as the reader prefers, and can be printed.

The template of a page lies beside the code that fills it. It extends `page.html.jinja`, which includes `page.css`, and imports
macros for tables, pictures and charts from `parts.html.jinja`. Code prepares plain data; templates turn it into HTML.
"""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from jinja2 import Environment, FileSystemLoader, StrictUndefined

if TYPE_CHECKING:
    from PIL.Image import Image

_FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Section:
    """A section of a page. The top of the page links to it."""

    key: str
    """Anchor of the section. The page's template chooses the layout by this key."""
    title: str
    lede: str
    """Introduction of one or two sentences."""
    content: Mapping[str, Any]
    """Data for the template."""


@dataclass(frozen=True)
class Picture:
    uri: str
    alt: str
    caption: str = ""
    mark: Literal["", "right", "wrong"] = ""
    """Whether the picture is of the right class. Shown as a coloured frame and in the alternative text."""


Facts = Sequence[tuple[str, str | tuple[str, ...]]]
"""Pairs (name, value). A tuple of values is shown as code."""


def render(template: Path, **values: Any) -> str:
    """Renders `template` with `values`, which must include `title` and `sections`. Returns the HTML.

    Escapes all text. Raises jinja2.UndefinedError if the template uses a missing value.
    """
    environment = Environment(
        loader=FileSystemLoader([template.parent, _FOLDER]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": percent, "between": between}
    return environment.get_template(template.name).render(values, style=(_FOLDER / "page.css").read_text())


def percent(value: float) -> str:
    return f"{value:.1%}"


def between(interval: tuple[float, float]) -> str:
    """Formats an interval of fractions in per cent, as in "71.2 to 74.8%"."""
    low, high = interval
    return f"{100 * low:.1f} to {100 * high:.1f}%"


def data_uri(picture: "Image", quality: int = 85) -> str:
    """Encodes a picture as a JPEG in a data URI."""
    out = io.BytesIO()
    picture.save(out, "jpeg", quality=quality)
    return f"data:image/jpeg;base64,{base64.b64encode(out.getvalue()).decode()}"

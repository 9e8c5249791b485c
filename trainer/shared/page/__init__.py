"""Pages: one HTML file each that asks for nothing else, light or dark as the reader has it, on a screen or on paper.

A page is a template beside the code that fills it. It extends `page.html.jinja`, which holds the frame and `page.css`, and takes
tables, pictures and charts from `parts.html.jinja`. Code prepares plain data, templates make HTML of it.
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
    """A part of a page, with a link to it at the top."""

    key: str
    """Its anchor; the page's template shows a section according to its key."""
    title: str
    lede: str
    """Says in a sentence or two what there is to see."""
    content: Mapping[str, Any]
    """What the template needs."""


@dataclass(frozen=True)
class Picture:
    uri: str
    alt: str
    caption: str = ""
    mark: Literal["", "right", "wrong"] = ""
    """Said in words and shown as a frame."""


Facts = Sequence[tuple[str, str | tuple[str, ...]]]
"""Names with their values; a tuple's are shown as code."""


def render(template: Path, **values: Any) -> str:
    """Returns the page that `template` makes of `values`, which hold its `title` and its `sections` at least.

    All text is escaped. Raises jinja2.UndefinedError if the template uses a value that is not given.
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
    """Returns an interval of fractions in per cent."""
    low, high = interval
    return f"{100 * low:.1f} to {100 * high:.1f}%"


def data_uri(picture: "Image", quality: int = 85) -> str:
    """Returns a picture, as a JPEG, as the text that a page holds in the place of an address."""
    out = io.BytesIO()
    picture.save(out, "jpeg", quality=quality)
    return f"data:image/jpeg;base64,{base64.b64encode(out.getvalue()).decode()}"

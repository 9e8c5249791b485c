"""The raw layouts, a module each. For each split, the first of `ORDER` that recognises the raw folder reads it.

A new layout takes a module here, whose LAYOUT implements `layout.Layout` or `layout.Stream`, and the module's name in `ORDER`.
"""

import importlib
import pkgutil

from beam_jobs.layouts.layout import Layout, Stream

ORDER = (
    "archives",
    "gzip_archives",
    "hugging_face_parquet",
    "hugging_face_archives",
    "tfds",
    "kaggle",
    "tiny_imagenet",
    "folders",
)
_MODULES = {one.name: importlib.import_module(f"{__name__}.{one.name}") for one in pkgutil.iter_modules(__path__)}
LAYOUTS: tuple[Layout | Stream, ...] = tuple(_MODULES[name].LAYOUT for name in ORDER)


def name_of(layout: Layout | Stream) -> str:
    """Returns the name of a layout for people: its module's name with spaces."""
    return type(layout).__module__.rpartition(".")[2].replace("_", " ")

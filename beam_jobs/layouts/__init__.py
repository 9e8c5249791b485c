"""The raw layouts, a module each. For each split, the first of `ORDER` that recognises the raw folder reads it.

A new layout takes a module here, whose LAYOUT implements `layout.Layout`, and the module's name in `ORDER`.
"""

import importlib
import pkgutil

from beam_jobs.layouts.layout import Layout

ORDER = ("archives", "folders")
_MODULES = {one.name: importlib.import_module(f"{__name__}.{one.name}") for one in pkgutil.iter_modules(__path__)}
LAYOUTS: tuple[Layout, ...] = tuple(_MODULES[name].LAYOUT for name in ORDER)

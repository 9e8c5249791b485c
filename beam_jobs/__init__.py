"""Converts raw images to TFRecords with image IDs, on Apache Beam."""

import sys
from importlib.util import find_spec
from pathlib import Path

# `python -m` looks in the current folder first, where another project may have a trainer of its own.
_PROJECT = Path(__file__).absolute().parents[1]
if str(_PROJECT / "trainer") not in (getattr(find_spec("trainer"), "submodule_search_locations", None) or ()):
    sys.path.insert(0, str(_PROJECT))

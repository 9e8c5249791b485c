"""Evaluation of a pretrained encoder: `measure` evaluates it, `export` exports it, `show` renders the results as HTML pages.

This package has the name of a builtin. Always write `from eval.x import y`, never `import eval`.
"""

import sys
from importlib.util import find_spec
from pathlib import Path

# `python -m` looks in the current folder first, where another project may have a trainer of its own.
_PROJECT = Path(__file__).absolute().parents[1]
if str(_PROJECT / "trainer") not in (getattr(find_spec("trainer"), "submodule_search_locations", None) or ()):
    sys.path.insert(0, str(_PROJECT))

import trainer  # noqa: E402, F401  must come before TensorFlow: it sets TensorFlow's environment variables

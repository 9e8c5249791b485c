"""Evaluation of a pretrained encoder: `measure` says how good it is, `export` hands it on, `show` makes pages of the results.

The folder shares its name with a builtin: import from it, never import it bare.
"""

import trainer  # noqa: F401  before TensorFlow, which it sets up

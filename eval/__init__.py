"""Evaluation of a frozen encoder. (The folder shares its name with a builtin: import from it, never import it bare.)"""

import trainer  # noqa: F401  before TensorFlow, which it sets up

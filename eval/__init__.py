"""Evaluation of a pretrained encoder: `measure` evaluates it, `export` exports it, `show` renders the results as HTML pages.

This package has the name of a builtin. Always write `from eval.x import y`, never `import eval`.
"""

import trainer  # noqa: F401  must come before TensorFlow: it sets TensorFlow's environment variables

"""The interpreter of `make tpu-check`, which has JAX and the TPU's compiler, and the mark of tests that need it."""

import pytest

from pipelines.code import PROJECT
from pipelines.plan import compiler

PYTHON = compiler.tpu_python(PROJECT)


def needs_compiler(test):
    """Marks a test that compiles with the TPU's compiler, which takes tens of seconds."""
    return pytest.mark.thorough(pytest.mark.skipif(PYTHON is None, reason="make tpu-check installs the TPU's compiler")(test))

"""Who may know whom; the layers themselves are checked by import-linter from pyproject.toml."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = ("trainer", "eval", "beam_jobs", "components", "pipelines")
FILES = [path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))]


def imported(path: Path) -> list[str]:
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names.append(node.module or "")
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_imports_eval_bare(path):
    assert "eval" not in imported(path)


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("pipelines.cli", "tensorflow"),
        ("beam_jobs.build_tfrecords", "tensorflow"),
        ("trainer.shared.records", "tensorflow"),
        ("trainer.shared.blocks", "tensorflow"),
        ("trainer.shared.page", "tensorflow"),
    ],
)
def test_a_room_that_must_be_light_is(module, absent):
    code = f"import sys, {module}; sys.exit({absent!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_the_import_rules_hold():
    linter = Path(sys.executable).parent / "lint-imports"
    done = subprocess.run([linter, "--config", "pyproject.toml"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("module", ["eval.export.encoder", "eval.serving", "eval.task", "trainer.task", "trainer.lowering"])
def test_onednn_is_turned_on_before_tensorflow_is_imported(module):
    """Ends where TensorFlow is about to be imported, with 0 if oneDNN is on by then."""
    script = f"""
import os, sys

class Watch:
    def find_spec(self, name, path=None, target=None):
        if name == "tensorflow":
            os._exit(os.environ.get("TF_ENABLE_ONEDNN_OPTS") != "1")

sys.meta_path.insert(0, Watch())
import {module}
from trainer import train
os._exit(2)
"""
    environ = {name: value for name, value in os.environ.items() if name != "TF_ENABLE_ONEDNN_OPTS"}
    assert subprocess.run([sys.executable, "-c", script], env=environ, cwd=ROOT).returncode == 0

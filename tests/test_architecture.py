"""Who may know whom; the layers themselves are checked by import-linter from pyproject.toml."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
ROOT = TESTS.parent
ROOMS = ("trainer", "eval", "beam_jobs", "components", "pipelines")
FILES = [path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))]


def imported(path: Path) -> list[str]:
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names += [node.module or "", *(f"{node.module or ''}.{alias.name}" for alias in node.names)]
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_imports_eval_bare(path):
    assert "eval" not in imported(path)


def imports_of_tests(folder: Path) -> list[str]:
    """Returns "FILE: NAME" for each import of, or from, a test file or conftest in the Python files of a folder."""
    return [
        f"{path.name}: {name}"
        for path in sorted(folder.rglob("*.py"))
        for name in imported(path)
        if any(part == "conftest" or part.startswith("test_") for part in name.split("."))
    ]


def test_what_test_files_share_is_in_no_test_file():
    assert imports_of_tests(TESTS) == []


@pytest.mark.parametrize(
    "line", ["from conftest import dataset", "import test_train", "def f():\n    from tests import test_train"]
)
def test_an_import_of_a_test_file_is_found(tmp_path, line):
    (tmp_path / "test_of_another.py").write_text(f"{line}\n")
    assert imports_of_tests(tmp_path)


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


@pytest.mark.thorough
def test_each_job_runs_this_project_where_the_current_folder_has_a_trainer_of_its_own(tmp_path):
    (tmp_path / "trainer").mkdir()
    (tmp_path / "trainer" / "__init__.py").write_text("raise SystemExit('not ours')\n")
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    jobs = (("-m", "eval.task"), ("-m", "beam_jobs.build_tfrecords"), ("-P", "-m", "trainer.task"))
    for job in jobs:
        done = subprocess.run([sys.executable, *job, "--help"], cwd=tmp_path, env=environ, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, ""), job
        assert done.stdout.startswith("usage: ")

"""Identifies the code that a step runs: digests of its sources, and the git commit."""

import ast
import hashlib
import os
import re
import subprocess
from functools import cache
from pathlib import Path

from components import variables

PROJECT = Path(__file__).absolute().parents[1]
"""The folder of the project's packages."""

_PACKAGES = ("beam_jobs", "components", "eval", "pipelines", "trainer")
_STEPS = "components/steps.py"
_PAGE_FILE = re.compile(r"[\w.]+\.(?:jinja|css|js)\b")
"""Name of a template, stylesheet or script that a Python file reads."""


def code_version(project: Path = PROJECT) -> str:
    """Returns a short digest of all the project's own sources."""
    files = [file for package in _PACKAGES for file in sorted((project / package).rglob("*.*"))]
    return _digest(project, [file for file in files if file.suffix == ".py" or _PAGE_FILE.fullmatch(file.name)])


def program_version(lowering: str, project: Path = PROJECT) -> str:
    """Returns a short digest of the code that determines a compiled program: the file `lowering`, its imports, the compiler."""
    files = _reached({project / lowering}, project)
    return _digest(
        project, sorted(files | {project / "pipelines" / "plan" / "program.py", project / "requirements" / "tpu-check.lock"})
    )


def step_version(component: str, project: Path = PROJECT) -> str:
    """Returns a short digest of the sources that a component's body imports, directly or indirectly.

    KFP's cache key has the body itself, but not its imports.
    """
    name = component.replace("-", "_")
    tree = ast.parse((project / _STEPS).read_text())
    body = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name)
    return _digest(project, sorted(_reached(_files(_imports(ast.unparse(body)), project), project)))


def _reached(files: set[Path], project: Path) -> set[Path]:
    """Returns `files` and all of the project's files that they import, directly or indirectly."""
    found: set[Path] = set()
    waiting = set(files)
    while waiting:
        file = waiting.pop()
        if file not in found:
            found.add(file)
            waiting |= _read_beside(file)
            if file.suffix == ".py":
                waiting |= _files(_imports(file.read_text()), project)
    return found


def _read_beside(file: Path) -> set[Path]:
    """Returns the files that `file` reads from its folder without an import: named page files, modules it iterates over."""
    source = file.read_text()
    named = {file.with_name(name) for name in _PAGE_FILE.findall(source)}
    modules = set(file.parent.glob("*.py")) if "iter_modules(__path__)" in source else set()
    return {one for one in named | modules if one.is_file()}


@cache
def _imports(source: str) -> frozenset[str]:
    """Returns the names that `source` imports from the project, at any level of nesting."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return frozenset(name for name in names if name.split(".")[0] in _PACKAGES)


def _files(names: frozenset[str], project: Path) -> set[Path]:
    files = set()
    for name in names:
        within = project.joinpath(*name.split("."))
        files |= {project / name.split(".")[0] / "__init__.py", within / "__init__.py", within.with_suffix(".py")}
    return {file for file in files if file.is_file()}


def _digest(project: Path, files: list[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        content = hashlib.sha256(file.read_bytes()).hexdigest()
        digest.update(f"{file.relative_to(project).as_posix()} {content}\n".encode())
    return digest.hexdigest()[:16]


@cache
def git_commit() -> str:
    """Returns the commit of the sources, or "" if it is unknown."""
    return os.environ.get(variables.COMMIT) or _git("rev-parse", "HEAD")


def uncommitted() -> bool:
    """Returns whether the sources differ from the commit, so that an image of the commit would lack changes."""
    return bool(_git("status", "--porcelain", "--", *_PACKAGES, "pyproject.toml", "Dockerfile"))


def _git(*arguments: str) -> str:
    if not (PROJECT / ".git").exists():
        return ""
    try:
        return subprocess.run(["git", "-C", str(PROJECT), *arguments], capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""

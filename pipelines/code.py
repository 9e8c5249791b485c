"""What identifies the code that a step runs."""

import ast
import hashlib
import os
import re
import subprocess
from functools import cache
from pathlib import Path

from components import variables

PROJECT = Path(__file__).absolute().parents[1]
"""The folder that the project's packages are in."""

_PACKAGES = ("beam_jobs", "components", "eval", "pipelines", "trainer")
_STEPS = "components/steps.py"
_PAGE_FILE = re.compile(r"[\w.]+\.(?:jinja|css|js)\b")
"""Name of a template, a stylesheet or a script: sources that Python files read."""


def code_version(project: Path = PROJECT) -> str:
    """Returns a short digest of all of the project's own sources."""
    files = [file for package in _PACKAGES for file in sorted((project / package).rglob("*.*"))]
    return _digest(project, [file for file in files if file.suffix == ".py" or _PAGE_FILE.fullmatch(file.name)])


def program_version(lowering: str, project: Path = PROJECT) -> str:
    """Returns a short digest of what a compiled program follows from besides the config: the file `lowering` and the compiler."""
    files = _reached({project / lowering}, project)
    return _digest(
        project, sorted(files | {project / "pipelines" / "plan" / "program.py", project / "requirements" / "tpu-check.lock"})
    )


def step_version(component: str, project: Path = PROJECT) -> str:
    """Returns a short digest of the sources that the body of a component imports, directly or not.

    KFP's cache sees the body itself, and nothing that it imports.
    """
    name = component.replace("-", "_")
    tree = ast.parse((project / _STEPS).read_text())
    body = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name)
    return _digest(project, sorted(_reached(_files(_imports(ast.unparse(body)), project), project)))


def _reached(files: set[Path], project: Path) -> set[Path]:
    """Returns `files` with all of the project's files that they import, directly or not."""
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
    """Returns what `file` reads in its folder without an import: page files that it names, and modules that it iterates over."""
    source = file.read_text()
    named = {file.with_name(name) for name in _PAGE_FILE.findall(source)}
    modules = set(file.parent.glob("*.py")) if "iter_modules(__path__)" in source else set()
    return {one for one in named | modules if one.is_file()}


@cache
def _imports(source: str) -> frozenset[str]:
    """Returns the names of what `source` imports of the project, wherever in it."""
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
    """Returns the commit that the sources are of, or nothing where that is not known."""
    return os.environ.get(variables.COMMIT) or _git("rev-parse", "HEAD")


def uncommitted() -> bool:
    """Returns whether sources differ from the commit, so that an image of the commit would lack something."""
    return bool(_git("status", "--porcelain", "--", *_PACKAGES, "pyproject.toml", "Dockerfile"))


def _git(*arguments: str) -> str:
    if not (PROJECT / ".git").exists():
        return ""
    try:
        return subprocess.run(["git", "-C", str(PROJECT), *arguments], capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""

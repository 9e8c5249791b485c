"""The project's CPU image as a folder of files, and what the Dockerfile says of how a container of it starts."""

import fcntl
import functools
import hashlib
import json
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from string import Template

REPOSITORY = Path(__file__).parents[2]
DOCKERFILE = (REPOSITORY / "Dockerfile").read_text()
_HOST_FOLDERS = ("usr", "bin", "sbin", "lib", "lib64")
"""Of the machine, in the place of the image's Debian."""
_MADE_BY_DOCKER = ("dev", "etc", "gcs", "proc", "root", "sys", "tmp", "var/opt", "var/tmp", "opt/apache/beam")


@dataclass(frozen=True)
class Image:
    """What a container's start depends on."""

    environ: dict[str, str]
    user: str
    workdir: str
    entrypoint: list[str]


def image_of(build: str) -> Image:
    """Returns the image of a build, as ENV, USER, WORKDIR and ENTRYPOINT of the last stage and of the stages under it say."""
    variables = {"BUILD": build, "COMMIT": "c0ffee"}
    stages: dict[str, Image] = {}
    bare = Image({"PATH": "/usr/bin:/bin"}, "root", "/", [])
    stage, name = bare, ""
    for line in re.sub(r"\\\n", " ", re.sub(r"^#.*\n", "", DOCKERFILE, flags=re.MULTILINE)).splitlines():
        word, _, rest = line.partition(" ")
        match word:
            case "FROM":
                base, _, name = Template(rest).safe_substitute(variables).partition(" AS ")
                stage = stages.get(base, bare)
            case "ENV":
                known = {**variables, **stage.environ}
                pairs = (pair.partition("=") for pair in shlex.split(rest))
                stage = replace(
                    stage, environ=stage.environ | {key: Template(value).substitute(known) for key, _, value in pairs}
                )
            case "USER":
                stage = replace(stage, user=rest)
            case "WORKDIR":
                stage = replace(stage, workdir=rest)
            case "ENTRYPOINT":
                stage = replace(stage, entrypoint=json.loads(rest))
        stages[name] = stage
    return stage


@functools.cache
def layers() -> tuple[Path, Path]:
    """Returns the CPU image's files as two folders, the first over the second: this project as it is now, and all else.

    Debian's own folders are those of this machine, mounted when a container starts. Python's environment is as locked. Both
    folders are kept in build/ and are made anew when what they are made of changes.
    """
    lock = REPOSITORY / "requirements" / "cpu.lock"
    kept = REPOSITORY / "build" / "rehearsal"
    kept.mkdir(parents=True, exist_ok=True)
    with (kept / "lock").open("w") as held, tempfile.TemporaryDirectory() as scratch:
        fcntl.flock(held, fcntl.LOCK_EX)

        def made(name: str, depends_on: bytes, make: Callable[[Path], None]) -> Path:
            folder = kept / f"{name}-{hashlib.sha256(depends_on).hexdigest()[:12]}"
            if not folder.exists():
                print(f"making the image's layer {folder.name}", file=sys.stderr, flush=True)
                partial = kept / f"{name}.partial"
                shutil.rmtree(partial, ignore_errors=True)
                make(partial)
                partial.rename(folder)
            return folder

        def environment(folder: Path) -> None:
            _skeleton(folder)
            # The venv's options and the lock are the Dockerfile's, uv is pip in a fraction of its time.
            _run(sys._base_executable, "-m", "venv", folder / "opt" / "sogclr")
            python = folder / "opt" / "sogclr" / "bin" / "python3"
            _run(*_INSTALL, "--compile-bytecode", "--require-hashes", "--python", python, "--requirement", lock)

        def project(folder: Path) -> None:
            packages = next(below.glob("opt/sogclr/lib/python3*/site-packages")).relative_to(below)
            _run(*_INSTALL, "--compile-bytecode", "--no-build-isolation", "--target", folder / packages, source)

        below = made("environment", lock.read_bytes() + platform.python_version().encode(), environment)
        source = Path(scratch, "source")
        source.mkdir()
        for line in re.findall(r"^COPY (?!--from)([^$\n]+) /tmp/source", DOCKERFILE, re.MULTILINE):
            for name in line.split():
                copy = shutil.copytree if (REPOSITORY / name).is_dir() else shutil.copy
                copy(REPOSITORY / name, source / name)
        files = sorted(path for path in source.rglob("*") if path.is_file() and path.suffix != ".pyc")
        content = b"".join(str(path.relative_to(source)).encode() + path.read_bytes() for path in files)
        return made("project", content, project), below


_INSTALL = (Path(sys.executable).with_name("uv"), "pip", "install", "--quiet", "--no-deps")


def _skeleton(root: Path) -> None:
    """Makes what is in an image beside Python's environment: Docker's folders, Debian's as places to mount them, and boot."""
    for name in _MADE_BY_DOCKER:
        (root / name).mkdir(parents=True)
    for name in _HOST_FOLDERS:
        if (there := Path("/", name)).is_symlink():
            (root / name).symlink_to(there.readlink())
        elif there.is_dir():
            (root / name).mkdir()
    (root / sys.base_prefix.lstrip("/")).mkdir(parents=True, exist_ok=True)
    shutil.copy(Path(__file__).with_name("boot"), root / "opt/apache/beam/boot")


def mounted(root: Path) -> list[str]:
    """Returns the folders of this machine that a container sees, as paths without the first slash."""
    return [*(name for name in _HOST_FOLDERS if (root / name).is_dir() and not (root / name).is_symlink()), *_base(root)]


def _base(root: Path) -> list[str]:
    return [] if sys.base_prefix.startswith("/usr") and not sys.base_prefix.startswith("/usr/local/") else [sys.base_prefix[1:]]


def _run(*command: object) -> None:
    done = subprocess.run([str(one) for one in command], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"error: {' '.join(map(str, command[:4]))} ... failed: {done.stderr[-2000:]}")

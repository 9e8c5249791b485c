"""Makes the virtual environment that everything here runs in, exactly as locked: install.py VENV [cpu|gpu|tpu]

The interpreter that runs this is the one that the environment gets. Without a build of TensorFlow, an environment that is
there keeps its own, and a new one gets the one that this machine can use. The earlier environment stays until the new one
is whole. `make setup` calls this.
"""

import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

PROJECT = Path(__file__).absolute().parents[1]
LOCKS = PROJECT / "requirements"
INSTALLED = "installed.json"
"""Says what a finished environment holds."""

sys.path.insert(0, str(PROJECT))

from trainer import hardware  # noqa: E402  the checkout, which is not installed yet


def main(venv: Path, asked: str) -> str:
    """Makes the environment `venv` unless it is as it should be; returns what is in it. Ends with a line where it cannot."""
    aside = venv.with_name(f"{venv.name}.before")
    if aside.exists():
        # An installation was cut off.
        shutil.rmtree(venv, ignore_errors=True)
        aside.rename(venv)
    try:
        before = json.loads((venv / INSTALLED).read_text())
    except (OSError, ValueError):
        before = {}
    build, reason = choose(asked, before.get("build", ""))
    locks = [LOCKS / f"{build}.lock", LOCKS / "dev.lock"]
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in (*locks, PROJECT / "pyproject.toml"))).hexdigest()
    wanted = {"build": build, "python": platform.python_version(), "locks": digest, "folder": str(venv)}
    said = f"{venv.name}: Python {wanted['python']}, TensorFlow for {build} ({reason})"
    if before == wanted:
        return said
    print(f"installing {said}", flush=True)
    if venv.exists():
        venv.rename(aside)
    try:
        install(venv, locks)
        (venv / INSTALLED).write_text(json.dumps(wanted))
    except BaseException:
        shutil.rmtree(venv, ignore_errors=True)
        if aside.exists():
            aside.rename(venv)
        raise
    shutil.rmtree(aside, ignore_errors=True)
    return said


def choose(asked: str, installed: str) -> tuple[str, str]:
    """Returns the build of TensorFlow to have, and the reason."""
    system = (platform.system(), platform.machine())
    if system not in (("Linux", "x86_64"), ("Darwin", "arm64")):
        sys.exit(f"error: there are locks for Linux on x86_64 and macOS on arm64, none for {' on '.join(system)}")
    if asked and asked not in hardware.BUILDS:
        sys.exit(f"error: TENSORFLOW={asked} is no build of TensorFlow: take {', '.join(hardware.BUILDS)}")
    if asked in ("gpu", "tpu") and system[0] != "Linux":
        sys.exit(f"error: TensorFlow for {asked} exists for Linux only: take TENSORFLOW=cpu")
    fitting, seen = hardware.choose_build(hardware.visible())
    if asked:
        return asked, f"TENSORFLOW={asked}; {seen}"
    if installed and installed != fitting:
        return installed, f"as installed before; {seen}: make setup TENSORFLOW={fitting} changes it"
    return fitting, seen


def install(venv: Path, locks: list[Path]) -> None:
    """Makes `venv` with what `locks` hold, and this project, editable."""
    run(sys.executable, "-m", "venv", "--clear", venv)
    python = venv / "bin" / "python"
    # pip fetches uv alone, as locked, and uv the rest, in a fraction of pip's time.
    locked = re.search(r"^uv==.*?(?<!\\)$", locks[-1].read_text(), re.DOTALL | re.MULTILINE)
    assert locked, "the development tools have uv"
    with tempfile.NamedTemporaryFile("w", suffix=".lock") as file:
        file.write(locked[0] + "\n")
        file.flush()
        pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", "--require-hashes"]
        run(*pip, "--requirement", file.name)
    uv = [venv / "bin" / "uv", "pip", "install", "--quiet", "--python", python, "--no-deps"]
    # Compiled once: where PYTHONDONTWRITEBYTECODE is set, each process would compile TensorFlow anew, which takes seconds.
    run(*uv, "--compile-bytecode", "--require-hashes", *(option for lock in locks for option in ("--requirement", lock)))
    run(*uv, "--no-build-isolation", "--editable", PROJECT)


def run(*command: str | os.PathLike[str]) -> None:
    done = subprocess.run(command)
    if done.returncode:
        sys.exit(f"error: {' '.join(map(str, command[:4]))} ... failed; what was installed before is as it was")


if __name__ == "__main__":
    if not (3, 11) <= sys.version_info[:2] <= (3, 13):
        sys.exit(f"error: Python 3.11, 3.12 or 3.13 is needed, this is {platform.python_version()}")
    try:
        import ensurepip  # noqa: F401  absent from Debian's python3 alone
    except ImportError:
        sys.exit(f"error: {sys.executable} cannot make virtual environments; on Debian: apt-get install python3-venv")
    print(main(Path(sys.argv[1]).absolute(), sys.argv[2] if len(sys.argv) > 2 else ""))

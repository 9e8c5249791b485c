"""Runs the TPU's own compiler, which needs no TPU, and caches its results in a folder."""

import hashlib
import json
import re
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipelines.plan.machines import Device
from trainer.shared.errors import UserError
from trainer.shared.files import write_whole

_OUT_OF_MEMORY = re.compile(r"Used ([\d.]+)([KMG]) of ([\d.]+)([KMG]) hbm")


def compile_program(hlo: bytes, device: Device, python: Path, listing: Path | None = None, quick: bool = False) -> dict[str, Any]:
    """Compiles a program for a device and returns its memory, FLOPs and bytes moved, and whether it `fits`.

    `quick` optimises little, only to see whether the program compiles. Raises UserError with the compiler's message if it does
    not compile.
    """
    with tempfile.NamedTemporaryFile(suffix=".hlo") as file:
        file.write(hlo)
        file.flush()
        command = [
            str(python),
            str(Path(__file__).with_name("program.py")),
            "compile",
            file.name,
            "--topology",
            device.topology,
        ]
        command += ["--chip-config", device.chip_config] if device.chip_config else []
        command += ["--listing", str(listing)] if listing else []
        command += ["--quick"] if quick else []
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == 0:
        return {"fits": True, **json.loads(done.stdout)}
    said = done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"the compiler exited with {done.returncode}"
    if found := _OUT_OF_MEMORY.search(done.stderr):
        unit = {"K": 2**10, "M": 2**20, "G": 2**30}
        return {"fits": False, "used_bytes": float(found[1]) * unit[found[2]]}
    raise UserError(f"the program does not compile for a TPU: {said[:500]}")


def used_bytes(compiled: Mapping[str, Any]) -> float:
    """Returns the device memory that a compiled program uses, in bytes."""
    return sum(compiled[name] for name in ("arguments_bytes", "results_bytes", "temp_bytes", "code_bytes"))


def tpu_python(project: Path) -> Path | None:
    """Returns the interpreter that `make tpu-check` installs, or None if it is not installed."""
    python = project / ".venv-tpu" / "bin" / "python"
    return python if python.exists() else None


def cache_file(cache: Path, key: Mapping[str, Any]) -> Path:
    """Returns the file in the folder `cache` for results that depend on `key`, which is any JSON object."""
    return cache / f"{hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]}.json"


def read_cache(file: Path) -> dict[str, Any]:
    """Returns the contents that `write_cache` wrote, or an empty dict if there is no file."""
    return json.loads(file.read_text()) if file.exists() else {}


def write_cache(file: Path, known: Mapping[str, Any]) -> None:
    """Writes `known` to a cache file atomically."""
    write_whole(str(file), json.dumps(known).encode())

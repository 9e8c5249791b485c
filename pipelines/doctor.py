"""Examines this machine for a bug report: versions, devices, disk, memory, store and credentials, with advice on each problem."""

import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

from pipelines.code import PROJECT, code_version, git_commit
from trainer import hardware
from trainer.shared.errors import UserError

_PACKAGES = (
    *("keras", "numpy", "tensorflow-datasets", "apache-beam", "kfp", "google-cloud-aiplatform"),
    *("google-cloud-pipeline-components", "mlflow", "protobuf"),
)
_SETTINGS = (
    *("CUDA_VISIBLE_DEVICES", "KERAS_BACKEND", "LD_LIBRARY_PATH", "NEXT_PLUGGABLE_DEVICE_USE_C_API", "OMP_NUM_THREADS"),
    *("PYTHONPATH", "TF_ENABLE_ONEDNN_OPTS", "TF_FORCE_GPU_ALLOW_GROWTH", "TF_PLUGGABLE_DEVICE_LIBRARY_PATH", "TF_XLA_FLAGS"),
    *("TPU_NAME", "TPU_SKIP_MDS_QUERY", "XLA_FLAGS"),
)
"""Environment variables that change what TensorFlow does. None of them holds a secret."""
_CREDENTIALS = ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN")
_SECONDS_FOR_TENSORFLOW = 300
_LEAST_DISK = 2 << 30
"""Free disk space that a run should have, in bytes."""
_LEAST_MEMORY = 4 << 30
"""Memory that a machine should have, in bytes."""


@dataclass(frozen=True)
class Finding:
    """One fact about this machine."""

    name: str
    value: str
    wrong: str = ""
    """The problem and what to do about it; empty if there is none."""


def examine(root: Path, store_uri: str, experiment: str, environ: Mapping[str, str] = os.environ) -> Iterator[Finding]:
    """Yields the findings one by one. `store_uri` is the URI of MLflow's store. Writes nothing."""
    build, wrong = hardware.installed_build()
    yield Finding("sogclr", f"{metadata.version('sogclr')}, commit {git_commit()[:12] or 'not known'}, code {code_version()}")
    yield Finding("python", f"{platform.python_version()}, {sys.executable}")
    yield Finding("system", f"{platform.platform()}, {platform.machine()}")
    yield Finding("packages", ", ".join(f"{name} {_version(name)}" for name in _PACKAGES))
    yield _against_lock(build)
    yield from _devices(build, wrong, environ)
    yield _settings(environ)
    yield _processors_and_memory()
    yield from _disk(root)
    yield _store(store_uri, experiment)
    yield _google_credentials(environ)
    given = [name for name in _CREDENTIALS if environ.get(name)]
    yield Finding("MLflow's credentials", f"{', '.join(given)} set" if given else "none, which a local store does not need")


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


# ---- What is installed


def _against_lock(build: str) -> Finding:
    lock = PROJECT / "requirements" / f"{build}.lock"
    if not build or not lock.exists():
        return Finding("lock", "there is no lock file beside this code, as in an image")
    locked = (Requirement(line.rstrip("\\ ")) for line in lock.read_text().splitlines() if line[:1].isalnum())
    other = [
        f"{one.name} {_version(one.name) or 'missing'}, not {one.specifier}"
        for one in locked
        if (one.marker is None or one.marker.evaluate()) and not one.specifier.contains(_version(one.name), prereleases=True)
    ]
    if not other:
        return Finding("lock", f"as in requirements/{lock.name}")
    shown = "; ".join(other[:3]) + (f" and {len(other) - 3} more" if len(other) > 3 else "")
    return Finding(
        "lock",
        f"differs from requirements/{lock.name}",
        f"{shown}: remove {sys.prefix}, then make setup TENSORFLOW={build} installs the locked versions",
    )


# ---- Devices


def _devices(build: str, wrong: str, environ: Mapping[str, str]) -> Iterator[Finding]:
    visible = hardware.visible()
    usable = [one for one in visible if not one.problem]
    yield Finding(
        "accelerators that the system shows",
        "; ".join(f"{one.name} ({one.seen_by})" for one in visible) or "none: no NVIDIA driver answers and no TPU is visible",
        "; ".join(f"{one.name}: {one.problem}" for one in visible if one.problem),
    )
    seen = {} if wrong else tensorflow_devices()
    if error := wrong or seen.get("error", ""):
        yield Finding("TensorFlow", build or "unusable", error)
        return
    onednn = "on" if seen["onednn"] else "off"
    slow = (
        ""
        if seen["onednn"] or platform.machine() != "x86_64"
        else "a step takes up to twice as long: unset TF_ENABLE_ONEDNN_OPTS"
    )
    yield Finding("TensorFlow", f"{seen['version']} for {build}, oneDNN {onednn}", slow)
    ours = seen["devices"].get(build.upper(), []) if build != "cpu" else []
    without = ""
    if build != "cpu" and not ours and not usable:
        without = f"this machine has no {build.upper()}: TensorFlow for {build} computes on its CPU"
    yield Finding(
        "accelerators that TensorFlow sees",
        f"{len(ours)} x {ours[0]}" if ours else "none",
        hardware.why_unused(usable, build, {build: len(ours)}, environ) or without,
    )


def tensorflow_devices() -> dict[str, Any]:
    """Returns the result of `trainer.distribution.describe_devices`, or `error`.

    TensorFlow may abort or hang, so it runs in a process of its own.
    """
    environ = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "2"}
    search = os.pathsep.join(filter(None, (str(PROJECT), environ.get("PYTHONPATH"))))
    command = [sys.executable, "-m", "trainer.distribution"]
    try:
        done = subprocess.run(
            command, env={**environ, "PYTHONPATH": search}, capture_output=True, text=True, timeout=_SECONDS_FOR_TENSORFLOW
        )
    except subprocess.TimeoutExpired:
        return {"error": f"TensorFlow did not list its devices within {_SECONDS_FOR_TENSORFLOW} s"}
    if done.returncode:
        last = next((line for line in reversed(done.stderr.splitlines()) if line.strip()), "")
        return {"error": f"importing TensorFlow exits with {done.returncode}: {last or 'it prints nothing'}"}
    return json.loads(done.stdout)


# ---- The machine


def _settings(environ: Mapping[str, str]) -> Finding:
    given = [f"{name}={environ[name]}" for name in _SETTINGS if name in environ]
    backend = environ.get("KERAS_BACKEND", "tensorflow")
    wrong = "" if backend == "tensorflow" else f"Keras uses {backend}, but this project needs TensorFlow: unset KERAS_BACKEND"
    return Finding("variables", ", ".join(given) or "none that matters", wrong)


def _processors_and_memory() -> Finding:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.exists() and (said := limit.read_text().strip()).isdigit():
        total = min(total, int(said))
    wrong = f"less than {_gigabytes(_LEAST_MEMORY)}: steps may be killed" if total < _LEAST_MEMORY else ""
    return Finding("cores and memory", f"{hardware.processors()}, {_gigabytes(total)}", wrong)


def _disk(root: Path) -> Iterator[Finding]:
    for name, folder, cure in (
        ("disk of --root", root, "take another --root"),
        ("disk of temporary files", Path(tempfile.gettempdir()), "set TMPDIR"),
    ):
        there = next(path for path in (folder, *folder.parents) if path.exists())
        free = shutil.disk_usage(there).free
        wrong = ""
        if not os.access(there, os.W_OK):
            wrong = f"{there} is not writable: {cure}"
        elif free < _LEAST_DISK:
            wrong = f"less than {_gigabytes(_LEAST_DISK)} is free: {cure}"
        yield Finding(name, f"{folder}, {_gigabytes(free)} free", wrong)


def _gigabytes(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"


# ---- Services


def _store(uri: str, experiment: str) -> Finding:
    from components import tracking

    shown = tracking.without_credentials(uri)
    if uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).exists():
        return Finding("MLflow", f"{shown}, not made yet: sogclr run makes it")
    try:
        return Finding("MLflow", f"{shown}, {tracking.describe_store(uri, experiment)}")
    except UserError as error:
        return Finding("MLflow", shown, str(error))


def _google_credentials(environ: Mapping[str, str]) -> Finding:
    name = "Google Cloud's credentials"
    named = environ.get("GOOGLE_APPLICATION_CREDENTIALS")
    if named:
        there = os.access(named, os.R_OK)
        return Finding(
            name,
            "GOOGLE_APPLICATION_CREDENTIALS names a file",
            "" if there else f"{named} cannot be read: fix or unset the variable",
        )
    folder = environ.get("CLOUDSDK_CONFIG") or os.path.expanduser("~/.config/gcloud")
    if os.path.exists(os.path.join(folder, "application_default_credentials.json")):
        return Finding(name, "from gcloud auth application-default login")
    return Finding(name, "none; submit needs them: gcloud auth application-default login")

"""The accelerators of this machine, and TensorFlow's build and environment variables for them. Needs only Python.

It also explains why TensorFlow does not use an accelerator that the operating system shows.

    python -m trainer.hardware

prints the build that `make setup` installs by default on this machine, and on a second line the reason.
"""

import importlib.util
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

BUILDS = ("cpu", "gpu", "tpu")
"""The builds of TensorFlow that have a lock file in requirements/."""

_GOOGLE, _NVIDIA = "0x1ae0", "0x10de"
"""PCI vendor IDs."""
_TPUS = {
    "0x0027": "TPU v2 or v3",
    "0x005e": "TPU v4",
    "0x0062": "TPU v5p",
    "0x0063": "TPU v5e",
    "0x006f": "TPU v6e",
    "0x0076": "TPU7x",
}
"""PCI device IDs of Google's TPUs; source: JAX, jax/_src/hardware_utils.py."""
_DISPLAY = "0x03"
"""First byte of the PCI class of graphics cards, and of compute cards, which are 3D controllers."""
_OLDEST_DRIVER = (525, 60)
"""Oldest NVIDIA driver that works with CUDA 12."""
_SECONDS_FOR_DRIVER = 60
"""Timeout for the NVIDIA driver. If no process keeps the GPUs awake, the driver starts each GPU before it answers."""
_TPU_SELECTION = ("TPU_VISIBLE_DEVICES", "TPU_VISIBLE_CHIPS")
"""Variables that select TPU chips for a process."""


@dataclass(frozen=True)
class Devices:
    """Devices of one kind that the operating system shows."""

    build: str
    """The build of TensorFlow that uses them: `gpu` or `tpu`."""
    name: str
    """Count and product, as in "2 x NVIDIA A100-SXM4-40GB"."""
    seen_by: str
    """How they were detected, as in "driver 550.54.15 answers"."""
    problem: str = ""
    """Why no process can use them, and what to do. Empty if they can be used."""

    @property
    def count(self) -> int:
        return int(self.name.partition(" x ")[0])

    @property
    def product(self) -> str:
        return self.name.partition(" x ")[2]


def visible(system: Path = Path("/")) -> list[Devices]:
    """Returns the TPUs and the NVIDIA GPUs of this machine, usable or not. `system` is the root of its /dev and /sys.

    Queries the NVIDIA driver, which may take up to a minute.
    """
    return [*tpus(system), *_gpus(system)]


def choose_build(found: list[Devices]) -> tuple[str, str]:
    """Returns (build of TensorFlow for a machine that shows `found`, reason)."""
    for one in found:
        if not one.problem:
            return one.build, f"{one.name}: {one.seen_by}"
    if found:
        return "cpu", "; ".join(f"{one.name}, but {one.problem}" for one in found)
    return "cpu", "no NVIDIA driver answers and no TPU is visible"


def installed_build() -> tuple[str, str]:
    """Returns (installed build of TensorFlow, problem). One of both is empty: the build if the installation is unusable."""
    installed = [name for name in ("tensorflow-cpu", "tensorflow", "tensorflow-tpu") if _is_installed(name)]
    if not installed:
        return "", "TensorFlow is not installed: make setup"
    if len(installed) > 1:
        return "", f"{' and '.join(installed)} are installed into the same folder: remove .venv, then make setup"
    builds = {"tensorflow-cpu": "cpu", "tensorflow-tpu": "tpu"}
    return builds.get(installed[0]) or ("gpu" if _is_installed("nvidia-cudnn-cu12") else "cpu"), ""


def why_unused(shown: Iterable[Devices], build: str, used: Mapping[str, int], environ: Mapping[str, str] = os.environ) -> str:
    """Returns one line: which accelerators TensorFlow does not use, why, and what to do. Empty if it uses all of them.

    `shown` comes from `visible`, `build` is TensorFlow's build, and `used` maps each kind, `gpu` or `tpu`, to the number of
    devices that TensorFlow uses. Ignores all kinds after one in use: if a TPU is in use, a GPU does not matter.
    """
    lines = []
    for one in shown:
        count = used.get(one.build, 0)
        if count < one.count:
            lines.append(_why_unused(one, build, count, environ))
        if count:
            break
    return "; ".join(lines)


def _why_unused(one: Devices, build: str, used: int, environ: Mapping[str, str]) -> str:
    hiding = _hiding_variable(one, used, environ)
    if used:
        reason = f"{hiding} hides the rest, unset it to use all" if hiding else "TF_CPP_MIN_LOG_LEVEL=0 shows TensorFlow's reason"
        return f"TensorFlow uses {used} of {one.name}: {reason}"
    them = "it" if one.count == 1 else "them"
    found = f"the system shows {one.name}, but"
    if one.problem:
        return f"{found} {one.problem}"
    if hiding:
        return f"{found} {hiding} hides {them}: unset it to use {them}"
    if build != one.build:
        cure = f"make setup TENSORFLOW={one.build}, or use the image sogclr-{one.build}"
        return f"{found} {f'TensorFlow for {build}' if build else 'this TensorFlow'} cannot use {them}: {cure}"
    if one.build == "gpu":
        cure = "unset LD_LIBRARY_PATH if it names another CUDA, else remove .venv and make setup TENSORFLOW=gpu"
        return f"{found} TensorFlow does not find {them}, probably because CUDA's libraries do not load: {cure}"
    return f"{found} TensorFlow does not find {them}: another process may hold {them}; end it, or run as root"


def _hiding_variable(one: Devices, used: int, environ: Mapping[str, str]) -> str:
    """Returns NAME="value" of the environment variable that hides some of the devices `one` from TensorFlow, or "".

    `used` is the number of them that TensorFlow uses.
    """
    if one.build == "tpu":
        return next((f'{name}="{environ[name]}"' for name in _TPU_SELECTION if name in environ), "")
    selection = environ.get("CUDA_VISIBLE_DEVICES")
    if selection is None:
        return ""
    # CUDA ignores everything from the first invalid index on. It accepts UUIDs too.
    first = selection.split(",")[0].strip()
    selects = first.startswith(("GPU-", "MIG-")) or (first.isdigit() and int(first) < one.count)
    return f'CUDA_VISIBLE_DEVICES="{selection}"' if used or not selects else ""


def processors(system: Path = Path("/")) -> str:
    """Returns the CPU cores that this process may use, as in "2 CPU cores (AMD EPYC 7B13)"."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        named = re.search(r"^model name\s*: (.+)$", (system / "proc" / "cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        named = None
    product = named[1].strip() if named else platform.processor() or platform.machine()
    return f"{cores} CPU core{'s' if cores > 1 else ''} ({product})"


def tensorflow_environment(system: Path = Path("/")) -> dict[str, str]:
    """Returns the environment variables that must be set on this machine when TensorFlow is imported."""
    # TensorFlow leaves oneDNN off on many processors, where a train step then takes twice as long.
    environment = {"TF_ENABLE_ONEDNN_OPTS": "1"}
    # TensorFlow reads 64 MiB ahead from Cloud Storage by default. Our readers request everything they need at once.
    environment["GCS_READAHEAD_BUFFER_SIZE_BYTES"] = str(2**16)
    # 20 attempts at a request instead of 10 outlast an outage of 200 s, as `make rehearse` shows.
    environment["GCS_RETRY_CONFIG_MAX_RETRIES"] = "20"
    found = tpus(system)
    if not found:
        # Otherwise libtpu would query Google's metadata server for minutes.
        environment["TPU_SKIP_MDS_QUERY"] = "1"
    elif libtpu := importlib.util.find_spec("libtpu"):
        (folder,) = libtpu.submodule_search_locations or [""]
        environment |= plugin_environment(os.path.join(folder, "libtpu.so"))
    return environment


def plugin_environment(libtpu: str) -> dict[str, str]:
    """Returns the environment variables that make TensorFlow use a TPU through the PJRT plug-in in the file `libtpu`.

    The v5e requires the plug-in: without these variables TensorFlow 2.20 registers no TPU. TPU v2 to v4 also work with the older
    StreamExecutor. The plug-in lacks TPU embeddings, and tf.print and tf.summary with soft placement; this project uses none of
    them. Source: docs.cloud.google.com/tpu/docs/supported-tpu-versions, "TensorFlow PJRT support". Google's own tests train a
    ResNet-50 with it on a v2-8 and a v3-8 (GoogleCloudPlatform/ml-auto-solutions, solutionsteam_tf_release_supported.py).
    """
    return {"NEXT_PLUGGABLE_DEVICE_USE_C_API": "true", "TF_PLUGGABLE_DEVICE_LIBRARY_PATH": libtpu}


def tpus(system: Path = Path("/")) -> list[Devices]:
    """Returns the TPUs of this machine, usable or not. `system` is the root of its /dev and /sys. Does not wait."""
    devices = [device for vendor, device, _ in _pci(system) if vendor == _GOOGLE and device in _TPUS]
    # v2 to v4 have nodes /dev/accel0 and so on. Later TPUs have /dev/vfio/0, as has any device passed through to a VM.
    nodes = [path for path in _children(system / "dev") if re.fullmatch(r"accel\d+", path.name)]
    if devices and not nodes:
        nodes = [path for path in _children(system / "dev" / "vfio") if path.name.isdigit()]
    if not devices and not nodes:
        return []
    product = _TPUS[devices[0]] if devices else "TPU"
    name = f"{len(devices) or len(nodes)} x {product}"
    if not nodes:
        return [Devices("tpu", name, "PCI bus", "it has no node in /dev: start the container with --privileged")]
    closed = [path for path in nodes if not os.access(path, os.R_OK | os.W_OK)]
    problem = f"this user may not open {closed[0]}: run as root" if closed else ""
    return [Devices("tpu", name, f"{nodes[0]} is there", problem)]


def _gpus(system: Path) -> list[Devices]:
    # Under WSL the driver's tools are in a separate folder, which is not always on PATH.
    search = os.pathsep.join([os.environ.get("PATH", os.defpath), str(system / "usr" / "lib" / "wsl" / "lib")])
    tool = shutil.which("nvidia-smi", path=search)
    problem = "no NVIDIA driver answers: install one, or start the container with --gpus all"
    if tool:
        ask = [tool, "--query-gpu=name,driver_version", "--format=csv,noheader"]
        try:
            answer = subprocess.run(ask, capture_output=True, text=True, timeout=_SECONDS_FOR_DRIVER)
        except (OSError, subprocess.TimeoutExpired) as error:
            problem = f"nvidia-smi does not answer ({error})"
        else:
            gpus = [line.rsplit(", ", 1) for line in answer.stdout.splitlines() if ", " in line]
            if answer.returncode == 0 and gpus:
                name, driver = gpus[0]
                return [Devices("gpu", f"{len(gpus)} x {name}", f"NVIDIA driver {driver} answers", _too_old(driver))]
            said = " ".join((answer.stderr or answer.stdout).split()) or "no GPU"
            problem = f"nvidia-smi says: {said}"
    cards = [device for vendor, device, kind in _pci(system) if vendor == _NVIDIA and kind.startswith(_DISPLAY)]
    return [Devices("gpu", f"{len(cards)} x NVIDIA GPU", "PCI bus", problem)] if cards else []


def _is_installed(package: str) -> bool:
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        return False
    return True


def _too_old(driver: str) -> str:
    if tuple(int(number) for number in re.findall(r"\d+", driver)) >= _OLDEST_DRIVER:
        return ""
    oldest = ".".join(map(str, _OLDEST_DRIVER))
    return f"NVIDIA driver {driver} is older than {oldest}, which TensorFlow 2.20 needs: install a newer one"


def _pci(system: Path) -> list[tuple[str, str, str]]:
    """Returns (vendor, device, class) of every PCI device, as in ("0x10de", "0x2330", "0x030200")."""
    found = []
    for folder in _children(system / "sys" / "bus" / "pci" / "devices"):
        try:
            vendor, device, kind = ((folder / name).read_text().strip() for name in ("vendor", "device", "class"))
        except OSError:
            continue
        found.append((vendor, device, kind))
    return found


def _children(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []


if __name__ == "__main__":
    print(*choose_build(visible()), sep="\n")

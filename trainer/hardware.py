"""What accelerators the operating system shows, which build of TensorFlow uses them, and what that has to be told. Needs
nothing but Python.

    python -m trainer.hardware

prints the build that `make setup` installs by default on this machine, and on a second line why.
"""

import importlib.util
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

BUILDS = ("cpu", "gpu", "tpu")
"""The builds of TensorFlow that requirements/ has a lock for."""

_GOOGLE, _NVIDIA = "0x1ae0", "0x10de"
"""PCI vendors."""
_TPUS = {
    "0x0027": "TPU v2 or v3",
    "0x005e": "TPU v4",
    "0x0062": "TPU v5p",
    "0x0063": "TPU v5e",
    "0x006f": "TPU v6e",
    "0x0076": "TPU7x",
}
"""PCI devices of Google's; source: JAX, jax/_src/hardware_utils.py."""
_WITH_PLUGIN = "0x0063"
"""The TPU that TensorFlow 2.20 reaches through a plug-in."""
_DISPLAY = "0x03"
"""First byte of the PCI class of graphics cards and of compute cards, which are 3D controllers."""
_OLDEST_DRIVER = (525, 60)
"""That CUDA 12 works with."""
_SECONDS_FOR_DRIVER = 60
"""Where nothing else keeps the GPUs awake, the driver starts each before it answers."""


@dataclass(frozen=True)
class Devices:
    """Devices of one kind that the operating system shows."""

    build: str
    """The build of TensorFlow that uses them: `gpu` or `tpu`."""
    name: str
    """Count and product, as in "2 x NVIDIA A100-SXM4-40GB"."""
    seen_by: str
    """What showed them, as in "driver 550.54.15 answers"."""
    problem: str = ""
    """Why no process can use them, and what to do. Empty where they can be used."""


def visible(system: Path = Path("/")) -> list[Devices]:
    """Returns the TPUs and the NVIDIA GPUs of this machine, usable or not. `system` is the root of its /dev and /sys."""
    return [*_tpus(system), *_gpus(system)]


def choose_build(found: list[Devices]) -> tuple[str, str]:
    """Returns the build of TensorFlow for a machine that shows `found`, and the reason in words."""
    for one in found:
        if not one.problem:
            return one.build, f"{one.name}: {one.seen_by}"
    if found:
        return "cpu", "; ".join(f"{one.name}, but {one.problem}" for one in found)
    return "cpu", "no NVIDIA driver answers and no TPU is visible"


def tensorflow_environment(system: Path = Path("/")) -> dict[str, str]:
    """Returns the variables that TensorFlow has to find when it is imported on this machine."""
    # It leaves oneDNN off on many processors, where a step takes twice as long without.
    environment = {"TF_ENABLE_ONEDNN_OPTS": "1"}
    tpus = _tpus(system)
    if not tpus:
        # libtpu would ask Google's metadata server for minutes.
        environment["TPU_SKIP_MDS_QUERY"] = "1"
    elif _TPUS[_WITH_PLUGIN] in tpus[0].name and (libtpu := importlib.util.find_spec("libtpu")):
        # Without its plug-in named, TensorFlow registers no TPU there.
        (folder,) = libtpu.submodule_search_locations or [""]
        environment["NEXT_PLUGGABLE_DEVICE_USE_C_API"] = "true"
        environment["TF_PLUGGABLE_DEVICE_LIBRARY_PATH"] = os.path.join(folder, "libtpu.so")
    return environment


def _tpus(system: Path) -> list[Devices]:
    devices = [device for vendor, device, _ in _pci(system) if vendor == _GOOGLE and device in _TPUS]
    # v2 to v4 have /dev/accel0 and so on; later ones /dev/vfio/0, which any device lent to a virtual machine has.
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
    # On Windows' Linux the driver's tools lie in a folder of their own, which is not always on PATH.
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

"""Containers without a container engine: namespaces of the kernel around a folder.

A container has its own root folder (the image's, with what it writes kept aside), its own processes (its command is PID 1),
root's /gcs, and the network of whoever starts it. All of it ends with PID 1.
"""

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from vertex.image import Image, mounted

_START = """
set -e
mount -t overlay overlay -o "lowerdir=$LAYERS,upperdir=$SCRATCH/upper,workdir=$SCRATCH/work" "$SCRATCH/root"
cd "$SCRATCH/root"
for folder in $MOUNTED; do mount --rbind -o ro "/$folder" "$folder"; done
mount --bind "$ETC" etc
mount --bind "$GCS" gcs
mount --rbind /dev dev
mount -t proc proc proc
mount --rbind -o ro /sys sys
mount -t tmpfs tmpfs tmp
exec chroot "$@"
"""


def possible() -> str:
    """Returns why there can be no containers on this machine, or nothing."""
    if sys.platform != "linux" or shutil.which("unshare") is None:
        return "containers need Linux and the command unshare"
    if os.geteuid() != 0 or subprocess.run(["unshare", "--mount", "--pid", "--fork", "true"], capture_output=True).returncode:
        return "containers need root, and leave to make namespaces"
    return ""


@dataclass(frozen=True)
class Machine:
    """What is the same for every container on it."""

    layers: tuple[Path, ...]
    """Folders with the image's files, each over the next."""
    etc: Path
    """Mounted at /etc: names of hosts, certificates."""
    gcs: Path
    """Mounted at /gcs: a folder a bucket."""


class Container:
    """A running command in an image."""

    def __init__(self, machine: Machine, image: Image, command: Sequence[str], environ: Mapping[str, str], log: Path) -> None:
        self._scratch = Path(tempfile.mkdtemp(prefix="container-"))
        for name in ("upper", "work", "root"):
            (self._scratch / name).mkdir()
        variables = {"HOME": "/root", **image.environ, **environ}
        inner = ["env", "-i", "-C", image.workdir, *(f"{name}={value}" for name, value in variables.items()), *command]
        user = [] if image.user == "root" else [f"--userspec={image.user}"]
        unshare = ["unshare", "--mount", "--pid", "--fork", "--kill-child=KILL", "--ipc"]
        given = {
            "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
            "LAYERS": ":".join(map(str, machine.layers)),
            "ETC": str(machine.etc),
            "GCS": str(machine.gcs),
            "SCRATCH": str(self._scratch),
            "MOUNTED": shlex.join(mounted(machine.layers[-1])),
        }
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                [*unshare, "sh", "-c", _START, "sh", *user, ".", *inner],
                env=given,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def poll(self) -> int | None:
        """Returns the exit status of PID 1, another than 0 where a signal ended it; None while it runs."""
        status = self._process.poll()
        if status is not None:
            shutil.rmtree(self._scratch, ignore_errors=True)
        return status

    def wait(self) -> int:
        while (status := self.poll()) is None:
            time.sleep(0.1)
        return status

    def signal(self, number: int) -> None:
        """Sends a signal to PID 1, as an engine does. Nothing happens where it has ended."""
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children")
        with contextlib.suppress(OSError):
            # It has none yet where it has just begun.
            while not (found := children.read_text().split()) and self._process.poll() is None:
                time.sleep(0.01)
            if found:
                os.kill(int(found[0]), number)

    def stop(self, grace: float = 30.0) -> int:
        """Ends it as Google Cloud does: SIGTERM, and SIGKILL after `grace` seconds."""
        self.signal(signal.SIGTERM)
        until = time.monotonic() + grace
        while self.poll() is None and time.monotonic() < until:
            time.sleep(0.1)
        return self.kill()

    def kill(self) -> int:
        """Ends it as a lost machine does."""
        self.signal(signal.SIGKILL)
        return self.wait()

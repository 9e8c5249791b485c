"""A network of one machine, in which addresses of this machine are Google's hosts, under their own names and with HTTPS.

Nothing can leave it: its only interface is the loopback. Google's clients need no word about it beside the variables in `TRUST`,
which name the authority that signed its certificates. Linux only, as root.

    python -m vertex.world COMMAND ...    runs a command in such a network
"""

import contextlib
import fcntl
import os
import shutil
import socket
import ssl
import struct
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import grpc

from vertex.certificates import write_certificates
from vertex.container import Container, Machine, possible
from vertex.google import Google, Server
from vertex.image import REPOSITORY, Image, layers

REGION = "europe-west4"
MLFLOW = "mlflow.example.com"
_HOSTS = (
    "www.googleapis.com",
    "storage.googleapis.com",
    "oauth2.googleapis.com",
    "dataflow.googleapis.com",
    "secretmanager.googleapis.com",
    "iamcredentials.googleapis.com",
    f"{REGION}-aiplatform.googleapis.com",
    f"{REGION}-docker.pkg.dev",
)
_METADATA = ("metadata.google.internal", "169.254.169.254")
_CERTIFICATES = "/etc/ssl/certs/ca-certificates.crt"
_REPLACED = ("hosts", "resolv.conf", "nsswitch.conf", _CERTIFICATES.removeprefix("/etc/"))
"""Files of /etc that the world's own take the place of."""
TRUST = dict.fromkeys(
    ("REQUESTS_CA_BUNDLE", "SSL_CERT_FILE", "GRPC_DEFAULT_SSL_ROOTS_FILE_PATH", "HTTPLIB2_CA_CERTS", "CURL_CA_BUNDLE"),
    _CERTIFICATES,
)
"""Variables by which clients that bring their own list of authorities take that of the machine."""
_MLFLOW_ADDRESS = "127.0.0.2"


def enter(command: Sequence[str]) -> int:
    """Runs a command in a network of its own; with it ends all that it started. Returns its exit status."""
    unshare = ["unshare", "--net", "--mount", "--pid", "--ipc", "--fork", "--kill-child=KILL", "--mount-proc"]
    search = os.pathsep.join([str(REPOSITORY / "tests"), str(REPOSITORY)])
    return subprocess.run([*unshare, *command], env={**os.environ, "PYTHONPATH": search}).returncode


@dataclass(frozen=True)
class World:
    """Google's services, and containers on Google's machines."""

    google: Google
    machine: Machine
    folder: Path

    def container(self, image: Image, command: Sequence[str], environ: Mapping[str, str], log: Path) -> Container:
        return Container(self.machine, image, command, {**TRUST, **environ}, log)

    def certificate(self) -> tuple[Path, Path]:
        """Returns the files of the certificate of all hosts here, and of its key."""
        return self.folder / "certificate.pem", self.folder / "key.pem"


@contextlib.contextmanager
def world(page: int = 1000) -> Iterator[World]:
    """Makes Google's hosts of this network, which `enter` made. Fails at the end where a request was of no known kind."""
    with tempfile.TemporaryDirectory(prefix="world-") as scratch:
        folder = Path(scratch)
        _raise_interface()
        write_certificates(folder, (*_HOSTS, MLFLOW))
        etc = folder / "etc"
        _write_etc(etc, (folder / "authority.pem").read_text())
        replaced = [name for name in _REPLACED if Path("/etc", name).exists()]
        for name in replaced:
            subprocess.run(["mount", "--bind", etc / name, Path("/etc", name)], check=True)
        gcs = folder / "gcs"
        gcs.mkdir()
        google = Google(gcs, page)
        key, chain = (folder / "key.pem").read_bytes(), (folder / "certificate.pem").read_bytes()
        services, port = google.grpc_server(grpc.ssl_server_credentials([(key, chain)]))
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(folder / "certificate.pem", folder / "key.pem")
        context.set_alpn_protocols(["http/1.1"])
        servers = [
            Server(("127.0.0.1", 443), google, context, port),
            Server(("169.254.169.254", 80), google),
        ]
        for server in servers:
            threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        try:
            yield World(google, Machine(layers(), etc, gcs), folder)
        finally:
            for server in servers:
                server.shutdown()
                server.server_close()
            services.stop(None).wait()
            for name in replaced:
                subprocess.run(["umount", Path("/etc", name)], check=True)
        google.require_whole()


def _raise_interface() -> None:
    """Gives the loopback interface its address, and a second one: that of every machine's metadata server."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:

        def set_address(name: str, address: str) -> None:
            request = struct.pack("16sH2s4s8s", name.encode(), socket.AF_INET, b"", socket.inet_aton(address), b"")
            fcntl.ioctl(any_socket, 0x8916, request)  # SIOCSIFADDR

        fcntl.ioctl(any_socket, 0x8914, struct.pack("16sh22s", b"lo", 0x1 | 0x40, b""))  # SIOCSIFFLAGS: up and running
        set_address("lo:1", _METADATA[1])


def _write_etc(folder: Path, authority: str) -> None:
    """Writes what a machine of Google's has in /etc, as far as a step looks at it."""
    hosts = ["127.0.0.1 localhost", *(f"127.0.0.1 {host}" for host in _HOSTS)]
    hosts += [f"{_METADATA[1]} {_METADATA[0]} metadata", f"{_MLFLOW_ADDRESS} {MLFLOW}"]
    files = {
        "hosts": "\n".join(hosts) + "\n",
        "resolv.conf": "",
        "nsswitch.conf": "passwd: files\ngroup: files\nhosts: files\n",
        "passwd": "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/nonexistent:/bin/sh\n",
        "group": "root:x:0:\nnogroup:x:65534:\n",
        _CERTIFICATES.removeprefix("/etc/"): authority,
    }
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    for name in ("ld.so.cache", "localtime"):
        if Path("/etc", name).exists():
            shutil.copy(Path("/etc", name), folder / name)


if __name__ == "__main__":
    if reason := possible():
        sys.exit(f"error: {reason}")
    layers()  # outside of it, where packages can be had
    sys.exit(enter(sys.argv[1:]))

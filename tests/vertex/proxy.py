"""One of Google's hosts for a process of this machine's own network: a proxy leads gRPC's connections to the host here."""

import contextlib
import socket
import socketserver
import threading
from collections.abc import Iterator
from pathlib import Path

import grpc

from vertex.certificates import write_certificates
from vertex.google import Google, join


@contextlib.contextmanager
def serving_by_proxy(host: str, folder: Path) -> Iterator[tuple[Google, dict[str, str]]]:
    """Gives the services, and the variables with which a process finds them at `host`. Certificates go to `folder`.

    Fails at the end where a request was of no known kind.
    """
    write_certificates(folder, [host])
    google = Google()
    secrets = [((folder / "key.pem").read_bytes(), (folder / "certificate.pem").read_bytes())]
    services, port = google.grpc_server(grpc.ssl_server_credentials(secrets))

    class Tunnel(socketserver.StreamRequestHandler):
        """Answers HTTP's CONNECT."""

        def handle(self) -> None:
            asked = self.rfile.readline().decode()
            while self.rfile.readline().strip():
                pass
            if not asked.startswith(f"CONNECT {host}:443 "):
                google.unknown.append(asked)
                return
            self.wfile.write(b"HTTP/1.1 200 OK\r\n\r\n")
            join(self.connection, socket.create_connection(("127.0.0.1", port)))

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Tunnel) as proxy:
        proxy.daemon_threads = True
        threading.Thread(target=proxy.serve_forever, args=(0.05,), daemon=True).start()
        environ = {"grpc_proxy": f"http://127.0.0.1:{proxy.server_address[1]}", "no_proxy": "", "no_grpc_proxy": ""}
        environ |= {"GRPC_DEFAULT_SSL_ROOTS_FILE_PATH": str(folder / "authority.pem")}
        try:
            yield google, environ
        finally:
            proxy.shutdown()
            services.stop(None)
    google.require_whole()

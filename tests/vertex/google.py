"""One server for every host of Google's: finds the service that a request is for, makes it go wrong where a test wants that,
and counts it.

`serving` gives it over HTTP on a port of its own, for clients that can be told an address; `world.py` gives it over HTTPS and
gRPC under the real names.
"""

import contextlib
import re
import socket
import ssl
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import grpc

from vertex.accounts import Accounts
from vertex.dataflow import Dataflow
from vertex.http import Answer, RefusedError, Request, as_json
from vertex.jobs import Jobs
from vertex.storage import Storage, headers_of, query_of

_STATUS = {400: "INVALID_ARGUMENT", 401: "UNAUTHENTICATED", 403: "PERMISSION_DENIED", 404: "NOT_FOUND", 409: "ALREADY_EXISTS"}
_STATUS |= {412: "FAILED_PRECONDITION", 429: "RESOURCE_EXHAUSTED", 500: "INTERNAL", 503: "UNAVAILABLE"}


@dataclass
class Fault:
    """Makes requests go wrong.

    A kind is a status; "cut": the connection ends without an answer; "lost": the request is carried out and the answer is lost;
    "taken": it is carried out and answered 503; "half": half of the body is taken, then the connection ends; "slow": it is
    carried out when whoever asked has given up.
    """

    kind: str | int
    where: str
    """Pattern of "METHOD HOST/PATH?QUERY", found anywhere in it."""
    times: float = 1
    until: float = float("inf")
    """On the clock of `time.monotonic`."""


class Google:
    """Services, faults, and what was asked."""

    def __init__(self, folder: Path | None = None, page: int = 1000) -> None:
        self.accounts = Accounts()
        self.vertex = Jobs()
        self.dataflow = Dataflow()
        self.storage = Storage(folder, page) if folder else None
        self.requests: list[tuple[str, str, str]] = []
        """Method, target and body of every request; bodies of objects are left out."""
        self.counts: Counter[str] = Counter()
        """Requests by kind."""
        self.moments: list[tuple[float, str]] = []
        """When each request came, on the clock of `time.monotonic`, and its METHOD HOST/PATH."""
        self.unknown: list[str] = []
        """What no service knows."""
        self.broken: list[str] = []
        """Tracebacks of a service's own errors."""
        self.faults: list[Fault] = []
        self.latency = 0.0
        """Seconds before every answer, as a network has them."""
        self.services: dict[str, dict[str, tuple[Callable[[Any], Any], Any]]] = {
            **self.accounts.services,
            **self.vertex.services,
            **self.dataflow.services,
        }
        """gRPC: what answers, and the message that it gets, by service and method."""
        self.routes = [*self.accounts.routes, *self.vertex.routes, *self.dataflow.routes]
        self.routes += self.storage.routes if self.storage else []
        self.url = ""
        self._lock = threading.Lock()

    def fail(self, *kinds: str | int, path: str = "pipelineJobs") -> None:
        """Makes the next requests with `path` in them go wrong, one after another, and no others."""
        self.faults = [Fault(kind, re.escape(path)) for kind in kinds]

    def fail_for(self, kind: str | int, seconds: float, where: str) -> None:
        """Makes all requests that match `where` go wrong for a while."""
        self.faults.append(Fault(kind, where, float("inf"), time.monotonic() + seconds))

    def sent(self, method: str, path: str) -> list[str]:
        """Returns the bodies of the requests to targets that match `path`."""
        return [body for m, p, body in self.requests if m == method and re.search(path, p)]

    def fault(self, method: str, target: str) -> str | int | None:
        """Returns what is to go wrong with a request."""
        with self._lock:
            now = time.monotonic()
            self.faults = [one for one in self.faults if one.times > 0 and one.until > now]
            for one in self.faults:
                if re.search(one.where, f"{method} {target}"):
                    one.times -= 1
                    return one.kind
        return None

    def answer(self, request: Request) -> Answer:
        routes = self.routes
        self.moments.append((time.monotonic(), f"{request.method} {request.host}{request.path}"))
        if self.storage and request.host == "storage.googleapis.com":
            routes = [*routes, *self.storage.xml_routes]
        for method, pattern, handle in routes:
            if method == request.method and (match := re.fullmatch(pattern, request.path)):
                with self._lock:
                    self.counts[f"{method} {request.host}: {handle.__name__.strip('_')}"] += 1
                return handle(request, **match.groupdict())
        self.unknown.append(f"{request.method} {request.host}{request.path}")
        raise RefusedError(404, f"no such method: {request.method} {request.path}")

    def require_whole(self) -> None:
        """Fails where a request was of no known kind, or met an error of the service itself."""
        assert self.unknown == [], f"no service here knows: {self.unknown}"
        assert self.broken == [], "\n".join(self.broken)

    # ---- Servers

    def handler(self) -> type[BaseHTTPRequestHandler]:
        google = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            # As a large answer is written in pieces.
            wbufsize = 2**16

            def _handle(self) -> None:
                host = (self.headers.get("Host") or "").split(":")[0]
                fault = google.fault(self.command, f"{host}{self.path}")
                body = self._body(half=fault == "half")
                is_object = "/upload/" in self.path
                google.requests.append((self.command, self.path, "" if is_object else body.decode(errors="replace")))
                if fault in ("cut", "half"):
                    return self._cut()
                if fault == "slow":
                    # Until whoever asks has given up.
                    self.connection.recv(1, socket.MSG_PEEK)
                if google.latency:
                    time.sleep(google.latency)
                answer = self._answer(fault, body)
                if fault == "lost":
                    return self._cut()
                with contextlib.suppress(OSError):
                    self.send_response(answer.status)
                    for header, value in {**answer.headers, "Content-Length": str(len(answer.body))}.items():
                        self.send_header(header, value)
                    self.end_headers()
                    if self.command != "HEAD":
                        self.wfile.write(answer.body)
                    self.wfile.flush()

            def _answer(self, fault: str | int | None, body: bytes) -> Answer:
                target = urlsplit(self.path)
                headers = headers_of(str(self.headers))
                headers["x-scheme"] = "https" if isinstance(self.connection, ssl.SSLSocket) else "http"
                host = self.headers.get("Host") or ""
                try:
                    if isinstance(fault, int):
                        raise RefusedError(fault, "on demand")
                    answer = google.answer(Request(self.command, host, target.path, query_of(target.query), headers, body))
                    if fault == "taken":
                        raise RefusedError(503, "on demand, when all was done")
                    return answer
                except Exception as error:
                    if not isinstance(error, RefusedError):
                        google.broken.append(f"{self.command} {host}{self.path}\n{traceback.format_exc()}")
                        error = RefusedError(500, repr(error))
                    name = _STATUS.get(error.status, "UNKNOWN")
                    return as_json({"error": {"code": error.status, "message": str(error), "status": name}}, error.status)

            def _body(self, half: bool) -> bytes:
                if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
                    parts = []
                    while size := int(self.rfile.readline().split(b";")[0], 16):
                        parts.append(self._read(size))
                        self.rfile.readline()
                    self.rfile.readline()
                    return b"".join(parts)
                size = int(self.headers.get("Content-Length") or 0)
                return self._read(size // 2 if half else size)

            def _read(self, size: int) -> bytes:
                content = self.rfile.read(size)
                if len(content) < size:
                    raise ConnectionError("whoever asked is gone, in the middle of a request")
                return content

            def _cut(self) -> None:
                self.close_connection = True
                with contextlib.suppress(OSError):
                    self.connection.shutdown(socket.SHUT_RDWR)
                self.connection.close()

            do_GET = do_POST = do_HEAD = do_DELETE = do_PUT = do_PATCH = _handle  # noqa: N815

            def log_message(self, *_: Any) -> None:
                pass

            def handle(self) -> None:
                # Of the connection: what a service raises is answered 500.
                with contextlib.suppress(OSError, ValueError):
                    super().handle()

        return Handler

    def grpc_server(self, credentials: grpc.ServerCredentials) -> tuple[grpc.Server, int]:
        """Returns a server of the gRPC services, started, and its port on 127.0.0.1."""
        google = self

        class Handler(grpc.GenericRpcHandler):
            def service(self, details: Any) -> grpc.RpcMethodHandler | None:
                _, service, method = details.method.split("/")
                handle, message = google.services.get(service, {}).get(method, (None, None))
                if handle is None:
                    google.unknown.append(f"gRPC {details.method}")
                    return None

                def answer(request: Any, context: grpc.ServicerContext) -> Any:
                    fault = google.fault("GRPC", details.method)
                    with google._lock:
                        google.counts[f"gRPC {service.rpartition('.')[2]}: {method}"] += 1
                    try:
                        if isinstance(fault, int):
                            raise RefusedError(fault, "on demand")
                        done = handle(request)
                        if fault in ("lost", "taken"):
                            raise RefusedError(503, "on demand, when all was done")
                        return done
                    except RefusedError as error:
                        context.abort(grpc.StatusCode[_STATUS.get(error.status, "UNKNOWN")], str(error))

                return grpc.unary_unary_rpc_method_handler(
                    answer, request_deserializer=message.FromString, response_serializer=lambda one: one.SerializeToString()
                )

        server = grpc.server(ThreadPoolExecutor(32), handlers=[Handler()])
        port = server.add_secure_port("127.0.0.1:0", credentials)
        server.start()
        return server, port


class Server(ThreadingHTTPServer):
    """HTTP, or HTTPS and gRPC where it has certificates: a client that speaks nothing but HTTP/2 wants gRPC."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(
        self, address: tuple[str, int], google: Google, certificates: ssl.SSLContext | None = None, grpc_port: int = 0
    ) -> None:
        super().__init__(address, google.handler())
        self._certificates, self._grpc_port = certificates, grpc_port

    def finish_request(self, request: Any, client_address: Any) -> None:
        if self._certificates is None:
            return super().finish_request(request, client_address)
        with contextlib.suppress(OSError):
            hello = request.recv(2**14, socket.MSG_PEEK)
            if b"\x02h2" in hello and b"http/1.1" not in hello:
                join(request, socket.create_connection(("127.0.0.1", self._grpc_port)))
                return None
            with self._certificates.wrap_socket(request, server_side=True) as secured:
                super().finish_request(secured, client_address)
        return None


def join(one: socket.socket, other: socket.socket) -> None:
    """Passes on bytes between two connections until both end."""

    def pass_on(source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while content := source.recv(2**16):
                target.sendall(content)
        with contextlib.suppress(OSError):
            target.shutdown(socket.SHUT_WR)

    back = threading.Thread(target=pass_on, args=(other, one), daemon=True)
    back.start()
    pass_on(one, other)
    back.join()
    other.close()


@contextlib.contextmanager
def serving(folder: Path | None = None) -> Iterator[Google]:
    """Gives the services over HTTP; with Cloud Storage over `folder`. Fails at the end where a request was of no known kind."""
    google = Google(folder)
    server = Server(("127.0.0.1", 0), google)
    google.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield google
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
    google.require_whole()

"""An HTTP server on a loopback address that answers every request as a test says, and a clock for whoever waits for it."""

import contextlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import tenacity


class Clock:
    """Stands in for the module `time`: time passes only while somebody sleeps, and then at once."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def skip_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Puts a `Clock` where repeated calls look for the time, so that hours of waiting take none."""
    clock = Clock()
    monkeypatch.setattr(tenacity, "time", clock)
    monkeypatch.setattr(tenacity.nap, "time", clock)


class Loopback:
    """`status` and `body` are the next answers. A request waits until `open` is set."""

    def __init__(self) -> None:
        self.url = ""
        self.status, self.body = 200, "{}"
        self.open = threading.Event()
        self.open.set()
        self.asked = threading.Semaphore(0)
        """One more for every request that came."""
        self.accepted: list[dict] = []
        """The JSON bodies of the requests that were answered with 200."""

    def steps(self) -> list[int]:
        """Returns the steps of the metrics that it accepted."""
        return [metric["step"] for body in self.accepted for metric in body.get("metrics", ())]


@contextlib.contextmanager
def answering(status: int = 200, body: str = "{}") -> Iterator[Loopback]:
    loopback = Loopback()
    loopback.status, loopback.body = status, body

    class Handler(BaseHTTPRequestHandler):
        def _handle(self) -> None:
            sent = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            loopback.asked.release()
            loopback.open.wait()
            if loopback.status == 200 and sent:
                loopback.accepted.append(json.loads(sent))
            answer = loopback.body.encode()
            with contextlib.suppress(OSError):
                self.send_response(loopback.status)
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

        do_GET = do_POST = do_PATCH = _handle  # noqa: N815

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    loopback.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield loopback
    finally:
        loopback.open.set()
        server.shutdown()
        server.server_close()
        thread.join()

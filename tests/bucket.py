"""A bucket on a loopback address with what a lease needs: a look at an object, and a write with a precondition.

`fail` makes the next requests go wrong: a status, or "lost", where the request is carried out and the answer is lost.
"""

import contextlib
import email
import email.policy
import itertools
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit


class Bucket:
    def __init__(self) -> None:
        self.url = ""
        self.objects: dict[str, dict] = {}
        self.texts: dict[str, str] = {}
        self.faults: list[int | str] = []
        self.asked: list[str] = []
        """Method and path of each request for an object."""
        self._generations = itertools.count(1)
        self._lock = threading.Lock()

    def fail(self, *faults: int | str) -> None:
        self.faults += faults

    def answer(self, method: str, target: str, content_type: str, body: bytes) -> tuple[int, dict] | None:
        path, query = urlsplit(target).path, parse_qs(urlsplit(target).query)
        if "/o" not in path:
            # The client asks once, by itself, what kind of bucket it is.
            return 200, {"name": "bucket", "location": "EUROPE-WEST4", "projectNumber": "1"}
        with self._lock:
            self.asked.append(f"{method} {path}")
            fault = self.faults.pop(0) if self.faults else None
            if isinstance(fault, int):
                return fault, {"error": {"code": fault, "message": "on demand"}}
            if method == "GET":
                name = unquote(path.rpartition("/o/")[2])
                return (200, self.objects[name]) if name in self.objects else (404, {"error": {"code": 404, "message": name}})
            assert (method, query["uploadType"]) == ("POST", ["multipart"]), target
            head = f"Content-Type: {content_type}\r\n\r\n".encode()
            about, content = email.message_from_bytes(head + body, policy=email.policy.HTTP).iter_parts()
            given = json.loads(about.get_content() if about.get_content_maintype() == "text" else about.get_payload(decode=True))
            there = int(self.objects.get(given["name"], {}).get("generation", 0))
            if int(query["ifGenerationMatch"][0]) != there:
                return 412, {"error": {"code": 412, "message": "At least one of the pre-conditions you specified did not hold."}}
            self.objects[given["name"]] = {**given, "bucket": "bucket", "generation": str(next(self._generations))}
            self.texts[given["name"]] = content.get_payload(decode=True).decode()
            return None if fault == "lost" else (200, self.objects[given["name"]])


@contextlib.contextmanager
def serving() -> Iterator[Bucket]:
    bucket = Bucket()

    class Handler(BaseHTTPRequestHandler):
        def _handle(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            answer = bucket.answer(self.command, self.path, self.headers.get("Content-Type", ""), body)
            if answer is None:
                self.close_connection = True
                return
            text = json.dumps(answer[1]).encode()
            self.send_response(answer[0])
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        do_GET = do_POST = _handle  # noqa: N815

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    bucket.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield bucket
    finally:
        server.shutdown()
        server.server_close()
        thread.join()

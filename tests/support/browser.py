"""A headless Chromium that tells all that a page asked for, over the pipe of the DevTools protocol."""

import fcntl
import json
import os
import shutil
import socketserver
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no chromium here: apt-get install chromium")

_OF_ITS_OWN = ("CONNECT www.google.com:443",)
"""What Chromium asks for whatever it shows: it gets a connection to its search engine ready. A page that asked for the same would
be found out by `Browser.requests`."""


class Browser:
    """A running browser with one page; what that tries to reach in the network is written to `asked` by a proxy that refuses."""

    def __init__(self, send: int, receive: int, proxy: str, asked: list[str]) -> None:
        self.asked = asked
        self.requests: list[str] = []
        """URLs that the page wanted, its own included."""
        self.complaints: list[str] = []
        """What came on the console."""
        self._send, self._receive = os.fdopen(send, "wb", buffering=0), os.fdopen(receive, "rb")
        self._rest = b""
        self._number = 0
        self._session: dict[str, str] = {}
        context = self.call("Target.createBrowserContext", proxyServer=proxy, proxyBypassList="<-loopback>")["browserContextId"]
        target = self.call("Target.createTarget", url="about:blank", browserContextId=context)["targetId"]
        self._session = {"sessionId": self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]}
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters) -> dict:
        """Calls a method of the protocol and returns its result."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters, **self._session}
        self._send.write(json.dumps(message).encode() + b"\0")
        while (answer := self._next()).get("id") != self._number:
            pass
        assert "error" not in answer, answer
        return answer["result"]

    def open(self, page: Path) -> None:
        """Opens a file and waits until it, and all that it shows, is loaded."""
        self.requests.clear()
        self.complaints.clear()
        self._loaded = False
        self.call("Page.navigate", url=page.as_uri())
        while not self._loaded:
            self._next()

    def evaluate(self, expression: str):
        """Returns the value of a JavaScript expression, of a promise what it comes to."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def _next(self) -> dict:
        while b"\0" not in self._rest:
            read = self._receive.read1(1 << 20)
            assert read, "the browser ended"
            self._rest += read
        line, _, self._rest = self._rest.partition(b"\0")
        message = json.loads(line)
        match message.get("method"):
            case "Network.requestWillBeSent":
                self.requests.append(message["params"]["request"]["url"])
            case "Page.loadEventFired":
                self._loaded = True
            case "Log.entryAdded":
                self.complaints.append(message["params"]["entry"]["text"])
            case "Runtime.consoleAPICalled" | "Runtime.exceptionThrown":
                self.complaints.append(json.dumps(message["params"])[:500])
        return message


@contextmanager
def browsing(folder: Path) -> Iterator[Browser]:
    """Starts a browser that keeps its files in `folder`, with a proxy that writes down and refuses."""
    asked: list[str] = []

    class Refuse(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            line = self.rfile.readline().decode(errors="replace").strip()
            if line and not line.startswith(_OF_ITS_OWN):
                asked.append(line)

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Refuse) as proxy:
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        (theirs, send), (receive, theirs_too) = _pipe(), _pipe()
        # No connection ahead of a search that nobody makes.
        (folder / "Default").mkdir(parents=True)
        (folder / "Default" / "Preferences").write_text(json.dumps({"net": {"network_prediction_options": 2}}))
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
        flags += ["--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage"]
        flags += [f"--user-data-dir={folder}", "--remote-debugging-pipe", "--window-size=1280,900"]
        # What the browser asks for itself, the time or its makers' services, goes nowhere: port 9 discards.
        flags += ["--proxy-server=127.0.0.1:9", "--disable-features=PreconnectToSearch"]
        process = subprocess.Popen(
            ["bash", "-c", f'exec "$@" 3<&{theirs} 4>&{theirs_too}', "bash", CHROMIUM, *flags],
            pass_fds=(theirs, theirs_too),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for end in (theirs, theirs_too):
            os.close(end)
        try:
            yield Browser(send, receive, f"127.0.0.1:{proxy.server_address[1]}", asked)
        finally:
            process.terminate()
            process.wait()
            proxy.shutdown()


def _pipe() -> list[int]:
    """Returns the ends of a pipe, with numbers beyond 3 and 4, which the browser has for its own."""
    low = os.pipe()
    high = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in low]
    for end in low:
        os.close(end)
    return high

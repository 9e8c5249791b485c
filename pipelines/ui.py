"""Serves the MLflow UI on this machine, for this machine only.

The server has a process of its own, which ends with this one. `serve` starts that process, `main` is its code.
"""

import contextlib
import http.client
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from trainer.shared.errors import UserError
from trainer.shared.files import make_folder, naming_unwritable
from trainer.shared.processes import end_with

_HOST = "127.0.0.1"


def serve(uri: str, artifacts: str, port: int, log: Path, ready: Callable[[str], None]) -> None:
    """Serves the store at `uri` until interrupted. Calls `ready(url)` once the page can be opened.

    The server's output goes to the file `log`. If this process dies, the server dies with it. Raises UserError if the port is not
    available or the log cannot be written.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((_HOST, port))
        except (OSError, OverflowError) as error:
            raise UserError(f"--port {port} is not available ({error}): take another") from error
        # Of --port 0, the system chooses the port.
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "pipelines.ui", str(os.getpid()), "server"]
    command += ["--host", _HOST, "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", uri, "--default-artifact-root", artifacts, "--no-serve-artifacts"]
    search = os.pathsep.join(filter(None, (str(Path(__file__).absolute().parents[1]), os.environ.get("PYTHONPATH"))))
    make_folder(str(log.parent))
    with naming_unwritable(str(log)):
        file = log.open("w")
        # Written at once, because the server would fail on a full disk without a word.
        print(f"MLflow's server on port {port}", file=file, flush=True)
    with file:
        server = subprocess.Popen(
            command,
            # The server must find the project's packages before the current folder's.
            env={
                **os.environ,
                "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
                "PYTHONPATH": search,
                "PYTHONSAFEPATH": "1",
            },
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            while server.poll() is None and not _answers(port):
                time.sleep(0.2)
            if server.poll() is None:
                # Without this parameter the UI shows its pages about agents.
                ready(f"http://{_HOST}:{port}/#/experiments?workflowType=machine_learning")
            server.wait()
        finally:
            server.terminate()
            server.wait()


def main(command: str, *arguments: str) -> None:
    """Runs MLflow's command line with `arguments` until it ends, or until the process `command` does."""
    end_with(int(command), lambda: os.killpg(0, signal.SIGKILL))
    sys.argv = ["mlflow", *arguments]
    runpy.run_module("mlflow", run_name="__main__")


def _answers(port: int) -> bool:
    connection = http.client.HTTPConnection(_HOST, port, timeout=5)
    with contextlib.closing(connection), contextlib.suppress(OSError, http.client.HTTPException):
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    return False


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Serves the MLflow UI on this machine, for this machine only."""

import contextlib
import http.client
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from trainer.shared.errors import UserError

_HOST = "127.0.0.1"


def serve(uri: str, artifacts: str, port: int, log: Path, ready: Callable[[str], None]) -> None:
    """Serves the store at `uri` until interrupted. Calls `ready(url)` once the page can be opened.

    The server's output goes to the file `log`. Raises UserError if the port is not available.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((_HOST, port))
        except (OSError, OverflowError) as error:
            raise UserError(f"--port {port} is not available ({error}): take another") from error
        # Of --port 0, the system chooses the port.
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--host", _HOST, "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", uri, "--default-artifact-root", artifacts, "--no-serve-artifacts"]
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as file:
        server = subprocess.Popen(
            command,
            env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
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


def _answers(port: int) -> bool:
    connection = http.client.HTTPConnection(_HOST, port, timeout=5)
    with contextlib.closing(connection), contextlib.suppress(OSError, http.client.HTTPException):
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    return False

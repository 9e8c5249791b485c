"""A real `mlflow server` with SQLite and passwords, which can be killed and started again on what it had."""

import contextlib
import http.client
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from support.processes import until

USER, PASSWORD = "trainer", "planted-mlflow-password"

_AUTH = """[mlflow]
default_permission = EDIT
database_uri = sqlite:///{folder}/auth.db
admin_username = {user}
admin_password = {password}
auth_cache_ttl_seconds = 300
authorization_function = mlflow.server.auth:authenticate_request_basic_auth
"""


class MlflowServer:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"
        self.environ = {
            "MLFLOW_TRACKING_URI": self.uri,
            "MLFLOW_TRACKING_USERNAME": USER,
            "MLFLOW_TRACKING_PASSWORD": PASSWORD,
        }
        (folder / "auth.ini").write_text(_AUTH.format(folder=folder, user=USER, password=PASSWORD))
        self._process: subprocess.Popen | None = None

    def start(self) -> None:
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port), "--workers", "1"]
        command += ["--backend-store-uri", f"sqlite:///{self.folder}/mlflow.db", "--app-name", "basic-auth"]
        command += ["--artifacts-destination", str(self.folder / "artifacts")]
        environ = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_TRACKING")}
        environ |= {"MLFLOW_AUTH_CONFIG_PATH": str(self.folder / "auth.ini"), "MLFLOW_FLASK_SERVER_SECRET_KEY": "for-tests"}
        environ |= {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        with (self.folder / "server.log").open("a") as log:
            self._process = subprocess.Popen(
                command, env=environ, cwd=self.folder, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
        until(self._answers, self._process)

    def kill(self) -> None:
        """Ends it as a power cut does."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def _answers(self) -> bool:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
        with contextlib.closing(connection), contextlib.suppress(OSError, http.client.HTTPException):
            connection.request("GET", "/health")
            return connection.getresponse().status == 200
        return False


@contextlib.contextmanager
def serving(folder: Path) -> Iterator[MlflowServer]:
    server = MlflowServer(folder)
    try:
        server.start()
        yield server
    finally:
        server.kill()

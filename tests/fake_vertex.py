"""Google Cloud on a loopback address: Vertex AI's jobs and schedules, OAuth's tokens, a container registry, Secret Manager.

Every request to Vertex AI is parsed into the real protos, so what Vertex AI would not parse is refused here too. `fail`
makes the next requests go wrong: a status, "cut" (the connection ends without an answer), "lost" (the request is carried
out and the answer is lost) or "slow" (it is carried out when whoever asked has given up).
"""

import contextlib
import json
import re
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from google.auth.credentials import CredentialsWithRegionalAccessBoundary
from google.cloud import aiplatform_v1
from google.protobuf import json_format
from kfp.pipeline_spec import pipeline_spec_pb2

FOLDER = r"/v1/(?P<parent>projects/[^/]+/locations/[^/]+)"
_STATUS = {400: "INVALID_ARGUMENT", 401: "UNAUTHENTICATED", 403: "PERMISSION_DENIED", 404: "NOT_FOUND", 409: "ALREADY_EXISTS"}
_STATUS |= {429: "RESOURCE_EXHAUSTED", 500: "INTERNAL", 503: "UNAVAILABLE"}

# A service account's credentials would ask Google where they may be used, in a thread that can outlive the test that made them.
CredentialsWithRegionalAccessBoundary._is_regional_access_boundary_lookup_required = lambda _: False

KEY = (
    rsa.generate_private_key(public_exponent=65537, key_size=2048)
    .private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    .decode()
)


def give_credentials(patch: pytest.MonkeyPatch, folder: Path, project: str, url: str) -> None:
    """Gives this process a service account whose tokens come from the fake at `url`, and no other way to Google."""
    key = folder / "key.json"
    about = {"type": "service_account", "project_id": project, "client_email": f"me@{project}.iam.gserviceaccount.com"}
    key.write_text(json.dumps({**about, "private_key": KEY, "token_uri": f"{url}/token", "private_key_id": "1"}))
    patch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(key))
    patch.setattr("google.auth.compute_engine._metadata._NO_GCE_CHECK", True)


@contextlib.contextmanager
def nothing_leaves_this_machine(patch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fails where so much as the name of another machine is looked up."""
    asked, real = [], socket.getaddrinfo

    def look_up(host: Any, *args: Any, **named: Any) -> Any:
        if host not in ("localhost", "127.0.0.1", "::1"):
            asked.append(host)
            raise socket.gaierror(f"no name but this machine's: {host}")
        return real(host, *args, **named)

    patch.setattr(socket, "getaddrinfo", look_up)
    yield
    assert asked == []


class RefusedError(Exception):
    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class FakeGoogle:
    """State and faults; `serving` gives one with an address."""

    def __init__(self) -> None:
        self.jobs: dict[str, aiplatform_v1.PipelineJob] = {}
        self.schedules: dict[str, aiplatform_v1.Schedule] = {}
        self.images: dict[str, str] = {}
        """Digests by NAME:TAG."""
        self.secrets: dict[str, str] = {}
        self.script: list[dict[str, str]] = []
        """What each further look at a job finds: states by task, and by `job` its own."""
        self.requests: list[tuple[str, str, str]] = []
        """Method, path and body of every request."""
        self.faults: list[str | int] = []
        self.fault_path = ""
        self.token_ok = True
        self.url = ""
        self._lock = threading.Lock()

    def fail(self, *faults: str | int, path: str = "pipelineJobs") -> None:
        """Makes the next requests to what has `path` in its path go wrong, one after another."""
        self.faults, self.fault_path = list(faults), path

    def sent(self, method: str, path: str) -> list[str]:
        """Returns the bodies of the requests to paths that match `path`."""
        return [body for m, p, body in self.requests if m == method and re.search(path, p)]

    def answer(self, method: str, target: str, body: bytes) -> tuple[int, dict[str, str], bytes]:
        path, query = urlsplit(target).path, parse_qs(urlsplit(target).query)
        routes: list[tuple[str, str, Any]] = [
            ("POST", "/token", self._token),
            ("HEAD", "/v2/(?P<name>.+)/manifests/(?P<tag>[^/]+)", self._manifest),
            ("GET", "/v1/(?P<name>projects/[^/]+/secrets/[^/]+/versions/[^/]+):access", self._secret),
            ("GET", f"{FOLDER}/pipelineJobs", self._list_jobs),
            ("POST", f"{FOLDER}/pipelineJobs", self._create_job),
            ("GET", f"{FOLDER}/pipelineJobs/(?P<job>[^/:]+)", self._get_job),
            ("POST", f"{FOLDER}/pipelineJobs/(?P<job>[^/:]+):cancel", self._cancel_job),
            ("GET", f"{FOLDER}/schedules", self._list_schedules),
            ("POST", f"{FOLDER}/schedules", self._create_schedule),
            ("DELETE", f"{FOLDER}/schedules/(?P<schedule>[^/]+)", self._delete_schedule),
        ]
        for wanted, pattern, handle in routes:
            match = re.fullmatch(pattern, path)
            if match and wanted == method:
                with self._lock:
                    done = handle(query=query, body=body, **match.groupdict())
                return done if isinstance(done, tuple) else (200, {}, done.encode())
        raise RefusedError(404, f"no such method: {method} {path}")

    # ---- Vertex AI

    def _list_jobs(self, parent: str, **_: Any) -> str:
        return aiplatform_v1.ListPipelineJobsResponse.to_json(
            aiplatform_v1.ListPipelineJobsResponse(pipeline_jobs=list(self.jobs.values())[:1])
        )

    def _create_job(self, parent: str, query: dict, body: bytes) -> str:
        job_id = query["pipelineJobId"][0]
        if not re.fullmatch("[a-z][-a-z0-9]{0,127}", job_id):
            raise RefusedError(400, f"pipelineJobId {job_id} is not valid")
        job = parse_job(body)
        name = f"{parent}/pipelineJobs/{job_id}"
        if name in self.jobs:
            raise RefusedError(409, f"{name} already exists")
        job.name, job.state = name, aiplatform_v1.PipelineState.PIPELINE_STATE_PENDING
        self.jobs[name] = job
        return aiplatform_v1.PipelineJob.to_json(job)

    def _get_job(self, parent: str, job: str, **_: Any) -> str:
        found = self._job(parent, job)
        if self.script:
            self.step_on(found, self.script.pop(0))
        return aiplatform_v1.PipelineJob.to_json(found)

    def _cancel_job(self, parent: str, job: str, **_: Any) -> str:
        self._job(parent, job).state = aiplatform_v1.PipelineState.PIPELINE_STATE_CANCELLED
        return "{}"

    def _job(self, parent: str, job: str) -> aiplatform_v1.PipelineJob:
        name = f"{parent}/pipelineJobs/{job}"
        if name not in self.jobs:
            raise RefusedError(404, f"{name} was not found")
        return self.jobs[name]

    def step_on(self, job: aiplatform_v1.PipelineJob, states: dict[str, str]) -> None:
        """Puts a job and its tasks into states; FAILED takes a reason after a colon."""
        details = {one.task_name: one for one in job.job_detail.task_details}
        for name, text in states.items():
            state, _, reason = text.partition(": ")
            error = {"code": 9, "message": reason} if reason else None
            if name == "job":
                job.state = aiplatform_v1.PipelineState[f"PIPELINE_STATE_{state}"]
                job.error = error
                continue
            detail = details.get(name) or aiplatform_v1.PipelineTaskDetail(task_name=name, task_id=len(details) + 1)
            detail.state, detail.error = aiplatform_v1.PipelineTaskDetail.State[state], error
            detail.executor_detail = {"container_detail": {"main_job": f"projects/1/locations/r/customJobs/{len(name)}"}}
            details[name] = detail
        job.job_detail = aiplatform_v1.PipelineJobDetail(task_details=list(details.values()))

    def leave(self, job_id: str, outputs: dict[str, dict[str, dict[str, Any]]]) -> None:
        """Lets a job have succeeded, with the artifacts (`uri`, `metadata`) that each task left, by output."""
        titles = {"dataset": "system.Dataset", "model": "system.Model", "metrics": "system.Metrics"}
        (job,) = (one for name, one in self.jobs.items() if name.endswith(f"/{job_id}"))
        self.step_on(job, {"job": "SUCCEEDED", **dict.fromkeys(outputs, "SUCCEEDED")})
        for detail in job.job_detail.task_details:
            detail.outputs = {
                name: {"artifacts": [{"uri": one["uri"], "schema_title": titles[name], "metadata": one["metadata"]}]}
                for name, one in outputs[detail.task_name].items()
            }

    def _list_schedules(self, parent: str, query: dict, **_: Any) -> str:
        wanted = re.fullmatch('display_name="(.*)"', query["filter"][0])
        assert wanted, query
        found = [one for one in self.schedules.values() if one.display_name == wanted[1]]
        return aiplatform_v1.ListSchedulesResponse.to_json(aiplatform_v1.ListSchedulesResponse(schedules=found))

    def _create_schedule(self, parent: str, body: bytes, **_: Any) -> str:
        schedule = aiplatform_v1.Schedule.from_json(body.decode(), ignore_unknown_fields=False)
        check_job(schedule.create_pipeline_job_request.pipeline_job)
        schedule.name, schedule.state = f"{parent}/schedules/{len(self.schedules) + 1}", aiplatform_v1.Schedule.State.ACTIVE
        self.schedules[schedule.name] = schedule
        return aiplatform_v1.Schedule.to_json(schedule)

    def _delete_schedule(self, parent: str, schedule: str, **_: Any) -> str:
        if self.schedules.pop(f"{parent}/schedules/{schedule}", None) is None:
            raise RefusedError(404, f"{schedule} was not found")
        return json.dumps({"name": f"{parent}/operations/1", "done": True})

    # ---- Others

    def _token(self, **_: Any) -> str:
        if not self.token_ok:
            raise RefusedError(400, "invalid_grant")
        return json.dumps({"access_token": "planted-access-token", "expires_in": 3600, "token_type": "Bearer"})

    def _manifest(self, name: str, tag: str, **_: Any) -> tuple[int, dict[str, str], bytes]:
        digest = self.images.get(f"{name}:{tag}")
        return (200, {"Docker-Content-Digest": digest}, b"") if digest else (404, {}, b"")

    def _secret(self, name: str, **_: Any) -> str:
        if name not in self.secrets:
            raise RefusedError(403, f"Permission denied on {name}")
        from base64 import b64encode

        return json.dumps({"name": name, "payload": {"data": b64encode(self.secrets[name].encode()).decode()}})


def parse_job(body: bytes) -> aiplatform_v1.PipelineJob:
    try:
        job = aiplatform_v1.PipelineJob.from_json(body.decode(), ignore_unknown_fields=False)
        check_job(job)
    except json_format.ParseError as error:
        raise RefusedError(400, str(error)) from error
    return job


def check_job(job: aiplatform_v1.PipelineJob) -> None:
    """Parses the spec and the machines in a job, and compares its parameters to the spec, as the service does."""
    spec = json_format.MessageToDict(aiplatform_v1.PipelineJob.pb(job).pipeline_spec)
    proto = json_format.ParseDict(spec, pipeline_spec_pb2.PipelineSpec())
    values = json_format.MessageToDict(aiplatform_v1.PipelineJob.pb(job).runtime_config).get("parameterValues", {})
    for name, definition in proto.root.input_definitions.parameters.items():
        if name not in values and not definition.HasField("default_value"):
            raise RefusedError(400, f"parameter {name} is missing")
    if unknown := set(values) - set(proto.root.input_definitions.parameters):
        raise RefusedError(400, f"parameters {unknown} are unknown")
    for component in proto.components.values():
        if "worker_pool_specs" in component.input_definitions.parameters:
            for pool in json_format.MessageToDict(component.input_definitions.parameters["worker_pool_specs"].default_value):
                json_format.ParseDict(pool, aiplatform_v1.WorkerPoolSpec.pb()())


@contextlib.contextmanager
def serving() -> Iterator[FakeGoogle]:
    fake = FakeGoogle()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _handle(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            fake.requests.append((self.command, self.path, body.decode()))
            fault = fake.faults.pop(0) if fake.faults and fake.fault_path in self.path else None
            if fault == "cut":
                self.close_connection = True
                self.connection.close()
                return
            if fault == "slow":
                # Until whoever asks has given up.
                self.connection.recv(1, socket.MSG_PEEK)
            try:
                if isinstance(fault, int):
                    raise RefusedError(fault, "on demand")
                status, headers, answer = fake.answer(self.command, self.path, body)
            except RefusedError as error:
                name = _STATUS.get(error.status, "UNKNOWN")
                said = {"error": {"code": error.status, "message": str(error), "status": name}}
                status, headers, answer = error.status, {}, json.dumps(said).encode()
            if fault == "lost":
                self.close_connection = True
                self.connection.close()
                return
            with contextlib.suppress(OSError):
                self.send_response(status)
                for header, value in {"Content-Type": "application/json", **headers, "Content-Length": str(len(answer))}.items():
                    self.send_header(header, value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(answer)

        do_GET = do_POST = do_HEAD = do_DELETE = _handle  # noqa: N815

        def log_message(self, *_: Any) -> None:
            pass

        def handle(self) -> None:
            with contextlib.suppress(OSError, ValueError):
                super().handle()

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    fake.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield fake
    finally:
        server.shutdown()
        server.server_close()
        thread.join()

"""Dataflow on a loopback address: jobs as Beam's and Google's real clients create, list, look at and cancel them.

A request of a kind that it does not know is refused with 501, and every body is parsed into the real messages. As the real one,
it refuses a job whose name an active one has, lists jobs without their labels, and ends a job that is cancelled a look later.
"""

import contextlib
import json
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

from google.cloud import dataflow_v1beta3 as api
from google.protobuf import json_format

JOBS = "/v1b3/projects/my-project/locations/europe-west4/jobs"
_ENDED = ("DONE", "FAILED", "CANCELLED")
_STATUS = {403: "PERMISSION_DENIED", 409: "ALREADY_EXISTS", 404: "NOT_FOUND", 501: "UNIMPLEMENTED", 503: "UNAVAILABLE"}


class FakeDataflow:
    """State and faults; `serving_dataflow` gives one with an address. Each look at a job moves it on to its next state."""

    def __init__(self, states: Sequence[str]) -> None:
        self.states = list(states)
        """Of a job that is created: a look each, the last one for good."""
        self.jobs: dict[str, api.Job] = {}
        self.sent: list[dict] = []
        """The bodies of the requests to create a job."""
        self.requests: list[tuple[str, str]] = []
        """Method and path of each."""
        self.faults: dict[str, int] = {}
        """Status by method, of every request."""
        self.finish: Callable[[str], None] = lambda job: None
        """What a job does when it comes to JOB_STATE_DONE."""
        self.created = threading.Event()
        self.answers = threading.Event()
        """Until it is set, the answer to a request to create a job is held back."""
        self.answers.set()
        self.url = ""
        self._left: dict[str, list[str]] = {}
        self._lock = threading.RLock()

    def add(self, job: str, name: str, labels: dict[str, str], states: Sequence[str] = ("RUNNING",)) -> None:
        """Adds a job that somebody else created."""
        self.jobs[job] = api.Job(id=job, name=name, labels=labels, project_id="my-project", location="europe-west4")
        self.go_to(job, *states)

    def go_to(self, job: str, *states: str) -> None:
        """Puts a job into the first of `states`, and into the next ones at the looks to come."""
        with self._lock:
            self._left[job] = list(states[1:])
            self.jobs[job].current_state = api.JobState[f"JOB_STATE_{states[0]}"]

    def state(self, job: str) -> str:
        return self.jobs[job].current_state.name.removeprefix("JOB_STATE_")

    def count(self, method: str, path: str) -> int:
        return sum(bool(one == method and re.fullmatch(path, target)) for one, target in list(self.requests))

    def answer(self, method: str, target: str, body: bytes) -> tuple[int, str]:
        path, query = urlsplit(target).path, parse_qs(urlsplit(target).query)
        with self._lock:
            self.requests.append((method, path))
            if status := self.faults.get(method):
                return self._error(status, "on demand")
            if method == "POST" and path == JOBS:
                return self._create(json.loads(body))
            if method == "GET" and path == JOBS:
                return 200, self._list(query)
            match = re.fullmatch(f"{JOBS}/([^/]+)(/messages)?", path)
            if not match or match[1] not in self.jobs:
                return self._error(404 if match else 501, f"{method} {path}")
            if method == "GET" and match[2]:
                return 200, self._messages(match[1])
            if method == "GET":
                return 200, self._look(match[1], query)
            if method == "PUT":
                wish = json_format.Parse(body, api.Job.pb(api.Job()))
                assert wish.requested_state == api.JobState.JOB_STATE_CANCELLED
                self.go_to(match[1], "CANCELLING", "CANCELLED")
                return 200, api.Job.to_json(self.jobs[match[1]])
            return self._error(501, f"{method} {path}")

    def _error(self, status: int, message: str) -> tuple[int, str]:
        return status, json.dumps({"error": {"code": status, "message": message, "status": _STATUS.get(status, "UNKNOWN")}})

    def _create(self, body: dict) -> tuple[int, str]:
        self.sent.append(body)
        job = api.Job(json_format.ParseDict(body, api.Job.pb(api.Job()), ignore_unknown_fields=True))
        assert re.fullmatch(r"[a-z]([-a-z0-9]{0,1022}[a-z0-9])?", job.name)
        for key, value in job.labels.items():
            assert re.fullmatch(r"[a-z][a-z0-9_-]{0,62}", key)
            assert re.fullmatch(r"[a-z0-9_-]{0,63}", value)
        if job.name in [one.name for one in self._active()]:
            return self._error(409, f"There is already an active job named {job.name}")
        job.id, job.location, job.project_id = f"job-{len(self.jobs) + 1}", "europe-west4", "my-project"
        self.jobs[job.id] = job
        self.go_to(job.id, "PENDING", *self.states)
        self.created.set()
        return 200, self._text(job)

    def _active(self) -> list[api.Job]:
        return [job for number, job in self.jobs.items() if self.state(number) not in _ENDED]

    def _list(self, query: dict[str, list[str]]) -> str:
        assert api.ListJobsRequest.Filter(int(query["filter"][0])) == api.ListJobsRequest.Filter.ACTIVE
        found = [one for one in self._active() if query.get("name", [one.name]) == [one.name]]
        summaries = [api.Job(id=one.id, name=one.name, current_state=one.current_state) for one in found]
        return api.ListJobsResponse.to_json(api.ListJobsResponse(jobs=summaries))

    def _look(self, job: str, query: dict[str, list[str]]) -> str:
        text = self._text(self.jobs[job])
        if self._left[job] and ("view" not in query or self.state(job) == "CANCELLING"):
            self.jobs[job].current_state = api.JobState[f"JOB_STATE_{self._left[job].pop(0)}"]
            if self.state(job) == "DONE":
                self.finish(job)
        return text

    def _text(self, job: api.Job) -> str:
        times = {"createTime": "2026-01-01T00:00:00Z", "currentStateTime": "2026-01-01T00:00:00Z"}
        one = api.Job(id=job.id, name=job.name, labels=dict(job.labels), current_state=job.current_state)
        return json.dumps({**json.loads(api.Job.to_json(one)), "projectId": "my-project", "location": "europe-west4", **times})

    def _messages(self, job: str) -> str:
        text = "Workflow failed: no quota" if self.state(job) == "FAILED" else "Worker pool stopped."
        message = {"id": "1", "time": "2026-01-01T00:00:00Z", "messageText": text, "messageImportance": "JOB_MESSAGE_ERROR"}
        return json.dumps({"jobMessages": [message] if self.state(job) in _ENDED else []})


@contextlib.contextmanager
def serving_dataflow(states: Sequence[str] = ("RUNNING",)) -> Iterator[FakeDataflow]:
    fake = FakeDataflow(states)

    class Handler(BaseHTTPRequestHandler):
        def _handle(self) -> None:
            status, text = fake.answer(self.command, self.path, self.rfile.read(int(self.headers.get("Content-Length") or 0)))
            if self.command == "POST":
                fake.answers.wait()
            with contextlib.suppress(OSError):
                self.send_response(status)
                for header, value in (("Content-Type", "application/json"), ("Content-Length", str(len(text.encode())))):
                    self.send_header(header, value)
                self.end_headers()
                self.wfile.write(text.encode())

        do_GET = do_POST = do_PUT = _handle  # noqa: N815

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    fake.url = f"http://localhost:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield fake
    finally:
        fake.answers.set()
        server.shutdown()
        server.server_close()

"""Dataflow's API: jobs are created, listed, looked at and cancelled, over gRPC and over REST.

As the real one, it refuses a job whose name an active one has, and lists jobs without their labels. What a job then does is
`beam`'s; without it a test puts jobs into states by hand.
"""

import itertools
import re
import threading
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from google.cloud import dataflow_v1beta3 as api
from google.protobuf import json_format

from vertex.http import Answer, RefusedError, Request, Route

ENDED = ("JOB_STATE_DONE", "JOB_STATE_FAILED", "JOB_STATE_CANCELLED")
_JOBS = r"/v1b3/projects/(?P<project>[^/]+)/locations/(?P<region>[^/]+)/jobs"


class Dataflow:
    """`run` is told of each new job, and `cancel` of each that is to end."""

    def __init__(self) -> None:
        self.jobs: dict[str, api.Job] = {}
        self.errors: dict[str, str] = {}
        """What a job says of its failure, by its ID."""
        self.script: dict[str, list[str]] = {}
        """By the ID of a job, the states that it comes to, one after each look."""
        self.run: Callable[[api.Job], None] = lambda job: None
        self.cancel: Callable[[api.Job], None] = lambda job: self.go_to(job, "CANCELLING", "CANCELLED")
        self.finish: Callable[[api.Job], None] = lambda job: None
        """What a job does when `script` brings it to DONE."""
        self.lock = threading.RLock()
        self._numbers = itertools.count(1)
        self.services = {
            "google.dataflow.v1beta3.JobsV1Beta3": {
                "CreateJob": (self._create, api.CreateJobRequest.pb()),
                "GetJob": (self._get, api.GetJobRequest.pb()),
                "ListJobs": (self._list, api.ListJobsRequest.pb()),
                "UpdateJob": (self._update, api.UpdateJobRequest.pb()),
            },
            "google.dataflow.v1beta3.MessagesV1Beta3": {"ListJobMessages": (self._messages, api.ListJobMessagesRequest.pb())},
            "google.dataflow.v1beta3.MetricsV1Beta3": {"GetJobMetrics": (self._metrics, api.GetJobMetricsRequest.pb())},
        }
        self.routes: list[Route] = [
            ("GET", _JOBS, self._list_by_rest),
            ("POST", _JOBS, self._create_by_rest),
            ("GET", f"{_JOBS}/(?P<job>[^/]+)", self._get_by_rest),
            ("PUT", f"{_JOBS}/(?P<job>[^/]+)", self._update_by_rest),
            ("GET", f"{_JOBS}/(?P<job>[^/]+)/messages", self._messages_by_rest),
        ]

    def active(self) -> list[api.Job]:
        """Returns the jobs that run, and are paid for."""
        return [job for job in self.jobs.values() if job.current_state.name not in ENDED]

    def add(self, job: api.Job, *states: str) -> None:
        """Takes in a job that has its ID, as `go_to` has it."""
        job.create_time = datetime.now(UTC)
        self.go_to(job, *states)
        self.jobs[job.id] = job

    def go_to(self, job: api.Job, *states: str) -> None:
        """Puts a job into the first of `states`, and into each of the others after a look."""
        with self.lock:
            job.current_state, job.current_state_time = api.JobState[f"JOB_STATE_{states[0]}"], datetime.now(UTC)
            self.script[job.id] = list(states[1:])

    # ---- What is asked

    def _create(self, request: Any) -> Any:
        job = api.Job.deserialize(request.job.SerializeToString())
        if not re.fullmatch(r"[a-z]([-a-z0-9]{0,1022}[a-z0-9])?", job.name):
            raise RefusedError(400, f"the job name {job.name} is not valid")
        for name, value in job.labels.items():
            if not re.fullmatch(r"[a-z][-_a-z0-9]{0,62}", name) or not re.fullmatch(r"[-_a-z0-9]{0,63}", value):
                raise RefusedError(400, f"the label {name}={value} is not valid")
        with self.lock:
            if job.name in [one.name for one in self.active()]:
                raise RefusedError(409, f"There is already an active job named {job.name}.")
            job.id = f"2026-01-01_00_00_00-{next(self._numbers)}"
            job.project_id, job.location = request.project_id, request.location
            self.add(job, "PENDING")
        self.run(job)
        return api.Job.pb(job)

    def _job(self, request: Any) -> api.Job:
        if request.job_id not in self.jobs:
            raise RefusedError(404, f"there is no job {request.job_id}")
        return self.jobs[request.job_id]

    def _get(self, request: Any) -> Any:
        job = self._job(request)
        with self.lock:
            found = api.Job.pb(api.Job(job))
            # Whoever looks at labels does not wait for the job.
            waits = request.view == api.JobView.JOB_VIEW_UNKNOWN or job.current_state == api.JobState.JOB_STATE_CANCELLING
            if waits and (left := self.script[job.id]):
                self.go_to(job, *left)
                if job.current_state == api.JobState.JOB_STATE_DONE:
                    self.finish(job)
        return found

    def _list(self, request: Any) -> Any:
        with self.lock:
            jobs = self.active() if request.filter == api.ListJobsRequest.Filter.ACTIVE else self.jobs.values()
            found = [job for job in jobs if not request.name or job.name == request.name]
            summaries = [api.Job(id=job.id, name=job.name, current_state=job.current_state) for job in found]
        return api.ListJobsResponse.pb(api.ListJobsResponse(jobs=summaries))

    def _update(self, request: Any) -> Any:
        job = self._job(request)
        wanted = api.JobState(request.job.requested_state).name
        if wanted != "JOB_STATE_CANCELLED":
            raise RefusedError(400, f"a job cannot be made {wanted}")
        with self.lock:
            if job.current_state.name not in ENDED:
                self.cancel(job)
        return api.Job.pb(job)

    def _messages(self, request: Any) -> Any:
        job = self._job(request)
        failed = job.current_state == api.JobState.JOB_STATE_FAILED
        about = {"time": job.current_state_time, "message_importance": api.JobMessageImportance.JOB_MESSAGE_ERROR}
        said = [{"id": "1", "message_text": self.errors.get(job.id, "Workflow failed."), **about}] if failed else []
        return api.ListJobMessagesResponse.pb(api.ListJobMessagesResponse(job_messages=said))

    def _metrics(self, request: Any) -> Any:
        return api.JobMetrics.pb()()

    # ---- The same by REST. Google's client says enums as numbers

    def _create_by_rest(self, request: Request, project: str, region: str) -> Answer:
        job = json_format.Parse(request.body, api.Job.pb()())
        return _said(self._create(api.CreateJobRequest.pb()(project_id=project, location=region, job=job)))

    def _list_by_rest(self, request: Request, project: str, region: str) -> Answer:
        query = {"name": request.query.get("name", ""), "filter": int(request.query.get("filter", 0))}
        return _said(self._list(api.ListJobsRequest.pb()(**query)))

    def _get_by_rest(self, request: Request, project: str, region: str, job: str) -> Answer:
        return _said(self._get(api.GetJobRequest.pb()(job_id=job, view=int(request.query.get("view", 0)))))

    def _update_by_rest(self, request: Request, project: str, region: str, job: str) -> Answer:
        asked = json_format.Parse(request.body, api.Job.pb()())
        return _said(self._update(api.UpdateJobRequest.pb()(job_id=job, job=asked)))

    def _messages_by_rest(self, request: Request, project: str, region: str, job: str) -> Answer:
        return _said(self._messages(api.ListJobMessagesRequest.pb()(job_id=job)))


def _said(message: Any) -> Answer:
    return Answer(200, json_format.MessageToJson(message).encode(), {"Content-Type": "application/json"})

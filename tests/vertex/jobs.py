"""Vertex AI's API: pipeline jobs, custom jobs, schedules.

Every request is parsed into the real protos, so what Vertex AI would not parse is refused here too. What a job then does is
`executor`'s; without one a test puts jobs into states by hand.
"""

import itertools
import json
import re
import threading
from collections.abc import Callable
from typing import Any

from google.cloud import aiplatform_v1
from google.protobuf import empty_pb2, json_format
from kfp.pipeline_spec import pipeline_spec_pb2

from vertex.http import Answer, RefusedError, Request, Route, as_json

FOLDER = r"/v1/(?P<parent>projects/[^/]+/locations/[^/]+)"
PROJECT_NUMBER = "123456789"


class Jobs:
    """`executor` is told of jobs to run and to cancel."""

    def __init__(self) -> None:
        self.jobs: dict[str, aiplatform_v1.PipelineJob] = {}
        self.custom: dict[str, aiplatform_v1.CustomJob] = {}
        self.schedules: dict[str, aiplatform_v1.Schedule] = {}
        self.script: list[dict[str, str]] = []
        """What each further look at a job finds: states by task, and by `job` its own."""
        self.run: Callable[[aiplatform_v1.PipelineJob], None] = lambda job: None
        self.cancel: Callable[[aiplatform_v1.PipelineJob], None] = self._cancelled
        self.run_custom: Callable[[aiplatform_v1.CustomJob], None] = lambda job: None
        self.cancel_custom: Callable[[aiplatform_v1.CustomJob], None] = lambda job: None
        self._numbers = itertools.count(1)
        self.lock = threading.RLock()
        self.routes: list[Route] = [
            ("GET", f"{FOLDER}/pipelineJobs", self._list),
            ("POST", f"{FOLDER}/pipelineJobs", self._create),
            ("GET", f"{FOLDER}/pipelineJobs/(?P<job>[^/:]+)", self._get),
            ("POST", f"{FOLDER}/pipelineJobs/(?P<job>[^/:]+):cancel", self._cancel),
            ("POST", f"{FOLDER}/customJobs/(?P<job>[^/:]+):cancel", self._cancel_custom),
            ("GET", f"{FOLDER}/schedules", self._list_schedules),
            ("POST", f"{FOLDER}/schedules", self._create_schedule),
            ("DELETE", f"{FOLDER}/schedules/(?P<schedule>[^/]+)", self._delete_schedule),
        ]
        self.services = {
            "google.cloud.aiplatform.v1.JobService": {
                "CreateCustomJob": (self._create_custom, aiplatform_v1.CreateCustomJobRequest.pb()),
                "GetCustomJob": (self._get_custom, aiplatform_v1.GetCustomJobRequest.pb()),
                "CancelCustomJob": (self._cancel_custom_by_name, aiplatform_v1.CancelCustomJobRequest.pb()),
            }
        }

    # ---- Pipeline jobs

    def _list(self, request: Request, parent: str) -> Answer:
        found = aiplatform_v1.ListPipelineJobsResponse(pipeline_jobs=list(self.jobs.values())[:1])
        return _said(aiplatform_v1.ListPipelineJobsResponse, found)

    def _create(self, request: Request, parent: str) -> Answer:
        job_id = request.query["pipelineJobId"]
        if not re.fullmatch("[a-z][-a-z0-9]{0,127}", job_id):
            raise RefusedError(400, f"pipelineJobId {job_id} is not valid")
        job = parse_job(request.body)
        name = f"{parent}/pipelineJobs/{job_id}"
        with self.lock:
            if name in self.jobs:
                raise RefusedError(409, f"{name} already exists")
            job.name, job.state = name, aiplatform_v1.PipelineState.PIPELINE_STATE_PENDING
            self.jobs[name] = job
        self.run(job)
        return _said(aiplatform_v1.PipelineJob, job)

    def _get(self, request: Request, parent: str, job: str) -> Answer:
        found = self._job(parent, job)
        with self.lock:
            if self.script:
                self.step_on(found, self.script.pop(0))
            return _said(aiplatform_v1.PipelineJob, found)

    def _cancel(self, request: Request, parent: str, job: str) -> Answer:
        self.cancel(self._job(parent, job))
        return as_json({})

    def _cancelled(self, job: aiplatform_v1.PipelineJob) -> None:
        job.state = aiplatform_v1.PipelineState.PIPELINE_STATE_CANCELLED

    def _job(self, parent: str, job: str) -> aiplatform_v1.PipelineJob:
        name = f"{parent}/pipelineJobs/{job}"
        if name not in self.jobs:
            raise RefusedError(404, f"{name} was not found")
        return self.jobs[name]

    def step_on(self, job: aiplatform_v1.PipelineJob, states: dict[str, str]) -> None:
        """Puts a job and its tasks into states; FAILED takes a reason after a colon."""
        with self.lock:
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

    # ---- Custom jobs

    def _create_custom(self, request: Any) -> Any:
        job = aiplatform_v1.CustomJob.deserialize(request.custom_job.SerializeToString())
        if not job.job_spec.worker_pool_specs:
            raise RefusedError(400, "a custom job has worker_pool_specs")
        with self.lock:
            job.name = f"{request.parent}/customJobs/{next(self._numbers)}"
            job.state = aiplatform_v1.JobState.JOB_STATE_PENDING
            self.custom[job.name] = job
        self.run_custom(job)
        return aiplatform_v1.CustomJob.pb(job)

    def _get_custom(self, request: Any) -> Any:
        if request.name not in self.custom:
            raise RefusedError(404, f"{request.name} was not found")
        return aiplatform_v1.CustomJob.pb(self.custom[request.name])

    def _cancel_custom(self, request: Request, parent: str, job: str) -> Answer:
        self._cancel_one(f"{parent}/customJobs/{job}")
        return as_json({})

    def _cancel_custom_by_name(self, request: Any) -> Any:
        self._cancel_one(request.name)
        return empty_pb2.Empty()

    def _cancel_one(self, name: str) -> None:
        if name not in self.custom:
            raise RefusedError(404, f"{name} was not found")
        self.cancel_custom(self.custom[name])

    # ---- Schedules

    def _list_schedules(self, request: Request, parent: str) -> Answer:
        wanted = re.fullmatch('display_name="(.*)"', request.query["filter"])
        assert wanted, request.query
        found = [one for one in self.schedules.values() if one.display_name == wanted[1]]
        return _said(aiplatform_v1.ListSchedulesResponse, aiplatform_v1.ListSchedulesResponse(schedules=found))

    def _create_schedule(self, request: Request, parent: str) -> Answer:
        schedule = aiplatform_v1.Schedule.from_json(request.body.decode(), ignore_unknown_fields=False)
        check_job(schedule.create_pipeline_job_request.pipeline_job)
        schedule.name, schedule.state = f"{parent}/schedules/{len(self.schedules) + 1}", aiplatform_v1.Schedule.State.ACTIVE
        self.schedules[schedule.name] = schedule
        return _said(aiplatform_v1.Schedule, schedule)

    def _delete_schedule(self, request: Request, parent: str, schedule: str) -> Answer:
        if self.schedules.pop(f"{parent}/schedules/{schedule}", None) is None:
            raise RefusedError(404, f"{schedule} was not found")
        return as_json({"name": f"{parent}/operations/1", "done": True})


def _said(kind: Any, message: Any) -> Answer:
    return Answer(200, kind.to_json(message).encode(), {"Content-Type": "application/json"})


def parse_job(body: bytes) -> aiplatform_v1.PipelineJob:
    try:
        job = aiplatform_v1.PipelineJob.from_json(body.decode(), ignore_unknown_fields=False)
        check_job(job)
    except json_format.ParseError as error:
        raise RefusedError(400, str(error)) from error
    return job


def as_dict(message: Any) -> Any:
    """Returns a struct as plain data."""
    return json.loads(json_format.MessageToJson(message))


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

"""Dataflow: takes a job as Beam's client sends it, and runs the staged pipeline with Beam's real worker in the project's image.

Beam's portable runner is in the service's place. It starts workers as Dataflow does: the image's entry point, with options.

    python -m vertex.dataflow JOB    is one job: the file says where all that it needs is
"""

import contextlib
import itertools
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from google.cloud import dataflow_v1beta3 as api
from google.protobuf import json_format

from vertex.container import Container, Machine
from vertex.http import Answer, RefusedError, Request
from vertex.image import image_of
from vertex.world import TRUST, World

_ACTIVE = ("JOB_STATE_PENDING", "JOB_STATE_RUNNING", "JOB_STATE_QUEUED", "JOB_STATE_CANCELLING")
_IMPORTANT = api.JobMessageImportance.JOB_MESSAGE_ERROR


class Dataflow:
    """The jobs of a world; their logs go to the folder `logs`."""

    def __init__(self, world: World, logs: Path) -> None:
        self.jobs: dict[str, api.Job] = {}
        self._world, self._logs = world, logs
        self._processes: dict[str, subprocess.Popen] = {}
        self._errors: dict[str, str] = {}
        self._numbers = itertools.count(1)
        self._lock = threading.RLock()
        world.google.services |= {
            "google.dataflow.v1beta3.JobsV1Beta3": {
                "CreateJob": (self._create, api.CreateJobRequest.pb()),
                "GetJob": (self._get, api.GetJobRequest.pb()),
                "ListJobs": (self._list, api.ListJobsRequest.pb()),
                "UpdateJob": (self._update, api.UpdateJobRequest.pb()),
            },
            "google.dataflow.v1beta3.MessagesV1Beta3": {"ListJobMessages": (self._messages, api.ListJobMessagesRequest.pb())},
            "google.dataflow.v1beta3.MetricsV1Beta3": {"GetJobMetrics": (self._metrics, api.GetJobMetricsRequest.pb())},
        }

        jobs = r"/v1b3/projects/(?P<project>[^/]+)/locations/(?P<region>[^/]+)/jobs"
        world.google.routes += [
            ("GET", jobs, self._list_by_rest),
            ("GET", f"{jobs}/(?P<job>[^/]+)", self._get_by_rest),
            ("PUT", f"{jobs}/(?P<job>[^/]+)", self._update_by_rest),
        ]

    def active(self) -> list[str]:
        """Returns the names of the jobs that run, and are paid for."""
        return [job.name for job in self.jobs.values() if job.current_state.name in _ACTIVE]

    def _create(self, request: Any) -> Any:
        job = api.Job.deserialize(request.job.SerializeToString())
        if not re.fullmatch(r"[a-z]([-a-z0-9]{0,1022}[a-z0-9])?", job.name):
            raise RefusedError(400, f"the job name {job.name} is not valid")
        for name, value in job.labels.items():
            if not re.fullmatch(r"[a-z][-_a-z0-9]{0,62}", name) or not re.fullmatch(r"[-_a-z0-9]{0,63}", value):
                raise RefusedError(400, f"the label {name}={value} is not valid")
        with self._lock:
            if job.name in self.active():
                raise RefusedError(409, f"There is already an active job named {job.name}.")
            job.id = f"2026-01-01_00_00_00-{next(self._numbers)}"
            job.project_id, job.location = request.project_id, request.location
            job.create_time = datetime.now(UTC)
            self._set(job, "JOB_STATE_PENDING")
            self.jobs[job.id] = job
        threading.Thread(target=self._run, args=(job,), daemon=True).start()
        return api.Job.pb(job)

    def _set(self, job: api.Job, state: str) -> None:
        job.current_state, job.current_state_time = api.JobState[state], datetime.now(UTC)

    def _job(self, request: Any) -> api.Job:
        if request.job_id not in self.jobs:
            raise RefusedError(404, f"there is no job {request.job_id}")
        return self.jobs[request.job_id]

    def _get(self, request: Any) -> Any:
        return api.Job.pb(self._job(request))

    def _list(self, request: Any) -> Any:
        with self._lock:
            found = [job for job in self.jobs.values() if not request.name or job.name == request.name]
            active = api.ListJobsRequest.Filter.ACTIVE
            if request.filter == active:
                found = [job for job in found if job.current_state.name in _ACTIVE]
            return api.ListJobsResponse.pb()(jobs=[api.Job.pb(job) for job in found])

    def _update(self, request: Any) -> Any:
        job = self._job(request)
        wanted = api.JobState(request.job.requested_state).name
        if wanted != "JOB_STATE_CANCELLED":
            raise RefusedError(400, f"a job cannot be made {wanted}")
        with self._lock:
            if job.current_state.name in _ACTIVE:
                self._set(job, "JOB_STATE_CANCELLED")
                if process := self._processes.get(job.id):
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(process.pid, signal.SIGKILL)
        return api.Job.pb(job)

    def _list_by_rest(self, request: Request, project: str, region: str) -> Answer:
        wanted = api.ListJobsRequest.Filter[request.query.get("filter", "UNKNOWN")]
        return _said(self._list(api.ListJobsRequest.pb()(name=request.query.get("name", ""), filter=wanted)))

    def _get_by_rest(self, request: Request, project: str, region: str, job: str) -> Answer:
        return _said(self._get(api.GetJobRequest.pb()(job_id=job)))

    def _update_by_rest(self, request: Request, project: str, region: str, job: str) -> Answer:
        asked = json_format.Parse(request.body, api.Job.pb()())
        return _said(self._update(api.UpdateJobRequest.pb()(job_id=job, job=asked)))

    def _messages(self, request: Any) -> Any:
        text = self._errors.get(self._job(request).id, "")
        messages = [{"id": "1", "message_text": text, "message_importance": _IMPORTANT}] if text else []
        return api.ListJobMessagesResponse.pb(api.ListJobMessagesResponse(job_messages=messages))

    def _metrics(self, request: Any) -> Any:
        return api.JobMetrics.pb()()

    def _run(self, job: api.Job) -> None:
        options = dict(job.environment.sdk_pipeline_options)["options"]
        (image,) = {pool.worker_harness_container_image for pool in job.environment.worker_pools}
        _, _, digest = image.partition("@")
        assert digest in self._world.google.accounts.images.values(), f"no registry here has {image}"
        assert job.environment.service_account_email, "workers would run as another account than the steps"
        log = self._logs / f"dataflow-{len(self.jobs)}.log"
        asked = self._logs / f"dataflow-{len(self.jobs)}.json"
        pipeline = self._world.machine.gcs / str(options["pipelineUrl"]).removeprefix("gs://")
        asked.write_text(
            json.dumps({"pipeline": str(pipeline), "machine": asdict(self._world.machine), "log": str(log)}, default=str)
        )
        with self._lock, log.open("ab") as output:
            if job.current_state.name == "JOB_STATE_CANCELLED":
                return
            # Whatever the job starts ends with it.
            unshare = ["unshare", "--pid", "--fork", "--kill-child=KILL", "--mount-proc"]
            command = [*unshare, sys.executable, "-m", "vertex.dataflow", str(asked)]
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )
            self._processes[job.id] = process
            self._set(job, "JOB_STATE_RUNNING")
        process.wait()
        with self._lock:
            if job.current_state.name == "JOB_STATE_CANCELLED":
                return
            if process.returncode:
                self._errors[job.id] = _last_error(log)
            self._set(job, "JOB_STATE_FAILED" if process.returncode else "JOB_STATE_DONE")


def _said(message: Any) -> Answer:
    return Answer(200, json_format.MessageToJson(message).encode(), {"Content-Type": "application/json"})


def _last_error(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if re.match(r"[\w.]*(Error|Exception)\b", line)]
    return lines[-1] if lines else "Workflow failed."


def run(asked: Path) -> None:
    """Runs a job to its end; raises what its pipeline raises."""
    from apache_beam.options.pipeline_options import PipelineOptions
    from apache_beam.portability import common_urns
    from apache_beam.portability.api import beam_runner_api_pb2
    from apache_beam.runners.portability.fn_api_runner import fn_runner

    about = json.loads(asked.read_text())
    pipeline = beam_runner_api_pb2.Pipeline.FromString(Path(about["pipeline"]).read_bytes())
    worker = shlex.join([sys.executable, "-m", "vertex.dataflow", str(asked), "worker"])
    for environment in pipeline.components.environments.values():
        assert environment.urn == common_urns.environments.DOCKER.urn, environment.urn
        environment.urn = "beam:env:harness_subprocess_python:v1"
        environment.payload = worker.encode()
    runner = fn_runner.FnApiRunner()
    result = runner.run_via_runner_api(pipeline, PipelineOptions(["--runner=FnApiRunner"]))
    result.wait_until_finish()


def work(asked: Path) -> int:
    """Starts a worker in the image and waits until it ends."""
    about = json.loads(asked.read_text())
    machine = Machine(tuple(map(Path, about["machine"]["layers"])), Path(about["machine"]["etc"]), Path(about["machine"]["gcs"]))
    image = image_of("cpu")
    address = {
        name: re.search(r'url:\s*"([^"]+)"', os.environ[f"{name}_API_SERVICE_DESCRIPTOR"])[1]  # type: ignore[index]
        for name in ("CONTROL", "LOGGING")
    }
    command = [
        *image.entrypoint,
        f"--id={os.environ.get('WORKER_ID', 'worker-1')}",
        f"--logging_endpoint={address['LOGGING']}",
        f"--control_endpoint={address['CONTROL']}",
        "--semi_persist_dir=/var/opt/google",
    ]
    # What boot learns from the provisioning service.
    environ = {"PIPELINE_OPTIONS": os.environ.get("PIPELINE_OPTIONS", "{}"), **TRUST}
    return Container(machine, image, command, environ, Path(about["log"])).wait()


if __name__ == "__main__":
    started = time.monotonic()
    if sys.argv[2:] == ["worker"]:
        sys.exit(work(Path(sys.argv[1])))
    run(Path(sys.argv[1]))
    print(f"done in {time.monotonic() - started:.0f} s", file=sys.stderr)

"""A client of Vertex AI that creates, follows and ends pipeline jobs and schedules.

Every call uses REST, is repeated while the service is overloaded or unreachable, and fails with a one-line UserError. The
client chooses the ID of a new job, so a repeated request never creates a second one.
"""

import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import requests
import tenacity
from google.api_core import exceptions
from google.auth import exceptions as auth_exceptions
from google.cloud import aiplatform_v1
from google.protobuf import json_format

from components import console
from components.lineage import COMPONENTS, Artifact
from pipelines.vertex.jobs import REQUEST_LABEL, Job, Place, Task
from trainer.shared.errors import UserError

if TYPE_CHECKING:
    from google.auth.credentials import Credentials

T = TypeVar("T")

_SECONDS_FOR_A_CALL = 30.0
_FIRST_WAIT, _LONGEST_WAIT = 1.0, 30.0
_PATIENCE = 120.0
"""Seconds for which a call is repeated after a transient error."""
_PATIENCE_OF_FOLLOWING = 1800.0
_SECONDS_BETWEEN_POLLS = 15.0


class Vertex:
    """The pipeline jobs of a project in one region."""

    def __init__(self, place: Place, credentials: "Credentials") -> None:
        self.place = place
        options = {"api_endpoint": place.endpoint or f"https://{place.region}-aiplatform.googleapis.com"}
        self._jobs = aiplatform_v1.PipelineServiceClient(transport="rest", client_options=options, credentials=credentials)
        self._schedules = aiplatform_v1.ScheduleServiceClient(transport="rest", client_options=options, credentials=credentials)

    def check(self) -> None:
        """Raises UserError if the jobs of this place cannot be listed."""
        request = aiplatform_v1.ListPipelineJobsRequest(parent=self.place.folder, page_size=1)
        self._call(lambda timeout: self._jobs.list_pipeline_jobs(request, timeout=timeout, retry=None))

    def find(self, job_id: str, patience: float | None = None) -> Job | None:
        """Returns the current state of a job, or None if there is no job of that ID."""
        try:
            name = f"{self.place.folder}/pipelineJobs/{job_id}"
            return self._job(
                self._call(lambda timeout: self._jobs.get_pipeline_job(name=name, timeout=timeout, retry=None), patience)
            )
        except _NotFoundError:
            return None

    def get(self, job_id: str, patience: float | None = None) -> Job:
        job = self.find(job_id, patience)
        if job is None:
            raise UserError(f"there is no job {job_id} in {self.place.folder}")
        return job

    def create(self, job_id: str, job: aiplatform_v1.PipelineJob) -> tuple[Job, bool]:
        """Returns the job `job_id`, and whether this call created it. A job from an identical earlier request is reused.

        Raises UserError if another job has the ID, or if the service does not answer. Then the job may exist all the same.
        """
        request_digest = job.labels[REQUEST_LABEL]
        if (existing := self.find(job_id)) is None:
            try:
                made = self._call(
                    lambda timeout: self._jobs.create_pipeline_job(
                        parent=self.place.folder, pipeline_job=job, pipeline_job_id=job_id, timeout=timeout, retry=None
                    )
                )
                return self._job(made), True
            except _AlreadyExistsError:
                # Either the answer to an earlier attempt was lost, or somebody else created a job. The digest tells which.
                existing = self.get(job_id)
                if existing.request_digest == request_digest:
                    return existing, True
            except _NoAnswerError as error:
                raise UserError(
                    f"{error}; job {job_id} may have been made: sogclr status {job_id} shows it; submitting again with "
                    f"--job-id {job_id} makes no second job"
                ) from error
        if existing.request_digest != request_digest:
            raise UserError(
                f"another job is named {job_id} ({existing.state}): give another --job-id, or look at it with "
                f"sogclr status {job_id}"
            )
        return existing, False

    def cancel(self, job_id: str) -> Job:
        """Requests the cancellation of a job, unless it has ended, and returns the job."""
        job = self.get(job_id)
        if not job.ended:
            name = f"{self.place.folder}/pipelineJobs/{job_id}"
            self._call(lambda timeout: self._jobs.cancel_pipeline_job(name=name, timeout=timeout, retry=None))
        return self.get(job_id)

    def schedule(self, name: str, cron: str, job: aiplatform_v1.PipelineJob, max_runs: int) -> tuple[str, bool]:
        """Returns the resource name of a schedule that repeats `job`, and whether this call created it.

        An active schedule with the same name, cron expression and job is reused.
        """
        request_digest = job.labels[REQUEST_LABEL]
        listing = aiplatform_v1.ListSchedulesRequest(parent=self.place.folder, filter=f'display_name="{name}"')

        def existing() -> str:
            found = self._call(lambda timeout: list(self._schedules.list_schedules(listing, timeout=timeout, retry=None)))
            for one in found:
                same = one.create_pipeline_job_request.pipeline_job.labels.get(REQUEST_LABEL) == request_digest
                if same and one.cron == cron and one.state == aiplatform_v1.Schedule.State.ACTIVE:
                    return str(one.name)
            return ""

        if found := existing():
            return found, False
        schedule = aiplatform_v1.Schedule(
            display_name=name,
            cron=cron,
            max_concurrent_run_count=1,
            max_run_count=max_runs or None,
            create_pipeline_job_request=aiplatform_v1.CreatePipelineJobRequest(parent=self.place.folder, pipeline_job=job),
        )

        def create(timeout: float) -> aiplatform_v1.Schedule:
            return self._schedules.create_schedule(parent=self.place.folder, schedule=schedule, timeout=timeout, retry=None)

        # The service chooses a schedule's ID. If an answer was lost, the schedule may exist, so look before each retry.
        return self._call(lambda timeout: create(timeout).name, before_retry=existing), True

    def delete_schedule(self, name: str) -> None:
        """Ends a schedule, by its resource name. Its jobs go on. Raises UserError if there is no such schedule."""
        self._call(lambda timeout: self._schedules.delete_schedule(name=name, timeout=timeout, retry=None))

    def follow(self, job_id: str, say: Callable[[str], None]) -> Job:
        """Waits until a job has ended and returns it. Calls `say` with a line for each change of state."""
        said: dict[str, str] = {}

        def tell(name: str, state: str, more: str) -> None:
            if state and said.get(name) != state:
                said[name] = state
                say(f"[{name}] {state.lower()}{more}")

        while True:
            job = self.get(job_id, _PATIENCE_OF_FOLLOWING)
            tell("job", job.state, "")
            for task in job.tasks:
                reason = f": {task.error}" if task.error else ""
                tell(task.name, task.state, f"{reason}{f'  {task.logs}' if task.logs else ''}")
            if job.ended:
                return job
            time.sleep(_SECONDS_BETWEEN_POLLS)

    def _call(
        self, call: Callable[[float], T], patience: float | None = None, before_retry: Callable[[], T | None] = lambda: None
    ) -> T:
        """Returns the result of `call(timeout)`. Repeats the call after a transient error.

        Calls `before_retry` before each repetition, because an answer may have been lost. A true result is returned instead.
        """
        tries = tenacity.Retrying(
            retry=tenacity.retry_if_exception(_is_transient),
            stop=tenacity.stop_before_delay(_PATIENCE if patience is None else patience),
            wait=tenacity.wait_exponential(_FIRST_WAIT, _LONGEST_WAIT),
            before_sleep=_say_once,
            reraise=True,
        )

        def once() -> T:
            known = before_retry() if tries.statistics["attempt_number"] > 1 else None
            return known or call(_SECONDS_FOR_A_CALL)

        try:
            return tries(once)
        except (exceptions.GoogleAPICallError, requests.RequestException, auth_exceptions.GoogleAuthError) as error:
            raise self._as_user_error(error) from error

    def _as_user_error(self, error: Exception) -> UserError:
        where = self.place.folder
        match error:
            case exceptions.NotFound():
                return _NotFoundError(f"Vertex AI finds nothing of that name in {where}: {_short(error)}")
            case exceptions.AlreadyExists() | exceptions.Conflict():
                return _AlreadyExistsError(_short(error))
            case exceptions.Unauthorized() | auth_exceptions.GoogleAuthError():
                return UserError(
                    f"the credentials are not valid ({_short(error)}): gcloud auth application-default login renews them"
                )
            case exceptions.Forbidden():
                return UserError(f"not allowed in {where} ({_short(error)}): docs/vertex.md lists the roles and APIs to grant")
            case exceptions.TooManyRequests():
                return UserError(f"Vertex AI is out of quota in {where} ({_short(error)}): wait, or ask for more quota")
            case exceptions.ClientError():
                return UserError(f"Vertex AI refuses: {_short(error)}")
            case exceptions.GoogleAPICallError():
                return _NoAnswerError(
                    f"Vertex AI in {self.place.region} has an internal error ({_short(error)}): try again later"
                )
        return _NoAnswerError(f"Vertex AI in {self.place.region} cannot be reached ({_short(error)}): try again later")

    def _job(self, found: aiplatform_v1.PipelineJob) -> Job:
        # JSON keeps KFP's own field names.
        spec = json_format.MessageToDict(aiplatform_v1.PipelineJob.pb(found).pipeline_spec)
        parameters = json_format.MessageToDict(aiplatform_v1.PipelineJob.pb(found).runtime_config).get("parameterValues", {})
        job_id = found.name.rpartition("/")[2]
        order = {name: number for number, name in enumerate((*COMPONENTS, "record-lineage", "end-pipeline"))}
        tasks = [self._task(one) for one in found.job_detail.task_details if one.task_name in order]
        return Job(
            job_id=job_id,
            state=found.state.name.removeprefix("PIPELINE_STATE_"),
            error=" ".join(found.error.message.split()) if found.error.code else "",
            link=self.place.job_link(job_id),
            request_digest=found.labels.get(REQUEST_LABEL, ""),
            tasks=tuple(sorted(tasks, key=lambda task: order[task.name])),
            spec=spec,
            parameters=parameters,
            pipeline_root=found.runtime_config.gcs_output_directory,
        )

    def _task(self, found: aiplatform_v1.PipelineTaskDetail) -> Task:
        detail = found.executor_detail
        resource = detail.custom_job_detail.job or detail.container_detail.main_job
        query = f"resource.labels.job_id%3D%22{resource.rpartition('/')[2]}%22"
        return Task(
            name=found.task_name,
            state=found.state.name if found.state else "",
            error=" ".join(found.error.message.split()) if found.error.code else "",
            logs=console.logs_page(self.place.project, query) if resource else "",
            outputs={
                name: Artifact(one.artifacts[0].schema_title, one.artifacts[0].uri, _plain(one.artifacts[0]))
                for name, one in found.outputs.items()
                if one.artifacts
            },
        )


def _plain(artifact: aiplatform_v1.Artifact) -> dict[str, Any]:
    return dict(json_format.MessageToDict(aiplatform_v1.Artifact.pb(artifact).metadata))


class _NotFoundError(UserError):
    pass


class _AlreadyExistsError(UserError):
    pass


class _NoAnswerError(UserError):
    pass


def _say_once(state: tenacity.RetryCallState) -> None:
    """Prints after the first failure of a call that it is repeated."""
    if state.attempt_number == 1 and state.outcome and isinstance(error := state.outcome.exception(), Exception):
        print(f"Vertex AI: {_short(error)}; trying again", file=sys.stderr, flush=True)


def _is_transient(error: BaseException) -> bool:
    if isinstance(error, exceptions.GoogleAPICallError):
        return isinstance(error, exceptions.TooManyRequests | exceptions.ServerError)
    return isinstance(error, requests.ConnectionError | requests.Timeout | auth_exceptions.TransportError)


def _short(error: Exception) -> str:
    said = error.message if isinstance(error, exceptions.GoogleAPICallError) else str(error)
    code = f"{error.code} " if isinstance(error, exceptions.GoogleAPICallError) else f"{type(error).__name__}: "
    return f"{code}{' '.join(str(said).split())}"[:300]

"""A conversion's job on Dataflow. A later attempt at the same conversion finds the job and waits for it.

If the waiting process is terminated, it cancels the job. The job has a label that names the conversion. If a pipeline job started
it, it has another label that names the pipeline job.
"""

import contextlib
import hashlib
import sys
import time
from collections.abc import Iterator
from typing import Any

import apache_beam as beam
import tenacity
from apache_beam.options.pipeline_options import GoogleCloudOptions
from apache_beam.runners.runner import PipelineState
from apache_beam.utils import retry

from trainer.shared.errors import UserError

_CONVERSION = "sogclr-conversion"
_SECONDS_FOR_A_CALL = 5.0
_SECONDS_TO_CANCEL = 12.0
"""How long cancelling is retried. The process must end soon after SIGTERM, even if Dataflow does not answer."""
_SECONDS_BETWEEN_TRIES = 1.0
_SECONDS_BETWEEN_POLLS = 5.0


class DataflowJobError(Exception):
    """A job on Dataflow failed or was cancelled."""


def _is_transient(error: BaseException) -> bool:
    """Returns whether the same call may succeed later. Beam's filter treats any error that is not Google's as transient."""
    return isinstance(error, Exception) and not isinstance(error, UserError) and retry.retry_on_server_errors_filter(error)


def is_dataflow(pipeline: beam.Pipeline) -> bool:
    return type(pipeline.runner).__name__ == "DataflowRunner"


class Conversion:
    """The job on Dataflow that does a conversion. Any attempt may have started it."""

    def __init__(self, pipeline: beam.Pipeline, output: str, identity: str) -> None:
        """Labels the job that `pipeline` will start, and names it if the user did not.

        identity: digest of what the job does in the folder `output`
        """
        # Imported here: Dataflow's client takes seconds to import, and a run on one machine does not need it.
        from apache_beam.runners.dataflow.internal import apiclient

        self._api: Any = vars(apiclient)["dataflow"]  # the messages of Dataflow's own client
        self._runner: Any = pipeline.runner
        self._options = pipeline.options
        self._google = pipeline.options.view_as(GoogleCloudOptions)
        # Each conversion and each output folder has a job of its own.
        self._digest = hashlib.sha256(f"{output}\n{identity}".encode()).hexdigest()[:20]
        self._google.job_name = self._google.job_name or f"build-tfrecords-{self._digest}"
        self._google.labels = [*(self._google.labels or []), f"{_CONVERSION}={self._digest}"]
        self._client = apiclient.DataflowApplicationClient(pipeline.options)
        self._job_id = ""

    def running(self) -> Any:
        """Returns the DataflowPipelineResult of an earlier attempt's job that still runs, or None.

        Waits for the end of a job that is being cancelled. Raises UserError if another conversion's job has the same name.
        """
        from apache_beam.runners.dataflow.dataflow_runner import DataflowPipelineResult

        while found := self._find():
            if found.current_state != self._api.JobState.JOB_STATE_CANCELLING:
                print(f"going on with Dataflow job {found.name} ({found.id}) of an earlier attempt", file=sys.stderr, flush=True)
                self._job_id = found.id
                self._runner.dataflow_client = self._client
                return DataflowPipelineResult(found, self._runner, self._options)
            time.sleep(_SECONDS_BETWEEN_POLLS)
        return None

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Cancels the job if the process is terminated or interrupted while the block runs."""
        try:
            yield
        except (KeyboardInterrupt, SystemExit):
            self._cancel()
            raise

    def wait(self, result: Any) -> None:
        """Waits until the job of a DataflowPipelineResult has finished. Raises DataflowJobError with its name if it fails."""
        from apache_beam.runners.dataflow.dataflow_runner import DataflowRuntimeException

        self._job_id = result.job_id()
        try:
            state = result.wait_until_finish()
        except DataflowRuntimeException as error:
            raise DataflowJobError(f"Dataflow job {self._google.job_name} ({self._job_id}): {error}") from error
        if state != PipelineState.DONE:  # the job had ended before this wait began, so Beam raised nothing
            raise DataflowJobError(f"Dataflow job {self._google.job_name} ({self._job_id}) is {state}")

    @retry.with_exponential_backoff(retry_filter=_is_transient)
    def _find(self) -> Any:
        """Returns the active job of this conversion, or None. Raises UserError if another conversion's job has its name."""
        return self._find_once(timeout=60.0)

    def _find_once(self, timeout: float) -> Any:
        # `job_id_for_name` of Beam's client finds running jobs only, and never returns if there is none.
        listing = self._api.ListJobsRequest(
            project_id=self._google.project,
            location=self._google.region,
            filter=self._api.ListJobsRequest.Filter.ACTIVE,
            name=self._google.job_name,
        )
        for job in self._client._jobs_client.list_jobs(listing, timeout=timeout):
            if job.name != self._google.job_name:
                continue
            # Listed jobs come without their labels.
            request = self._api.GetJobRequest(
                project_id=self._google.project,
                location=self._google.region,
                job_id=job.id,
                view=self._api.JobView.JOB_VIEW_DESCRIPTION,
            )
            whole = self._client._jobs_client.get_job(request, timeout=timeout)
            if whole.labels.get(_CONVERSION) != self._digest:
                raise UserError(
                    f"Dataflow job {job.name} ({job.id}) is active and does something else: leave out --job_name, or give another"
                )
            return whole
        return None

    def _cancel(self) -> None:
        """Asks Dataflow to end the job, repeatedly for `_SECONDS_TO_CANCEL`, and prints the outcome."""
        try:
            if self._ask_to_cancel():
                _say(f"Dataflow job {self._job_id} is cancelled")
        except Exception as error:
            command = f"gcloud dataflow jobs cancel {self._job_id or 'ID'} --region={self._google.region}"
            _say(f"Dataflow job {self._google.job_name} may go on ({_short(error)}): {command}")

    # Beam's own `cancel` and its own retries would wait for minutes.
    @tenacity.retry(
        retry=tenacity.retry_if_exception(_is_transient),
        wait=tenacity.wait_fixed(_SECONDS_BETWEEN_TRIES),
        stop=tenacity.stop_after_delay(_SECONDS_TO_CANCEL),
        reraise=True,
    )
    def _ask_to_cancel(self) -> bool:
        """Returns whether there was a job to cancel."""
        # The request that started the job may not have been answered yet; then the job's ID is unknown.
        if not self._job_id and not (found := self._find_once(_SECONDS_FOR_A_CALL)):
            return False
        self._job_id = self._job_id or found.id
        wish = self._api.Job(requested_state=self._api.JobState.JOB_STATE_CANCELLED)
        request = self._api.UpdateJobRequest(
            project_id=self._google.project, location=self._google.region, job_id=self._job_id, job=wish
        )
        self._client._jobs_client.update_job(request, timeout=_SECONDS_FOR_A_CALL)
        return True


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:200]

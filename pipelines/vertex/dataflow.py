"""Cancels the Dataflow jobs of a pipeline job from this machine, because the step that waits for them may be gone."""

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

import tenacity
from google.api_core import exceptions
from google.auth import exceptions as auth_exceptions

from components.dataflow import JOB_LABEL, label_of
from pipelines.vertex.jobs import Job
from trainer.shared.errors import UserError

if TYPE_CHECKING:
    from google.auth.credentials import Credentials
    from google.cloud import dataflow_v1beta3

_SECONDS_FOR_A_CALL = 30.0
_TRIES = 4
_FIRST_WAIT = 1.0


class DataflowError(Exception):
    """A request to Dataflow failed. The message says what to do instead."""


def cancel(job: Job, credentials: "Credentials") -> list[str]:
    """Cancels the active Dataflow jobs of a pipeline job and returns their IDs. Raises DataflowError if Dataflow refuses."""
    options = _options(job)
    if options.get("runner") != "DataflowRunner":
        return []
    from google.cloud import dataflow_v1beta3 as api

    endpoint = {"api_endpoint": options["dataflow_endpoint"]} if "dataflow_endpoint" in options else {}
    client = api.JobsV1Beta3Client(transport="rest", client_options=endpoint, credentials=credentials)
    place = {"project_id": options["project"], "location": options["region"]}
    cancelled: list[str] = []

    def once() -> None:
        for found in _active(client, place, label_of(job.job_id)):
            wish = api.Job(requested_state=api.JobState.JOB_STATE_CANCELLED)
            request = api.UpdateJobRequest(job_id=found, job=wish, **place)
            client.update_job(request, timeout=_SECONDS_FOR_A_CALL, retry=None)
            cancelled.append(found)

    tries = tenacity.Retrying(
        retry=tenacity.retry_if_exception(_is_transient),
        stop=tenacity.stop_after_attempt(_TRIES),
        wait=tenacity.wait_exponential(_FIRST_WAIT),
        reraise=True,
    )
    try:
        tries(once)
    except (exceptions.GoogleAPICallError, auth_exceptions.GoogleAuthError, OSError) as error:
        listing = f"gcloud dataflow jobs list --status=active --project={options['project']} --region={options['region']}"
        said = " ".join(str(error).split())[:200]
        raise DataflowError(f"a Dataflow job of {job.job_id} may go on ({said}); {listing} shows it") from error
    return list(dict.fromkeys(cancelled))


def _is_transient(error: BaseException) -> bool:
    failed = isinstance(error, exceptions.GoogleAPICallError | auth_exceptions.GoogleAuthError | OSError)
    return failed and not isinstance(error, exceptions.ClientError)


def _options(job: Job) -> dict[str, str]:
    """Returns Beam's options of a job's build-tfrecords, by name; empty if the job has no such step."""
    try:
        given = job.arguments("build-tfrecords").get("beam_args") or []
    except UserError:
        return {}
    return {found[1]: found[2] for one in given if (found := re.fullmatch(r"--(\w+)=(.*)", one))}


def _active(client: "dataflow_v1beta3.JobsV1Beta3Client", place: dict[str, str], label: str) -> Iterator[str]:
    from google.cloud import dataflow_v1beta3 as api

    listing = api.ListJobsRequest(filter=api.ListJobsRequest.Filter.ACTIVE, **place)
    for one in client.list_jobs(listing, timeout=_SECONDS_FOR_A_CALL, retry=None):
        if one.current_state == api.JobState.JOB_STATE_CANCELLING:
            continue
        # Listed jobs come without their labels.
        request = api.GetJobRequest(job_id=one.id, view=api.JobView.JOB_VIEW_DESCRIPTION, **place)
        if client.get_job(request, timeout=_SECONDS_FOR_A_CALL, retry=None).labels.get(JOB_LABEL) == label:
            yield one.id

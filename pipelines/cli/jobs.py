"""The commands status and cancel for jobs on Vertex AI, and following a job until it ends."""

import json
import sys
from argparse import Namespace
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipelines.cli.options import Commands, Output, add_command, add_json, add_place, read_output
from pipelines.vertex.jobs import Job, JobName, Place, as_json, parse_job, parse_schedule

if TYPE_CHECKING:
    from pipelines.vertex.client import Vertex


def add_to(commands: Commands) -> None:
    """Adds the commands of this module."""
    summary = "Show the state of a job on Vertex AI: its steps, their errors, links to their logs."
    status = add_command(commands, "status", _read_job, show_status, summary)
    status.add_argument("job", metavar="JOB", help="ID of the job, or projects/P/locations/R/pipelineJobs/ID")

    summary = "End a job or a schedule on Vertex AI. Checkpoints stay, and a later job resumes from them."
    cancel = add_command(commands, "cancel", _read_cancelled, _cancel, summary)
    cancel.add_argument(
        "job", metavar="JOB", help="ID of the job, or projects/P/locations/R/pipelineJobs/ID, or a schedule's .../schedules/ID"
    )
    for one in (status, cancel):
        add_place(one, "of the job")
        one.add_argument("--wait", action="store_true", help="follow the job until it has ended")
        add_json(one)


@dataclass(frozen=True)
class JobOptions:
    """A job and how to show it."""

    name: JobName
    wait: bool
    output: Output


@dataclass(frozen=True)
class ScheduleOptions:
    """A schedule to end."""

    place: Place
    name: str
    """Full resource name of the schedule."""
    output: Output


def _read_job(args: Namespace) -> JobOptions:
    name = parse_job(args.job, args.project, args.region, args.endpoint)
    return JobOptions(name, args.wait, read_output(args))


def _read_cancelled(args: Namespace) -> JobOptions | ScheduleOptions:
    if place := parse_schedule(args.job, args.endpoint):
        return ScheduleOptions(place, args.job, read_output(args))
    return _read_job(args)


def connect(place: Place) -> "Vertex":
    """Returns a client for a place, with the credentials of this machine."""
    from pipelines.vertex.client import Vertex
    from pipelines.vertex.credentials import find_credentials

    return Vertex(place, find_credentials()[0])


def show_status(options: JobOptions) -> int:
    """Prints the state of a job. Returns 1 if the job failed, else 0."""
    job = follow(options.name, options.output) if options.wait else connect(options.name.place).get(options.name.job_id)
    return show(job, options.output)


def _cancel(options: JobOptions | ScheduleOptions) -> int:
    return cancel_schedule(options) if isinstance(options, ScheduleOptions) else cancel_job(options)


def cancel_schedule(options: ScheduleOptions) -> int:
    """Ends a schedule. Its jobs go on."""
    connect(options.place).delete_schedule(options.name)
    done = {"schedule": options.name, "state": "DELETED"}
    print(json.dumps(done) if options.output.json else f"deleted: {options.name}")
    return 0


def cancel_job(options: JobOptions) -> int:
    """Ends a job and its Dataflow jobs. If Dataflow refuses, prints a warning and still returns 0."""
    from pipelines.vertex import dataflow
    from pipelines.vertex.client import Vertex
    from pipelines.vertex.credentials import find_credentials

    who = find_credentials()[0]
    job = Vertex(options.name.place, who).cancel(options.name.job_id)
    try:
        for found in dataflow.cancel(job, who):
            print(f"cancelled: Dataflow job {found}", file=options.output.beside, flush=True)
    except dataflow.DataflowError as error:
        print(f"warning: {error}", file=sys.stderr, flush=True)
    if options.wait and not job.ended:
        job = follow(options.name, options.output)
    print_job(job, options.output)
    return 0


def follow(name: JobName, output: Output) -> Job:
    """Waits until a job has ended, prints each change of state, and returns the job."""
    place = name.place
    try:
        return connect(place).follow(name.job_id, lambda line: print(line, file=output.beside, flush=True))
    except KeyboardInterrupt:
        where = f"{name.job_id} --project {place.project} --region {place.region}"
        print(f"\nthe job goes on; sogclr status {where} shows it, sogclr cancel {where} ends it", file=sys.stderr)
        raise


def show(job: Job, output: Output) -> int:
    """Prints a job. If it failed, prints an error that names the step and returns 1, else 0."""
    print_job(job, output)
    return exit_code(job)


def print_job(job: Job, output: Output) -> None:
    if output.json:
        print(json.dumps(as_json(job)))
        return
    print(f"{job.job_id}: {job.state.lower()}{f': {job.error}' if job.error else ''}\n{job.link}")
    for task in job.tasks:
        reused = {"SKIPPED": "reused from the cache"}.get(task.state, task.state.lower())
        print(f"  {task.name:<16} {reused}{f': {task.error}' if task.error else ''}")
        if task.logs:
            print(f"  {'':<16} {task.logs}")


def exit_code(job: Job) -> int:
    """Returns 1 if a job failed or was cancelled, and prints the step that failed. Returns 0 otherwise."""
    if job.state in ("FAILED", "CANCELLED", "PAUSED"):
        failed = next((task for task in job.tasks if task.state == "FAILED"), None)
        what = f"{failed.name} failed: {failed.error or 'see its logs'}" if failed else job.error or job.state.lower()
        print(f"error: job {job.job_id} {job.state.lower()}: {what}", file=sys.stderr)
        return 1
    return 0

"""Sends a job to Vertex AI: the options, the checks before, and the printed results."""

import argparse
import json
from argparse import Namespace
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipelines.cli.formats import check_options
from pipelines.cli.jobs import exit_code, follow, print_job, show
from pipelines.cli.options import Output
from pipelines.vertex.jobs import JobName
from pipelines.vertex.preflight import CHECKS, Finding, PreflightReport, run_preflight
from trainer.shared.errors import UserError

if TYPE_CHECKING:
    from pipelines.vertex.submission import Sent, Submission


@dataclass(frozen=True)
class Sending:
    """How a job is sent."""

    dry_run: bool
    wait: bool
    job_id: str
    """ID of the job; empty for one made of the experiment's name and the time."""
    skip: tuple[str, ...]
    """Checks to skip."""


def add_sending(one: argparse.ArgumentParser) -> None:
    group = one.add_argument_group("sending")
    group.add_argument("--dry-run", action="store_true", help="print the plan and the checks; submit nothing")
    group.add_argument("--wait", action="store_true", help="follow the job until it has ended")
    group.add_argument("--job-id", default="", metavar="ID", help="name of the job; the same name twice makes one job")
    group.add_argument(
        "--skip-check", nargs="+", action="extend", default=[], metavar="NAME", help=f"skip checks: {', '.join(CHECKS)}"
    )


def read_sending(args: Namespace) -> Sending:
    check_options({"--job-id": args.job_id})
    if unknown := set(args.skip_check) - set(CHECKS):
        raise UserError(f"--skip-check {min(unknown)} is not a check; the checks are {', '.join(CHECKS)}")
    return Sending(args.dry_run, args.wait, args.job_id, tuple(args.skip_check))


def job_id_of(name: str, when: str) -> str:
    """Returns the default ID of a job."""
    return f"sogclr-{name.replace('_', '-').removeprefix('sogclr-')}{when}"


def send(submission: "Submission", estimates: Iterable[Finding], sending: Sending, output: Output) -> int:
    """Checks a submission, prints its plan and the findings, and sends it if all checks pass.

    Returns the exit code of the command. Raises UserError if a check fails.
    """
    report = run_preflight(submission, estimates, sending.skip)
    _print_report(report, output)
    if sending.dry_run:
        hint = "" if report.problems else "; without --dry-run it is sent"
        print(f"\nnothing was submitted: this was a dry run{hint}", file=output.beside)
        if output.json:
            print(json.dumps(_report_as_json(report)))
    if report.problems:
        raise UserError(f"{'it would not work' if sending.dry_run else 'nothing was submitted'}: {_in_words(report.problems)}")
    return 0 if sending.dry_run else _send(report, sending, output)


def _print_report(report: PreflightReport, output: Output) -> None:
    said = output.beside
    width = max(len(name) for name, _ in report.submission.lines())
    for name, text in report.submission.lines():
        print(f"{name:<{width}}  {text}", file=said)
    print(file=said)
    for finding in report.findings:
        mark = "ok" if finding.ok and finding.looked else "missing" if finding.looked else "?"
        print(f"{mark:<7}  {finding.name}: {finding.text}", file=said)
    said.flush()


def _report_as_json(report: PreflightReport) -> dict[str, object]:
    return {
        "plan": dict(report.submission.lines()),
        "checks": {one.name: {"ok": one.ok, "looked": one.looked, "text": one.text} for one in report.findings},
    }


def _in_words(problems: Iterable[Finding]) -> str:
    missing, waiting = ([one.name for one in problems if one.looked is looked] for looked in (True, False))
    later = f"; {', '.join(waiting)} can be checked then" if waiting else ""
    return f"{', '.join(missing)} must be fixed first{later}"


def _send(report: PreflightReport, sending: Sending, output: Output) -> int:
    from pipelines.vertex.submission import submit

    assert report.credentials is not None, "a submission without credentials has problems"
    place = report.submission.place
    sent = submit(report.submission, report.credentials)
    where = f" --endpoint {place.endpoint}" if place.endpoint else ""
    if sent.job is None:
        _print_schedule(sent, where, output)
        return 0
    print(f"\n{'submitted' if sent.is_new else 'was there already'}: {sent.name}\n{sent.job.link}", file=output.beside)
    if sending.wait:
        return show(follow(JobName(place, sent.name), output), output)
    if output.json:
        print_job(sent.job, output)
    elif not sent.job.ended:
        print(f"follow it: sogclr status {sent.name} --project {place.project} --region {place.region}{where} --wait")
    return exit_code(sent.job)


def _print_schedule(sent: "Sent", where: str, output: Output) -> None:
    said = (
        f"\n{'schedule' if sent.is_new else 'schedule was there already'}: {sent.name}\nend it: sogclr cancel {sent.name}{where}"
    )
    print(json.dumps({"schedule": sent.name}) if output.json else said)

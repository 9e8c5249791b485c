"""The commands that have to do with Vertex AI: compile, submit, status, cancel, and a step done again there."""

import argparse
import json
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from components import variables
from components.lineage import Artifact
from pipelines import accelerators, dataflow, pipeline, vertex
from pipelines import submission as sending
from pipelines.accelerators import Accelerator
from pipelines.code import git_commit, program_version, step_version, uncommitted
from pipelines.evaluation_plan import EvaluationPlan, Limits, make_evaluation_plan
from pipelines.images import Images
from pipelines.pipeline import LONGEST_HOURS, Cluster
from pipelines.plan import Plan, assumptions, kept_plan
from pipelines.submission import CHECKS, Checked, Submission, base_output_directory, check_options, parse_labels
from pipelines.vertex import Job, Place, as_json
from trainer.config import Config, split_overrides
from trainer.presets import resolve
from trainer.shared.errors import UserError


def compile_(args: argparse.Namespace) -> int:
    config = resolve(args.preset, args.overrides)
    output = Path(os.path.abspath(args.output))
    if not output.parent.is_dir() or output.is_dir():
        raise UserError(f"--output {args.output} cannot be written: name a file in a folder that exists")
    _check_machines(args)
    accelerator = accelerators.get(args.accelerator) if args.accelerator else None
    if accelerator:
        accelerators.check(accelerator, config)
        plan = _kept_plan(args, args.preset, config)
        if plan and not plan.values["fits"]:
            raise UserError(plan.memory)
        evaluation = _evaluation_plan(args, args.preset, config)
        if evaluation.problems:
            raise UserError(evaluation.problems[0])

    defaults = {"preset": args.preset, **_overrides(args), "raw_identity": ""} | ({"raw": args.raw} if args.raw else {})
    if accelerator and args.pipeline_root:
        defaults["base_output_directory"] = base_output_directory(args.pipeline_root)
    pipeline.write(pipeline.compile_pipeline(_cluster(args), defaults), output)
    print(args.output)
    return 0


def submit(args: argparse.Namespace) -> int:
    config = resolve(args.preset, args.overrides)
    _check_machines(args)
    accelerators.check(accelerators.get(args.accelerator), config)
    for name in ("project", "region", "pipeline_root", "raw"):
        if not getattr(args, name):
            raise UserError(f"--{name.replace('_', '-')} is empty; sogclr submit --help says what it must be")
    if args.max_runs and not args.schedule:
        raise UserError(f"--max-runs {args.max_runs} is for --schedule")

    parameters = {
        "raw": args.raw.rstrip("/"),
        "raw_identity": "",
        "preset": args.preset,
        **_overrides(args),
        "base_output_directory": base_output_directory(args.pipeline_root),
    }
    cluster = _cluster(args)
    return _send(
        args,
        Submission(
            place=Place(args.project, args.region, args.endpoint),
            # A schedule has no time of its own: asked for twice, it is one.
            job_id=args.job_id or _job_id(args.preset, "" if args.schedule else time.strftime("-%Y%m%d-%H%M%S")),
            title=f"{args.preset}, the whole pipeline",
            cluster=cluster,
            pipeline_root=args.pipeline_root.rstrip("/"),
            raw=parameters["raw"],
            compile=lambda cluster: pipeline.compile_pipeline(cluster, {}),
            parameters=parameters,
            schedule=args.schedule,
            max_runs=args.max_runs,
            plan=_kept_plan(args, args.preset, config),
            evaluation=_evaluation_plan(args, args.preset, config),
        ),
    )


def send_step(args: argparse.Namespace, place: Place, job: Job, before: Mapping[str, Any], inputs: Mapping[str, Artifact]) -> int:
    """Does a component of `job` again on Vertex AI."""
    component = args.component
    _check_machines(args)
    plan = evaluation = None
    root = (args.pipeline_root or job.pipeline_root).rstrip("/")
    args.project, args.region, args.pipeline_root = place.project, place.region, root
    arguments = {**before, "code_version": step_version(component)}
    if component == "pretrain":
        arguments["overrides"] = [*before["overrides"], *args.overrides]
        config = resolve(arguments["preset"], arguments["overrides"])
        accelerators.check(accelerators.get(args.accelerator), config)
        plan = _kept_plan(args, arguments["preset"], config)
    elif component == "linear-eval":
        arguments["overrides"] = [*before["overrides"], *args.overrides]
        args.eval_accelerator = args.accelerator
        pretraining = job.arguments("pretrain")
        config = resolve(pretraining["preset"], [*pretraining["overrides"], *arguments["overrides"]])
        evaluation = _evaluation_plan(args, pretraining["preset"], config, "--accelerator")
    cluster = _cluster(args)
    done = next((task.outputs for task in job.tasks if task.name == component), {})
    source = next((str(one.metadata.get("run_id", "")) for one in done.values()), "")
    environment = {**cluster.environment, **({variables.RERUN_OF: source} if source else {})}

    def compiled(cluster: Cluster) -> dict[str, Any]:
        beam = {"beam_args": list(cluster.beam_args)} if component == "build-tfrecords" else {}
        return pipeline.compile_step(cluster, component, {**arguments, **beam}, inputs, base_output_directory(root))

    return _send(
        args,
        Submission(
            place=place,
            job_id=args.job_id or _job_id(f"rerun-{component}", time.strftime("-%Y%m%d-%H%M%S")),
            title=f"{component} of job {job.job_id} again",
            cluster=replace(cluster, environment=environment, caching=False),
            pipeline_root=root,
            raw=arguments.get("raw", ""),
            compile=compiled,
            parameters={},
            components=(component,),
            plan=plan,
            evaluation=evaluation,
        ),
    )


def _kept_plan(args: argparse.Namespace, preset: str, config: Config) -> Plan | None:
    """Returns what `sogclr plan` found of this step, if it was asked before with the same --root."""
    version = program_version("trainer/lowering.py")
    return kept_plan(preset, config, accelerators.get(args.accelerator), cache=_plans(args), version=version)


def _evaluation_plan(args: argparse.Namespace, preset: str, config: Config, option: str = "--eval-accelerator") -> EvaluationPlan:
    """Returns what the evaluation will need; `option` names its machine. It compiles nothing."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # Protocols may import TensorFlow, which says much as it begins.
    machine = _eval_accelerator(args)
    return make_evaluation_plan(
        config,
        machine,
        assumptions(preset, machine),
        Limits(args.disk_gb, args.timeout_hours, option, args.region),
        python=None,
        cache=_plans(args),
        version=program_version("eval/measure/programs.py"),
    )


def _check_machines(args: argparse.Namespace) -> None:
    """Raises UserError where a custom job cannot have the machine that an option names."""
    machines = {"--accelerator": args.accelerator, "--eval-accelerator": args.eval_accelerator} if args.accelerator else {}
    for option, name in machines.items():
        if name:
            accelerators.check_usable(accelerators.get(name), option, spot=args.spot, force=args.force_accelerator)


def _eval_accelerator(args: argparse.Namespace) -> Accelerator:
    return accelerators.get(args.eval_accelerator or args.accelerator or "cpu")


def _plans(args: argparse.Namespace) -> Path:
    """Returns the folder where `sogclr plan` keeps what it compiled."""
    return Path(os.path.abspath(args.root)) / "plans"


def _send(args: argparse.Namespace, submission: Submission) -> int:
    unknown = set(args.skip_check) - set(CHECKS)
    if unknown:
        raise UserError(f"--skip-check {min(unknown)} is no check; there are {', '.join(CHECKS)}")
    checked = sending.look(submission, args.skip_check)
    said = sys.stderr if args.json else sys.stdout
    width = max(len(name) for name, _ in checked.submission.lines())
    for name, text in checked.submission.lines():
        print(f"{name:<{width}}  {text}", file=said)
    print(file=said)
    for finding in checked.findings:
        mark = "ok" if finding.ok and finding.looked else "missing" if finding.looked else "?"
        print(f"{mark:<7}  {finding.name}: {finding.text}", file=said)
    said.flush()
    if args.dry_run:
        print(
            f"\nnothing was submitted: this was a dry run{'' if checked.problems else '; without --dry-run it is sent'}",
            file=said,
        )
        if args.json:
            print(json.dumps(_plan_as_json(checked)))
    if checked.problems:
        missing, waiting = ([one.name for one in checked.problems if one.looked is looked] for looked in (True, False))
        named = f"{', '.join(missing)} must be mended first" + (
            f"; {', '.join(waiting)} can be looked at then" if waiting else ""
        )
        raise UserError(f"{'it would not work' if args.dry_run else 'nothing was submitted'}: {named}")
    if args.dry_run:
        return 0
    job, name, made = sending.submit(checked)
    where = f" --endpoint {args.endpoint}" if args.endpoint else ""
    if job is None:
        there = f"\n{'schedule' if made else 'schedule was there already'}: {name}\nend it: sogclr cancel {name}{where}"
        print(json.dumps({"schedule": name}) if args.json else there)
        return 0
    print(f"\n{'submitted' if made else 'was there already'}: {name}\n{job.link}", file=said)
    if args.wait:
        return _follow(args, submission.place, name)
    if args.json:
        _print_job(args, job)
    elif not job.ended:
        print(f"follow it: sogclr status {name} --project {args.project} --region {args.region}{where} --wait")
    return _exit_code(job)


def _plan_as_json(checked: Checked) -> dict[str, Any]:
    return {
        "plan": dict(checked.submission.lines()),
        "checks": {one.name: {"ok": one.ok, "looked": one.looked, "text": one.text} for one in checked.findings},
    }


def status(args: argparse.Namespace) -> int:
    place, job_id = vertex.parse_job(args.job, args.project, args.region, args.endpoint)
    if args.wait:
        return _follow(args, place, job_id)
    job = vertex.Vertex(place, vertex.credentials()[0]).get(job_id)
    _print_job(args, job)
    return _exit_code(job)


def cancel(args: argparse.Namespace) -> int:
    if there := vertex.parse_schedule(args.job, args.endpoint):
        vertex.Vertex(there, vertex.credentials()[0]).delete_schedule(args.job)
        print(json.dumps({"schedule": args.job, "state": "DELETED"}) if args.json else f"deleted: {args.job}")
        return 0
    place, job_id = vertex.parse_job(args.job, args.project, args.region, args.endpoint)
    credentials = vertex.credentials()[0]
    job = vertex.Vertex(place, credentials).cancel(job_id)
    said = sys.stderr if args.json else sys.stdout
    try:
        for found in dataflow.cancel(job, credentials):
            print(f"cancelled: Dataflow job {found}", file=said, flush=True)
    except dataflow.DataflowError as error:
        print(f"warning: {error}", file=sys.stderr, flush=True)
    if args.wait and not job.ended:
        job = _followed(args, place, job_id)
    _print_job(args, job)
    return 0


def _follow(args: argparse.Namespace, place: Place, job_id: str) -> int:
    job = _followed(args, place, job_id)
    _print_job(args, job)
    return _exit_code(job)


def _followed(args: argparse.Namespace, place: Place, job_id: str) -> Job:
    """Returns a job once it has ended."""
    try:
        return vertex.Vertex(place, vertex.credentials()[0]).follow(
            job_id, lambda line: print(line, file=sys.stderr if args.json else sys.stdout, flush=True)
        )
    except KeyboardInterrupt:
        where = f"{job_id} --project {place.project} --region {place.region}"
        print(f"\nthe job goes on; sogclr status {where} shows it, sogclr cancel {where} ends it", file=sys.stderr)
        raise


def _print_job(args: argparse.Namespace, job: Job) -> None:
    if args.json:
        print(json.dumps(as_json(job)))
        return
    print(f"{job.job_id}: {job.state.lower()}{f': {job.error}' if job.error else ''}\n{job.link}")
    for task in job.tasks:
        reused = {"SKIPPED": "reused from the cache"}.get(task.state, task.state.lower())
        print(f"  {task.name:<16} {reused}{f': {task.error}' if task.error else ''}")
        if task.logs:
            print(f"  {'':<16} {task.logs}")


def _exit_code(job: Job) -> int:
    if job.state in ("FAILED", "CANCELLED", "PAUSED"):
        failed = next((task for task in job.tasks if task.state == "FAILED"), None)
        what = f"{failed.name} failed: {failed.error or 'its logs say why'}" if failed else job.error or job.state.lower()
        print(f"error: job {job.job_id} {job.state.lower()}: {what}", file=sys.stderr)
        return 1
    return 0


def _job_id(name: str, when: str) -> str:
    return f"sogclr-{name.replace('_', '-').removeprefix('sogclr-')}{when}"


def _overrides(args: argparse.Namespace) -> dict[str, list[str]]:
    overrides, linear_eval_overrides = split_overrides(args.overrides)
    return {"overrides": overrides, "linear_eval_overrides": linear_eval_overrides}


def _cluster(args: argparse.Namespace) -> Cluster:
    """Returns what the options say of machines and images. Raises UserError for what is not written as it must be."""
    uri = args.mlflow_uri or os.environ.get("MLFLOW_TRACKING_URI", "")
    check_options(
        {
            "--project": args.project,
            "--region": args.region,
            "--pipeline-root": args.pipeline_root,
            "--raw": getattr(args, "raw", "") or "" if args.accelerator else "",
            "--job-id": getattr(args, "job_id", ""),
            "--service-account": args.service_account,
            "--network": args.network,
            "--encryption-key": args.encryption_key,
            "--mlflow-uri": uri if uri.startswith("http") or args.mlflow_uri else "",
            "--mlflow-secret": args.mlflow_secret,
            "--schedule": getattr(args, "schedule", ""),
        }
    )
    for name, value in (("--timeout-hours", args.timeout_hours), ("--dataflow-workers", args.dataflow_workers)):
        if not value > 0:
            raise UserError(f"{name} {value:g} makes no sense: it must be above 0")
    if args.timeout_hours > LONGEST_HOURS:
        raise UserError(
            f"--timeout-hours {args.timeout_hours:g} is more than {LONGEST_HOURS:g}: Google documents no custom job of more "
            "than 7 days; a job that is submitted again goes on from the newest checkpoint"
        )
    if args.retries < 0 or args.disk_gb < 100:
        raise UserError("--retries must be 0 or more, --disk-gb at least 100")
    environment = {
        "MLFLOW_TRACKING_URI": uri if uri.startswith("http") else "",
        "MLFLOW_EXPERIMENT_NAME": args.experiment or os.environ.get("MLFLOW_EXPERIMENT_NAME", ""),
        variables.SECRET: args.mlflow_secret,
        variables.JOB_FOLDER: f"projects/{args.project}/locations/{args.region}" if args.project and args.region else "",
    }
    images = _images(args)
    return Cluster(
        images=images,
        accelerator=accelerators.get(args.accelerator) if args.accelerator else None,
        eval_accelerator=_eval_accelerator(args),
        environment={name: value for name, value in environment.items() if value},
        beam_args=_beam_args(args, images.reference("cpu")),
        timeout_hours=args.timeout_hours,
        retries=args.retries,
        spot=args.spot,
        disk_gb=args.disk_gb,
        service_account=args.service_account,
        network=args.network,
        encryption_key=args.encryption_key,
        labels=parse_labels(args.label),
        caching=not args.no_cache,
    )


def _images(args: argparse.Namespace) -> Images:
    if args.accelerator and not args.tag and uncommitted():
        raise UserError("sources differ from the commit, so its images lack something: commit, or name the images with --tag")
    google = f"{args.region}-docker.pkg.dev/{args.project}/sogclr" if args.project and args.region else ""
    return Images(args.images.rstrip("/") or google, args.tag or git_commit()[:12])


def _beam_args(args: argparse.Namespace, image: str) -> tuple[str, ...]:
    """Returns Beam's options for Dataflow, none where it is not to be used or nothing says where it would be."""
    if args.no_dataflow or not (args.accelerator and args.project and args.region and args.pipeline_root):
        return ()
    region, root = args.dataflow_region or args.region, f"{args.pipeline_root.rstrip('/')}/dataflow"
    return (
        "--runner=DataflowRunner",
        f"--project={args.project}",
        f"--region={region}",
        f"--temp_location={root}/temp",
        f"--staging_location={root}/staging",
        f"--sdk_container_image={image}",
        "--sdk_location=container",
        f"--max_num_workers={args.dataflow_workers}",
        f"--worker_machine_type={args.dataflow_machine}",
        *([f"--service_account_email={args.service_account}"] if args.service_account else []),
        *([f"--dataflow_kms_key={args.encryption_key}"] if args.encryption_key else []),
        *(f"--labels={label}" for label in args.label),
        *args.dataflow_arg,
    )

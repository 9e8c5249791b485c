"""The command rerun: runs one component again, here or on Vertex AI, on outputs of a run in MLflow or a job on Vertex AI."""

import time
from argparse import Namespace
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components import variables
from components.lineage import COMPONENTS, MADE_BY, NEEDS, Artifact, short
from pipelines.cli.cluster import ClusterOptions, add_cluster, read_cluster
from pipelines.cli.encoders import check_settings as check_settings_of_import
from pipelines.cli.encoders import encoder_parameters
from pipelines.cli.formats import check_options
from pipelines.cli.jobs import connect
from pipelines.cli.named_files import check_remote, linear_eval_overrides, without_digest
from pipelines.cli.options import (
    Commands,
    Output,
    absolute_files,
    add_command,
    add_init_from,
    add_json,
    add_place,
    add_root,
    add_set,
    init_parameters,
    make_experiment,
    read_init_from,
    read_output,
)
from pipelines.cli.phases import showing
from pipelines.cli.raw_data import identified
from pipelines.cli.sending import Sending, add_sending, job_id_of, read_sending, send
from pipelines.cli.store import check_runs, make_root, open_store, root_of
from pipelines.cli.submitting import check_place
from pipelines.code import step_version
from pipelines.vertex import accelerators
from pipelines.vertex.cluster import Cluster, base_output_directory
from pipelines.vertex.jobs import Job, JobName, parse_job
from trainer.config import data_from, split_overrides
from trainer.presets import resolve
from trainer.shared.data import DATA, DataSettings, as_overrides
from trainer.shared.errors import UserError

if TYPE_CHECKING:
    from pipelines.vertex.preflight import Finding

_EXAMPLES = """
examples:
  sogclr rerun linear-eval --run 3fa91c2e --set linear_eval.l2_penalties=1e-2
  a job's artifacts, on this machine
    sogclr rerun linear-eval --run vertex:JOB --project P --region R
  a job's artifacts, on Vertex AI
    sogclr rerun pretrain --run vertex:JOB --project P --region R \\
        --accelerator v5e-8 --pipeline-root gs://B/sogclr
"""


def add_to(commands: Commands) -> None:
    """Adds the command of this module."""
    summary = "Run one component again, on the outputs of an earlier run."
    one = add_command(commands, "rerun", _read, rerun, summary, _EXAMPLES)
    one.add_argument("component", metavar="COMPONENT", choices=COMPONENTS, help=f"one of {', '.join(COMPONENTS)}")
    one.add_argument(
        "--run", required=True, metavar="RUN", help="the earlier run: its MLflow ID (8 characters do), or vertex:JOB"
    )
    add_root(one)
    add_set(one)
    add_init_from(one)
    add_json(one)
    add_place(one, "of vertex:JOB")
    add_cluster(one, "machine on Vertex AI (default: run on this machine)", required=False)
    add_sending(one)


@dataclass(frozen=True)
class Rerun:
    """A component to run again, with changed settings."""

    component: str
    overrides: tuple[str, ...]
    init_from: str
    """Checkpoint that pretraining starts from; empty for that of the earlier run, if it had one."""
    root: str
    output: Output


@dataclass(frozen=True)
class FromRun:
    """A component to run again on this machine, on the outputs of a run in MLflow."""

    again: Rerun
    run: str


@dataclass(frozen=True)
class FromJob:
    """A component to run again on this machine, on the outputs of a job on Vertex AI."""

    again: Rerun
    name: JobName


@dataclass(frozen=True)
class OnVertex:
    """A component to run again on Vertex AI, on the outputs of a job there."""

    again: Rerun
    name: JobName
    cluster: ClusterOptions
    pipeline_root: str
    """Pipeline root of the new job; empty for that of the earlier job."""
    sending: Sending


def _read(args: Namespace) -> FromRun | FromJob | OnVertex:
    _check_settings(args.component, args.overrides)
    if args.init_from and args.component != "pretrain":
        raise UserError(f"--init-from {args.init_from} is for pretrain, not {args.component}")
    again = Rerun(args.component, tuple(args.overrides), read_init_from(args), args.root, read_output(args))
    if not args.run.startswith("vertex:"):
        _check_here(args)
        return FromRun(again, args.run)
    name = parse_job(args.run, args.project, args.region, args.endpoint)
    if not args.accelerator:
        return FromJob(again, name)
    check_options({"--pipeline-root": args.pipeline_root, "--init-from": args.init_from})
    return OnVertex(again, name, read_cluster(args), args.pipeline_root, read_sending(args))


def _check_settings(component: str, overrides: list[str]) -> None:
    """Raises UserError for a setting that the component does not have."""
    for item in overrides:
        pretraining, linear_eval = split_overrides([item])
        conversion = [item] if item.strip().startswith(DATA) else []
        own = {"build-tfrecords": conversion, "linear-eval": linear_eval}.get(component, pretraining)
        if not own:
            raise UserError(f"--set {item} is not a setting of {component}")
    if component == "import-encoder":
        check_settings_of_import(overrides)


def _check_here(args: Namespace) -> None:
    """Raises UserError for an option that needs Vertex AI."""
    if args.accelerator:
        raise UserError("--accelerator runs a step on Vertex AI, which needs a job there: name it with --run vertex:JOB")
    for option in ("dry_run", "wait", "job_id"):
        if getattr(args, option):
            raise UserError(f"--{option.replace('_', '-')} is for a step on Vertex AI: --run vertex:JOB --accelerator NAME")


def rerun(options: FromRun | FromJob | OnVertex) -> int:
    """Runs one component again."""
    match options:
        case FromRun():
            return _rerun_run(options)
        case FromJob():
            return _rerun_job(options)
        case OnVertex():
            return _rerun_on_vertex(options)


# ---- On this machine


def _rerun_run(options: FromRun) -> int:
    again, component = options.again, options.again.component
    root = root_of(again.root)
    check_runs(root)
    with showing("rerun", "loading MLflow"):
        from components import tracking

        store = open_store(root)
    run_id = tracking.find_run(store, options.run)
    source = tracking.find_step(store, run_id, component)
    inputs = {name: tracking.find_step(store, source.run_id, *MADE_BY[name]).outputs[name] for name in NEEDS[component]}
    for name, artifact in inputs.items():
        if "://" not in artifact.uri and not Path(artifact.uri).exists():
            raise UserError(f"the {name} of run {short(run_id)} is gone: there is no {artifact.uri}; sogclr run makes it again")
    return _run_here(again, root, source.arguments, inputs, source.run_id, source.run_id)


def _rerun_job(options: FromJob) -> int:
    name, component = options.name, options.again.component
    job = connect(name.place).get(name.job_id)
    inputs = _inputs_from(job, component)
    run = f"vertex:{name.place.folder}/pipelineJobs/{name.job_id}"
    return _run_here(options.again, make_root(options.again.root), job.arguments(component), inputs, run, job.run_of(component))


def _run_here(
    again: Rerun, root: Path, before: Mapping[str, Any], inputs: Mapping[str, Artifact], run: str, rerun_of: str
) -> int:
    """Runs a component on `inputs`. `before` are its earlier arguments, `run` is the value of --run."""
    from pipelines.cli.executing import Record, execute
    from pipelines.local import Request

    component = again.component
    arguments = {**_usual(component), **before, "code_version": step_version(component)}
    listed: AbstractContextManager[tuple[str, str]] = nullcontext(("", ""))
    if component == "build-tfrecords":
        data = absolute_files(_data_again(before, again.overrides))
        arguments |= {"data_settings": as_overrides(data), "beam_args": []}
        listed = identified(arguments["raw"], data, "rerun")
    else:
        arguments["overrides"] = [*without_digest(before["overrides"]), *again.overrides]
        config = resolve(arguments.get("preset", "demo"), arguments["overrides"])
        if component == "linear-eval":
            arguments["overrides"] = linear_eval_overrides(config, arguments["overrides"])
        arguments |= init_parameters(again.init_from or arguments.get("init_from", ""), config)
        arguments |= encoder_parameters(arguments.get("encoder", ""), arguments.get("preset", "demo"), arguments["overrides"])
    settings = ("--set", *again.overrides) if again.overrides else ()
    begun = ("--init-from", arguments["init_from"]) if again.init_from else ()
    command = ("sogclr", "rerun", component, "--run", run, *settings, *begun)
    record = Record(f"rerun {component}", command, again.root, rerun_of)
    with listed as (identity, listing):
        arguments |= {"raw_identity": identity} if identity else {}
        return execute(Request(str(root), arguments, component, inputs, listing=listing), record, again.output)


def _usual(component: str) -> dict[str, Any]:
    """Returns the arguments that a run may lack because it was recorded without a first checkpoint."""
    return {"init_from": "", "init_identity": ""} if component == "pretrain" else {}


def _data_again(before: Mapping[str, Any], overrides: Sequence[str]) -> DataSettings:
    """Returns the settings of a conversion: those of the earlier arguments, changed by `overrides`.

    The conversions of an earlier version had no settings.
    """
    return data_from([*before.get("data_settings", []), *overrides])


def _inputs_from(job: Job, component: str) -> dict[str, Artifact]:
    """Returns the outputs of a job that a component needs. Raises UserError if the job has not made them."""
    return {name: job.task(job.first_of(*MADE_BY[name])).outputs[name] for name in NEEDS[component]}


# ---- On Vertex AI


def _rerun_on_vertex(options: OnVertex) -> int:
    from pipelines import pipeline
    from pipelines.vertex.submission import Submission

    component, place, sending = options.again.component, options.name.place, options.sending
    job = connect(place).get(options.name.job_id)
    inputs = _inputs_from(job, component)
    root = (options.pipeline_root or job.pipeline_root).rstrip("/")
    check_place(place.project, place.region, root)
    cluster = _cluster_again(options, job, root)
    arguments = {**_usual(component), **job.arguments(component), "code_version": step_version(component)}
    if component == "build-tfrecords":
        data = _data_again(arguments, options.again.overrides)
        check_remote(data.files)
        arguments["data_settings"] = as_overrides(data)
    else:
        arguments["overrides"] = [*without_digest(arguments["overrides"]), *options.again.overrides]
        check_remote(resolve(arguments.get("preset", "demo"), arguments["overrides"]).linear_eval.files)
    init_from = options.again.init_from
    if init_from:
        arguments |= {"init_from": init_from, "init_identity": ""}

    def compiled(cluster: Cluster) -> dict[str, Any]:
        beam = {"beam_args": list(cluster.beam_args)} if component == "build-tfrecords" else {}
        return pipeline.compile_step(cluster, component, {**arguments, **beam}, inputs, base_output_directory(root))

    submission = Submission(
        place=place,
        job_id=sending.job_id or job_id_of(f"rerun-{component}", time.strftime("-%Y%m%d-%H%M%S")),
        title=f"{component} of job {job.job_id} again",
        cluster=cluster,
        pipeline_root=root,
        raw=arguments.get("raw", ""),
        compile=compiled,
        parameters={},
        components=(component,),
        init_from=init_from,
        config=resolve(arguments["preset"], arguments["overrides"]) if init_from else None,
    )
    return send(submission, _estimates(options, job, cluster, arguments), sending, options.again.output)


def _cluster_again(options: OnVertex, job: Job, root: str) -> Cluster:
    """Returns the cluster of one step, with the machine of --accelerator and the ID of the run that it repeats."""
    cluster = options.cluster.at(options.name.place, root)
    source = job.run_of(options.again.component)
    environment = {**cluster.environment, **({variables.RERUN_OF: source} if source else {})}
    if options.again.component == "linear-eval" and cluster.accelerator:
        cluster = replace(cluster, eval_accelerator=cluster.accelerator)
    return replace(cluster, environment=environment, caching=False)


def _estimates(options: OnVertex, job: Job, cluster: Cluster, arguments: Mapping[str, Any]) -> "list[Finding]":
    """Returns findings on the step's memory or time. Raises UserError if the batch does not divide among the replicas."""
    from pipelines.cli import estimates

    again = options.again
    if again.component in ("build-tfrecords", "import-encoder"):
        return []
    if again.component == "pretrain":
        experiment = make_experiment(arguments["preset"], arguments["overrides"])
        if cluster.accelerator:
            accelerators.check(cluster.accelerator, experiment.config)
        return estimates.memory_findings(experiment, cluster, again.root, options.sending.skip)
    making = job.arguments(job.first_of(*MADE_BY["model"]))
    experiment = make_experiment(making["preset"], [*making["overrides"], *arguments["overrides"]])
    region = options.name.place.region
    return [estimates.evaluation_finding(experiment, cluster, region, again.root, "--accelerator")]

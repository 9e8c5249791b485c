"""The commands for the whole pipeline on a cluster: compile writes it to a file, submit sends it to Vertex AI."""

import time
from argparse import Namespace
from dataclasses import dataclass

from components.lineage import components_of, source_of
from pipelines.cli.cluster import add_cluster, read_cluster
from pipelines.cli.encoders import add_encoder, read_encoder
from pipelines.cli.formats import check_options
from pipelines.cli.options import (
    Commands,
    Experiment,
    Output,
    add_command,
    add_init_from,
    add_json,
    add_place,
    add_preset,
    add_root,
    add_set,
    check_remote_files,
    read_experiment,
    read_init_from,
    read_output,
)
from pipelines.cli.sending import Sending, add_sending, job_id_of, read_sending, send
from pipelines.cli.store import absolute
from pipelines.vertex import accelerators
from pipelines.vertex.cluster import Cluster, base_output_directory
from pipelines.vertex.jobs import Place
from trainer.shared.errors import UserError

_COMPILE = """
examples:
  for any Kubeflow Pipelines
    sogclr compile --preset demo --output pipeline.yaml
  for Vertex AI
    sogclr compile --preset sogclr_imagenet_r50_b512 --accelerator v5e-8 \\
        --images europe-west4-docker.pkg.dev/PROJECT/sogclr \\
        --output pipeline.yaml
"""
_SUBMIT = """
examples:
  sogclr submit --preset sogclr_imagenet_r50_b512 --accelerator v5e-8 \\
      --project P --region europe-west4 --pipeline-root gs://BUCKET/sogclr \\
      --raw gs://BUCKET/imagenet --mlflow-uri https://mlflow.example --dry-run

--dry-run makes all checks, prints the plan and what is missing, and submits
nothing. Submitting again with the same --job-id makes no second job.
docs/vertex.md goes from an empty project to a finished run.
"""


def add_to(commands: Commands) -> None:
    """Adds the commands of this module."""
    one = add_command(commands, "compile", _read_compile, compile_, "Write the pipeline as KFP IR YAML.", _COMPILE)
    add_preset(one)
    one.add_argument("--output", required=True, metavar="FILE", help="file to write")
    one.add_argument("--raw", metavar="DIR", help="default of the pipeline's parameter raw (default: the parameter is required)")
    one.add_argument("--project", default="", metavar="P", help="project of the Dataflow job")
    one.add_argument("--region", default="", metavar="R", help="region of the Dataflow job")
    add_set(one)
    add_init_from(one)
    add_encoder(one)
    add_root(one)
    what = "machine of pretraining on Vertex AI (default: plain containers for any cluster)"
    add_cluster(one, what, required=False)

    one = add_command(commands, "submit", _read_submit, submit, "Run the whole pipeline on Vertex AI.", _SUBMIT)
    add_preset(one)
    add_place(one, "to run in", required=True)
    one.add_argument("--raw", required=True, metavar="gs://...", help="folder of the raw archives")
    add_set(one)
    add_init_from(one)
    add_encoder(one)
    add_root(one)
    add_cluster(one, "machine of pretraining; sogclr accelerators lists them", required=True)
    add_sending(one)
    one.add_argument("--schedule", default="", metavar="CRON", help="repeat the job on a schedule, as in '0 3 * * 1'")
    one.add_argument("--max-runs", type=int, default=0, metavar="N", help="number of jobs after which the schedule ends")
    add_json(one)


# ---- compile


@dataclass(frozen=True)
class CompileOptions:
    experiment: Experiment
    cluster: Cluster
    region: str
    raw: str
    """Default of the pipeline's parameter raw; empty for none."""
    init_from: str
    """Default of the pipeline's parameter init_from; empty for none."""
    encoder: str
    """Default of the pipeline's parameter encoder; empty for a pipeline that pretrains."""
    pipeline_root: str
    root: str
    output: str
    """The file, as the user wrote it."""


def _read_compile(args: Namespace) -> CompileOptions:
    experiment = read_experiment(args)
    output = absolute(args.output)
    if not output.parent.is_dir() or output.is_dir():
        raise UserError(f"--output {args.output} cannot be written: name a file in a folder that exists")
    raw = args.raw or ""
    check_place(args.project, args.region, args.pipeline_root, raw if args.accelerator else "")
    init_from = read_init_from(args)
    encoder = read_encoder(args)
    check_options({"--init-from": init_from if args.accelerator else "", "--encoder": encoder if args.accelerator else ""})
    cluster = read_cluster(args).at(Place(args.project, args.region), args.pipeline_root)
    if cluster.accelerator:
        if not encoder:
            accelerators.check(cluster.accelerator, experiment.config)
        check_remote_files(experiment.config.data)
    return CompileOptions(experiment, cluster, args.region, raw, init_from, encoder, args.pipeline_root, args.root, args.output)


def compile_(options: CompileOptions) -> int:
    """Writes the pipeline as KFP IR YAML. Raises UserError if an estimate says that a step does not fit or cannot end."""
    from pipelines import pipeline
    from pipelines.cli import estimates

    experiment, cluster = options.experiment, options.cluster
    defaults = {**experiment.parameters, "raw_identity": ""} | ({"raw": options.raw} if options.raw else {})
    defaults |= {"init_from": options.init_from} if options.init_from else {}
    defaults |= {"encoder": options.encoder} if options.encoder else {}
    if cluster.accelerator:
        memory = None if options.encoder else estimates.pretraining(experiment, cluster.accelerator, options.root)
        if memory and not memory.values["fits"]:
            raise UserError(memory.memory)
        for problem in estimates.evaluation(experiment, cluster, options.region, options.root).problems:
            raise UserError(problem)
        if options.pipeline_root:
            defaults["base_output_directory"] = base_output_directory(options.pipeline_root)
    pipeline.write(pipeline.compile_pipeline(cluster, defaults, source_of(defaults)), absolute(options.output))
    print(options.output)
    return 0


# ---- submit


@dataclass(frozen=True)
class SubmitOptions:
    experiment: Experiment
    place: Place
    cluster: Cluster
    raw: str
    init_from: str
    encoder: str
    pipeline_root: str
    root: str
    schedule: str
    max_runs: int
    sending: Sending
    output: Output


def _read_submit(args: Namespace) -> SubmitOptions:
    for name in ("project", "region", "pipeline_root", "raw"):
        if not getattr(args, name):
            raise UserError(f"--{name.replace('_', '-')} is empty; sogclr submit --help explains it")
    experiment = read_experiment(args)
    check_remote_files(experiment.config.data)
    check_place(args.project, args.region, args.pipeline_root, args.raw)
    encoder = read_encoder(args)
    check_options({"--schedule": args.schedule, "--init-from": args.init_from, "--encoder": encoder})
    if args.max_runs and not args.schedule:
        raise UserError(f"--max-runs {args.max_runs} needs --schedule")
    place = Place(args.project, args.region, args.endpoint)
    options = read_cluster(args)
    if not encoder:
        accelerators.check(accelerators.get(args.accelerator), experiment.config)
    return SubmitOptions(
        experiment=experiment,
        place=place,
        cluster=options.at(place, args.pipeline_root),
        raw=args.raw.rstrip("/"),
        init_from=args.init_from.rstrip("/"),
        encoder=encoder,
        pipeline_root=args.pipeline_root.rstrip("/"),
        root=args.root,
        schedule=args.schedule,
        max_runs=args.max_runs,
        sending=read_sending(args),
        output=read_output(args),
    )


def submit(options: SubmitOptions) -> int:
    """Sends the whole pipeline to Vertex AI."""
    from pipelines import pipeline
    from pipelines.cli import estimates
    from pipelines.vertex.submission import Submission

    experiment, place, cluster = options.experiment, options.place, options.cluster
    # A schedule's name has no time in it, so that submitting it twice makes one schedule.
    when = "" if options.schedule else time.strftime("-%Y%m%d-%H%M%S")
    begun = {"init_from": options.init_from, "init_identity": ""}
    if options.encoder:
        begun = {"encoder": options.encoder, "encoder_identity": ""}
    source = source_of(begun)
    submission = Submission(
        place=place,
        job_id=options.sending.job_id or job_id_of(experiment.preset, when),
        title=f"{experiment.preset}, the whole pipeline",
        cluster=cluster,
        pipeline_root=options.pipeline_root,
        raw=options.raw,
        compile=lambda cluster: pipeline.compile_pipeline(cluster, {}, source),
        parameters={
            "raw": options.raw,
            "raw_identity": "",
            **experiment.parameters,
            **begun,
            "base_output_directory": base_output_directory(options.pipeline_root),
        },
        components=components_of(source),
        init_from=options.init_from,
        encoder=options.encoder,
        config=experiment.config,
        schedule=options.schedule,
        max_runs=options.max_runs,
    )
    findings = [
        *([] if options.encoder else estimates.memory_findings(experiment, cluster, options.root, options.sending.skip)),
        estimates.evaluation_finding(experiment, cluster, place.region, options.root),
    ]
    return send(submission, findings, options.sending, options.output)


def check_place(project: str, region: str, pipeline_root: str, raw: str = "") -> None:
    """Raises UserError for the first invalid value. Empty values are valid."""
    check_options({"--project": project, "--region": region, "--pipeline-root": pipeline_root, "--raw": raw})

"""The command line: `sogclr run | rerun | compare | plan | compile | submit | status | cancel | ui | presets | accelerators |
doctor`.

What is heavy is imported by the command that needs it, so that --help answers at once.
"""

import argparse
import json
import os
import select
import shlex
import signal
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from components.lineage import COMPONENTS, Artifact, Lineage, short
from pipelines import accelerators
from trainer.config import split_overrides
from trainer.presets import PRESETS, describe, resolve
from trainer.shared.errors import UserError

if TYPE_CHECKING:
    from components.tracking import Store

_ROOT = "runs"
_CHECKS = ("options", "region", "memory", "evaluation", "mlflow", "vertex", "bucket", "images", "raw")
"""Checks of a submission that can be skipped, as `submission.CHECKS` has them."""
_MADE_BY = {"dataset": "build-tfrecords", "model": "pretrain"}
_NEEDS = {"build-tfrecords": (), "pretrain": ("dataset",), "linear-eval": ("dataset", "model")}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code.

    0, 1 for what failed, 2 for what the user can mend, 130 for an interrupt, 141 where the reader of the output has gone.
    """
    args = _parser().parse_args(arguments)
    # A request to end is an interrupt, so that what was started is ended too.
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        done = args.command(args)
        sys.stdout.flush()
        return done
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except UserError as error:
        if args.debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _nobody_reads():
            return 141
        if args.debug:
            raise
        print(f"error: {type(error).__name__}: {' '.join(str(error).split())} (--debug shows where)", file=sys.stderr)
        return 1
    finally:
        signal.signal(signal.SIGTERM, before)


def _nobody_reads() -> bool:
    """Says whether the reader of the output has gone, as head does when it has its lines; then nothing more is written to it."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    gone = any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
    if gone:
        # Python flushes once more as it ends: to where that succeeds.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return gone


_RUN = """
examples:
  sogclr run --preset demo
  sogclr run --preset demo --set epochs=10 gamma=0.8
  sogclr run --preset sogclr_imagenet_r50_b512 --raw /data/imagenet --root /data/runs

Run again, it reuses the steps whose code, settings and input did not change; interrupted, pretraining goes on from its
newest checkpoint. MLFLOW_TRACKING_URI, where it is set, says where the runs are recorded.
"""
_RERUN = """
examples:
  sogclr rerun linear-eval --run 3fa91c2e --set linear_eval.l2_penalties=1e-2
  sogclr rerun linear-eval --run vertex:JOB --project P --region R           a job's artifacts, on this machine
  sogclr rerun pretrain --run vertex:JOB --project P --region R --accelerator v5e-8 --pipeline-root gs://B/sogclr
                                                                            a job's artifacts, on Vertex AI
"""
_COMPARE = """
examples:
  sogclr compare 3fa91c2e 9d04b7aa
  sogclr compare 3fa91c2e 9d04b7aa 51c8e6f0 --output page.html --json

Prints the accuracies by protocol, paired tests on the same images and the settings that differ, and writes a page with curves.
"""
_COMPILE = """
examples:
  sogclr compile --preset demo --output pipeline.yaml                       for any Kubeflow Pipelines
  sogclr compile --preset sogclr_imagenet_r50_b512 --accelerator v5e-8 \\
      --images europe-west4-docker.pkg.dev/PROJECT/sogclr --output pipeline.yaml
"""
_SUBMIT = """
examples:
  sogclr submit --preset sogclr_imagenet_r50_b512 --accelerator v5e-8 --project P --region europe-west4 \\
      --pipeline-root gs://BUCKET/sogclr --raw gs://BUCKET/imagenet --mlflow-uri https://mlflow.example --dry-run

--dry-run looks at all that can be looked at, prints the plan and what is missing, and makes nothing. Submitted again with the
same --job-id, there is still one job. docs/vertex.md goes from an empty project to a finished run.
"""

_PLAN = """
examples:
  sogclr plan --preset sogclr_imagenet_r50_b512 --accelerator v5e-8
  sogclr plan --preset sogclr_imagenet_r50_b2048 --accelerator v3-32 --price 1.0 --json
  sogclr plan --preset sogclr_imagenet_r50_b512 --accelerator v5e-8 --eval-accelerator l4-1 \\
      --set linear_eval.protocols=cached,official

The step, and the evaluation's forward pass, are compiled by the TPU's own compiler, without a TPU: some minutes the first time,
which make tpu-check prepares.
"""


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, where argparse would print all options before it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}; {self.prog} --help says how\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="sogclr",
        description="SogCLR from raw images to a linear eval, on this machine or on Vertex AI, with the lineage of all steps.",
        epilog="sogclr COMMAND --help tells more of each. Exit codes: 0 done, 1 failed, 2 something for you to mend.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, command: Any, summary: str, epilog: str = "") -> argparse.ArgumentParser:
        one = commands.add_parser(
            name,
            help=summary,
            description=summary,
            epilog=epilog.strip("\n"),
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        one.set_defaults(command=command)
        one.add_argument("--debug", action="store_true", help="show tracebacks, and all that the steps print")
        return one

    run = add("run", _run, "Run the whole pipeline on this machine.", _RUN)
    _add_preset(run)
    run.add_argument("--raw", metavar="DIR", help="folder of the raw archives, here or gs://; the demo makes its own")
    _add_root(run)
    _add_set(run)
    _add_json(run)

    rerun = add("rerun", _rerun, "Run one component again, on what an earlier run left.", _RERUN)
    rerun.add_argument("component", metavar="COMPONENT", choices=COMPONENTS, help=f"one of {', '.join(COMPONENTS)}")
    rerun.add_argument(
        "--run", required=True, metavar="RUN", help="the earlier run: its MLflow ID (8 characters do), or vertex:JOB"
    )
    _add_root(rerun)
    _add_set(rerun)
    _add_json(rerun)
    _add_place(rerun, "of vertex:JOB")
    _add_cluster(rerun, "where it is to run on Vertex AI; here, where it is not given", required=False)
    _add_sending(rerun)

    compare = add("compare", _compare, "Compare the linear evals of several runs.", _COMPARE)
    compare.add_argument("runs", nargs="+", metavar="RUN", help="MLflow ID of a run, or of the pipeline that it is part of")
    _add_root(compare)
    compare.add_argument("--output", default="compare.html", metavar="FILE", help="where the page goes (default: %(default)s)")
    _add_json(compare)

    compile_ = add("compile", _compile, "Write the pipeline as KFP IR YAML.", _COMPILE)
    _add_preset(compile_)
    compile_.add_argument("--output", required=True, metavar="FILE", help="where to")
    compile_.add_argument("--raw", metavar="DIR", help="default of the pipeline's parameter raw, which is required otherwise")
    compile_.add_argument("--project", default="", metavar="P", help="project of the Dataflow job")
    compile_.add_argument("--region", default="", metavar="R", help="region of the Dataflow job")
    _add_set(compile_)
    _add_root(compile_)
    _add_cluster(
        compile_, "machine of pretraining on Vertex AI; plain containers for any cluster, where it is not given", required=False
    )

    submit = add("submit", _submit, "Run the whole pipeline on Vertex AI.", _SUBMIT)
    _add_preset(submit)
    _add_place(submit, "to run in", required=True)
    submit.add_argument("--raw", required=True, metavar="gs://...", help="folder of the raw archives")
    _add_set(submit)
    _add_root(submit)
    _add_cluster(submit, "machine of pretraining; sogclr accelerators lists them", required=True)
    _add_sending(submit)
    submit.add_argument("--schedule", default="", metavar="CRON", help="make such a job again and again, as in '0 3 * * 1'")
    submit.add_argument("--max-runs", type=int, default=0, metavar="N", help="end the schedule after so many jobs")
    _add_json(submit)

    for name, command, or_schedule, summary in (
        ("status", _status, "", "Show how a job on Vertex AI stands: its steps, their errors, links to their logs."),
        (
            "cancel",
            _cancel,
            ", or of a schedule .../schedules/ID",
            "End a job, or a schedule, on Vertex AI. Checkpoints stay, and a later job goes on from them.",
        ),
    ):
        one = add(name, command, summary)
        one.add_argument("job", metavar="JOB", help=f"its ID, or projects/P/locations/R/pipelineJobs/ID{or_schedule}")
        _add_place(one, "of the job")
        one.add_argument("--wait", action="store_true", help="follow it until it has ended")
        _add_json(one)

    summary = "Say what pretraining and evaluation will need before they are paid for: memory, time, money, and what binds them."
    plan = add("plan", _plan, summary, _PLAN)
    _add_preset(plan)
    plan.add_argument(
        "--accelerator", required=True, metavar="NAME", help="machine of pretraining; sogclr accelerators lists them"
    )
    _add_eval_accelerator(plan)
    _add_limits(plan)
    plan.add_argument(
        "--data", metavar="DIR", help="the dataset, for its counts; those of the preset's dataset where it is not given"
    )
    plan.add_argument(
        "--price",
        type=float,
        metavar="DOLLARS",
        help="of a device of --accelerator (a TPU core of v2 and v3, else a chip) and hour",
    )
    plan.add_argument(
        "--images-per-core", type=float, metavar="N", help="what tests/benchmarks/input_pipeline.py measures on a core"
    )
    plan.add_argument("--listing", metavar="FILE", help="where to write the compiled program: its buffers and fusions")
    plan.add_argument("--log", action="store_true", help="record the plan as a run in MLflow")
    _add_root(plan)
    _add_set(plan)
    _add_json(plan)

    ui = add("ui", _ui, "Open the MLflow UI on a root.")
    _add_root(ui)
    ui.add_argument("--port", type=int, default=5000, help="port on this machine (default: 5000)")

    doctor = add("doctor", _doctor, "Say what a bug report needs of this machine, and what to do about each thing that is wrong.")
    _add_root(doctor)
    _add_json(doctor)

    _add_json(add("presets", _presets, "List the presets with the published result of each."))
    _add_json(add("accelerators", _accelerators, "List the machines that pretraining can be given on Vertex AI."))
    return parser


def _add_preset(one: argparse.ArgumentParser) -> None:
    one.add_argument("--preset", required=True, metavar="NAME", help="the experiment; sogclr presets lists them")


def _add_root(one: argparse.ArgumentParser) -> None:
    one.add_argument("--root", default=_ROOT, metavar="DIR", help=f"folder of everything that is kept (default: {_ROOT})")


def _add_set(one: argparse.ArgumentParser) -> None:
    one.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        dest="overrides",
        help="change a setting of the preset; those of the linear eval begin with linear_eval.",
    )


def _add_json(one: argparse.ArgumentParser) -> None:
    one.add_argument("--json", action="store_true", help="print the result as one JSON object")


def _add_place(one: argparse.ArgumentParser, what: str, required: bool = False) -> None:
    group = one.add_argument_group("where on Google Cloud")
    group.add_argument("--project", default="", metavar="P", required=required, help=f"project {what}")
    group.add_argument("--region", default="", metavar="R", required=required, help=f"region {what}, as in europe-west4")
    group.add_argument("--endpoint", default="", metavar="URL", help="of the API, where it is not Google's public one")


def _add_eval_accelerator(one: argparse._ActionsContainer) -> None:
    one.add_argument(
        "--eval-accelerator", default="", metavar="NAME", help="machine of the linear eval (default: that of --accelerator)"
    )


def _add_limits(one: argparse._ActionsContainer) -> None:
    one.add_argument(
        "--timeout-hours", type=float, default=168, metavar="H", help="end an attempt after so long (default and limit: 168)"
    )
    one.add_argument("--disk-gb", type=int, default=200, metavar="GB", help="boot disk (default: 200)")


def _add_cluster(one: argparse.ArgumentParser, what: str, required: bool) -> None:
    group = one.add_argument_group("machines and images")
    group.add_argument("--accelerator", metavar="NAME", required=required, help=what)
    _add_eval_accelerator(group)
    group.add_argument("--force-accelerator", action="store_true", help="use a machine that sogclr accelerators lists as refused")
    group.add_argument("--pipeline-root", default="", metavar="gs://...", required=required, help="folder of all that jobs write")
    group.add_argument(
        "--images",
        default="",
        metavar="REPOSITORY",
        help="where make images pushed to (default: REGION-docker.pkg.dev/PROJECT/sogclr)",
    )
    group.add_argument("--tag", default="", metavar="TAG", help="of the images (default: the code's commit)")
    group.add_argument("--spot", action="store_true", help="spot machines: cheaper, and taken away at times")
    _add_limits(group)
    group.add_argument("--retries", type=int, default=3, metavar="N", help="attempts after the first, of each step (default: 3)")
    group.add_argument(
        "--service-account",
        default="",
        metavar="EMAIL",
        help="account that all steps run as (default: the project's default service account of Compute Engine)",
    )
    group.add_argument("--network", default="", metavar="NAME", help="VPC network that the steps are peered with")
    group.add_argument("--encryption-key", default="", metavar="NAME", help="Cloud KMS key of all that the job makes")
    group.add_argument("--label", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="label of job and machines")
    group.add_argument("--no-cache", action="store_true", help="run every step, whatever ran before")
    flow = one.add_argument_group("Dataflow, which runs build-tfrecords")
    flow.add_argument("--no-dataflow", action="store_true", help="convert in the step's own container instead")
    flow.add_argument("--dataflow-region", default="", metavar="R", help="(default: --region)")
    flow.add_argument("--dataflow-workers", type=int, default=16, metavar="N", help="at most (default: 16)")
    flow.add_argument("--dataflow-machine", default="n2-standard-4", metavar="TYPE", help="(default: n2-standard-4)")
    flow.add_argument(
        "--dataflow-arg", action="append", default=[], metavar="=--OPTION=VALUE", help="any other option of Beam or Dataflow"
    )
    mlflow = one.add_argument_group("MLflow, where the steps record what they do")
    mlflow.add_argument(
        "--mlflow-uri", default="", metavar="URL", help="server that the steps can reach (default: MLFLOW_TRACKING_URI)"
    )
    mlflow.add_argument(
        "--mlflow-secret",
        default="",
        metavar="NAME",
        help="projects/P/secrets/S/versions/V of Secret Manager: a token, or USER:PASSWORD",
    )
    mlflow.add_argument("--experiment", default="", metavar="NAME", help="(default: MLFLOW_EXPERIMENT_NAME, or sogclr)")


def _add_sending(one: argparse.ArgumentParser) -> None:
    group = one.add_argument_group("sending")
    group.add_argument("--dry-run", action="store_true", help="print the plan and what is missing; make nothing")
    group.add_argument("--wait", action="store_true", help="follow the job until it has ended")
    group.add_argument("--job-id", default="", metavar="ID", help="the job's name; asked for twice, there is one job")
    group.add_argument("--skip-check", nargs="+", action="extend", default=[], metavar="NAME", help=f"of {', '.join(_CHECKS)}")


# ---- run, rerun


def _run(args: argparse.Namespace) -> int:
    resolve(args.preset, args.overrides)
    if args.raw is None and args.preset != "demo":
        raise UserError(f"--preset {args.preset} needs --raw DIR, the folder of the raw archives; only the demo makes its own")
    root = _make_root(args.root)

    from beam_jobs.raw import raw_identity

    raw = _demo_raw(root) if args.raw is None else args.raw if "://" in args.raw else str(_absolute(args.raw))
    overrides, linear_eval_overrides = split_overrides(args.overrides)
    arguments = {
        "raw": raw,
        "raw_identity": raw_identity(raw),
        "preset": args.preset,
        "overrides": overrides,
        "linear_eval_overrides": linear_eval_overrides,
    }
    command = ["sogclr", "run", "--preset", args.preset, *(["--raw", raw] if args.raw else [])]
    return _execute(args, root, args.preset, command, arguments)


def _rerun(args: argparse.Namespace) -> int:
    component = args.component
    for item, (pretraining, linear_eval) in ((item, split_overrides([item])) for item in args.overrides):
        if not {"build-tfrecords": [], "pretrain": pretraining, "linear-eval": linear_eval}[component]:
            raise UserError(f"{item} is no setting of {component}")
    if args.run.startswith("vertex:"):
        return _rerun_of_job(args)
    if args.accelerator:
        raise UserError("--accelerator repeats a step on Vertex AI, from a job of it: name that with --run vertex:JOB")
    for option in ("dry_run", "wait", "job_id"):
        if getattr(args, option):
            raise UserError(f"--{option.replace('_', '-')} is for a step on Vertex AI: --run vertex:JOB --accelerator NAME")
    root = _absolute(args.root)
    store = _open_store(root, must_exist=True)
    from components import tracking

    run_id = tracking.find_run(store, args.run)
    source = tracking.find_step(store, run_id, component)
    inputs = {name: tracking.find_step(store, source.run_id, _MADE_BY[name]).outputs[name] for name in _NEEDS[component]}
    for name, artifact in inputs.items():
        if "://" not in artifact.uri and not Path(artifact.uri).exists():
            raise UserError(f"the {name} of run {short(run_id)} is gone: there is no {artifact.uri}; sogclr run makes it anew")
    arguments = _arguments_again(args, source.arguments)
    command = ["sogclr", "rerun", component, "--run", source.run_id]
    return _execute(
        args, root, f"rerun {component}", command, arguments, component=component, inputs=inputs, rerun_of=source.run_id
    )


def _compare(args: argparse.Namespace) -> int:
    root = _absolute(args.root)
    store = _open_store(root, must_exist=True)
    from components import tracking

    steps = [tracking.find_step(store, tracking.find_run(store, run), "linear-eval") for run in args.runs]
    for step in steps:
        if step.status != "FINISHED":
            raise UserError(f"the linear-eval {short(step.run_id)} has not finished: it is {step.status.lower()}")

    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    from eval.show.comparison import as_dict, as_text, compare, read_candidate, to_html
    from trainer.shared.files import write_whole

    found = compare(
        [
            read_candidate(step.run_id, step.outputs["metrics"].uri, tracking.history_behind(store, step.run_id, "pretrain"))
            for step in steps
        ]
    )
    write_whole(args.output, to_html(found).encode())
    if args.json:
        print(json.dumps({**as_dict(found), "page": args.output}))
    else:
        print("\n".join([*as_text(found), "", f"page: {_shown(args.output)}"]))
    return 0


def _arguments_again(args: argparse.Namespace, before: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the arguments of a component that did it with `before`, changed as `args` says, on this machine."""
    from pipelines.code import step_version

    arguments = {**before, "code_version": step_version(args.component)}
    if args.component == "build-tfrecords":
        from beam_jobs.raw import raw_identity

        arguments |= {"raw_identity": raw_identity(arguments["raw"]), "beam_args": []}
    else:
        arguments["overrides"] = [*before["overrides"], *args.overrides]
        resolve(arguments.get("preset", "demo"), arguments["overrides"])
    return arguments


def _rerun_of_job(args: argparse.Namespace) -> int:
    """Does a component of a job of Vertex AI again, here or there."""
    from pipelines import cloud, vertex

    place, job_id = vertex.parse_job(args.run, args.project, args.region, args.endpoint)
    job = vertex.Vertex(place, vertex.credentials()[0]).get(job_id)
    inputs = {name: job.task(_MADE_BY[name]).outputs[name] for name in _NEEDS[args.component]}
    before = job.arguments(args.component)
    if args.accelerator:
        return cloud.send_step(args, place, job, before, inputs)
    done = next((task.outputs for task in job.tasks if task.name == args.component), {})
    rerun_of = next((str(one.metadata.get("run_id", "")) for one in done.values()), "")
    command = ["sogclr", "rerun", args.component, "--run", f"vertex:{place.folder}/pipelineJobs/{job_id}"]
    return _execute(
        args,
        _make_root(args.root),
        f"rerun {args.component}",
        command,
        _arguments_again(args, before),
        component=args.component,
        inputs=inputs,
        rerun_of=rerun_of,
    )


def _execute(
    args: argparse.Namespace,
    root: Path,
    name: str,
    command: list[str],
    arguments: Mapping[str, Any],
    *,
    component: str = "",
    inputs: Mapping[str, Artifact] | None = None,
    rerun_of: str = "",
) -> int:
    """Runs the whole pipeline, or `component`, under a new parent run; says what came out."""
    from components import tracking
    from pipelines import local
    from pipelines.code import code_version, git_commit
    from trainer.shared.progress import ProgressBars

    # A run that began must be closed, though the server be down when it ends.
    store = _open_store(root)
    store = replace(store, client=tracking.patient(store.client))
    command += ["--set", *args.overrides] if args.overrides else []
    pipeline_id = tracking.start_pipeline(
        store,
        name,
        command=command,
        root="" if args.root == _ROOT else args.root,
        code_version=code_version(),
        git_commit=git_commit(),
        params=arguments,
        rerun_of=rerun_of,
    )
    log = root / "logs" / f"{pipeline_id}.log"
    local.forget_lost(local.cache_of(root), lambda run_id: tracking.knows(store, run_id))
    status = "KILLED"
    made: list[str] | None = None
    try:
        with ProgressBars() as bars:
            request = local.Request(str(root), arguments, component, inputs or {})
            echo = (lambda line: print(line, end="", file=sys.stderr)) if args.debug else None
            environment = {
                **_mlflow_names(root),
                "MLFLOW_RUN_ID": pipeline_id,
                # As on Vertex AI: where a step that was interrupted finds what it did.
                "AIP_CHECKPOINT_DIR": str(root / "checkpoints"),
            }
            made = local.run(request, environment, log, bars, echo)
        status = "FAILED" if made is None else "FINISHED"
    finally:
        chain = tracking.end_pipeline(store, pipeline_id, status, made or [])
    if made is None:
        return _say_what_failed(chain, log)
    picture = tracking.picture_uri(store, pipeline_id)
    print(json.dumps(_as_json(chain, picture)) if args.json else "\n".join(_summary(chain, picture, root)))
    return 0


def _say_what_failed(chain: Lineage, log: Path) -> int:
    failed = chain.failed
    if failed and failed.user_error:
        print(f"error: {failed.component}: {failed.error}", file=sys.stderr)
        return 2
    what = (
        f"{failed.component} failed: {failed.error or 'it was killed'}" if failed else "the pipeline failed outside of its steps"
    )
    print(f"error: {what} (the log is {_shown(log)})", file=sys.stderr)
    return 1


def _summary(chain: Lineage, picture: str, root: Path) -> Iterable[str]:
    for step in chain.steps:
        yield f"{step.component}: {'reused from ' if chain.reused(step) else ''}run {short(step.run_id)}"
    if result := chain.output("metrics"):
        yield ""
        controlled = "untrained_top_1_accuracy" in result.metadata
        yield (
            f"{'linear eval':<12}{'pretrained':>12}{'untrained':>12}" if controlled else f"{'linear eval':<12}{'pretrained':>12}"
        )
        for text in ("top-1", "top-5"):
            key = f"{text.replace('-', '_')}_accuracy"
            control = f"{result.metadata[f'untrained_{key}']:>12.1%}" if controlled else ""
            yield f"{text:<12}{result.metadata[key]:>12.1%}{control}"
    yield ""
    yield f"lineage: {_shown(picture)}"
    yield f"browse:  sogclr ui --root {shlex.quote(_shown(root))}"


def _as_json(chain: Lineage, picture: str) -> dict[str, Any]:
    return {
        "run_id": chain.run_id,
        "components": {
            step.component: {
                "run_id": step.run_id,
                "reused": chain.reused(step),
                "outputs": {name: {"uri": one.uri, "metadata": one.metadata} for name, one in step.outputs.items()},
            }
            for step in chain.steps
        },
        "metrics": {name: value for step in chain.steps for name, value in step.metrics.items()},
        "lineage": picture,
    }


def _demo_raw(root: Path) -> str:
    from pipelines.demo_data import make_raw
    from trainer.shared.progress import ProgressBars

    folder = root / "demo-raw"
    with ProgressBars() as bars:
        make_raw(str(folder), report=lambda done, total: bars("demo-raw", done, total))
    return str(folder)


def _make_root(name: str) -> Path:
    root = _absolute(name)
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--root {name} cannot be a folder: {error.strerror}") from error
    return root


# ---- Where MLflow is


def _mlflow_names(root: Path) -> dict[str, str]:
    """Returns MLflow's own variables for a root; what the user set wins."""
    return {
        "MLFLOW_TRACKING_URI": os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{root / 'mlflow.db'}",
        "MLFLOW_EXPERIMENT_NAME": os.environ.get("MLFLOW_EXPERIMENT_NAME") or "sogclr",
    }


def _open_store(root: Path, must_exist: bool = False) -> "Store":
    if must_exist:
        _check_runs(root)
    from components.tracking import move_credentials, open_store

    move_credentials()
    names = _mlflow_names(root)
    uri = names["MLFLOW_TRACKING_URI"]
    # A server says itself where artifacts go.
    artifacts = None if uri.startswith("http") else str(root / "artifacts")
    return open_store(uri, names["MLFLOW_EXPERIMENT_NAME"], artifacts)


def _check_runs(root: Path) -> None:
    if not os.environ.get("MLFLOW_TRACKING_URI") and not (root / "mlflow.db").exists():
        raise UserError(f"--root {_shown(root)} holds no runs; sogclr run --preset demo --root {_shown(root)} makes the first")


def _ui(args: argparse.Namespace) -> int:
    from pipelines.ui import serve

    root = _absolute(args.root)
    _check_runs(root)
    uri = _mlflow_names(root)["MLFLOW_TRACKING_URI"]
    if uri.startswith("http"):
        from components.tracking import without_credentials

        raise UserError(f"the runs are on a server, as MLFLOW_TRACKING_URI says: open {without_credentials(uri)}")
    log = root / "logs" / "ui.log"
    try:
        serve(uri, str(root / "artifacts"), args.port, log, lambda url: print(f"MLflow: {url} (Ctrl-C ends it)", flush=True))
    except KeyboardInterrupt:
        return 0
    raise RuntimeError(f"the server ended by itself; the log is {_shown(log)}")


# ---- Vertex AI


def _compile(args: argparse.Namespace) -> int:
    from pipelines import cloud

    return cloud.compile_(args)


def _submit(args: argparse.Namespace) -> int:
    from pipelines import cloud

    return cloud.submit(args)


def _status(args: argparse.Namespace) -> int:
    from pipelines import cloud

    return cloud.status(args)


def _cancel(args: argparse.Namespace) -> int:
    from pipelines import cloud

    return cloud.cancel(args)


# ---- This machine


def _doctor(args: argparse.Namespace) -> int:
    from components.tracking import move_credentials
    from pipelines.doctor import examine

    root = _absolute(args.root)
    move_credentials()
    names = _mlflow_names(root)
    found = []
    for one in examine(root, names["MLFLOW_TRACKING_URI"], names["MLFLOW_EXPERIMENT_NAME"]):
        found.append(one)
        if not args.json:
            print(f"{'!' if one.wrong else ' '} {one.name}: {one.value}", flush=True)
    wrong = [one for one in found if one.wrong]
    if args.json:
        print(json.dumps([asdict(one) for one in found]))
    else:
        print("\n".join(["", *(f"! {one.name}: {one.wrong}" for one in wrong)] if wrong else ["", "nothing is wrong"]))
    return 2 if wrong else 0


# ---- Lists


def _accelerators(args: argparse.Namespace) -> int:
    known = accelerators.ACCELERATORS.values()
    if args.json:
        print(json.dumps([{**asdict(one), "refused": one.refused} for one in known]))
        return 0
    rows = [("accelerator", "image", "machine", "replicas", "refused", "regions")]
    rows += [(one.name, one.build, one.summary, str(one.replicas), one.refused, ", ".join(one.regions)) for one in known]
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    for row in rows:
        print("  ".join([*(text.ljust(width) for text, width in zip(row, widths, strict=False)), row[5]]).rstrip())
    return 0


def _plan(args: argparse.Namespace) -> int:
    from pipelines import evaluation_plan as evaluating
    from pipelines import plan as planning
    from pipelines.code import PROJECT, program_version
    from pipelines.machines import PRICES
    from trainer.shared.records import read_manifest

    config = resolve(args.preset, args.overrides)
    accelerator = accelerators.get(args.accelerator)
    eval_accelerator = accelerators.get(args.eval_accelerator or args.accelerator)
    root = _make_root(args.root)
    manifest = read_manifest(args.data) if args.data else None
    assumed = planning.assumptions(args.preset, accelerator, manifest, args.price)
    if args.images_per_core:
        assumed = replace(assumed, images_a_core=args.images_per_core)
    price = args.price if eval_accelerator == accelerator else None
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    python, cache = planning.tpu_python(PROJECT), root / "plans"
    plan = planning.make_plan(
        args.preset,
        config,
        accelerator,
        assumed,
        python=python,
        cache=cache,
        version=program_version("trainer/lowering.py"),
        listing=Path(args.listing) if args.listing else None,
        say=say,
    )
    evaluation = evaluating.make_evaluation_plan(
        config,
        eval_accelerator,
        planning.assumptions(args.preset, eval_accelerator, manifest, price),
        evaluating.Limits(args.disk_gb, args.timeout_hours),
        python=python,
        cache=cache,
        version=program_version("eval/measure/programs.py"),
        say=say,
    )
    plan = replace(plan, evaluation=evaluation)
    if args.log:
        from components import tracking

        run_id = tracking.log_plan(_open_store(root), f"plan {plan.preset} {plan.accelerator}", plan.as_json())
        print(f"recorded as run {short(run_id)}", file=sys.stderr)
    if args.json:
        print(json.dumps(plan.as_json()))
        return 0
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 120)
    for title, rows, notes in (
        (f"{plan.preset} on {plan.accelerator}", planning.as_lines(plan), plan.notes),
        (f"its evaluation on {evaluation.accelerator}", evaluating.as_lines(evaluation), evaluation.notes),
    ):
        table = Table("", title, "", box=None)
        for row in rows:
            table.add_row(*row)
        console.print(table)
        for note in notes:
            print(f"note: {note}")
        print()
    for problem in evaluation.problems:
        print(f"cannot end: {problem}")
    if price is None:
        print(f"note: prices are {PRICES}")
    return 0


def _presets(args: argparse.Namespace) -> int:
    described = [describe(name) for name in PRESETS]
    if args.json:
        print(json.dumps(described))
        return 0
    from rich.console import Console
    from rich.table import Table

    console = Console()
    if not console.is_terminal:
        for one in described:
            print(f"{one['name']}: {one['summary']} Published: {one['published']}. Source: {one['source']}. {one['command']}")
        return 0
    table = Table(box=None, padding=(0, 2, 1, 0))
    for title in ("preset", "what", "published", "source"):
        table.add_column(title, no_wrap=title == "preset")
    for one in described:
        table.add_row(one["name"], one["summary"], one["published"], one["source"])
    console.print(table)
    return 0


def _absolute(path: str) -> Path:
    """Returns the one way to write a path, so that the cache knows it again."""
    return Path(os.path.abspath(path))


def _shown(path: Path | str) -> str:
    """Returns a path as short as it can be written from here."""
    relative = os.path.relpath(path) if "://" not in str(path) else str(path)
    return str(path) if relative.startswith("..") else relative


if __name__ == "__main__":
    sys.exit(main())

"""The command line: `sogclr run | rerun | compile | ui | presets`.

What is heavy is imported by the command that needs it, so that --help answers at once.
"""

import argparse
import json
import os
import shlex
import signal
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.lineage import COMPONENTS, Artifact, Lineage, short
from trainer.config import split_overrides
from trainer.presets import PRESETS, describe, resolve
from trainer.records import UserError

if TYPE_CHECKING:
    from components.tracking import Store

_MADE_BY = {"dataset": "build-tfrecords", "model": "pretrain"}
_NEEDS = {"build-tfrecords": (), "pretrain": ("dataset",), "linear-eval": ("dataset", "model")}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code: 0, 1 for what failed, 2 for what the user can mend, 130 for an interrupt."""
    args = _parser().parse_args(arguments)
    # A request to end is an interrupt, so that what was started is ended too.
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return args.command(args)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except UserError as error:
        if args.debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Exception as error:
        if args.debug:
            raise
        print(f"error: {type(error).__name__}: {' '.join(str(error).split())} (--debug shows where)", file=sys.stderr)
        return 1
    finally:
        signal.signal(signal.SIGTERM, before)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sogclr", description="SogCLR from raw images to a linear eval, with the lineage of all steps.", allow_abbrev=False
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, command: Any, summary: str) -> argparse.ArgumentParser:
        one = commands.add_parser(name, help=summary, description=summary, allow_abbrev=False)
        one.set_defaults(command=command)
        one.add_argument("--debug", action="store_true", help="show tracebacks, and all that the steps print")
        return one

    def add_root(one: argparse.ArgumentParser) -> None:
        one.add_argument("--root", default="runs", metavar="DIR", help="folder of everything that is kept (default: runs)")

    def add_set(one: argparse.ArgumentParser) -> None:
        one.add_argument(
            "--set",
            nargs="+",
            action="extend",
            default=[],
            metavar="KEY=VALUE",
            dest="overrides",
            help="change a setting of the preset",
        )

    def add_json(one: argparse.ArgumentParser) -> None:
        one.add_argument("--json", action="store_true", help="print the result as one JSON object")

    run = add("run", _run, "Run the whole pipeline on this machine.")
    run.add_argument("--preset", required=True, metavar="NAME", help="the experiment; sogclr presets lists them")
    run.add_argument("--raw", metavar="DIR", help="folder of the raw archives; the demo makes its own")
    add_root(run)
    add_set(run)
    add_json(run)

    rerun = add("rerun", _rerun, "Run one component again, on what an earlier run left.")
    rerun.add_argument("component", metavar="COMPONENT", choices=COMPONENTS, help=f"one of {', '.join(COMPONENTS)}")
    rerun.add_argument("--run", required=True, metavar="RUN", help="ID of the earlier run, or its first 8 characters or more")
    add_root(rerun)
    add_set(rerun)
    add_json(rerun)

    compile_ = add("compile", _compile, "Write the pipeline as KFP IR YAML.")
    compile_.add_argument("--preset", required=True, metavar="NAME", help="the experiment; sogclr presets lists them")
    compile_.add_argument("--output", required=True, metavar="FILE", help="where to")
    compile_.add_argument("--raw", metavar="DIR", help="default of the pipeline's parameter raw, which is required otherwise")
    compile_.add_argument("--image", metavar="IMAGE", help="container image of the steps")
    add_set(compile_)

    ui = add("ui", _ui, "Open the MLflow UI on a root.")
    add_root(ui)
    ui.add_argument("--port", type=int, default=5000, help="port on this machine (default: 5000)")

    presets = add("presets", _presets, "List the presets with the published result of each.")
    add_json(presets)
    return parser


# ---- run, rerun


def _run(args: argparse.Namespace) -> int:
    resolve(args.preset, args.overrides)
    if args.raw is None and args.preset != "demo":
        raise UserError(f"--preset {args.preset} needs --raw DIR, the folder of the raw archives; only the demo makes its own")
    root = _make_root(args.root)

    from beam_jobs.archives import raw_identity
    from pipelines.pipeline import code_version

    raw = _demo_raw(root) if args.raw is None else args.raw if "://" in args.raw else str(_absolute(args.raw))
    overrides, linear_eval_overrides = split_overrides(args.overrides)
    arguments = {
        "raw": raw,
        "raw_identity": raw_identity(raw),
        "preset": args.preset,
        "overrides": overrides,
        "linear_eval_overrides": linear_eval_overrides,
        "code_version": code_version(),
    }
    command = ["sogclr", "run", "--preset", args.preset, *(["--raw", raw] if args.raw else [])]
    return _execute(args, root, args.preset, command, arguments)


def _rerun(args: argparse.Namespace) -> int:
    component = args.component
    for item, (pretraining, linear_eval) in ((item, split_overrides([item])) for item in args.overrides):
        if not {"build-tfrecords": [], "pretrain": pretraining, "linear-eval": linear_eval}[component]:
            raise UserError(f"{item} is no setting of {component}")
    root = _absolute(args.root)

    from pipelines.pipeline import code_version

    store = _open_store(root, must_exist=True)
    from components import tracking

    run_id = tracking.find_run(store, args.run)
    source = tracking.find_step(store, run_id, component)
    inputs = {name: tracking.find_step(store, source.run_id, _MADE_BY[name]).outputs[name] for name in _NEEDS[component]}
    for name, artifact in inputs.items():
        if "://" not in artifact.uri and not Path(artifact.uri).exists():
            raise UserError(f"the {name} of run {short(run_id)} is gone: there is no {artifact.uri}; sogclr run makes it anew")
    arguments = {**source.arguments, "code_version": code_version()}
    if component == "build-tfrecords":
        from beam_jobs.archives import raw_identity

        arguments["raw_identity"] = raw_identity(arguments["raw"])
    else:
        arguments["overrides"] = [*source.arguments["overrides"], *args.overrides]
        resolve(arguments.get("preset", "demo"), arguments["overrides"])
    command = ["sogclr", "rerun", component, "--run", source.run_id]
    return _execute(
        args, root, f"rerun {component}", command, arguments, component=component, inputs=inputs, rerun_of=source.run_id
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
    from pipelines.pipeline import git_commit
    from trainer.progress import ProgressBars

    store = _open_store(root)
    command += ["--root", str(root), *(["--set", *args.overrides] if args.overrides else [])]
    pipeline_id = tracking.start_pipeline(
        store,
        name,
        command=command,
        root=str(root),
        code_version=arguments["code_version"],
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
            made = local.run(request, {**_mlflow_names(root), "MLFLOW_RUN_ID": pipeline_id}, log, bars, echo)
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
        yield f"{'linear eval':<12}{'pretrained':>12}{'untrained':>12}"
        for text in ("top-1", "top-5"):
            key = f"{text.replace('-', '_')}_accuracy"
            yield f"{text:<12}{result.metadata[key]:>12.1%}{result.metadata[f'untrained_{key}']:>12.1%}"
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
    from trainer.progress import ProgressBars

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
    from components.tracking import open_store

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
        raise UserError(f"the runs are on a server, as MLFLOW_TRACKING_URI says: open {uri}")
    log = root / "logs" / "ui.log"
    try:
        serve(uri, str(root / "artifacts"), args.port, log, lambda url: print(f"MLflow: {url} (Ctrl-C ends it)", flush=True))
    except KeyboardInterrupt:
        return 0
    raise RuntimeError(f"the server ended by itself; the log is {_shown(log)}")


# ---- compile, presets


def _compile(args: argparse.Namespace) -> int:
    resolve(args.preset, args.overrides)
    output = _absolute(args.output)
    if not output.parent.is_dir() or output.is_dir():
        raise UserError(f"--output {args.output} cannot be written: name a file in a folder that exists")

    from pipelines.pipeline import code_version, compile_to

    overrides, linear_eval_overrides = split_overrides(args.overrides)
    defaults = {
        "preset": args.preset,
        "overrides": overrides,
        "linear_eval_overrides": linear_eval_overrides,
        "raw_identity": "",
        "code_version": code_version(),
    }
    compile_to(output, defaults | ({"raw": args.raw} if args.raw else {}), args.image)
    print(_shown(output))
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

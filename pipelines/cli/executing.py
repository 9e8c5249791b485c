"""Runs the pipeline or one component on this machine, records the run in MLflow and prints the result."""

import json
import shlex
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components import variables
from components.lineage import Lineage, short
from pipelines import local
from pipelines.cache import drop_unusable
from pipelines.cli.options import Output
from pipelines.cli.store import ROOT, mlflow_names, open_store, shown
from pipelines.code import code_version, git_commit
from pipelines.logs import abandoned, is_dead, log_of, log_of_new_run
from trainer.shared.progress import ProgressBars

if TYPE_CHECKING:
    from components.tracking import Store


@dataclass(frozen=True)
class Record:
    """What MLflow records about a new run."""

    name: str
    command: tuple[str, ...]
    """The command that repeats the run, without --root."""
    root: str
    """The root, as the user wrote it."""
    rerun_of: str = ""
    """ID of the component's run that this run repeats."""


def execute(request: local.Request, record: Record, output: Output) -> int:
    """Executes a request under a new parent run and prints the result. Returns the exit code of the command."""
    from components import tracking

    root = Path(request.root)
    # A run must be closed even if the server is down when it ends, so its store waits.
    store = open_store(root)
    store = replace(store, client=tracking.patient(store.client))
    close_dead(store, root)

    def start(token: str) -> str:
        return tracking.start_pipeline(
            store,
            record.name,
            command=record.command,
            root="" if record.root == ROOT else record.root,
            code_version=code_version(),
            git_commit=git_commit(),
            params=request.arguments,
            rerun_of=record.rerun_of,
            token=token,
        )

    with log_of_new_run(root, start, partial(tracking.note_started, store)) as (pipeline_id, log):
        status = "KILLED"
        made: list[str] | None = None
        try:
            for line in () if request.component else drop_unusable(root, partial(tracking.why_lost, store)):
                print(line, file=sys.stderr, flush=True)
            with ProgressBars() as bars:
                made = local.run(request, _environment(root, pipeline_id, request), log, bars, _echo(output))
            status = "FAILED" if made is None else "FINISHED"
        finally:
            chain = tracking.end_pipeline(store, pipeline_id, status, made or [])
    if made is None:
        return _print_failure(chain, log_of(root, pipeline_id))
    picture = tracking.picture_uri(store, pipeline_id)
    print(json.dumps(_as_json(chain, picture)) if output.json else "\n".join(summary(chain, picture, root)))
    return 0


def close_dead(store: "Store", root: Path) -> None:
    """Closes the runs of commands that died without closing them. They are recorded as killed."""
    from components import tracking

    left = abandoned(root)
    for run_id, token in tracking.running(store).items():
        if is_dead(root, run_id, token, lambda: print("waiting for the steps of a killed command to end", file=sys.stderr)):
            tracking.end_pipeline(store, run_id, "KILLED")
    for beginning in left:
        beginning.unlink(missing_ok=True)


def _environment(root: Path, pipeline_id: str, request: local.Request) -> dict[str, str]:
    """Returns the variables of a run's steps."""
    return {
        **mlflow_names(root),
        "MLFLOW_RUN_ID": pipeline_id,
        # Vertex AI sets the same variable. An interrupted step resumes from this folder.
        "AIP_CHECKPOINT_DIR": str(root / "checkpoints"),
        variables.DATASETS: str(root / "datasets"),
        **({variables.LISTING: request.listing} if request.listing else {}),
        **({variables.FEATURES: str(root / "features")} if request.reuses else {}),
        **({variables.REUSE: "true"} if request.reuses and not request.component else {}),
    }


def _echo(output: Output) -> Callable[[str], None] | None:
    return (lambda line: print(line, end="", file=sys.stderr)) if output.debug else None


def _print_failure(chain: Lineage, log: Path) -> int:
    failed = chain.failed
    if failed and failed.user_error:
        print(f"error: {failed.component}: {failed.error}", file=sys.stderr)
        return 2
    what = f"{failed.component} failed: {failed.error or 'it was killed'}" if failed else "the pipeline failed outside its steps"
    print(f"error: {what} (the log is {shown(log)})", file=sys.stderr)
    return 1


def summary(chain: Lineage, picture: str, root: Path) -> Iterable[str]:
    """Yields the printed summary of a run: its steps, accuracies and lineage."""
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
    yield f"lineage: {shown(picture)}"
    yield f"browse:  sogclr ui --root {shlex.quote(shown(root))}"


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

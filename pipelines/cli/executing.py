"""Runs the pipeline or one component on this machine, records the run in MLflow and prints the result."""

import json
import shlex
import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from components.lineage import Lineage, short
from pipelines import local
from pipelines.cli.options import Output
from pipelines.cli.store import ROOT, mlflow_names, open_store, shown
from pipelines.code import code_version, git_commit
from trainer.shared.progress import ProgressBars


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
    pipeline_id = tracking.start_pipeline(
        store,
        record.name,
        command=record.command,
        root="" if record.root == ROOT else record.root,
        code_version=code_version(),
        git_commit=git_commit(),
        params=request.arguments,
        rerun_of=record.rerun_of,
    )
    log = root / "logs" / f"{pipeline_id}.log"
    local.forget_lost(local.cache_of(root), lambda run_id: tracking.knows(store, run_id))
    environment = {
        **mlflow_names(root),
        "MLFLOW_RUN_ID": pipeline_id,
        # Vertex AI sets the same variable. An interrupted step resumes from this folder.
        "AIP_CHECKPOINT_DIR": str(root / "checkpoints"),
    }
    echo = (lambda line: print(line, end="", file=sys.stderr)) if output.debug else None
    status = "KILLED"
    made: list[str] | None = None
    try:
        with ProgressBars() as bars:
            made = local.run(request, environment, log, bars, echo)
        status = "FAILED" if made is None else "FINISHED"
    finally:
        chain = tracking.end_pipeline(store, pipeline_id, status, made or [])
    if made is None:
        return _print_failure(chain, log)
    picture = tracking.picture_uri(store, pipeline_id)
    print(json.dumps(_as_json(chain, picture)) if output.json else "\n".join(summary(chain, picture, root)))
    return 0


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

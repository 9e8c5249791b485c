"""The command compare: several linear evals side by side."""

import json
import os
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

from components.lineage import short
from pipelines.cli.options import Commands, Output, add_command, add_json, add_root, read_output
from pipelines.cli.phases import showing
from pipelines.cli.store import check_runs, open_store, root_of, shown
from trainer.shared.errors import UserError

_EXAMPLES = """
examples:
  sogclr compare 3fa91c2e 9d04b7aa
  sogclr compare 3fa91c2e 9d04b7aa 51c8e6f0 --output page.html --json

Prints the accuracies by protocol, paired tests on the same images and the
settings that differ, and writes a page with curves.
"""


def add_to(commands: Commands) -> None:
    """Adds the command of this module."""
    one = add_command(commands, "compare", _read, print_comparison, "Compare the linear evals of several runs.", _EXAMPLES)
    one.add_argument("runs", nargs="+", metavar="RUN", help="MLflow ID of a linear eval's run, or of its pipeline run")
    add_root(one)
    one.add_argument("--output", default="compare.html", metavar="FILE", help="file for the page (default: %(default)s)")
    add_json(one)


@dataclass(frozen=True)
class CompareOptions:
    runs: tuple[str, ...]
    root: Path
    page: str
    output: Output


def _read(args: Namespace) -> CompareOptions:
    return CompareOptions(tuple(args.runs), root_of(args.root), args.output, read_output(args))


def print_comparison(options: CompareOptions) -> int:
    """Prints a comparison of linear evals and writes a page. Raises UserError if one of them has not finished."""
    check_runs(options.root)
    with showing("compare", "loading MLflow"):
        from components import tracking

        store = open_store(options.root)
    steps = [tracking.find_step(store, tracking.find_run(store, run), "linear-eval") for run in options.runs]
    for step in steps:
        if step.status != "FINISHED":
            raise UserError(f"the linear-eval {short(step.run_id)} has not finished: it is {step.status.lower()}")

    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    with showing("compare", "loading TensorFlow"):
        from eval.show.comparison import as_dict, as_text, compare, read_candidate, to_html
        from trainer.shared.files import write_whole

    found = compare(
        [
            read_candidate(step.run_id, step.outputs["metrics"].uri, tracking.history_behind(store, step.run_id, "pretrain"))
            for step in steps
        ]
    )
    write_whole(options.page, to_html(found).encode())
    if options.output.json:
        print(json.dumps({**as_dict(found), "page": options.page}))
    else:
        print("\n".join([*as_text(found), "", f"page: {shown(options.page)}"]))
    return 0

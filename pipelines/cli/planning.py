"""The command plan: estimates of a run's memory, time and price, before anything is paid for."""

import json
import os
import sys
from argparse import Namespace
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from components.lineage import short
from pipelines.cli.options import (
    Commands,
    Experiment,
    Output,
    add_command,
    add_eval_accelerator,
    add_json,
    add_limits,
    add_preset,
    add_root,
    add_set,
    read_experiment,
    read_output,
)
from pipelines.cli.phases import showing
from pipelines.cli.store import make_root, open_store
from pipelines.vertex import accelerators
from pipelines.vertex.accelerators import Accelerator

if TYPE_CHECKING:
    from pipelines.plan.estimate import Estimate
    from pipelines.plan.evaluation import EvaluationEstimate

_EXAMPLES = """
examples:
  sogclr plan --preset sogclr_imagenet_r50_b512 --accelerator v5e-8
  sogclr plan --preset sogclr_imagenet_r50_b2048 --accelerator v3-32 \\
      --price 1.0 --json
  sogclr plan --preset sogclr_imagenet_r50_b512 --accelerator v5e-8 \\
      --eval-accelerator l4-1 --set linear_eval.protocols=cached,official

The TPU's own compiler compiles the training step and the evaluation's forward
pass. It needs no TPU and takes some minutes the first time; make tpu-check
installs it.
"""


def add_to(commands: Commands) -> None:
    """Adds the command of this module."""
    summary = "Estimate memory, time, price and bottlenecks of pretraining and evaluation, before they are paid for."
    one = add_command(commands, "plan", _read, plan, summary, _EXAMPLES)
    add_preset(one)
    one.add_argument(
        "--accelerator", required=True, metavar="NAME", help="machine of pretraining; sogclr accelerators lists them"
    )
    add_eval_accelerator(one)
    add_limits(one)
    one.add_argument(
        "--data", metavar="DIR", help="folder of the dataset, for its counts (default: the counts of the preset's dataset)"
    )
    one.add_argument(
        "--price",
        type=float,
        metavar="DOLLARS",
        help="price of a device of --accelerator an hour; a device is a TPU core of v2 and v3, else a chip",
    )
    one.add_argument(
        "--images-per-core", type=float, metavar="N", help="images/s on a core, as tests/benchmarks/input_pipeline.py measures"
    )
    one.add_argument("--listing", metavar="FILE", help="file to write the compiled program to, with buffers and fusions")
    one.add_argument("--log", action="store_true", help="record the estimate as a run in MLflow")
    add_root(one)
    add_set(one)
    add_json(one)


@dataclass(frozen=True)
class PlanOptions:
    experiment: Experiment
    accelerator: Accelerator
    eval_accelerator: Accelerator
    disk_gb: int
    timeout_hours: float
    data: str
    """Folder of the dataset; empty for the counts of the preset's dataset."""
    price: float | None
    """Price of a device of `accelerator` in dollars an hour; None for the price in the table."""
    images_per_core: float | None
    listing: Path | None
    log: bool
    root: str
    output: Output


def _read(args: Namespace) -> PlanOptions:
    return PlanOptions(
        experiment=read_experiment(args),
        accelerator=accelerators.get(args.accelerator),
        eval_accelerator=accelerators.get(args.eval_accelerator or args.accelerator),
        disk_gb=args.disk_gb,
        timeout_hours=args.timeout_hours,
        data=args.data or "",
        price=args.price,
        images_per_core=args.images_per_core or None,
        listing=Path(args.listing) if args.listing else None,
        log=args.log,
        root=args.root,
        output=read_output(args),
    )


def plan(options: PlanOptions) -> int:
    """Prints the estimates of pretraining and evaluation. Compiles both if the TPU's compiler is installed."""
    from pipelines.plan import prices

    root = make_root(options.root)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    eval_price = options.price if options.eval_accelerator == options.accelerator else None
    pretraining, evaluation = _estimate(options, root / "plans", eval_price)
    both = {**pretraining.as_json(), "evaluation": evaluation.as_json()}
    if options.log:
        from components import tracking

        run_id = tracking.log_estimate(open_store(root), f"plan {pretraining.preset} {pretraining.accelerator}", both)
        print(f"recorded as run {short(run_id)}", file=sys.stderr)
    if options.output.json:
        print(json.dumps(both))
    else:
        _print(pretraining, evaluation)
        if eval_price is None:
            print(f"note: prices are {prices.IN_WORDS}")
    return 0


def _estimate(options: PlanOptions, cache: Path, eval_price: float | None) -> "tuple[Estimate, EvaluationEstimate]":
    with showing("plan", "loading TensorFlow"):
        from eval.measure import protocols  # noqa: F401  the estimates import it when they need it
        from pipelines.code import PROJECT, program_version
        from pipelines.plan.compiler import tpu_python
        from pipelines.plan.estimate import assumptions, make_estimate
        from pipelines.plan.evaluation import Limits, make_evaluation_estimate
        from trainer.shared.records import read_manifest

    experiment, python = options.experiment, tpu_python(PROJECT)
    manifest = read_manifest(options.data) if options.data else None
    data = experiment.config.data
    assumed = assumptions(experiment.preset, options.accelerator, manifest, options.price, data=data)
    if options.images_per_core:
        assumed = replace(assumed, images_a_core=options.images_per_core)

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    pretraining = make_estimate(
        experiment.preset,
        experiment.config,
        options.accelerator,
        assumed,
        python=python,
        cache=cache,
        version=program_version("trainer/lowering.py"),
        listing=options.listing,
        say=say,
    )
    evaluation = make_evaluation_estimate(
        experiment.config,
        options.eval_accelerator,
        assumptions(experiment.preset, options.eval_accelerator, manifest, eval_price, data=data),
        Limits(options.disk_gb, options.timeout_hours),
        python=python,
        cache=cache,
        version=program_version("eval/measure/programs.py"),
        say=say,
    )
    return pretraining, evaluation


def _print(pretraining: "Estimate", evaluation: "EvaluationEstimate") -> None:
    from rich.console import Console
    from rich.table import Table

    from pipelines.plan import tables

    console = Console(width=None if sys.stdout.isatty() else 120)
    for title, rows, notes in (
        (f"{pretraining.preset} on {pretraining.accelerator}", tables.pretraining(pretraining), pretraining.notes),
        (f"its evaluation on {evaluation.accelerator}", tables.evaluation(evaluation), evaluation.notes),
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

"""The command run: the whole pipeline on this machine."""

from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

from pipelines.cli.encoders import add_encoder, encoder_parameters, read_encoder
from pipelines.cli.named_files import linear_eval_overrides
from pipelines.cli.options import (
    Commands,
    Experiment,
    Output,
    add_command,
    add_init_from,
    add_json,
    add_preset,
    add_root,
    add_set,
    init_parameters,
    read_experiment,
    read_init_from,
    read_output,
    with_absolute_files,
)
from pipelines.cli.phases import showing
from pipelines.cli.raw_data import identified
from pipelines.cli.store import absolute, make_root
from trainer.shared.errors import UserError

_EXAMPLES = """
examples:
  sogclr run --preset demo
  sogclr run --preset demo --set epochs=10 gamma=0.8
  sogclr run --preset sogclr_imagenet_r50_b512 --raw /data/imagenet \\
      --root /data/runs --set data.on_bad_image=skip
  sogclr run --preset simclr_v1_imagenet_r50_b4096 --raw /data/imagenet \\
      --encoder ResNet50_1x/model.ckpt-225206

A second run reuses the steps whose code, settings and input did not change,
unless --no-cache is given.
After an interrupt, pretraining resumes from its newest checkpoint.
If MLFLOW_TRACKING_URI is set, the runs are recorded in that MLflow store.
"""


def add_to(commands: Commands) -> None:
    """Adds the command of this module."""
    one = add_command(commands, "run", _read, run, "Run the whole pipeline on this machine.", _EXAMPLES)
    add_preset(one)
    one.add_argument("--raw", metavar="DIR", help="folder of the raw archives, here or gs://; the demo makes its own")
    add_root(one)
    add_set(one)
    add_init_from(one)
    add_encoder(one)
    one.add_argument("--no-cache", action="store_true", help="run every step again, from its beginning")
    add_json(one)


@dataclass(frozen=True)
class RunOptions:
    experiment: Experiment
    raw: str
    """Folder of the raw archives; empty for the demo's own archives."""
    init_from: str
    """Checkpoint that pretraining starts from; empty for none."""
    encoder: str
    """Checkpoint of other code that is imported instead of pretraining; empty for none."""
    root: str
    reuses: bool
    """Whether finished steps are reused."""
    output: Output


def _read(args: Namespace) -> RunOptions:
    experiment = with_absolute_files(read_experiment(args))
    if args.raw is None and args.preset != "demo":
        raise UserError(f"--preset {args.preset} needs --raw DIR, the folder of the raw archives; only the demo makes its own")
    raw = args.raw or ""
    raw = raw if "://" in raw or not raw else str(absolute(raw))
    return RunOptions(experiment, raw, read_init_from(args), read_encoder(args), args.root, not args.no_cache, read_output(args))


def run(options: RunOptions) -> int:
    """Runs the whole pipeline on this machine."""
    root = make_root(options.root)

    with showing("run", "loading MLflow"):
        from pipelines.cli.executing import Record, execute
        from pipelines.local import Request

    experiment = options.experiment
    started = init_parameters(options.init_from, experiment.config)
    parameters = experiment.parameters
    parameters["linear_eval_overrides"] = linear_eval_overrides(experiment.config, parameters["linear_eval_overrides"])
    imported = encoder_parameters(options.encoder, experiment.preset, experiment.overrides)
    raw = options.raw or _demo_raw(root)
    settings = ("--set", *experiment.overrides) if experiment.overrides else ()
    named = ("--raw", raw) if options.raw else ()
    begun = ("--init-from", started["init_from"]) if started else ()
    begun = ("--encoder", options.encoder) if options.encoder else begun
    again = () if options.reuses else ("--no-cache",)
    command = ("sogclr", "run", "--preset", experiment.preset, *named, *settings, *begun, *again)
    record = Record(experiment.preset, command, options.root)
    with identified(raw, experiment.config.data, "run") as (identity, listing):
        arguments = {"raw": raw, "raw_identity": identity, **parameters, **started, **imported}
        return execute(Request(str(root), arguments, reuses=options.reuses, listing=listing), record, options.output)


def _demo_raw(root: Path) -> str:
    from pipelines.demo_data import make_raw
    from trainer.shared.progress import ProgressBars

    folder = root / "demo-raw"
    with ProgressBars() as bars:
        make_raw(str(folder), on_progress=lambda done, total: bars("demo-raw", "drawing photographs", done, total))
    return str(folder)

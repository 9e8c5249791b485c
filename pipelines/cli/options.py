"""Options that several commands share, and the frozen settings made from them."""

import argparse
import os
import sys
import textwrap
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn, TextIO, TypeVar

from pipelines.cli.store import ROOT, absolute
from trainer.config import Config, split_overrides
from trainer.presets import resolve
from trainer.shared.data import DATA, DataSettings, as_overrides
from trainer.shared.errors import UserError
from trainer.shared.files import is_local

T = TypeVar("T")
Commands = argparse._SubParsersAction
_WIDTH = 80


class Parser(argparse.ArgumentParser):
    """Prints an error as one line. argparse itself would print all options before it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}; {self.prog} --help says how\n")


def add_command(
    commands: Commands,
    name: str,
    read: Callable[[Namespace], T],
    do: Callable[[T], int],
    summary: str,
    examples: str = "",
) -> argparse.ArgumentParser:
    """Adds a command and returns its parser.

    `read` turns the parsed arguments into the command's settings and raises UserError for an invalid one. `do` gets the settings
    and returns the exit code.
    """
    one: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=textwrap.fill(summary, _WIDTH),
        epilog=examples.strip("\n"),
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    one.set_defaults(command=lambda args: do(read(args)))
    one.add_argument("--debug", action="store_true", help="show tracebacks and all output of the steps")
    return one


# ---- How a command prints


@dataclass(frozen=True)
class Output:
    """How a command prints its result."""

    json: bool = False
    """Print the result as one JSON object on stdout, and everything else on stderr."""
    debug: bool = False
    """Also print all output of the steps."""

    @property
    def beside(self) -> TextIO:
        """Returns the stream for all output except the result."""
        return sys.stderr if self.json else sys.stdout


def add_json(one: argparse.ArgumentParser) -> None:
    one.add_argument("--json", action="store_true", help="print the result as one JSON object")


def read_output(args: Namespace) -> Output:
    return Output(args.json, args.debug)


# ---- What is run


@dataclass(frozen=True)
class Experiment:
    """A preset and the settings that change it."""

    preset: str
    overrides: tuple[str, ...]
    config: Config
    """The preset with the overrides applied."""

    @property
    def files(self) -> dict[str, str]:
        """Returns the paths of the files that the settings name, by key."""
        return {**self.config.data.files, **self.config.linear_eval.files}

    @property
    def parameters(self) -> dict[str, Any]:
        """Returns the parameters of the pipeline that define the experiment."""
        pretraining, linear_eval = split_overrides(self.overrides)
        return {
            "data_settings": as_overrides(self.config.data),
            "preset": self.preset,
            "overrides": pretraining,
            "linear_eval_overrides": linear_eval,
        }


def add_preset(one: argparse.ArgumentParser) -> None:
    one.add_argument("--preset", required=True, metavar="NAME", help="the experiment; sogclr presets lists them")


def add_set(one: argparse.ArgumentParser) -> None:
    one.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        dest="overrides",
        help="change a setting of the preset; those of the conversion begin with data., of the linear eval with linear_eval.",
    )


def add_init_from(one: argparse.ArgumentParser) -> None:
    one.add_argument(
        "--init-from",
        default="",
        metavar="CHECKPOINT",
        help="start pretraining from another run's encoder, heads and u: a checkpoint file, or a folder for its newest one",
    )


def read_init_from(args: Namespace) -> str:
    """Returns the checkpoint or folder of --init-from, as an absolute path or a URI; empty if none is given."""
    return str(absolute(args.init_from)) if args.init_from and is_local(args.init_from) else args.init_from


def init_parameters(init_from: str, config: Config) -> dict[str, str]:
    """Returns the parameters of pretraining that name the checkpoint `init_from`; none if it is empty.

    Raises UserError if there is no such checkpoint, or if it does not fit `config`.
    """
    if not init_from:
        return {}
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    from trainer.checkpoint import sha256_of
    from trainer.initial import open_source

    found, _ = open_source(init_from, config)
    return {"init_from": found.path, "init_identity": sha256_of(found.arrays)}


def make_experiment(preset: str, overrides: Sequence[str]) -> Experiment:
    """Returns an experiment. Raises UserError for an unknown preset or an invalid setting."""
    return Experiment(preset, tuple(overrides), resolve(preset, overrides))


def read_experiment(args: Namespace) -> Experiment:
    """Returns the experiment of a whole pipeline. Raises UserError if its linear eval would have no images."""
    experiment = make_experiment(args.preset, args.overrides)
    if not experiment.config.data.validation:
        raise UserError(
            f"{DATA}validation=false leaves the linear eval of the pipeline without images: omit it, or convert with python -m "
            "beam_jobs.build_tfrecords --no-validation and pretrain with python -m trainer.task"
        )
    return experiment


def with_absolute_files(experiment: Experiment) -> Experiment:
    """Returns an experiment whose files for the conversion have absolute paths, so that equal files have equal cache keys."""
    return replace(experiment, config=replace(experiment.config, data=absolute_files(experiment.config.data)))


def absolute_files(data: DataSettings) -> DataSettings:
    """Returns settings of the conversion whose files on this machine have absolute paths."""
    paths: dict[str, Any] = {key.removeprefix(DATA): str(absolute(path)) for key, path in data.files.items() if is_local(path)}
    return replace(data, **paths)


# ---- Where


def add_root(one: argparse.ArgumentParser) -> None:
    one.add_argument("--root", default=ROOT, metavar="DIR", help=f"folder for all local files (default: {ROOT})")


def add_place(one: argparse.ArgumentParser, what: str, required: bool = False) -> None:
    group = one.add_argument_group("where on Google Cloud")
    group.add_argument("--project", default="", metavar="P", required=required, help=f"project {what}")
    group.add_argument("--region", default="", metavar="R", required=required, help=f"region {what}, as in europe-west4")
    group.add_argument("--endpoint", default="", metavar="URL", help="URL of the API (default: Google's public one)")


# ---- Machines of the two steps that compute


def add_eval_accelerator(one: argparse._ActionsContainer) -> None:
    one.add_argument(
        "--eval-accelerator", default="", metavar="NAME", help="machine of the linear eval (default: that of --accelerator)"
    )


def add_limits(one: argparse._ActionsContainer) -> None:
    one.add_argument(
        "--timeout-hours", type=float, default=168, metavar="H", help="longest time of an attempt (default and limit: 168)"
    )
    one.add_argument("--disk-gb", type=int, default=200, metavar="GB", help="size of the boot disk (default: 200)")

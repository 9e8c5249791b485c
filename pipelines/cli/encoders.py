"""The option --encoder: evaluates an encoder of other code in place of pretraining one."""

import argparse
import os
from argparse import Namespace
from collections.abc import Iterable

from pipelines.cli.store import absolute
from trainer.config import split_overrides
from trainer.shared.errors import UserError
from trainer.shared.files import is_local

_SETTINGS = ("image_size", "eval_crop_proportion")
"""Settings of pretraining that the linear eval of an imported encoder has too."""


def add_encoder(one: argparse.ArgumentParser) -> None:
    one.add_argument(
        "--encoder",
        default="",
        metavar="CHECKPOINT",
        help="import this encoder of other code instead of pretraining: docs/checkpoints.md lists the formats",
    )


def read_encoder(args: Namespace) -> str:
    """Returns the checkpoint of --encoder, as an absolute path or a URI; empty if none is given.

    Raises UserError for an option that has no effect with it.
    """
    if not args.encoder:
        return ""
    if args.init_from:
        raise UserError(f"--init-from {args.init_from} has no effect with --encoder, which replaces pretraining: leave one out")
    check_settings(args.overrides)
    return str(absolute(args.encoder)) if is_local(args.encoder) else args.encoder.rstrip("/")


def check_settings(overrides: Iterable[str]) -> None:
    """Raises UserError for a setting that has no effect on an imported encoder."""
    pretraining, _ = split_overrides(overrides)
    for item in pretraining:
        if item.partition("=")[0].strip() not in (*_SETTINGS, "data.allow_other_counts"):
            raise UserError(
                f"--set {item} has no effect on an imported encoder, which is not pretrained: set only data., linear_eval., "
                f"{' or '.join(_SETTINGS)}"
            )


def encoder_parameters(encoder: str, preset: str, overrides: Iterable[str]) -> dict[str, str]:
    """Returns the parameters of the pipeline that name the checkpoint `encoder`; none if it is empty.

    Raises UserError if it is of no known format, or if `preset` is published and has another encoder.
    """
    if not encoder:
        return {}
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    from trainer.importing.importer import recognise

    _, sha256 = recognise(encoder, preset, split_overrides(overrides)[0])
    return {"encoder": encoder, "encoder_identity": f"sha256:{sha256}"}

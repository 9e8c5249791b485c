"""Imports an encoder from the command line.

    python -m trainer.importing CHECKPOINT --output DIR [--dry-run]

CHECKPOINT is a checkpoint of other code: SimCLR, SogCLR, MoCo v3, torchvision, timm, lightly, solo-learn or VISSL.
docs/checkpoints.md lists the formats.
"""

import argparse
import json
import os
from collections.abc import Sequence

from trainer.shared.errors import UserError


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m trainer.importing",
        description="Make a checkpoint folder from an encoder of other code.",
        allow_abbrev=False,
    )
    add_options(parser)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_args(arguments)
    try:
        run(args.checkpoint, args.output, args.image_size, args.dataset_fingerprint, args.preset, args.dry_run, args.json)
    except UserError as error:
        if args.debug:
            raise
        parser.exit(2, f"error: {error}\n")


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "checkpoint", metavar="CHECKPOINT", help="file, or prefix of a TensorFlow checkpoint, or a folder that holds one"
    )
    parser.add_argument("--output", default="", metavar="DIR", help="new folder for the checkpoint and its config.json")
    parser.add_argument("--dry-run", action="store_true", help="say what the checkpoint holds; write nothing")
    parser.add_argument(
        "--image-size", type=int, default=0, metavar="PIXELS", help="side of the encoder's images (default: 224; CIFAR stem: 32)"
    )
    parser.add_argument(
        "--dataset-fingerprint",
        default="",
        metavar="FINGERPRINT",
        help="dataset that the moving averages u belong to; without it u is left out",
    )
    parser.add_argument("--preset", default="", metavar="NAME", help="published experiment that the checkpoint comes from")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(
    checkpoint: str, output: str, image_size: int, dataset_fingerprint: str, preset: str, dry_run: bool, as_json: bool
) -> None:
    """Imports `checkpoint` and prints what was found."""
    if bool(output) == dry_run:
        raise UserError("name the new folder by --output DIR, or ask for --dry-run; not both")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    from trainer.config import values_of
    from trainer.importing.importer import import_checkpoint

    found = import_checkpoint(checkpoint, output, image_size=image_size, dataset_fingerprint=dataset_fingerprint, preset=preset)
    values = values_of(found.config)
    settings = {key: values[key] for key in found.translation.settings}
    if as_json:
        print(json.dumps({"settings": settings, "checkpoint": found.checkpoint, **found.describe()}, sort_keys=True))
        return
    print(f"{found.source}: {found.translation.format}, sha256 {found.sha256}")
    print("  " + " ".join(f"{key}={value}" for key, value in settings.items()))
    print(f"  taken: {found.translation.mapped} arrays")
    for what, count in found.translation.left_out.items():
        print(f"  left out: {what} ({count} array{'' if count == 1 else 's'})")
    print(f"  {found.comparison}")
    if found.checkpoint:
        print(f"wrote {found.checkpoint}")


if __name__ == "__main__":
    main()

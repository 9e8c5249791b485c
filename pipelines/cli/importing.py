"""The command import: makes a checkpoint folder from an encoder of other code."""

from argparse import Namespace
from dataclasses import dataclass

from pipelines.cli.options import Commands, add_command
from trainer.importing import __main__ as importing

_EXAMPLES = """
examples:
  sogclr import ResNet50_1x/model.ckpt-225206 --dry-run
  sogclr import gs://BUCKET/checkpoint_0799.pth.tar --output encoders/sogclr
  python -m eval.task --data DATA --checkpoint encoders/sogclr --output EVAL

Taken are ResNets of SimCLR and SogCLR (TensorFlow 1 and 2, PyTorch), MoCo v3,
torchvision, timm, lightly, solo-learn and VISSL: see docs/checkpoints.md.
"""


def add_to(commands: Commands) -> None:
    """Adds the command of this module."""
    summary = "Make a checkpoint folder from a published encoder of other code, and compare their features."
    importing.add_options(add_command(commands, "import", _read, import_encoder, summary, _EXAMPLES))


@dataclass(frozen=True)
class ImportOptions:
    checkpoint: str
    output: str
    image_size: int
    dataset_fingerprint: str
    preset: str
    dry_run: bool
    json: bool


def _read(args: Namespace) -> ImportOptions:
    return ImportOptions(
        args.checkpoint, args.output, args.image_size, args.dataset_fingerprint, args.preset, args.dry_run, args.json
    )


def import_encoder(options: ImportOptions) -> int:
    """Imports the checkpoint and prints what was found."""
    importing.run(
        options.checkpoint,
        options.output,
        options.image_size,
        options.dataset_fingerprint,
        options.preset,
        options.dry_run,
        options.json,
    )
    return 0

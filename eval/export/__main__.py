"""Exports a pretrained encoder from the command line.

python -m eval.export --checkpoint CHECKPOINTS --output EXPORT [--data DATA] [--evaluation EVAL]
"""

import argparse
import os
from collections.abc import Sequence

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

from eval.export.encoder import export
from trainer.shared.errors import UserError


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m eval.export", description="Export a pretrained encoder.", allow_abbrev=False)
    parser.add_argument("--checkpoint", required=True, metavar="PATH", help="a checkpoint, or a folder: its newest checkpoint")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder for the encoder and the card")
    parser.add_argument("--data", default="", metavar="DIR", help="dataset of pretraining, to describe in the card")
    parser.add_argument("--evaluation", default="", metavar="DIR", help="output of eval.task for this checkpoint, for the card")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_args(arguments)
    try:
        exported = export(args.checkpoint, args.output, data_dir=args.data, evaluation=args.evaluation)
    except UserError as error:
        if args.debug:
            raise
        parser.exit(2, f"error: {error}\n")
    print(f"{exported.folder}: encoder of step {exported.step}, {exported.features} features per image")
    print(f"in PyTorch, {exported.comparison}")


if __name__ == "__main__":
    main()

"""Pretraining from the command line.

    python -m trainer.task --preset demo --data DATA --checkpoint-dir CHECKPOINTS [--set key=value ...]

The same command resumes from the newest checkpoint. On SIGTERM, and on SIGHUP of a closed terminal, it saves its state and exits
with 75, "temporary failure": run it again.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict

from trainer.preemption import ending_noted, exits_if_preempted
from trainer.presets import resolve_pretraining
from trainer.shared.errors import UserError
from trainer.shared.processes import end_with_its_work
from trainer.shared.progress import ProgressBars


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m trainer.task", description="Pretrain an encoder.", allow_abbrev=False)
    parser.add_argument("--preset", required=True, help="name of the preset; sogclr presets lists them")
    parser.add_argument("--data", required=True, metavar="DIR", help="dataset, the output of beam_jobs.build_tfrecords")
    parser.add_argument("--checkpoint-dir", required=True, metavar="DIR", help="folder for checkpoints and result.json")
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", dest="overrides", help="change a setting"
    )
    parser.add_argument(
        "--init-from",
        default="",
        metavar="CHECKPOINT",
        help="start from the encoder, heads and u of another run: a checkpoint file, or a folder for its newest one",
    )
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_args(arguments)
    try:
        config = resolve_pretraining(args.preset, args.overrides)
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
        with exits_if_preempted(), ProgressBars() as bars, ending_noted() as should_stop:
            bars("pretrain", "loading TensorFlow")
            from trainer.distribution import claim_devices
            from trainer.train import train

            bars("pretrain", "finding devices")
            strategy = claim_devices(say=lambda line: bars.note("pretrain", line))
            result = train(
                config,
                args.data,
                args.checkpoint_dir,
                init_from=args.init_from,
                preset=args.preset,
                strategy=strategy,
                on_progress=bars.of("pretrain"),
                should_stop=should_stop,
                say=lambda line: bars.note("pretrain", line),
            )
    except KeyboardInterrupt:
        parser.exit(130, "interrupted: the same command goes on from the newest checkpoint\n")
    except UserError as error:
        if args.debug:
            raise
        parser.exit(2, f"error: {error}\n")
    if args.json:
        print(json.dumps(asdict(result), sort_keys=True))
    else:
        print(f"{result.steps} steps, loss {result.metrics.get('train/contrastive_loss', float('nan')):.3f}", file=sys.stderr)
        print(f"checkpoint: {result.checkpoint}\nstate_sha256: {result.state_sha256}")


if __name__ == "__main__":
    end_with_its_work(main)

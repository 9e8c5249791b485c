"""Linear eval from the command line.

python -m eval.task --data DATA --checkpoint CHECKPOINTS --output OUTPUT [--set linear_eval.key=value ...]
"""

import argparse
import json
import os
from collections.abc import Sequence

from trainer.progress import ProgressBars
from trainer.records import UserError


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m eval.task", description="Evaluate a pretrained encoder.", allow_abbrev=False)
    parser.add_argument("--data", required=True, metavar="DIR", help="what beam_jobs.build_tfrecords wrote")
    parser.add_argument("--checkpoint", required=True, metavar="PATH", help="a checkpoint, or the folder of them: the newest")
    parser.add_argument("--output", required=True, metavar="DIR", help="where result.json and the classifier go")
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", dest="overrides", help="change a setting"
    )
    parser.add_argument("--json", action="store_true", help="print the metrics as one JSON object")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_args(arguments)
    try:
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
        from eval.linear_eval import linear_eval

        with ProgressBars() as bars:
            result = linear_eval(
                args.data,
                args.checkpoint,
                args.output,
                args.overrides,
                report=lambda done, total, text: bars("linear-eval", done, total, text),
            )
    except UserError as error:
        if args.debug:
            raise
        parser.exit(2, f"error: {error}\n")
    if args.json:
        print(json.dumps(dict(result.metrics), sort_keys=True))
    else:
        for k in (1, 5):
            ours, control = (result.metrics[f"eval/{name}top_{k}_accuracy"] for name in ("", "untrained_"))
            print(f"top-{k}: {ours:.2%}   untrained control: {control:.2%}   ({result.num_images} validation images)")


if __name__ == "__main__":
    main()

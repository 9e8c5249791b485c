"""Evaluation from the command line.

    python -m eval.task --data DATA --checkpoint CHECKPOINTS --output OUTPUT [--set linear_eval.key=value ...]

The same command resumes from the features, the finished protocols and the finished epochs in OUTPUT. On SIGTERM, and on SIGHUP
of a closed terminal, it saves its state and exits with 75, "temporary failure": run it again.
"""

import argparse
import json
import os
from collections.abc import Sequence

from trainer.preemption import ending_noted, exits_if_preempted
from trainer.shared.errors import UserError
from trainer.shared.processes import end_with_its_work
from trainer.shared.progress import ProgressBars


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m eval.task", description="Evaluate a pretrained encoder.", allow_abbrev=False)
    parser.add_argument("--data", required=True, metavar="DIR", help="dataset, the output of beam_jobs.build_tfrecords")
    parser.add_argument("--checkpoint", required=True, metavar="PATH", help="a checkpoint, or a folder: its newest checkpoint")
    parser.add_argument(
        "--output", required=True, metavar="DIR", help="folder for result.json, features, predictions and the classifier"
    )
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", dest="overrides", help="change a setting"
    )
    parser.add_argument("--json", action="store_true", help="print result.json as one JSON object")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_args(arguments)
    try:
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
        with exits_if_preempted(), ProgressBars() as bars, ending_noted() as should_stop:
            bars("linear-eval", "loading TensorFlow")
            from eval.measure.evaluation import read_evaluation, read_result
            from eval.measure.linear_eval import linear_eval
            from trainer.distribution import claim_devices

            bars("linear-eval", "finding devices")
            strategy = claim_devices(say=lambda line: bars.note("linear-eval", line))
            result = linear_eval(
                args.data,
                args.checkpoint,
                args.output,
                args.overrides,
                strategy=strategy,
                on_progress=bars.of("linear-eval"),
                should_stop=should_stop,
            )
    except KeyboardInterrupt:
        parser.exit(130, "interrupted: the same command goes on from the finished features and protocols\n")
    except UserError as error:
        if args.debug:
            raise
        parser.exit(2, f"error: {error}\n")
    if args.json:
        print(json.dumps(read_result(args.output), sort_keys=True))
        return
    print(f"{'protocol':14} {'encoder':11} {'top-1':>6}  {'95% interval':13} {'top-5':>7} {'seconds':>8}")
    for one in result.accuracies:
        low, high = (f"{100 * end:.1f}" for end in one.top_1_interval)
        print(f"{one.protocol:14} {one.encoder:11} {one.top_1:6.1%}  {f'{low} to {high}':13} {one.top_5:7.1%} {one.seconds:8.1f}")
    for measurement in result.measurements:
        for name, value in measurement.values.items():
            print(f"{name.replace('_', ' '):46} {value:.6g}")
    print(f"{result.num_images} validation images; intervals by bootstrap over them")
    print(f"untrained control: {read_evaluation(args.output).about_control}")


if __name__ == "__main__":
    end_with_its_work(main)

r"""Converts raw images to a TFDS folder in which every image has an ID. A Beam job.

On this machine, in one process or in two:

    python -m beam_jobs.build_tfrecords --raw DIR --output DIR
    python -m beam_jobs.build_tfrecords --raw DIR --output DIR --processes 2

On Dataflow, with an image that has this package installed:

    python -m beam_jobs.build_tfrecords --raw gs://BUCKET/raw --output gs://BUCKET/imagenet \
        --runner=DataflowRunner --project=PROJECT --region=REGION --temp_location=gs://BUCKET/temp \
        --sdk_container_image=IMAGE --sdk_location=container

This is the command line; `beam_jobs.job` does the work. `beam_jobs.layouts` defines the layouts of raw data, `beam_jobs.convert`
the work of Beam's workers. After an interrupt, the same command goes on from the finished shards. The user manual is
docs/conversion.md.
"""

import argparse
import json
import logging
import sys
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from beam_jobs import subsets
from beam_jobs.dry_run import passed_over_lines, to_dict, to_text
from beam_jobs.job import build, describe, plan_only
from beam_jobs.plan import EXPECT, ON_BAD_IMAGE, VERIFY
from beam_jobs.verify import LostRecordsError
from trainer.shared.errors import UserError, print_in_any_locale
from trainer.shared.progress import ProgressBars
from trainer.shared.records import Manifest


def _summary(output: str, manifest: Manifest) -> dict[str, Any]:
    splits = {
        name: {
            "images": split.records,
            "shards": len(split.shards),
            "repaired": len(split.repaired),
            "rejected": len(split.rejected),
            "resized": split.resized,
        }
        for name, split in manifest.splits.items()
    }
    return {
        "output": output,
        "name": manifest.name,
        "fingerprint": manifest.fingerprint,
        "classes": manifest.num_classes,
        "splits": splits,
    }


def _print_summary(summary: Mapping[str, Any], manifest: Manifest) -> None:
    for name, split in summary["splits"].items():
        more = "".join(
            f", {split[what]} {text}" for what, text in (("rejected", "left out"), ("resized", "resized")) if split[what]
        )
        print(f"{name}: {split['images']} images, {split['repaired']} of them repaired{more}, in {split['shards']} shards")
    for text in passed_over_lines({name: split.seen for name, split in manifest.splits.items()}):
        print(f"passed over in {text}")
    print(f"classes: {summary['classes']}")
    print(f"fingerprint: {summary['fingerprint']}")
    print(f"look at it: python -m beam_jobs.inspect_dataset {summary['output']}")
    print(f"next: python -m trainer.task --preset NAME --data {summary['output']} --checkpoint-dir DIR")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m beam_jobs.build_tfrecords",
        description="Raw images to TFRecords with image IDs. Options that are not listed here are Beam's.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--raw", required=True, metavar="DIR", help="the raw images as docs/conversion.md lists them, local or gs://"
    )
    parser.add_argument(
        "--output",
        required=True,
        metavar="DIR",
        help="folder of the dataset, local or gs://, for example ROOT/NAME/1.0.0",
    )
    parser.add_argument("--name", help="the dataset's name in TFDS (default: NAME of ROOT/NAME/1.0.0, else images)")
    parser.add_argument("--num-shards", type=int, metavar="N", help="shards of each split (default: shards of about 128 MiB)")
    parser.add_argument("--subset", metavar="NAME|FILE", help=f"{', '.join(subsets.SUBSETS)}, or a file with a synset a line")
    parser.add_argument("--images-per-class", type=int, metavar="N", help="most training images of a class: the first by name")
    parser.add_argument(
        "--on-bad-image",
        choices=ON_BAD_IMAGE,
        default="fail",
        help="skip: leave out unreadable images and list them (default: fail)",
    )
    parser.add_argument(
        "--verify", choices=VERIFY, default="headers", help="decode: decode every image, not only unusual ones (default: headers)"
    )
    parser.add_argument(
        "--validation-labels", metavar="FILE", help="labels of flat validation images (default: validation_labels.txt in --raw)"
    )
    parser.add_argument("--max-side", type=int, metavar="PIXELS", help="resize larger images to this length of the longer side")
    parser.add_argument(
        "--expect", choices=EXPECT, default="any", help="the dataset that the raw data must be: its classes and numbers of images"
    )
    parser.add_argument(
        "--allow-other-counts", action="store_true", help="accept other classes and numbers of images than ImageNet's"
    )
    parser.add_argument(
        "--no-validation",
        dest="validation",
        action="store_false",
        help="convert training images only: enough for pretraining, not for linear eval",
    )
    parser.add_argument("--processes", type=int, metavar="N", help="processes on this machine (default: 1)")
    parser.add_argument("--dry-run", action="store_true", help="check every image and print the plan; convert nothing")
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")
    parser.add_argument("--debug", action="store_true", help="show Beam's log, and the traceback of an error")
    return parser


def _only_describes(beam_args: Sequence[str]) -> bool:
    from beam_jobs.runners import only_describes

    return only_describes(beam_args)


def main(argv: Sequence[str] | None = None) -> int:
    print_in_any_locale()
    args, beam_args = _parser().parse_known_args(argv)
    given = vars(args)
    dry_run, as_json, debug = (given.pop(option) for option in ("dry_run", "json", "debug"))
    logging.getLogger().setLevel(logging.INFO if debug else logging.CRITICAL)
    if not debug:
        warnings.simplefilter("ignore")
    try:
        if dry_run:
            with ProgressBars() as bars:
                planned = plan_only(**given, beam_args=beam_args, on_progress=bars.of("dry-run"))
            print(json.dumps(to_dict(planned)) if as_json else to_text(planned))
            return 2 if planned.problems else 0
        if beam_args and _only_describes(beam_args):
            if given.pop("processes") is not None:
                raise UserError(
                    "--processes is for a conversion on this machine, but these options convert nothing here: omit it"
                )
            describe(**given, beam_args=beam_args)
            print("the job is described; nothing was converted")
            return 0
        with ProgressBars() as bars:
            manifest = build(**given, beam_args=beam_args, on_progress=bars.of("build-tfrecords"))
    except (UserError, LostRecordsError) as error:
        if debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    except KeyboardInterrupt:
        print("error: interrupted; the same command goes on from the shards that are finished", file=sys.stderr)
        return 130
    summary = _summary(args.output, manifest)
    if as_json:
        print(json.dumps(summary))
    else:
        _print_summary(summary, manifest)
    return 0


if __name__ == "__main__":
    # Imported by its own name, so that workers can import the functions of the pipeline.
    from beam_jobs.build_tfrecords import main as main_by_name

    sys.exit(main_by_name())

r"""From raw images to a TFDS folder whose every image has an ID, as a Beam job.

On this machine, in one process, or in two:

    python -m beam_jobs.build_tfrecords --raw DIR --output DIR
    python -m beam_jobs.build_tfrecords --raw DIR --output DIR --processes 2

On Dataflow, with an image that has this package installed:

    python -m beam_jobs.build_tfrecords --raw gs://BUCKET/raw --output gs://BUCKET/imagenet \
        --runner=DataflowRunner --project=PROJECT --region=REGION --temp_location=gs://BUCKET/temp \
        --sdk_container_image=IMAGE --sdk_location=container

`beam_jobs.archives` says how raw images may lie, `beam_jobs.convert` what happens to them. Interrupted, the same command
goes on from the shards that are finished. docs/conversion.md is the user's page.
"""

import argparse
import importlib.metadata
import json
import logging
import os
import re
import sys
import tempfile
import threading
import time
import traceback
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import apache_beam as beam
from apache_beam.options.pipeline_options import GoogleCloudOptions, PipelineOptions, TestOptions
from rich.console import Console
from rich.progress import Progress

from beam_jobs import archives, dataflow, files, images, proof, subsets, survey
from beam_jobs.convert import Convert, Index, Writers, local_writers
from beam_jobs.ending import ends_on_sigterm
from beam_jobs.plan import SPLITS, WORK, Plan, shards_for
from beam_jobs.publish import publish, was_made_by
from trainer.shared.errors import UserError
from trainer.shared.files import is_local
from trainer.shared.records import MANIFEST, Manifest, manifest_from_json

VERIFY = ("headers", "decode")
ON_BAD_IMAGE = ("fail", "skip")

_SHARD_FILE = re.compile(r".+\.tfrecord-\d{5}-of-\d{5}")
_NAME = re.compile(r"[a-z][a-z0-9_]*")
_VERSION = re.compile(r"\d+\.\d+\.\d+")
_IDENTITY = "IDENTITY"
"""In the folder of an unfinished job: what it was making."""
_DASK = "--runner=DaskRunner"
"""Beam knows it by a longer name only."""
_SECONDS_BETWEEN_LOOKS = 0.5
_SECONDS_BETWEEN_REMOTE_LOOKS = 10.0
_SECONDS_BETWEEN_LINES = 5.0


def ignore(*_: object) -> None:
    """Does nothing."""


def make_plan(
    raw: str,
    output: str,
    *,
    name: str | None = None,
    num_shards: int | None = None,
    subset: str | None = None,
    images_per_class: int | None = None,
    on_bad_image: str = "fail",
    verify: str = "headers",
    max_side: int | None = None,
    allow_other_counts: bool = False,
) -> Plan:
    """Returns the plan of converting the raw images in the folder `raw` to a dataset in the folder `output`.

    name: of the dataset in TFDS; by default NAME where `output` is ROOT/NAME/1.0.0, which is then its version, else images
    num_shards: of each split; by default what makes shards of 128 MiB
    subset: one of `subsets.SUBSETS` or a file with a synset a line
    images_per_class: at most, of training images, the first by name
    on_bad_image: fail, or skip: images that cannot be read get no ID and are listed in the manifest
    verify: headers, or decode: how deep to look for damage
    max_side: pixels that the longer side may have; larger images are made as small
    allow_other_counts: of the synsets of the real ImageNet, not all images need be there

    Raises UserError for arguments that make no sense, and where there are no raw images.
    """
    for argument, value in (("num_shards", num_shards), ("images_per_class", images_per_class), ("max_side", max_side)):
        if value is not None and value < 1:
            raise UserError(f"{argument}={value} makes no sense: it must be at least 1")
    for argument, text, choices in (("on_bad_image", on_bad_image, ON_BAD_IMAGE), ("verify", verify, VERIFY)):
        if text not in choices:
            raise UserError(f"{argument}={text} is unknown: it must be {' or '.join(choices)}")
    parts = output.rstrip("/").split("/")
    versioned = len(parts) > 1 and _VERSION.fullmatch(parts[-1]) is not None
    name = name or (parts[-2] if versioned else "images")
    if not _NAME.fullmatch(name):
        raise UserError(f"name={name} cannot name a dataset: use small letters, digits and underscores, a letter first")
    synsets = subsets.synsets_of(subset) if subset else None
    opened = archives.open_raw(raw, synsets=synsets, images_per_class=images_per_class)
    sizes = {split: sum(opened.archives[number].size for number in opened.of_split(split)) for split in SPLITS}
    options = {
        "subset": subset if subset in subsets.SUBSETS else subset and os.path.basename(subset),
        "images_per_class": images_per_class,
        "on_bad_image": on_bad_image if on_bad_image != "fail" else None,
        "verify": verify if on_bad_image != "fail" and verify != "headers" else None,
        "max_side": max_side,
    }
    return Plan(
        raw=opened,
        output=output,
        work=files.join(output, WORK),
        name=name,
        version=parts[-1] if versioned else "1.0.0",
        num_shards={split: num_shards or shards_for(sizes[split]) for split in SPLITS},
        images=images.Options(decode=verify == "decode", max_side=max_side),
        look_first=on_bad_image == "skip",
        expected=None if allow_other_counts else subsets.known_counts(opened.synsets),
        options={option: value for option, value in options.items() if value is not None},
        tool_version=_tool_version(),
    )


@ends_on_sigterm()
def build(
    raw: str,
    output: str,
    *,
    processes: int | None = None,
    beam_args: Sequence[str] = (),
    report: Callable[[int, int], None] = ignore,
    **options: Any,
) -> Manifest:
    """Converts the raw images in the folder `raw` to a dataset in the folder `output`, and returns its manifest.

    `processes` run on this machine, one by default; `beam_args` are Beam's own options, for any other runner; `report` is
    called with how many parts of the job are done and how many there are, from another thread; `options` are those of
    `make_plan`. The output is the same to the byte whatever the runner.

    A dataset that the same conversion finished before is left as it is. One of other raw data or options raises UserError.
    On Dataflow, an earlier attempt's job of the same conversion is gone on with where it still runs. SIGTERM and Ctrl-C cancel
    the job.

    Raises UserError for input that cannot be converted whole, after reading all of it, and `proof.LostRecordsError`; then
    `output` has neither manifest nor shards. Interrupted, or without room, it has finished shards, which the same call uses.
    """
    plan = make_plan(raw, output, **options)
    pipeline = _pipeline(beam_args, processes)
    job = dataflow.Conversion(pipeline, plan) if dataflow.is_dataflow(pipeline) else None
    running = job.running() if job else None
    if files.find(files.join(output, MANIFEST)):
        # Its work folder is there where an earlier job of this kind was interrupted when all but clearing up was done.
        if _made_here(plan) != plan.identity and not was_made_by(plan):
            raise _finished(plan)
        print(f"{output} is already there: the same conversion finished before", file=sys.stderr, flush=True)
        return publish(plan)
    if not running:  # else its workers write there
        _prepare(plan)
        pipeline | Convert(plan, Writers() if _names_runner(beam_args) else local_writers(processes or 1))
    with _watched(plan, report), job.watched() if job else nullcontext():
        try:
            if job:
                _run(lambda: job.wait(running or pipeline.run()))
            else:
                _run(lambda: pipeline.run().wait_until_finish())
            return publish(plan)
        except (proof.FaultsError, proof.LostRecordsError):
            _remove_leftovers(plan)
            raise


def describe(raw: str, output: str, *, beam_args: Sequence[str], **options: Any) -> None:
    """Describes the job that `build` would run, to Dataflow: a template, or nothing at all, as `beam_args` ask for.

    A template's job proves and publishes by itself; it is for these raw images and this output only.
    """
    plan = make_plan(raw, output, **options)
    pipeline = _pipeline(beam_args, None)
    pipeline | Convert(plan, Writers())
    pipeline.run()


def plan_only(
    raw: str, output: str, *, processes: int | None = None, beam_args: Sequence[str] = (), **options: Any
) -> survey.Survey:
    """Returns what `build` would do with the same arguments, having looked at every image's header; writes nothing that stays."""
    plan = make_plan(raw, output, **options)
    local = is_local(output)
    work = tempfile.mkdtemp(prefix="sogclr-plan-") if local else files.join(output, f".plan-{uuid.uuid4().hex}")
    pipeline = _pipeline(beam_args, processes)
    try:
        looking = survey.looking_plan(plan, work)
        pipeline | Index(looking)
        _run(lambda: pipeline.run().wait_until_finish())
        return survey.survey(plan, proof.archive_reports(looking))
    finally:
        files.delete_folder(work)


def _finished(plan: Plan) -> UserError:
    text = files.read(files.join(plan.output, MANIFEST)).decode(errors="replace")
    try:
        holds = f"a finished dataset, fingerprint {manifest_from_json(text).fingerprint}"
    except (ValueError, KeyError, TypeError):
        holds = f"a {MANIFEST} of something else"
    return UserError(f"{plan.output} has {holds}: give another folder, or delete this one first")


def _pipeline(beam_args: Sequence[str], processes: int | None) -> beam.Pipeline:
    if processes is not None and processes < 1:
        raise UserError(f"processes={processes} makes no sense: it must be at least 1")
    if processes is not None and _names_runner(beam_args):
        raise UserError("processes are those of this machine: with --runner, give that runner's own options")
    arguments = list(beam_args)
    if _DASK in arguments:
        arguments[arguments.index(_DASK)] = "--runner=apache_beam.runners.dask.dask_runner.DaskRunner"
        if not any(argument.startswith(("--dask_npartitions", "--dask_partition_size")) for argument in arguments):
            arguments.append("--dask_partition_size=1")  # by default it does 128 shards on one worker
    options = PipelineOptions(arguments if _names_runner(beam_args) else [*arguments, "--runner=FnApiRunner"])
    try:
        pipeline = beam.Pipeline(options=options)
    except (ValueError, ImportError) as error:
        raise UserError(f"Beam cannot run with {' '.join(beam_args)}: {' '.join(str(error).split())}") from error
    # Beam itself passes over a misspelt option without a word.
    unknown = options.get_all_options(retain_unknown_options=True).keys() - options.get_all_options().keys()
    if unknown:
        names = [
            name for name in (argument.split("=")[0] for argument in beam_args) if name.lstrip("-").replace("-", "_") in unknown
        ]
        raise UserError(f"there is no option {', '.join(names)}, neither here nor in Beam; --help lists those of this job")
    return pipeline


def _names_runner(beam_args: Sequence[str]) -> bool:
    return any(argument.split("=")[0] == "--runner" for argument in beam_args)


def _only_describes(beam_args: Sequence[str]) -> bool:
    options = PipelineOptions(list(beam_args))
    return bool(options.view_as(GoogleCloudOptions).template_location or options.view_as(TestOptions).dry_run)


def _run(pipeline: Callable[[], object]) -> None:
    """Runs a pipeline to its end; an error of this project's comes out as itself, whatever the runner made of it."""
    try:
        pipeline()
    except Exception as error:
        if told := _interruption(error):
            raise told from None
        text = "".join(traceback.format_exception(error))
        for kind in (proof.FaultsError, proof.LostRecordsError, UserError):
            if found := re.findall(rf"\b{kind.__name__}: (.+?)(?: \[while running .*)?$", text, re.MULTILINE):
                raise kind(found[-1]) from error
        raise


def _interruption(error: BaseException | None) -> KeyboardInterrupt | SystemExit | None:
    """Returns the Ctrl-C or the SIGTERM that Beam made an error of: in one process, its workers run in the main thread."""
    while error:
        if isinstance(error, KeyboardInterrupt | SystemExit):
            return error
        error = error.__cause__ or error.__context__
    return None


def _prepare(plan: Plan) -> None:
    """Makes the output folder ready: an interrupted job's shards stay where they are those of this plan."""
    made_here = _made_here(plan)
    if not made_here and (others := [name for name in files.names(plan.output) if _SHARD_FILE.fullmatch(name)]):
        raise UserError(f"{plan.output} has {others[0]}, which no unfinished job of this kind left there: give another folder")
    if made_here != plan.identity:
        _remove_leftovers(plan)
    files.delete_temporary(plan.output)
    files.delete_temporary(plan.work)
    files.delete([plan.rejected])
    files.write(files.join(plan.work, _IDENTITY), plan.identity.encode())


def _made_here(plan: Plan) -> str:
    path = files.join(plan.work, _IDENTITY)
    return files.read(path).decode() if files.find(path) else ""


def _remove_leftovers(plan: Plan) -> None:
    files.delete([files.join(plan.output, name) for name in files.names(plan.output) if _SHARD_FILE.fullmatch(name)])
    files.delete_temporary(plan.output)
    files.delete_folder(plan.work)


@contextmanager
def _watched(plan: Plan, report: Callable[[int, int], None]) -> Iterator[None]:
    """Reports while the block runs: a part for each archive, each shard, and for proving and publishing."""
    total = len(plan.raw.archives) + sum(plan.num_shards.values()) + 1
    ended = threading.Event()
    pause = _SECONDS_BETWEEN_LOOKS if is_local(plan.work) else _SECONDS_BETWEEN_REMOTE_LOOKS

    def watch() -> None:
        done = 0
        while not ended.wait(pause):
            done = max(done, min(proof.count_reports(plan), total - 1))
            report(done, total)

    report(0, total)
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()
    report(total, total)


def _tool_version() -> str:
    try:
        return importlib.metadata.version("sogclr")
    except importlib.metadata.PackageNotFoundError:
        return "source"


@contextmanager
def _progress() -> Iterator[Callable[[int, int], None]]:
    """Gives what shows progress on stderr: a bar on a terminal, else a line now and then."""
    console = Console(stderr=True)
    if console.is_terminal:
        with Progress(console=console) as bar:
            task = bar.add_task("build-tfrecords", total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total)
        return
    last = -_SECONDS_BETWEEN_LINES

    def print_line(done: int, total: int) -> None:
        nonlocal last
        if done == total or time.monotonic() - last >= _SECONDS_BETWEEN_LINES:
            last = time.monotonic()
            print(f"[build-tfrecords] {done}/{total}", file=sys.stderr, flush=True)

    yield print_line


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


def _print_summary(summary: Mapping[str, Any]) -> None:
    for name, split in summary["splits"].items():
        more = "".join(
            f", {split[what]} {text}" for what, text in (("rejected", "left out"), ("resized", "resized")) if split[what]
        )
        print(f"{name}: {split['images']} images, {split['repaired']} of them repaired{more}, in {split['shards']} shards")
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
    parser.add_argument("--raw", required=True, metavar="DIR", help="the raw images, archives or extracted, local or gs://")
    parser.add_argument(
        "--output",
        required=True,
        metavar="DIR",
        help="where the dataset goes, local or gs://; several lie well as ROOT/NAME/1.0.0",
    )
    parser.add_argument("--name", help="the dataset's name in TFDS (default: that in ROOT/NAME/1.0.0, else images)")
    parser.add_argument("--num-shards", type=int, metavar="N", help="shards of each split (default: as many as have 128 MiB)")
    parser.add_argument("--subset", metavar="NAME|FILE", help=f"{', '.join(subsets.SUBSETS)}, or a file with a synset a line")
    parser.add_argument("--images-per-class", type=int, metavar="N", help="at most, of training images: the first by name")
    parser.add_argument(
        "--on-bad-image",
        choices=ON_BAD_IMAGE,
        default="fail",
        help="skip: leave out and list what cannot be read (default: fail)",
    )
    parser.add_argument(
        "--verify", choices=VERIFY, default="headers", help="decode: decode every image, not only odd ones (default: headers)"
    )
    parser.add_argument("--max-side", type=int, metavar="PIXELS", help="make larger images this small at the longer side")
    parser.add_argument("--allow-other-counts", action="store_true", help="ImageNet's synsets need not have all its images")
    parser.add_argument("--processes", type=int, metavar="N", help="processes on this machine (default: 1)")
    parser.add_argument("--dry-run", action="store_true", help="print the plan, having looked at every image; convert nothing")
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")
    parser.add_argument("--debug", action="store_true", help="show Beam's log, and the traceback of an error")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args, beam_args = _parser().parse_known_args(argv)
    given = vars(args)
    dry_run, as_json, debug = (given.pop(option) for option in ("dry_run", "json", "debug"))
    logging.getLogger().setLevel(logging.INFO if debug else logging.CRITICAL)
    if not debug:
        warnings.simplefilter("ignore")
    try:
        if dry_run:
            planned = plan_only(**given, beam_args=beam_args)
            print(json.dumps(survey.to_dict(planned)) if as_json else survey.to_text(planned))
            return 2 if planned.problems else 0
        if _only_describes(beam_args):
            if given.pop("processes") is not None:
                raise UserError("processes are those of this machine, where nothing is to run")
            describe(**given, beam_args=beam_args)
            print("the job is described; nothing was converted")
            return 0
        with _progress() as report:
            manifest = build(**given, beam_args=beam_args, report=report)
    except (UserError, proof.LostRecordsError) as error:
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
        _print_summary(summary)
    return 0


if __name__ == "__main__":
    # By its own name, so that workers can import what the pipeline refers to.
    from beam_jobs.build_tfrecords import main as main_by_name

    sys.exit(main_by_name())

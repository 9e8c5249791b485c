r"""From raw archives to a TFDS folder whose every image has an ID, as a Beam job.

On this machine, in one process, or in two:

    python -m beam_jobs.build_tfrecords --raw DIR --output DIR
    python -m beam_jobs.build_tfrecords --raw DIR --output DIR --direct_running_mode=multi_processing --direct_num_workers=2

On Dataflow, with an image that has this package installed:

    python -m beam_jobs.build_tfrecords --raw gs://BUCKET/raw --output gs://BUCKET/imagenet \
        --runner=DataflowRunner --project=PROJECT --region=REGION --temp_location=gs://BUCKET/temp \
        --sdk_container_image=IMAGE --sdk_location=container

Only references to images go through Beam, never their bytes. A worker indexes an archive by its headers; the counts of all
archives, as a side input, make the IDs dense; references are grouped by shard; a worker reads the images of a shard where
they lie and writes it. Each of the two working stages leaves a small report beside the output. From these the job proves,
before it publishes anything, that what was indexed was written, each image once, with its ID and its label.
"""

import argparse
import importlib.metadata
import json
import logging
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, BinaryIO

import apache_beam as beam
import numpy as np
from apache_beam.io.filesystem import BeamIOError
from apache_beam.metrics.metric import Metrics
from apache_beam.options.pipeline_options import PipelineOptions
from rich.console import Console
from rich.progress import Progress

from beam_jobs import archives, files, images, proof
from beam_jobs.plan import WORK, Plan, make_plan, plan_split, reading_places
from beam_jobs.shards import write_shard
from trainer.records import ENCODED, IMAGE_ID, LABEL, MANIFEST, Manifest, UserError, manifest_from_json, manifest_to_json

_SHARD_FILE = re.compile(r".+\.tfrecord-\d{5}-of-\d{5}(\.[0-9a-f]{32}\.tmp)?")
_SECONDS_BETWEEN_LOOKS = 0.5
_SECONDS_BETWEEN_LINES = 5.0


def ignore(*_: object) -> None:
    """Does nothing."""


def build(
    raw: str,
    output: str,
    *,
    name: str = "images",
    num_shards: int | None = None,
    beam_args: Sequence[str] = (),
    report: Callable[[int, int], None] = ignore,
) -> Manifest:
    """Converts the raw data in the folder `raw` to a dataset in the folder `output`, and returns its manifest.

    `num_shards` is for each split (by default what makes shards of 128 MiB); `beam_args` are Beam's own options; `report` is
    called with how many parts of the job are done and how many there are, from another thread. The output is the same to the
    byte whatever the runner. Raises UserError for input that cannot be converted whole, after reading all of it, and
    `proof.LostRecordsError`; then, and where the job is interrupted, `output` has no manifest.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise UserError(f"name={name} cannot name a dataset: use small letters, digits and underscores, a letter first")
    if num_shards is not None and num_shards < 1:
        raise UserError(f"num_shards={num_shards} makes no sense: it must be at least 1")
    _refuse_finished(output)
    plan = make_plan(archives.open_raw(raw), output, name, num_shards)
    pipeline = _pipeline(beam_args)
    _prepare(plan)
    pipeline | Convert(plan)
    with _watched(plan, report):
        pipeline.run().wait_until_finish()
        try:
            manifest = proof.prove(plan, _tool_version())
        except Exception:
            _remove_leftovers(output)
            raise
        _publish(plan, manifest)
    return manifest


class Convert(beam.PTransform):
    """All that runs on workers: from a plan to shards and reports.

    A single line of steps; what branches off is a side input and nothing else, since not every runner keeps other branches.
    """

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.plan = plan

    def expand(self, pbegin: Any) -> Any:
        indexed = (
            pbegin
            | "Archives" >> beam.Create(range(len(self.plan.raw.archives)))
            | "IndexHeaders" >> beam.FlatMap(index_archive, self.plan)
        )
        counts = indexed | "CountImages" >> beam.Map(count_images)
        return (
            indexed
            | "AssignIDs" >> beam.FlatMap(assign_ids, self.plan, beam.pvalue.AsDict(counts))
            | "GroupByShard" >> beam.GroupByKey()
            | "WriteShards" >> beam.Map(write_references, self.plan)
        )


Indexed = tuple[int, list[tuple]]
"""The number of an archive and the fields of each `RawImage` in it: Beam encodes plain tuples faster than named ones."""


def index_archive(number: int, plan: Plan) -> list[Indexed]:
    """Returns what is in an archive, in the order of names; nothing where it cannot be used."""
    try:
        found = archives.index(plan.raw.folder, plan.raw.archives[number])
    except UserError as error:
        proof.report_archive(plan, number, num_images=0, problem=str(error))
        return []
    proof.report_archive(plan, number, num_images=len(found), problem="")
    return [(number, [tuple(image) for image in found])]


def count_images(indexed: Indexed) -> tuple[int, int]:
    number, found = indexed
    return number, len(found)


def assign_ids(indexed: Indexed, plan: Plan, counts: dict[int, int]) -> list[tuple[tuple[str, str], tuple]]:
    """Returns for each image of an archive ((split, shard's file), (place, image ID, *fields of the RawImage))."""
    number, found = indexed
    if len(counts) < len(plan.raw.archives):
        return []  # one of them cannot be used, so there will be no dataset
    split = plan.raw.archives[number].split
    of_split = plan_split(plan, split, counts)
    first_id = of_split.first_ids[number]
    places = reading_places(of_split.num_images)[first_id : first_id + len(found)]
    shards = of_split.shards_of(places).tolist()
    return [
        ((split, of_split.shard_files[shard]), (place, image_id, *image))
        for image_id, (place, shard, image) in enumerate(zip(places.tolist(), shards, found, strict=True), start=first_id)
    ]


def write_references(grouped: tuple[tuple[str, str], Iterable[tuple]], plan: Plan) -> None:
    """Writes the shard of the images that are referred to, in the order of their places, reading each where it lies."""
    (split, shard_file), references = grouped
    repaired: list[dict[str, Any]] = []
    rejected: list[dict[str, Any]] = []

    def read_all() -> Iterator[tuple[int, int, bytes]]:
        with ExitStack() as stack:
            opened: dict[str, BinaryIO] = {}
            for _, image_id, *fields in sorted(references):
                image = archives.RawImage(*fields)
                if image.file not in opened:
                    opened[image.file] = stack.enter_context(files.open_to_read(files.join(plan.raw.folder, image.file)))
                source = f"{image.file}/{image.name}"
                try:
                    encoded, done = images.repair(archives.read(opened[image.file], image))
                except images.UnreadableImageError as error:
                    rejected.append({"source": source, "reason": str(error)})
                    continue
                if done:
                    repaired.append({"id": image_id, "source": source, "done": done})
                yield image_id, image.label, encoded

    written = write_shard(plan.output, shard_file, split, read_all())
    for what, count in (("written", written.shard.records), ("repaired", len(repaired)), ("rejected", len(rejected))):
        Metrics.counter("images", what).inc(count)
    proof.report_shard(plan, written, repaired, rejected)


def _refuse_finished(output: str) -> None:
    path = files.join(output, MANIFEST)
    if files.find(path):
        with files.open_to_read(path) as file:
            text = file.read().decode(errors="replace")
        try:
            holds = f"a finished dataset, fingerprint {manifest_from_json(text).fingerprint}"
        except (ValueError, KeyError, TypeError):
            holds = f"a {MANIFEST} of something else"
        raise UserError(f"{output} has {holds}: give another folder, or delete this one first")


def _pipeline(beam_args: Sequence[str]) -> beam.Pipeline:
    names_runner = any(argument.split("=")[0] == "--runner" for argument in beam_args)
    options = PipelineOptions(list(beam_args) if names_runner else [*beam_args, "--runner=FnApiRunner"])
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


def _prepare(plan: Plan) -> None:
    """Makes the output folder ready, without what an interrupted job left in it."""
    if not files.names(plan.work) and (others := [name for name in files.names(plan.output) if _SHARD_FILE.fullmatch(name)]):
        raise UserError(f"{plan.output} has {others[0]}, which no unfinished job of this kind left there: give another folder")
    _remove_leftovers(plan.output)
    files.delete([plan.rejected])
    try:
        with files.open_to_write(files.join(plan.work, "README")) as file:
            file.write(b"Here beam_jobs.build_tfrecords is at work, or was interrupted. The next run starts anew.\n")
    except (OSError, BeamIOError) as error:
        raise UserError(f"cannot write to {plan.output}: {error}") from error


def _remove_leftovers(output: str) -> None:
    files.delete([files.join(output, name) for name in files.names(output) if _SHARD_FILE.fullmatch(name)])
    files.delete_folder(files.join(output, WORK))


@contextmanager
def _watched(plan: Plan, report: Callable[[int, int], None]) -> Iterator[None]:
    """Reports while the block runs: a part for each archive, each shard, and for proving and publishing."""
    total = len(plan.raw.archives) + sum(plan.num_shards.values()) + 1
    ended = threading.Event()

    def watch() -> None:
        done = 0
        while not ended.wait(_SECONDS_BETWEEN_LOOKS):
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


def _publish(plan: Plan, manifest: Manifest) -> None:
    """Makes a dataset of the shards: TFDS's metadata, then the manifest, last of all."""
    import tensorflow_datasets as tfds  # here only: it imports TensorFlow

    template = tfds.core.ShardedFileTemplate(data_dir=plan.output, dataset_name=plan.name, filetype_suffix="tfrecord")
    tfds.folder_dataset.write_metadata(
        data_dir=plan.output,
        features=tfds.features.FeaturesDict(
            {
                ENCODED: tfds.features.Image(shape=(None, None, 3), encoding_format="jpeg"),
                LABEL: tfds.features.ClassLabel(names=list(manifest.synsets)),
                IMAGE_ID: np.int64,
            }
        ),
        split_infos=[
            tfds.core.SplitInfo(
                name=name,
                shard_lengths=[shard.records for shard in split.shards],
                num_bytes=sum(shard.bytes for shard in split.shards),
                filename_template=template.replace(split=name),
            )
            for name, split in manifest.splits.items()
        ],
        filename_template=template,
        description=f"Made by beam_jobs.build_tfrecords; its fingerprint is {manifest.fingerprint}.",
    )
    with files.open_to_write(files.join(plan.output, MANIFEST)) as file:
        file.write(manifest_to_json(manifest).encode())
    files.delete_folder(plan.work)


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
        name: {"images": split.records, "shards": len(split.shards), "repaired": len(split.repaired)}
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
        print(f"{name}: {split['images']} images, {split['repaired']} of them repaired, in {split['shards']} shards")
    print(f"classes: {summary['classes']}")
    print(f"fingerprint: {summary['fingerprint']}")
    print(f"next: python -m trainer.task --preset NAME --data {summary['output']} --checkpoint-dir DIR")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m beam_jobs.build_tfrecords",
        description="Raw archives to TFRecords with image IDs. Options that are not listed here are Beam's.",
        allow_abbrev=False,
    )
    parser.add_argument("--raw", required=True, metavar="DIR", help="the raw archives, local or gs://")
    parser.add_argument("--output", required=True, metavar="DIR", help="where the dataset goes, local or gs://")
    parser.add_argument("--name", default="images", help="the dataset's name in TFDS (default: %(default)s)")
    parser.add_argument("--num-shards", type=int, metavar="N", help="shards of each split (default: as many as have 128 MiB)")
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")
    parser.add_argument("--debug", action="store_true", help="show Beam's log, and the traceback of an error")
    args, beam_args = parser.parse_known_args(argv)
    logging.getLogger().setLevel(logging.INFO if args.debug else logging.ERROR)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    try:
        with _progress() as report:
            manifest = build(
                args.raw, args.output, name=args.name, num_shards=args.num_shards, beam_args=beam_args, report=report
            )
    except (UserError, proof.LostRecordsError) as error:
        if args.debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    summary = _summary(args.output, manifest)
    if args.json:
        print(json.dumps(summary))
    else:
        _print_summary(summary)
    return 0


if __name__ == "__main__":
    # By its own name, so that workers can import what the pipeline refers to.
    from beam_jobs.build_tfrecords import main as main_by_name

    sys.exit(main_by_name())

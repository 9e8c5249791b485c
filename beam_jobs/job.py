"""One conversion from start to finish: plans it, runs its pipeline, follows it, and resumes an interrupted one."""

import fcntl
import os
import re
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import cache
from typing import Any

from beam_jobs import catalogue, dry_run, files, images, origin, unpack, verify
from beam_jobs.ending import ends_when_asked
from beam_jobs.local import OnThisMachine, Steps
from beam_jobs.plan import UNPACKED, Plan, make_plan
from beam_jobs.pooled import Writers, local_writers
from beam_jobs.publish import CONVERSION, origin_of, publish, refuse_lost_shards
from beam_jobs.raw import Recognised
from trainer.shared.errors import UserError, printable
from trainer.shared.files import is_local
from trainer.shared.progress import OnProgress, followed, silent
from trainer.shared.records import MANIFEST, Manifest, manifest_from_json
from trainer.shared.scratch import scratch_folder

_SHARD_FILE = re.compile(r".+\.tfrecord-\d{5}-of-\d{5}")
_IDENTITY = "IDENTITY"
"""File in the work folder: the `Plan.identity` of the unfinished job."""
_SECONDS_BETWEEN_POLLS, _SECONDS_BETWEEN_REMOTE_POLLS = 0.5, 10.0
_SLOW_DISK = 500.0
"""Reads a second of a disk on which a conversion should not be done."""
LISTING = "listing raw files"
"""A phase of progress."""


@ends_when_asked()
def build(
    raw: str,
    output: str,
    *,
    processes: int | None = None,
    beam_args: Sequence[str] = (),
    listing: str = "",
    on_progress: OnProgress = silent,
    **options: Any,
) -> Manifest:
    """Converts the raw images in the folder `raw` to a dataset in the folder `output`, and returns its manifest.

    processes: number of processes on this machine, 1 by default
    beam_args: Beam's own options; they may choose another runner. Every runner writes the same bytes
    listing: the file in which `raw_identity` kept what it listed; "" to list the raw files
    on_progress: called with the phase and how much of it is done, perhaps from another thread
    options: the arguments of `make_plan`

    If the layout must be unpacked, that is done first, by a pipeline of its own on a runner.

    Leaves a dataset as it is if the same conversion finished it before. On Dataflow, waits for an earlier attempt's job of the
    same conversion if that still runs. SIGTERM, SIGHUP and Ctrl-C cancel the job.

    Raises UserError if `output` holds another dataset, or if another conversion on this machine writes to it. Raises UserError
    for faulty input, after reading all of it, and `verify.LostRecordsError` if the runner is at fault; `output` then has neither
    manifest nor shards. After an interruption or on a full disk, `output` keeps the finished shards, and the same call goes on
    from them.
    """

    with ExitStack() as held:
        # Once: a second lock of the same process would wait for the first.
        hold = cache(lambda: held.enter_context(_alone(output)))

        def unpacked(recognised: Recognised, synsets: Sequence[str] | None) -> str:
            folder = files.join(output, UNPACKED)
            work = unpack.make_work(raw, recognised, folder, synsets)
            if work.sources and not _is_unpacked(work, output):
                hold()
                _unpack(work, output, processes, beam_args, on_progress)
            return folder

        on_progress(LISTING)
        plan = make_plan(raw, output, **options, listing=listing, unpack=unpacked)
        for note in plan.raw.notes:
            _note(note)
        runs = _run(beam_args, processes, output, plan.identity)
        hold()
        return _convert(plan, runs, on_progress)


def _run(beam_args: Sequence[str], processes: int | None, output: str, identity: str) -> Steps:
    """Returns what runs the steps of a conversion: this machine, or Beam if any of its options are given.

    Raises UserError for options that make no sense.
    """
    if processes is not None and processes < 1:
        raise UserError(f"processes={processes} makes no sense: it must be at least 1")
    if not beam_args:
        return OnThisMachine(local_writers(processes or 1))
    from beam_jobs.runners import OnRunner

    return OnRunner(beam_args, processes, output, identity)


def _convert(plan: Plan, runs: Steps, on_progress: OnProgress) -> Manifest:
    if files.find(files.join(plan.output, MANIFEST)):
        # The work folder still exists if the earlier job was interrupted during its cleanup.
        differs = "" if _made_here(plan) == plan.identity else _differences(plan, on_progress)
        print(f"{plan.output} is already there: the same conversion finished before{differs}", file=sys.stderr, flush=True)
        return publish(plan)
    if not runs.going_on:  # a running job's workers write to the output folder, by a plan of their own
        _prepare(plan)
        plan, _ = _with_pieces(plan, on_progress)
    try:
        runs.convert(plan, on_progress)
        return publish(plan)
    except (verify.FaultsError, verify.LostRecordsError):
        _remove_leftovers(plan)
        raise


def _differences(plan: Plan, on_progress: OnProgress) -> str:
    """Returns the end of a line that says how the finished dataset's conversion differed, although its result is the same.

    Raises UserError if the finished dataset in the output folder is another than that of `plan`, or has lost a shard.
    """
    before, compared = origin_of(plan.output), ""
    if before is None:
        raise _finished(plan.output, f", and no usable {CONVERSION} that says of what it was made")
    if before.raw != plan.raw.identity and before.names == plan.raw.names:
        plan, compared = _with_pieces(plan, on_progress)
    if why := origin.why_another(before, plan.origin):
        raise _finished(plan.output, f", of {why}")
    refuse_lost_shards(plan.output)
    return origin.differences(before, plan.origin, compared)


def _with_pieces(plan: Plan, on_progress: OnProgress) -> tuple[Plan, str]:
    """Returns the plan with a digest of pieces of the raw files, and what the digest covers, for people."""
    on_progress("reading pieces of the raw files")
    begun = time.perf_counter()
    pieces, compared = origin.read_pieces(plan.raw.folder, [*plan.raw.found.values()], plan.raw.archives)
    rate = origin.PIECES / (time.perf_counter() - begun)
    if compared and rate < _SLOW_DISK and is_local(plan.raw.folder):
        _note(
            f"{plan.raw.folder} answers about {rate:.0f} reads a second, and each image takes one, so a million take "
            f"{1e6 / rate / 3600:.1f} hours: copy the raw files to an SSD first"
        )
    return replace(plan, pieces=pieces), compared


def describe(raw: str, output: str, *, beam_args: Sequence[str], **options: Any) -> None:
    """Describes to Dataflow the job that `build` would run, as a template or a dry run, whichever `beam_args` ask for.

    A job from the template checks and publishes the dataset by itself. It is for these raw images and this output only.
    """

    def refused(recognised: Recognised, synsets: Sequence[str] | None) -> str:
        if unpack.make_work(raw, recognised, "", synsets).sources:
            raise UserError(f"{raw} has a layout that must be unpacked first, which no template does: run the job itself")
        return ""

    from beam_jobs.runners import make_pipeline
    from beam_jobs.transforms import Convert

    plan, _ = _with_pieces(make_plan(raw, output, **options, unpack=refused), silent)
    pipeline = make_pipeline(beam_args, None)
    pipeline | Convert(plan, Writers())
    pipeline.run()


def plan_only(
    raw: str,
    output: str,
    *,
    processes: int | None = None,
    beam_args: Sequence[str] = (),
    on_progress: OnProgress = silent,
    **options: Any,
) -> dry_run.DryRun:
    """Returns what `build` would do with the same arguments. Reads every image's header; leaves no file behind."""
    to_check = images.Options(decode=options.get("verify") == "decode", max_side=options.get("max_side"))

    def catalogued(recognised: Recognised, synsets: Sequence[str] | None) -> str:
        needed = unpack.make_work(raw, recognised, folder, synsets, to_check)
        if needed.sources:
            _unpack(needed, output, processes, beam_args, on_progress)
        return folder

    with _folder_of_reports(output) as work:
        folder = files.join(work, "unpacked")
        on_progress(LISTING)
        plan = make_plan(raw, output, **options, unpack=catalogued)
        runs = _run(beam_args, processes, output, plan.identity)
        unpacked = catalogue.read_summary(folder).splits if catalogue.has_summary(folder) else {}
        checking = dry_run.check_only_plan(plan, work)
        runs.index(checking, on_progress)
        on_progress("measuring how long an image takes")
        return dry_run.summarise(plan, verify.archive_reports(checking), unpacked)


@contextmanager
def _folder_of_reports(output: str) -> Iterator[str]:
    """Gives a folder for the reports of a dry run, on this machine if `output` is here, and removes it when the block ends."""
    if is_local(output):
        with scratch_folder() as folder:
            yield folder
        return
    folder = files.join(output, f".plan-{uuid.uuid4().hex}")
    try:
        yield folder
    finally:
        files.delete_folder(files.join(folder, "unpacked"))
        files.delete_folder(folder)


@contextmanager
def _alone(output: str) -> Iterator[None]:
    """Keeps other conversions out of a local output folder while the block runs. The lock is on the folder: it leaves no file.

    Raises UserError if another conversion works in the folder, or if the folder cannot be made.
    """
    if not is_local(output):
        yield
        return
    try:
        os.makedirs(output, exist_ok=True)
        opened = os.open(output, os.O_RDONLY)
    except OSError as error:
        raise UserError(f"{output}/ cannot be written: {error.strerror}; give another folder") from error
    try:
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"another conversion writes to {output}: wait until it ends, or give another folder") from error
        yield
    finally:
        os.close(opened)


def _is_unpacked(work: unpack.Work, output: str) -> bool:
    """Returns whether nothing is left to unpack. Raises UserError if `output` has a dataset of other raw data."""
    summary = catalogue.read_summary(work.unpacked) if catalogue.has_summary(work.unpacked) else None
    if files.find(files.join(output, MANIFEST)):
        if summary is None or summary.names != work.names:
            raise _finished(output, ", of other raw data or classes")
        return True
    return summary is not None and summary.identity == work.identity and unpack.is_whole(work)


def _unpack(
    work: unpack.Work,
    output: str,
    processes: int | None,
    beam_args: Sequence[str],
    on_progress: OnProgress,
) -> None:
    """Runs the pipeline that unpacks the source files. Files that are unpacked already stay as they are."""
    runs = _run(beam_args, processes, output, work.identity)
    if not runs.going_on:
        unpack.prepare(work)
    pause = _SECONDS_BETWEEN_POLLS if is_local(work.unpacked) else _SECONDS_BETWEEN_REMOTE_POLLS
    total = sum(source.size for source in work.sources) // 10**6 + 1
    with followed(on_progress, "unpacking files, MB", lambda: unpack.bytes_done(work) // 10**6, total, pause):
        runs.unpack(work)
    on_progress("sorting what was unpacked")
    unpack.finish(work)


def _note(text: str) -> None:
    print(printable(f"note: {text}"), file=sys.stderr, flush=True)


def _finished(output: str, why: str) -> UserError:
    """Returns the error that `output` has a finished dataset, and `why` it is another one."""
    text = files.read(files.join(output, MANIFEST)).decode(errors="replace")
    try:
        holds = f"a finished dataset, fingerprint {manifest_from_json(text).fingerprint}"
    except (ValueError, KeyError, TypeError):
        holds = f"a {MANIFEST} of something else"
    return UserError(f"{output} has {holds}{why}: give another folder, or delete this one first")


def _prepare(plan: Plan) -> None:
    """Makes the output folder ready. Keeps the shards of an interrupted job if it had the same plan."""
    made_here = _made_here(plan)
    shards = [name for name in files.names(plan.output) if _SHARD_FILE.fullmatch(name)]
    if not made_here and shards:
        raise UserError(f"{plan.output} has {shards[0]}, which is not from an unfinished job like this one: give another folder")
    if made_here != plan.identity:
        if shards:
            _note(
                f"the raw files, options or versions changed since {plan.output} was interrupted: its {len(shards)} shards are "
                "written again"
            )
        _remove_leftovers(plan)
    files.delete_temporary(plan.output)
    files.delete_temporary(plan.work)
    files.delete([plan.rejected])
    files.write(files.join(plan.work, _IDENTITY), plan.identity.encode())


def _made_here(plan: Plan) -> str:
    """Returns the `Plan.identity` of the unfinished job in the output folder, or "" if there is none."""
    path = files.join(plan.work, _IDENTITY)
    return files.read(path).decode() if files.find(path) else ""


def _remove_leftovers(plan: Plan) -> None:
    files.delete([files.join(plan.output, name) for name in files.names(plan.output) if _SHARD_FILE.fullmatch(name)])
    files.delete_temporary(plan.output)
    files.delete_folder(plan.work)

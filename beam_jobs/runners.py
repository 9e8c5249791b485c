"""Runs a conversion's steps on Beam: makes its pipeline, runs it, and unwraps this project's own errors from Beam's."""

import re
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext

import apache_beam as beam
from apache_beam.options.pipeline_options import GoogleCloudOptions, PipelineOptions, TestOptions

from beam_jobs import dataflow, transforms, verify
from beam_jobs.local import CHECKING, LISTING
from beam_jobs.plan import Plan
from beam_jobs.pooled import Writers, local_writers
from beam_jobs.unpack import Work
from trainer.shared.errors import UserError
from trainer.shared.files import is_local
from trainer.shared.progress import OnProgress, polled

_SECONDS_BETWEEN_POLLS, _SECONDS_BETWEEN_REMOTE_POLLS = 0.5, 10.0
_DASK = "--runner=DaskRunner"
"""Short name of Dask's runner. Beam accepts only a longer name."""


class OnRunner:
    """Runs the steps of a conversion on the runner that Beam's options choose, one pipeline for each step."""

    def __init__(self, beam_args: Sequence[str], processes: int | None, output: str, identity: str) -> None:
        """Finds the job on Dataflow that an earlier attempt at the same work started.

        identity: digest of what the pipeline does in the folder `output`
        """
        self._pipeline = make_pipeline(beam_args, processes)
        self._writers = Writers() if names_runner(beam_args) else local_writers(processes or 1)
        self._job = dataflow.Conversion(self._pipeline, output, identity) if dataflow.is_dataflow(self._pipeline) else None
        self._running = self._job.running() if self._job else None

    @property
    def going_on(self) -> bool:
        """Whether an earlier attempt's job still runs. The next step then waits for it and starts none."""
        return bool(self._running)

    def index(self, plan: Plan, on_progress: OnProgress) -> None:
        self._pipeline | transforms.Index(plan)
        with _followed(plan, CHECKING, "", on_progress):
            run(lambda: self._pipeline.run().wait_until_finish())

    def unpack(self, work: Work) -> None:
        self._run(transforms.Unpack(work, self._writers))

    def convert(self, plan: Plan, on_progress: OnProgress) -> None:
        with _followed(plan, LISTING, "writing images, MB", on_progress):
            self._run(transforms.Convert(plan, self._writers))

    def _run(self, step: beam.PTransform) -> None:
        if not self._running:
            self._pipeline | step
        job = self._job
        with job.watched() if job else nullcontext():
            if job:
                run(lambda: job.wait(self._running or self._pipeline.run()))
            else:
                run(lambda: self._pipeline.run().wait_until_finish())


@contextmanager
def _followed(plan: Plan, first: str, second: str, on_progress: OnProgress) -> Iterator[None]:
    """Reports two phases while the block runs: `first` lists the archives, `second` writes the shards. Counts bytes."""
    size = sum(archive.size for archive in plan.raw.archives)
    total = size // 10**6 + 1

    def report() -> None:
        listed, written = verify.bytes_done(plan)
        if listed < size or not second:
            on_progress(first, listed // 10**6, total)
        else:
            on_progress(second, written // 10**6, total)

    on_progress(first, 0, total)
    with polled(report, _SECONDS_BETWEEN_POLLS if is_local(plan.work) else _SECONDS_BETWEEN_REMOTE_POLLS):
        yield
    on_progress(second or first, total, total)


def make_pipeline(beam_args: Sequence[str], processes: int | None) -> beam.Pipeline:
    """Returns an empty pipeline with Beam's options `beam_args`, on this machine unless they name a runner.

    Raises UserError for options that Beam does not know, and for `processes` with a runner that does not run on this machine.
    """
    if processes is not None and names_runner(beam_args):
        raise UserError("--processes is for this machine: with --runner, give that runner's own options instead")
    arguments = list(beam_args)
    if _DASK in arguments:
        arguments[arguments.index(_DASK)] = "--runner=apache_beam.runners.dask.dask_runner.DaskRunner"
        if not any(argument.startswith(("--dask_npartitions", "--dask_partition_size")) for argument in arguments):
            arguments.append("--dask_partition_size=1")  # by default, one worker writes 128 shards
    options = PipelineOptions(arguments if names_runner(beam_args) else [*arguments, "--runner=FnApiRunner"])
    try:
        pipeline = beam.Pipeline(options=options)
    except (ValueError, ImportError) as error:
        raise UserError(f"Beam cannot run with {' '.join(beam_args)}: {' '.join(str(error).split())}") from error
    # Beam itself ignores a misspelt option.
    unknown = options.get_all_options(retain_unknown_options=True).keys() - options.get_all_options().keys()
    if unknown:
        names = [
            name for name in (argument.split("=")[0] for argument in beam_args) if name.lstrip("-").replace("-", "_") in unknown
        ]
        raise UserError(
            f"there is no option {', '.join(names)}, neither in this job nor in Beam; --help lists this job's options"
        )
    return pipeline


def names_runner(beam_args: Sequence[str]) -> bool:
    """Returns whether Beam's options choose a runner."""
    return any(argument.split("=")[0] == "--runner" for argument in beam_args)


def only_describes(beam_args: Sequence[str]) -> bool:
    """Returns whether Beam's options ask for a template or a dry run on Dataflow, so that no image is converted."""
    options = PipelineOptions(list(beam_args))
    return bool(options.view_as(GoogleCloudOptions).template_location or options.view_as(TestOptions).dry_run)


def run(pipeline: Callable[[], object]) -> None:
    """Runs a pipeline to its end. Raises this project's own errors as themselves, although runners wrap them."""
    try:
        pipeline()
    except Exception as error:
        if told := _interruption(error):
            raise told from None
        text = "".join(traceback.format_exception(error))
        for kind in (verify.FaultsError, verify.LostRecordsError, UserError):
            if found := re.findall(rf"\b{kind.__name__}: (.+?)(?: \[while running .*)?$", text, re.MULTILINE):
                raise kind(found[-1]) from error
        raise


def _interruption(error: BaseException | None) -> KeyboardInterrupt | SystemExit | None:
    """Returns the Ctrl-C or SIGTERM that Beam wrapped in an error, or None. In one process, workers run in the main thread."""
    while error:
        if isinstance(error, KeyboardInterrupt | SystemExit):
            return error
        error = error.__cause__ or error.__context__
    return None

"""The raw data of a command that converts them on this machine."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

from trainer.shared.data import DataSettings
from trainer.shared.scratch import scratch_folder


@contextmanager
def identified(raw: str, data: DataSettings, job: str) -> Iterator[tuple[str, str]]:
    """Gives the identity of the raw folder, and a file of what was listed for it, which is there while the block runs.

    job: the command, for its progress
    """
    from trainer.shared.progress import ProgressBars

    with scratch_folder() as folder:
        listing = os.path.join(folder, "listing")
        with ProgressBars() as bars:
            bars(job, "loading the conversion")
            from beam_jobs.raw import raw_identity

            bars(job, "identifying the raw folder")
            identity = raw_identity(raw, data.files.values(), validation=data.validation, listing=listing)
        yield identity, listing

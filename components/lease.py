"""A lease on a folder of Cloud Storage, which has no file locks: an object that is written with a precondition.

The object `lease.json` names the job and the process that hold the folder. Every write requires the generation that was last
read, so one of two simultaneous writes fails. The holder renews the lease about once a minute.

No two machines' clocks are compared. A job that finds another job's lease polls its generation. If the generation changes, the
holder is alive. If it stays the same for `_POLLS` polls, the holder is considered dead.
"""

import json
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from components.patience import PATIENCE_OF_STEPS, answer, one_line, patiently, say
from trainer.shared.errors import UserError

FILE = "lease.json"
WORKING, RELEASED, FINISHED = "working", "released", "finished"

_SECONDS_BETWEEN_RENEWALS = 60.0
_SECONDS_AFTER_A_FAILURE = 30.0
_SECONDS_BETWEEN_POLLS = 30.0
_POLLS = 7
"""Consecutive successful polls with the same generation after which the holder is considered dead: 180 s."""
_SECONDS_OF_A_REQUEST = 60.0
_PATIENCE_TO_RELEASE = 60.0

Record = Mapping[str, str]
"""The contents of a lease: `job`, `holder` and `state`."""


class LostLeaseError(UserError):
    """Another process has taken over the folder."""


class Lease:
    """Keeps other processes out of a folder until it is released. A thread renews it, and survives storage errors."""

    def __init__(self, file: "_File", record: Record, generation: int) -> None:
        self._file, self._record, self._generation = file, record, generation
        self._taken_by = ""
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._renew_until_released, daemon=True)
        self._thread.start()

    def require(self) -> None:
        """Raises LostLeaseError if another process has taken over the folder, so that this one must not write to it."""
        if self._taken_by:
            raise LostLeaseError(
                f"{self._file.url} was taken over by {self._taken_by}, because this process did not renew it in time: "
                "it stops without another write"
            )

    def release(self, finished: bool) -> None:
        """Lets other jobs in, or only the same job if the work is `finished`. Prints a warning if that fails."""
        self._ending.set()
        self._thread.join()
        if self._taken_by:
            return
        record = {**self._record, "state": FINISHED if finished else RELEASED}
        try:
            patiently(lambda: self._write(record), _PATIENCE_TO_RELEASE, f"the storage of {self._file.url}")
        except Exception as error:
            say(f"warning: {self._file.url} is not released ({one_line(error)}): it expires")

    def _renew_until_released(self) -> None:
        pause = _SECONDS_BETWEEN_RENEWALS
        while not self._ending.wait(pause):
            pause = _SECONDS_BETWEEN_RENEWALS
            try:
                self._write(self._record)
            except Exception as error:
                # While storage fails, others cannot take the folder over either.
                say(f"warning: {self._file.url} is not renewed: it {answer(error)}")
                pause = _SECONDS_AFTER_A_FAILURE
            if self._taken_by:
                return

    def _write(self, record: Record) -> None:
        written = self._file.write(record, self._generation)
        if written is None:
            found, self._generation = self._file.read()
            if found and found["holder"] != self._record["holder"]:
                self._taken_by = found["job"]
                return
            # The answer to the last write was lost, or somebody deleted the object.
            written = self._file.write(record, self._generation)
        self._generation = written or self._generation


def take(folder: str, job: str, is_unfinished: Callable[[], bool]) -> Lease | None:
    """Returns the lease of a folder on gs://, or None if another job is working in it or has finished the work.

    The same job gets the lease at once, and its previous holder stops. Another job gets a released lease at once. If the lease
    is held, the other job waits until the holder renews it or is considered dead. `is_unfinished` tells whether a folder without
    a lease still has work to do. Waits for storage as long as a step does. Raises UserError if storage refuses.
    """
    file, holder = _File(folder), uuid.uuid4().hex
    watched, polls = 0, 0
    while True:
        failures: list[Exception] = []
        found, generation = _patient(file, partial(_noting, failures, file.read))
        if found is None and not _patient(file, is_unfinished):
            return None
        if found and found["job"] != job:
            if found["state"] == FINISHED:
                return None
            if found["state"] == WORKING:
                if watched and generation != watched:
                    return None
                if not watched:
                    say(f"{folder} is held by {found['job']}; waiting for a sign of life")
                # While storage failed, the holder could not renew its lease either.
                watched, polls = generation, 1 if failures else polls + 1
                if polls < _POLLS:
                    time.sleep(_SECONDS_BETWEEN_POLLS)
                    continue
        record = {"job": job, "holder": holder, "state": WORKING}
        written = _patient(file, partial(file.write, record, generation))
        if written is None:
            # Another process wrote first, or the answer to our first attempt was lost.
            found, generation = _patient(file, file.read)
            written = generation if found and found["holder"] == holder else None
        if written is not None:
            return Lease(file, record, written)


class _File:
    """The object. The record is in its metadata, so that reading and writing take one request each. The text is for people."""

    def __init__(self, folder: str) -> None:
        from google.cloud import storage

        bucket, _, prefix = folder.removeprefix("gs://").partition("/")
        self.url = f"{folder}/{FILE}"
        self._name = f"{prefix}/{FILE}"
        # A bucket's name is unique without a project.
        self._bucket = _in_one_line(self.url, lambda: storage.Client(project=None)).bucket(bucket)

    def read(self) -> tuple[Record | None, int]:
        """Returns the record and the generation of the object, or None and 0 if there is no object."""
        blob = self._bucket.get_blob(self._name, timeout=_SECONDS_OF_A_REQUEST, retry=None)
        if blob is None:
            return None, 0
        about = blob.metadata or {}
        return {key: about.get(key, "") for key in ("job", "holder", "state")}, int(blob.generation)

    def write(self, record: Record, generation: int) -> int | None:
        """Replaces the object of that `generation` and returns the new generation, or None if the object has another one."""
        from google.api_core.exceptions import PreconditionFailed

        blob = self._bucket.blob(self._name)
        blob.metadata = dict(record)
        text = json.dumps(record, indent=1) + "\n"
        try:
            blob.upload_from_string(
                text, "application/json", if_generation_match=generation, timeout=_SECONDS_OF_A_REQUEST, retry=None
            )
        except PreconditionFailed:
            return None
        return int(blob.generation)


def _patient(file: _File, call: Callable[[], Any]) -> Any:
    return _in_one_line(file.url, lambda: patiently(call, PATIENCE_OF_STEPS, f"the storage of {file.url}"))


def _in_one_line(url: str, call: Callable[[], Any]) -> Any:
    try:
        return call()
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{url} cannot be read or written: it {answer(error)}; fix that and start again") from error


def _noting(failures: list[Exception], call: Callable[[], Any]) -> Any:
    try:
        return call()
    except Exception as error:
        failures.append(error)
        raise

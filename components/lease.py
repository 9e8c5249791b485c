"""Who works in a folder of Cloud Storage, where no lock of a file system can say so: an object, written with a precondition.

The object `lease.json` names the job that works in the folder and the process that holds it. Each write asks that the object
still has the generation that was read, so of two writes at once one fails. The holder writes it anew about once a minute.

No clock is compared with another machine's. A job that finds the lease of another watches its generation: one that changes has
a living holder, and one that stays the same in `_LOOKS` looks has none.
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
_SECONDS_BETWEEN_LOOKS = 30.0
_LOOKS = 7
"""Looks at the same generation, without a failed one between, after which its holder is thought dead: 180 s."""
_SECONDS_OF_A_REQUEST = 60.0
_PATIENCE_TO_RELEASE = 60.0

Record = Mapping[str, str]
"""`job`, `holder` and `state`."""


class LostLeaseError(UserError):
    """Another process has taken over the folder."""


class Lease:
    """What keeps others out of a folder until it is released, by a thread that outlives errors of storage."""

    def __init__(self, file: "_File", record: Record, generation: int) -> None:
        self._file, self._record, self._generation = file, record, generation
        self._taken_by = ""
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._renew_until_released, daemon=True)
        self._thread.start()

    def require(self) -> None:
        """Raises LostLeaseError where this process may write no more."""
        if self._taken_by:
            raise LostLeaseError(
                f"{self._file.url} was taken over by {self._taken_by}, since this process was not heard from: "
                "it stops without another write"
            )

    def release(self, finished: bool) -> None:
        """Lets others in, or where the work is `finished` only the same job. Says in one line where that fails."""
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
    """Returns the lease of a folder on gs://, or None where another job is at work in it or has finished the work.

    The same job gets it at once, and whoever held it before stops. Another job gets what was released; where it was not, waits
    until the holder is heard from or thought dead. `is_unfinished` says of a folder without a lease whether there is work left.
    Waits for storage as long as a step does. Raises UserError where storage refuses.
    """
    file, holder = _File(folder), uuid.uuid4().hex
    watched, looks = 0, 0
    while True:
        failures: list[Exception] = []
        found, generation = _asked(file, partial(_noting, failures, file.read))
        if found is None and not _asked(file, is_unfinished):
            return None
        if found and found["job"] != job:
            if found["state"] == FINISHED:
                return None
            if found["state"] == WORKING:
                if watched and generation != watched:
                    return None
                if not watched:
                    say(f"{folder} is held by {found['job']}; waiting for a sign of life")
                # Where storage failed, the holder could not be heard from.
                watched, looks = generation, 1 if failures else looks + 1
                if looks < _LOOKS:
                    time.sleep(_SECONDS_BETWEEN_LOOKS)
                    continue
        record = {"job": job, "holder": holder, "state": WORKING}
        written = _asked(file, partial(file.write, record, generation))
        if written is None:
            # Somebody else was faster, or the answer to the first of two writes was lost.
            found, generation = _asked(file, file.read)
            written = generation if found and found["holder"] == holder else None
        if written is not None:
            return Lease(file, record, written)


class _File:
    """The object: its text is for people, its metadata are the record, so that a look and a write are one request each."""

    def __init__(self, folder: str) -> None:
        from google.cloud import storage

        bucket, _, prefix = folder.removeprefix("gs://").partition("/")
        self.url = f"{folder}/{FILE}"
        self._name = f"{prefix}/{FILE}"
        # No project: a bucket's name is enough.
        self._bucket = _in_one_line(self.url, lambda: storage.Client(project=None)).bucket(bucket)

    def read(self) -> tuple[Record | None, int]:
        """Returns the record, if there is one, and the generation, 0 where there is no object."""
        blob = self._bucket.get_blob(self._name, timeout=_SECONDS_OF_A_REQUEST, retry=None)
        if blob is None:
            return None, 0
        about = blob.metadata or {}
        return {key: about.get(key, "") for key in ("job", "holder", "state")}, int(blob.generation)

    def write(self, record: Record, generation: int) -> int | None:
        """Writes over that `generation` and returns the new one, or None where the object has another."""
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


def _asked(file: _File, call: Callable[[], Any]) -> Any:
    return _in_one_line(file.url, lambda: patiently(call, PATIENCE_OF_STEPS, f"the storage of {file.url}"))


def _in_one_line(url: str, call: Callable[[], Any]) -> Any:
    try:
        return call()
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{url} cannot be read or written: it {answer(error)}; mend that and start again") from error


def _noting(failures: list[Exception], call: Callable[[], Any]) -> Any:
    try:
        return call()
    except Exception as error:
        failures.append(error)
        raise

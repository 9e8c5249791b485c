"""Checkpoints of the train state, one file each, written atomically.

A checkpoint is an uncompressed .npz of arrays by name. The checksums of the zip format reveal a torn file; loading then falls
back to the previous checkpoint.
"""

import hashlib
import io
import json
import os
import re
import sys
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import numpy as np
import tensorflow as tf

from trainer.shared.errors import UserError
from trainer.shared.files import make_folder, names_in, write_arrays

_NAME = re.compile(r"checkpoint-(\d{8,})\.npz")
_ABOUT = "about.json"
_SHARE = 0.01
"""Largest fraction of a run's time that goes into writing checkpoints that are due by time."""
_MAY_PASS = (
    tf.errors.AbortedError,
    tf.errors.DeadlineExceededError,
    tf.errors.InternalError,
    tf.errors.ResourceExhaustedError,
    tf.errors.UnavailableError,
    tf.errors.UnknownError,
)
"""Errors that TensorFlow raises if storage does not answer, or answers 429 or 5xx. They may pass."""


@dataclass(frozen=True)
class Checkpoint:
    step: int
    arrays: Mapping[str, np.ndarray]
    """Values of the variables, by name."""
    metrics: Mapping[str, float]
    """Latest logged metrics."""
    run: str = ""
    """Identifies the run: a digest of its config and dataset."""
    path: str = ""
    """Path of the file, if it was read from one."""
    pending: Sequence[Mapping[str, float]] = ()
    """Metrics of each step since the last log. The next log includes them in its means."""


class Schedule:
    """Tells when a checkpoint is due by time: `minutes` after the last one, unless writing takes over 1% of the time then."""

    def __init__(self, minutes: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._seconds, self._clock = 60 * minutes, clock
        self._begun = self._last = clock()
        self._spent = self._next = 0.0

    def is_due(self) -> bool:
        now = self._clock()
        return now - self._last >= self._seconds and self._spent + self._next <= _SHARE * (now - self._begun)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Measures the block, which writes a checkpoint."""
        before = self._clock()
        yield
        self._last = self._clock()
        self._next = self._last - before
        self._spent += self._next


def save(folder: str, checkpoint: Checkpoint, keep: int, every: int = 1) -> str:
    """Writes `checkpoint` into `folder` and returns its path. Removes older checkpoints.

    Keeps the newest `keep`, and of those whose step is a multiple of `every` also the newest `keep`.
    """
    make_folder(folder)
    path = f"{folder}/checkpoint-{checkpoint.step:08}.npz"
    metrics = {"metrics": dict(checkpoint.metrics), "pending": [dict(one) for one in checkpoint.pending]}
    about = json.dumps({**metrics, "run": checkpoint.run}, sort_keys=True)
    write_arrays(path, {**checkpoint.arrays, _ABOUT: np.array(about)})
    steps = _steps(folder)
    regular = [step for step in steps if step % every == 0]
    for old in (steps[step] for step in steps if step not in [*list(steps)[-keep:], *regular[-keep:]]):
        # If the answer to a deletion is lost, TensorFlow repeats it, and Cloud Storage no longer finds the file.
        with suppress(tf.errors.NotFoundError):
            tf.io.gfile.remove(f"{folder}/{old}")
    return path


def paths(folder: str) -> list[str]:
    """Returns the paths of the checkpoints in `folder`, oldest first."""
    return [f"{folder}/{name}" for name in _steps(folder).values()]


def _steps(folder: str) -> dict[int, str]:
    """Returns the names of the checkpoints in `folder` by their steps, oldest first."""
    steps = {int(match[1]): match[0] for match in map(_NAME.fullmatch, names_in(folder)) if match}
    return dict(sorted(steps.items()))


def load(path: str) -> Checkpoint:
    """Reads a checkpoint.

    Raises UserError if the file is torn or is not a checkpoint. Raises tf.errors.OpError if storage fails temporarily, because
    the file may then be good.
    """
    match = _NAME.fullmatch(os.path.basename(path))
    try:
        if match is None:
            raise ValueError("its name is not checkpoint-STEP.npz")
        with np.load(io.BytesIO(tf.io.read_file(path).numpy()), allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
            about = json.loads(str(arrays.pop(_ABOUT)))
            return Checkpoint(int(match[1]), arrays, about["metrics"], about["run"], path, about.get("pending", ()))
    except _MAY_PASS:
        raise
    except (ValueError, OSError, KeyError, EOFError, zipfile.BadZipFile, tf.errors.OpError) as error:
        raise UserError(f"{path} is not a whole checkpoint: {str(error).splitlines()[0]}") from error


def run_folder(checkpoint: str) -> str:
    """Returns the folder of a run's checkpoints. `checkpoint` is this folder or a file in it."""
    return checkpoint.rpartition("/")[0] or "." if checkpoint.endswith(".npz") else checkpoint.rstrip("/")


def open_checkpoint(checkpoint: str) -> Checkpoint:
    """Reads the checkpoint in the file `checkpoint`, or the newest whole one in the folder `checkpoint`.

    Raises UserError if there is none.
    """
    if checkpoint.endswith(".npz"):
        return load(checkpoint)
    stored = load_latest(run_folder(checkpoint))
    if stored is None:
        raise UserError(f"{run_folder(checkpoint)} holds no whole checkpoint: pretraining has not saved one yet")
    return stored


def load_latest(folder: str, accept: Callable[[Checkpoint], None] = lambda checkpoint: None) -> Checkpoint | None:
    """Returns the newest checkpoint in `folder` that is whole and that `accept` does not refuse, or None.

    `accept` refuses a checkpoint by raising UserError. Prints a warning on stderr for each torn or refused checkpoint, and falls
    back to the previous one.
    """
    for path in reversed(paths(folder)):
        try:
            checkpoint = load(path)
            accept(checkpoint)
            return checkpoint
        except UserError as error:
            print(f"warning: {error}; falling back to the previous checkpoint", file=sys.stderr)
    return None


def require_same_shapes(variables: Mapping[str, tf.Variable], checkpoint: Checkpoint) -> None:
    """Raises UserError if `checkpoint` lacks one of `variables` or has it in another shape."""
    missing = sorted(set(variables) - set(checkpoint.arrays))
    if missing:
        raise UserError(
            f"{checkpoint.path} is of another architecture: it lacks {missing[0]} ({len(missing)} variables are missing)"
        )
    for name, variable in variables.items():
        found = checkpoint.arrays[name].shape
        if found != tuple(variable.shape):
            raise UserError(
                f"{checkpoint.path} is of another architecture: {name} has shape {found}, not {tuple(variable.shape)}"
            )


def restore(variables: Mapping[str, tf.Variable], checkpoint: Checkpoint) -> None:
    """Assigns each variable the array of its name. Raises UserError, and changes nothing, if a name or a shape does not match."""
    require_same_shapes(variables, checkpoint)
    for name, variable in variables.items():
        variable.assign(checkpoint.arrays[name])


def sha256_of(arrays: Mapping[str, np.ndarray]) -> str:
    """Returns the SHA-256 of names, types, shapes and values, in name order. Equal states have equal digests."""
    digest = hashlib.sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        digest.update(f"{name} {array.dtype.str} {array.shape}\n".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()

"""Checkpoints: everything that moves, one file a step, whole or not there.

A checkpoint is an uncompressed .npz of arrays by name. It is written under another name and then renamed, but on gs://, where an
object appears whole. Zip's own checksums tell a torn one, which is passed over for the one before.
"""

import hashlib
import io
import json
import os
import re
import sys
import zipfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import tensorflow as tf

from trainer.shared.errors import UserError
from trainer.shared.files import names_in, write_arrays

_NAME = re.compile(r"checkpoint-(\d{8,})\.npz")
_ABOUT = "about.json"
_MAY_PASS = (
    tf.errors.AbortedError,
    tf.errors.DeadlineExceededError,
    tf.errors.InternalError,
    tf.errors.ResourceExhaustedError,
    tf.errors.UnavailableError,
    tf.errors.UnknownError,
)
"""What TensorFlow says where storage does not answer, or answers 429 or 5xx."""


@dataclass(frozen=True)
class Checkpoint:
    step: int
    arrays: Mapping[str, np.ndarray]
    """By variable name."""
    metrics: Mapping[str, float]
    """The last ones that were logged before it was written."""
    run: str = ""
    """Names the run whose state this is: a digest of its config and dataset."""
    path: str = ""
    """Where it was read from."""
    pending: Sequence[Mapping[str, float]] = ()
    """Metrics of each step since the last log. The next log has the mean of these and of the steps to come."""


def save(folder: str, checkpoint: Checkpoint, keep: int) -> str:
    """Writes `checkpoint` into `folder`, removes all but the newest `keep`, and returns the new one's path."""
    tf.io.gfile.makedirs(folder)
    path = f"{folder}/checkpoint-{checkpoint.step:08}.npz"
    metrics = {"metrics": dict(checkpoint.metrics), "pending": [dict(one) for one in checkpoint.pending]}
    about = json.dumps({**metrics, "run": checkpoint.run}, sort_keys=True)
    write_arrays(path, {**checkpoint.arrays, _ABOUT: np.array(about)})
    for old in paths(folder)[:-keep]:
        # Cloud Storage says so where it deleted the file and its first answer was lost.
        with suppress(tf.errors.NotFoundError):
            tf.io.gfile.remove(old)
    return path


def paths(folder: str) -> list[str]:
    """Returns the checkpoints in `folder`, oldest first."""
    steps = {int(match[1]): match[0] for match in map(_NAME.fullmatch, names_in(folder)) if match}
    return [f"{folder}/{steps[step]}" for step in sorted(steps)]


def load(path: str) -> Checkpoint:
    """Reads one checkpoint.

    Raises UserError where the file is not whole or is no checkpoint, and tf.errors.OpError where storage fails in a way that may
    pass: then nothing is known of the file.
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
    """Returns the folder of a run's checkpoints, given that folder or one of the files in it."""
    return checkpoint.rpartition("/")[0] or "." if checkpoint.endswith(".npz") else checkpoint.rstrip("/")


def open_checkpoint(checkpoint: str) -> Checkpoint:
    """Reads one checkpoint: `checkpoint` is its file, or a folder, of which the newest whole one is taken.

    Raises UserError where there is none.
    """
    if checkpoint.endswith(".npz"):
        return load(checkpoint)
    stored = load_latest(run_folder(checkpoint))
    if stored is None:
        raise UserError(f"{run_folder(checkpoint)} holds no whole checkpoint: pretraining has not come so far")
    return stored


def load_latest(folder: str, accept: Callable[[Checkpoint], None] = lambda checkpoint: None) -> Checkpoint | None:
    """Returns the newest checkpoint in `folder` that is whole and that `accept` takes, or None.

    One that is torn, or for which `accept` raises UserError, is named on stderr and passed over for the one before.
    """
    for path in reversed(paths(folder)):
        try:
            checkpoint = load(path)
            accept(checkpoint)
            return checkpoint
        except UserError as error:
            print(f"warning: {error}; taking the one before", file=sys.stderr)
    return None


def require_same_shapes(variables: Mapping[str, tf.Variable], checkpoint: Checkpoint) -> None:
    """Raises UserError where `checkpoint` lacks one of `variables` or has it in another shape."""
    missing = sorted(set(variables) - set(checkpoint.arrays))
    if missing:
        raise UserError(
            f"{checkpoint.path} is of another architecture: it has no {missing[0]} ({len(missing)} variables missing)"
        )
    for name, variable in variables.items():
        found = checkpoint.arrays[name].shape
        if found != tuple(variable.shape):
            raise UserError(
                f"{checkpoint.path} is of another architecture: {name} has shape {found}, not {tuple(variable.shape)}"
            )


def restore(variables: Mapping[str, tf.Variable], checkpoint: Checkpoint) -> None:
    """Assigns each variable the array of its name. Raises UserError, and changes nothing, where names or shapes differ."""
    require_same_shapes(variables, checkpoint)
    for name, variable in variables.items():
        variable.assign(checkpoint.arrays[name])


def sha256_of(arrays: Mapping[str, np.ndarray]) -> str:
    """Returns a digest of names, types, shapes and values, in name order: equal states have equal digests."""
    digest = hashlib.sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        digest.update(f"{name} {array.dtype.str} {array.shape}\n".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()

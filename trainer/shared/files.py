"""Atomic writes of files and folders, local or on gs://: a reader sees the old content or the new, never a part.

A local file is written under a temporary name in the same folder, then renamed. On gs:// one upload is atomic by itself: the
object appears when the upload ends, and a rename would cost a copy and a deletion.

Local paths do not need TensorFlow. Beam has its own file systems: see `beam_jobs/files.py`.
"""

import errno
import hashlib
import io
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, BinaryIO

from trainer.shared.errors import UserError

if TYPE_CHECKING:
    import numpy as np

_PARTIAL = ".partial"
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
_OF_WRITING = (*_NO_ROOM, errno.EFBIG, errno.EROFS)
"""System errors that only writing raises, never reading."""


def is_local(path: str) -> bool:
    return "://" not in path


@contextmanager
def whole_file(path: str, partial: str = "") -> Iterator[BinaryIO]:
    """Opens a local file for writing. It appears at `path` when the block ends without an error.

    Until then its path is `partial`, by default `path` with a suffix. If two processes may write the same file at the same time,
    each must pass its own `partial`. Creates the folder. Raises UserError if this machine cannot write, as on a full disk.
    """
    partial = partial or path + _PARTIAL
    with naming_unwritable(path):
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        file = _create(partial)
    try:
        with naming_full_disk(path), file:
            yield file
        with naming_unwritable(path):
            os.replace(partial, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(partial)
        raise


@contextmanager
def whole_folder(path: str, replaces: bool = False) -> Iterator[str]:
    """Creates a local folder to fill. It appears at `path` when the block ends without an error.

    If `replaces`, it takes the place of what is there. Otherwise raises OSError if a folder that is not empty is there by then.
    Raises UserError if this machine cannot write.
    """
    parent, name = os.path.split(os.path.abspath(path))
    make_folder(parent)
    with naming_unwritable(path):
        partial = tempfile.mkdtemp(prefix=f".{name}-", dir=parent)
    try:
        with naming_full_disk(path):
            yield partial
        os.chmod(partial, 0o755)
        if replaces:
            shutil.rmtree(path, ignore_errors=True)
        os.rename(partial, path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def write_whole(path: str, content: bytes) -> None:
    """Writes a file atomically, local or remote.

    Raises UserError if it cannot be written, and tf.errors.OpError if remote storage fails in a way that may pass.
    """
    if is_local(path):
        with naming_unwritable(path), whole_file(path) as file:
            file.write(content)
        return
    import tensorflow as tf

    partial = path if path.startswith("gs://") else path + _PARTIAL
    with _naming_refused(path, "written"):
        with tf.io.gfile.GFile(partial, "wb") as file:
            file.write(content)
        if partial != path:
            tf.io.gfile.rename(partial, path, overwrite=True)


def make_folder(path: str) -> None:
    """Makes a folder and the folders above it, local or remote, unless they exist. Raises as `write_whole`."""
    if not is_local(path):
        import tensorflow as tf

        with _naming_refused(path, "made"):
            tf.io.gfile.makedirs(path)
        return
    try:
        os.makedirs(path, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise UserError(f"{path} cannot be made: a file is in the way; {_remedy(error)}") from error
    except OSError as error:
        raise UserError(f"{path} cannot be made: {error.strerror}; {_remedy(error)}") from error


def write_arrays(path: str, arrays: "Mapping[str, np.ndarray]") -> None:
    """Writes an uncompressed .npz atomically."""
    import numpy as np

    buffer = io.BytesIO()
    np.savez(buffer, **dict[str, Any](arrays))
    write_whole(path, buffer.getvalue())


def sha256_of_file(path: str) -> str:
    """Returns the SHA-256 of a file's content as hex digits, local or remote.

    Raises UserError if there is no such file, and tf.errors.OpError if remote storage fails in a way that may pass.
    """
    if is_local(path):
        try:
            with open(path, "rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise UserError(f"there is no file {path}: {error.strerror}") from error
    import tensorflow as tf

    try:
        with tf.io.gfile.GFile(path, "rb") as file:
            return hashlib.sha256(file.read()).hexdigest()
    except tf.errors.NotFoundError as error:
        raise UserError(f"there is no file {path}") from error


def names_in(folder: str) -> list[str]:
    """Returns the names of a folder's entries, or an empty list if the folder does not exist.

    Raises tf.errors.OpError if storage fails.
    """
    import tensorflow as tf

    # tf.io.gfile.isdir and listdir report every storage error as a missing folder; exists does not.
    return [name.rstrip("/") for name in tf.io.gfile.listdir(folder)] if tf.io.gfile.exists(folder) else []


def _create(path: str) -> BinaryIO:
    return open(path, "wb")


@contextmanager
def naming_unwritable(path: str) -> Iterator[None]:
    """Turns an OSError of the block, which only writes, into a UserError that names `path`."""
    try:
        yield
    except OSError as error:
        raise _unwritable(path, error) from error


@contextmanager
def naming_full_disk(path: str, *, or_its_own: bool = False) -> Iterator[None]:
    """Raises UserError in place of the errors of a disk that takes no more. The block may also read: other errors pass.

    With `or_its_own`, names the file of the error, if it has one, in place of `path`.
    """
    try:
        yield
    except OSError as error:
        if error.errno in _OF_WRITING:
            raise _unwritable((or_its_own and error.filename) or path, error) from error
        raise


@contextmanager
def _naming_refused(path: str, done: str) -> Iterator[None]:
    """Turns a lasting refusal of remote storage into a UserError that says that `path` cannot be `done`."""
    import tensorflow as tf

    refused = (
        tf.errors.FailedPreconditionError,
        tf.errors.NotFoundError,
        tf.errors.PermissionDeniedError,
        tf.errors.UnauthenticatedError,
    )
    try:
        yield
    except refused as error:
        raise UserError(f"{path} cannot be {done}: {error.message}; {_remedy()}") from error


def _unwritable(path: str, error: OSError) -> UserError:
    why = f"{error.filename} is a file" if isinstance(error, FileExistsError) else error.strerror or error
    return UserError(f"{path} cannot be written: {why}; {_remedy(error)}")


def _remedy(error: OSError | None = None) -> str:
    cure = "make room" if error is not None and error.errno in _NO_ROOM else "fix that"
    return f"{cure} and start the same command again"

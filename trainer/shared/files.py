"""Files and folders that are whole or not there, local or on gs://.

What is local is made beside its place and renamed into it, so that a reader sees the old content or the new, never a part. On
gs:// an object appears when its upload has ended: one write is whole, and a rename would be a copy and a deletion.

What is local needs no TensorFlow. Beam has its own file systems: see `beam_jobs/files.py`.
"""

import errno
import io
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, BinaryIO

from trainer.shared.errors import UserError

if TYPE_CHECKING:
    import numpy as np

_PARTIAL = ".partial"
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


def is_local(path: str) -> bool:
    return "://" not in path


@contextmanager
def whole_file(path: str, partial: str = "") -> Iterator[BinaryIO]:
    """Gives a local file to write to, which is at `path` once the block ends without an error.

    Until then it is at `partial`, beside `path` where that is not said: two processes that may write the same file at the same
    time need names of their own. Makes the folder. Raises UserError where this machine cannot write, as on a full disk.
    """
    partial = partial or path + _PARTIAL
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        file = _create(partial)
    except OSError as error:
        raise _unwritable(path, error) from error
    try:
        with file:
            yield file
        os.replace(partial, path)
    except BaseException as error:
        with suppress(OSError):
            os.unlink(partial)
        if isinstance(error, OSError) and error.errno in _NO_ROOM:
            raise _unwritable(path, error) from error
        raise


@contextmanager
def whole_folder(path: str) -> Iterator[str]:
    """Gives a local folder to fill, which takes the place of `path` once the block ends without an error."""
    partial = path.rstrip("/") + _PARTIAL
    shutil.rmtree(partial, ignore_errors=True)
    try:
        os.makedirs(partial)
        yield partial
        shutil.rmtree(path, ignore_errors=True)
        os.rename(partial, path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def write_whole(path: str, content: bytes) -> None:
    """Writes a file, local or remote.

    Raises UserError where this machine cannot write it, and tf.errors.OpError where remote storage does not take it.
    """
    if is_local(path):
        try:
            with whole_file(path) as file:
                file.write(content)
        except OSError as error:
            raise _unwritable(path, error) from error
        return
    import tensorflow as tf

    partial = path if path.startswith("gs://") else path + _PARTIAL
    with tf.io.gfile.GFile(partial, "wb") as file:
        file.write(content)
    if partial != path:
        tf.io.gfile.rename(partial, path, overwrite=True)


def write_arrays(path: str, arrays: "Mapping[str, np.ndarray]") -> None:
    """Writes an uncompressed .npz, whole or not at all."""
    import numpy as np

    buffer = io.BytesIO()
    np.savez(buffer, **dict[str, Any](arrays))
    write_whole(path, buffer.getvalue())


def names_in(folder: str) -> list[str]:
    """Returns the names of what is in a folder; none where there is no such folder.

    Raises tf.errors.OpError where storage does not say. `tf.io.gfile.isdir` and `listdir` take every error for no folder.
    """
    import tensorflow as tf

    return [name.rstrip("/") for name in tf.io.gfile.listdir(folder)] if tf.io.gfile.exists(folder) else []


def _create(path: str) -> BinaryIO:
    return open(path, "wb")


def _unwritable(path: str, error: OSError) -> UserError:
    mend = "make room" if error.errno in _NO_ROOM else "mend that"
    return UserError(f"{path} cannot be written: {error.strerror}; {mend} and give the same command again")

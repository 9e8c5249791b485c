"""The files that settings name. They take part in a run by their content, because the file behind a path may change."""

import hashlib
from collections.abc import Callable, Mapping

from trainer.config import Config, replace
from trainer.settings import LINEAR_EVAL
from trainer.shared.errors import UserError
from trainer.shared.files import sha256_of_file

FILES_SHA256 = f"{LINEAR_EVAL}files_sha256"


def digest_of_files(files: Mapping[str, str], sha256: Callable[[str], str] = sha256_of_file) -> str:
    """Returns a hex digest of the keys and contents of `files`, paths by key; "" for no files.

    `sha256(path)` returns the digest of one file. Raises UserError if a file does not exist.
    """
    contents = "".join(f"{key} {sha256(path)}\n" for key, path in files.items())
    return hashlib.sha256(contents.encode()).hexdigest() if contents else ""


def with_digest(config: Config, sha256: Callable[[str], str] = sha256_of_file) -> Config:
    """Returns `config` with the digest of the files that its linear eval reads.

    Raises UserError if the digest in `config` is another one, or if no setting names a file.
    """
    settings = config.linear_eval
    if settings.files_sha256 and not settings.files:
        raise UserError(f"{FILES_SHA256}={settings.files_sha256} has no effect: no setting of the linear eval names a file")
    found = digest_of_files(settings.files, sha256)
    if settings.files_sha256 not in ("", found):
        one, rest = (", ".join(settings.files.values()), "have" if len(settings.files) > 1 else "has")
        raise UserError(
            f"{one} {rest} changed since this evaluation was begun: put back what it held, or start the evaluation again"
        )
    return replace(config, **{FILES_SHA256: found})

"""The files that an experiment's settings name, as a command hands them to a pipeline: found anywhere, known by their content."""

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence

from pipelines.cli.store import absolute
from trainer.config import Config
from trainer.named_files import FILES_SHA256, digest_of_files, with_digest
from trainer.shared.errors import UserError
from trainer.shared.files import is_local, sha256_of_file


def linear_eval_overrides(config: Config, overrides: Iterable[str], sha256: Callable[[str], str] = sha256_of_file) -> list[str]:
    """Returns the overrides of the linear eval of `config`, with its files' absolute paths and the digest of their content.

    Both are parts of a cache key. `sha256(path)` returns the digest of one file. Raises UserError if a file does not exist.
    """
    files = _absolute(config.linear_eval.files)
    named = [f"{key}={path}" for key, path in files.items() if path != config.linear_eval.files[key]]
    digest = with_digest(config, lambda path: sha256(str(absolute(path)) if is_local(path) else path)).linear_eval.files_sha256
    return [*overrides, *named, *([f"{FILES_SHA256}={digest}"] if digest else [])]


def without_digest(overrides: Iterable[str]) -> list[str]:
    """Returns overrides without the digest that an earlier run had: a run again reads what the files hold now."""
    return [item for item in overrides if item.partition("=")[0].strip() != FILES_SHA256]


def defaults_of_compiled(config: Config, overrides: Sequence[str]) -> dict[str, object]:
    """Returns those parameters of a compiled pipeline that files of this machine identify.

    A file that cannot be read here leaves its parameter as it is, and is named on stderr: the steps read it, but a cluster's
    cache cannot know its content.
    """
    known: dict[str, object] = {}
    if all_here(config.data.files):
        known["raw_identity"] = digest_of_files(config.data.files)[:16]
    if all_here(config.linear_eval.files):
        known["linear_eval_overrides"] = linear_eval_overrides(config, overrides)
    return known


def all_here(files: Mapping[str, str]) -> bool:
    """Returns whether this machine has all of `files`, paths by key. Names each other one on stderr."""
    others = [path for path in files.values() if not is_local(path) or not absolute(path).exists()]
    for path in others:
        print(f"note: {path} is not on this machine: a cache knows it by its path, not by its content", file=sys.stderr)
    return not others


def check_remote(files: Mapping[str, str]) -> None:
    """Raises UserError if a step on Vertex AI would read a file of this machine."""
    for key, path in files.items():
        if not path.startswith("gs://"):
            what = " nor a subset that has a name" if key == "data.subset" else ""
            raise UserError(f"{key}={path} is not in Cloud Storage{what}: Vertex AI reads gs:// only")


def _absolute(files: Mapping[str, str]) -> dict[str, str]:
    return {key: str(absolute(path)) if is_local(path) else path for key, path in files.items()}

"""The SQLite file of a local store: it appears whole or not at all, is made again if it is half made, and moves with its root."""

import fcntl
import json
import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

from mlflow.exceptions import MlflowException
from mlflow.store.db.utils import _get_latest_schema_revision
from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore
from sqlalchemy.exc import SQLAlchemyError

from components.patience import is_transient, one_line, say
from components.tracking import names
from trainer.shared.errors import UserError
from trainer.shared.files import write_whole

DATABASE, ARTIFACTS = "mlflow.db", "artifacts"
"""Names of the database and of the folder of artifacts in a root."""
_PREFIX = "sqlite:///"
_HALF_MIGRATED = "_alembic_tmp_"
"""Prefix of the tables that exist only during a migration."""
_FILES_WITH_PATHS = (
    *(f"{ARTIFACTS}/*/artifacts/{name}" for name in (names.STEP_FILE, names.ARGUMENTS_FILE)),
    *("kfp/*/*/metrics/result.json", "checkpoints/*/result.json"),
)
"""Files in a root that name other files in it."""
_COMPANIONS = ("-journal", "-wal", "-shm")
"""Suffixes of the files that SQLite keeps beside a database."""


def file_of(uri: str) -> Path | None:
    """Returns the database of a store in SQLite, or None for any other store."""
    path = uri.removeprefix(_PREFIX).partition("?")[0]
    return Path(path) if uri.startswith(_PREFIX) and path and path != ":memory:" else None


def is_whole(path: Path) -> bool:
    """Returns whether a database has all of MLflow's tables. Raises UserError if the file is no database."""
    if not path.exists():
        return False
    try:
        tables = _tables(path)
        if "alembic_version" not in tables or any(table.startswith(_HALF_MIGRATED) for table in tables):
            return False
        return [(_get_latest_schema_revision(),)] == _ask(path, "SELECT version_num FROM alembic_version")
    except sqlite3.OperationalError:
        raise
    except sqlite3.DatabaseError as error:
        raise UserError(f"{path} is no database ({error}): move it away, and the same command makes a new one") from error


def require_whole(path: Path) -> None:
    """Makes the database `path` if there is none, or if it is half made and holds no runs.

    Of several processes, one makes it and the others wait. Raises UserError if the database cannot be made, or if it cannot be
    used and must not be made again.
    """
    if is_whole(path):
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path.parent):
            if is_whole(path):
                return
            if path.exists():
                if _holds_runs(path):
                    return  # MLflow says what is wrong with a database that another version of it made
                say(f"{path} was half made and holds no runs: it is made again")
            _make(path)
    except (OSError, SQLAlchemyError, sqlite3.Error, MlflowException) as error:
        if is_transient(error):
            raise
        raise UserError(f"{path} cannot be made ({_reason(error)}): fix that and start the same command again") from error


def follow_root(root: Path, kind: str) -> None:
    """If a root has moved or was copied, changes the paths that its database and its runs' files hold.

    An experiment shows where its root was: its artifacts are in ROOT/artifacts. Only experiments of the `kind` that this project
    makes count. A process that dies meanwhile leaves the rest to the next one.
    """
    database = root / DATABASE
    if not _former_roots(database, root, kind):
        return
    with _locked(root):
        for before in _former_roots(database, root, kind):
            say(f"{root} was {before}: its records follow")
            # The database is last, because it tells whether there is something to do.
            for file in (file for pattern in _FILES_WITH_PATHS for file in root.glob(pattern)):
                _change_file(file, before, str(root))
            _change_database(database, before, str(root))


def _holds_runs(path: Path) -> bool:
    """Returns whether a database has runs or registered models. Raises UserError if they cannot be used."""
    tables = _tables(path)
    kept = {"runs", f"{_HALF_MIGRATED}runs", "registered_models"} & tables
    held = any(_ask(path, f"SELECT 1 FROM {table} LIMIT 1") for table in kept)
    if held and any(table.startswith(_HALF_MIGRATED) for table in tables):
        raise UserError(
            f"{path} is half migrated and holds runs: put a copy from before the migration in its place, or take another --root"
        )
    return held


def _tables(path: Path) -> set[str]:
    return {name for (name,) in _ask(path, "SELECT name FROM sqlite_master WHERE type = 'table'")}


def _ask(path: Path, question: str) -> list[tuple[Any, ...]]:
    with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=rw", timeout=0, uri=True)) as connection:
        return connection.execute(question).fetchall()


def _make(path: Path) -> None:
    partial = path.with_name(f".{path.name}.partial")
    stale = [*(Path(f"{partial}{suffix}") for suffix in ("", *_COMPANIONS)), *(Path(f"{path}{suffix}") for suffix in _COMPANIONS)]
    for file in stale:  # SQLite would roll a journal back into a new database of the same name
        file.unlink(missing_ok=True)
    try:
        # MLflow would repeat for minutes what a folder refuses at once.
        partial.touch()
        SqlAlchemyStore(f"{_PREFIX}{partial}", str(path.parent / ARTIFACTS))._dispose_engine()
        os.replace(partial, path)
    except BaseException:
        for suffix in ("", *_COMPANIONS):
            with suppress(OSError):
                os.unlink(f"{partial}{suffix}")
        raise


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keeps other processes out while the block runs. The lock is on the folder itself, so it leaves no file."""
    opened = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(opened, fcntl.LOCK_EX)
        yield
    finally:
        os.close(opened)


def _reason(error: Exception) -> str:
    return one_line(getattr(error, "strerror", None) or getattr(error, "orig", None) or error)


# ---- A root that moved


def _former_roots(database: Path, root: Path, kind: str) -> list[str]:
    """Returns the folders that the root was before, which its experiments still name."""
    found = _ask(
        database,
        "SELECT DISTINCT artifact_location FROM experiments JOIN experiment_tags USING (experiment_id)"
        f" WHERE key = 'mlflow.experimentKind' AND value = '{kind}'",
    )
    before = [Path(location).parent for (location,) in found if location.startswith("/") and Path(location).name == ARTIFACTS]
    return [str(folder) for folder in before if not _same(folder, root) and _has_left(folder, root)]


def _same(folder: Path, other: Path) -> bool:
    return folder == other or (folder.exists() and os.path.samefile(folder, other))


def _has_left(before: Path, root: Path) -> bool:
    """Returns whether a root is no longer at `before`, or is a copy of the root there."""
    return not (before / ARTIFACTS).exists() or ((before / DATABASE).exists() and (root / ARTIFACTS).exists())


def _change_file(file: Path, before: str, after: str) -> None:
    def changed(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: changed(one) for key, one in value.items()}
        if isinstance(value, list):
            return [changed(one) for one in value]
        # The new root may be in a folder that has the old root's name.
        inside = isinstance(value, str) and f"{value}/".startswith(f"{before}/") and not f"{value}/".startswith(f"{after}/")
        return after + value[len(before) :] if inside else value

    with suppress(ValueError):  # a file that was torn stays as it is: its run is lost
        content = json.loads(file.read_text())
        if (moved := changed(content)) != content:
            write_whole(str(file), json.dumps(moved, indent=2).encode())


def _change_database(path: Path, before: str, after: str) -> None:
    """Replaces the folder `before` in every value, in one transaction: at the beginning of a text, and of texts within JSON."""
    quoted = [json.dumps(f"{folder}/")[:-1] for folder in (before, after)]
    with closing(sqlite3.connect(path)) as connection, connection:
        for table in sorted(_tables(path)):
            for _, column, kind, *_ in connection.execute(f'PRAGMA table_info("{table}")').fetchall():
                if not kind.upper().startswith(("VARCHAR", "TEXT")):
                    continue
                connection.execute(
                    f'UPDATE "{table}" SET "{column}" = ? || substr("{column}", ?) WHERE substr("{column}", 1, ?) = ?',
                    (f"{after}/", len(before) + 2, len(before) + 1, f"{before}/"),
                )
                connection.execute(
                    f'UPDATE "{table}" SET "{column}" = replace("{column}", ?, ?) WHERE instr("{column}", ?) > 0',
                    (*quoted, quoted[0]),
                )

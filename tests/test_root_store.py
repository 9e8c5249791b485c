"""The store of a root: made whole by one of two commands at once, after deaths and on full disks; locked, deleted, foreign."""

import os
import resource
import signal
import sqlite3
import threading
from contextlib import closing
from functools import partial

import pytest
from support.processes import in_a_process_of_its_own
from support.roots import finished_run

from components import patience, tracking
from pipelines import cli
from trainer.shared.errors import UserError


def test_a_death_while_the_store_is_made_leaves_none_and_the_next_command_makes_it(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        assert in_a_process_of_its_own(partial(tracking.open_root, tmp_path)) == -signal.SIGKILL
    assert [path.name for path in tmp_path.iterdir()] == [".mlflow.db.partial"]
    tracking.open_root(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mlflow.db"]


def test_two_first_commands_at_once_make_one_store(tmp_path):
    found = []
    threads = [threading.Thread(target=lambda: found.append(tracking.open_root(tmp_path).experiment_id)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == ["1", "1"]
    assert [path.name for path in tmp_path.iterdir()] == ["mlflow.db"]


def test_a_disk_that_is_full_in_the_first_second_is_one_line_and_leaves_nothing(tmp_path):
    def with_a_full_disk():
        resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))
        with pytest.raises(UserError, match=r"mlflow\.db cannot be made \(.+\): fix that and start the same command again"):
            tracking.open_root(tmp_path)

    assert in_a_process_of_its_own(with_a_full_disk) == 0
    assert list(tmp_path.iterdir()) == []


def half_migrate(root):
    with closing(sqlite3.connect(root / "mlflow.db")) as store, store:
        store.execute("CREATE TABLE _alembic_tmp_tags (key TEXT)")
        store.execute("UPDATE alembic_version SET version_num = '451aebb31d03'")


def test_a_half_made_store_without_runs_is_made_again_and_said(root, capsys):
    half_migrate(root)
    (root / "mlflow.db-journal").write_bytes(b"of the old one")
    assert tracking.open_root(root).experiment_id == "1"
    assert "was half made and holds no runs: it is made again" in capsys.readouterr().err
    assert [path.name for path in root.iterdir()] == ["mlflow.db"]


def test_an_empty_store_is_made_again(tmp_path):
    (tmp_path / "mlflow.db").touch()
    assert tracking.open_root(tmp_path).experiment_id == "1"


def test_a_half_migrated_store_with_runs_is_left_alone_and_the_error_says_what_to_do(root):
    finished_run(root)
    half_migrate(root)
    before = (root / "mlflow.db").read_bytes()
    with pytest.raises(UserError, match=r"half migrated and holds runs: put a copy from before .+ or take another --root"):
        tracking.open_root(root)
    assert (root / "mlflow.db").read_bytes() == before


def test_a_file_that_is_no_store_is_left_alone_and_the_error_says_what_to_do(tmp_path):
    (tmp_path / "mlflow.db").write_bytes(b"no database at all" * 100)
    with pytest.raises(UserError, match="move it away, and the same command makes a new one"):
        tracking.open_root(tmp_path)


def test_a_locked_store_is_waited_for_and_said_once(root, monkeypatch, capsys):
    holder = sqlite3.connect(root / "mlflow.db", check_same_thread=False)
    holder.execute("BEGIN EXCLUSIVE")
    said = []

    def release(line):
        said.append(line)
        holder.rollback()

    monkeypatch.setattr(patience, "say", release)
    assert tracking.open_root(root).experiment_id == "1"
    assert said == ["MLflow is locked by another process; waiting for it"]


def test_a_deleted_experiment_is_one_line_with_the_cures(root):
    store = tracking.open_root(root)
    store.client.delete_experiment(store.experiment_id)
    with pytest.raises(UserError, match=r"mlflow experiments restore --experiment-id 1 .+ MLFLOW_EXPERIMENT_NAME=NAME starts"):
        tracking.open_root(root)


@pytest.mark.parametrize("name", ["what?", "a%2Fb", "a#b", "gs://bucket/runs"])
@pytest.mark.parametrize("command", [("run", "--preset", "demo"), ("ui",), ("compare", "0" * 8)], ids=lambda command: command[0])
def test_a_root_that_mlflow_would_take_for_a_part_of_a_url_is_refused(name, command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main([*command, "--root", name]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    why = "is not a folder of this machine" if "://" in name else "cannot be used: MLflow takes "
    assert line.startswith(f"error: --root {name} {why}")
    assert list(tmp_path.iterdir()) == []

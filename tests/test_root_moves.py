"""A root that moves, is copied, or loses its artifacts: the next command finds what it keeps, or says what is lost."""

import os
import shutil
import signal
from functools import partial
from pathlib import Path

import pytest
from support.processes import in_a_process_of_its_own
from support.roots import finished_run

from components import tracking
from components.tracking import database
from trainer.shared.errors import UserError


def test_what_a_moved_root_keeps_is_found_in_it_and_nothing_goes_to_the_old_place(root, tmp_path, capsys):
    run_id = finished_run(root, model=f"{root}/checkpoints/a", elsewhere="/elsewhere/b")
    new = root.rename(tmp_path / "root2")
    store = tracking.open_root(new)
    assert capsys.readouterr().err == f"{new} was {root}: its records follow\n"
    step = tracking.find_step(store, run_id, "pretrain")
    assert step.outputs["model"].uri == f"{new}/checkpoints/a"
    assert step.outputs["elsewhere"].uri == "/elsewhere/b"
    assert step.arguments["raw"] == f"{new}/demo-raw"
    store.client.log_dict(finished_run(new), {}, "more.json")
    assert not root.exists()
    tracking.open_root(new)
    assert capsys.readouterr().err == ""


def test_a_root_that_moved_into_its_old_place_is_found_too(root, tmp_path):
    run_id = finished_run(root, model=f"{root}/checkpoints/a")
    aside = root.rename(tmp_path / "aside")
    root.mkdir()
    new = aside.rename(root / "inner")
    assert tracking.find_step(tracking.open_root(new), run_id, "pretrain").outputs["model"].uri == f"{new}/checkpoints/a"


def test_a_copied_root_leaves_the_first_alone(root, tmp_path):
    run_id = finished_run(root, model=f"{root}/checkpoints/a")
    copy = Path(shutil.copytree(root, tmp_path / "copy"))
    for one in (copy, root):
        store = tracking.open_root(one)
        assert tracking.find_step(store, run_id, "pretrain").outputs["model"].uri == f"{one}/checkpoints/a"
        assert store.client.get_run(run_id).info.artifact_uri.startswith(f"{one}/")


def test_a_root_that_is_reached_through_a_link_has_not_moved(root, tmp_path, capsys):
    finished_run(root)
    link = tmp_path / "link"
    link.symlink_to(root)
    tracking.open_root(link)
    tracking.open_root(root)
    assert capsys.readouterr().err == ""


def test_a_move_that_was_cut_short_goes_on(root, tmp_path, monkeypatch):
    run_id = finished_run(root, model=f"{root}/checkpoints/a")
    new = root.rename(tmp_path / "new")
    with monkeypatch.context() as patch:
        patch.setattr(database, "_change_database", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        assert in_a_process_of_its_own(partial(tracking.open_root, new)) == -signal.SIGKILL
    assert tracking.find_step(tracking.open_root(new), run_id, "pretrain").outputs["model"].uri == f"{new}/checkpoints/a"


def test_a_run_whose_artifacts_are_gone_is_lost_and_said(root):
    run_id = finished_run(root, model=f"{root}/checkpoints/a")
    shutil.rmtree(root / "artifacts")
    store = tracking.open_root(root)
    with pytest.raises(UserError, match=rf"the pretrain {run_id[:8]} is lost: its artifacts are gone from {root}/artifacts"):
        tracking.find_step(store, run_id, "pretrain")
    assert "is lost" in tracking.why_lost(store, run_id)

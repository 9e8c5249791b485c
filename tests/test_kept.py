"""What a root keeps for the next command, and its removal by `sogclr clean`."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
from support.processes import in_a_process_of_its_own
from support.raw_data import striped_archives
from support.roots import copy_store, finished_run

from beam_jobs import job
from beam_jobs.raw import raw_identity
from components import datasets, tracking, variables, workspace
from pipelines import cli, kept
from pipelines.logs import log_of_new_run
from trainer.shared.records import MANIFEST


class Killed(BaseException):
    """Ends a conversion in the middle."""


class World:
    """Raw data, and a folder that keeps datasets."""

    def __init__(self, folder: Path) -> None:
        self.raw = striped_archives(folder)
        self.environ = {variables.DATASETS: str(folder / "datasets"), variables.REUSE: "true"}

    def claim(self, name, settings=(), **changed):
        about = {"raw": raw_identity(str(self.raw)), "settings": list(settings), "code_version": "c0de", **changed}
        return datasets.claim("output", name, about, self.environ)

    def convert(self, name):
        """Converts in the folder of the command `name`, and returns the folder."""
        claim = self.claim(name)
        try:
            job.build(str(self.raw), claim.folder)
        except BaseException:
            claim.release(False)
            raise
        claim.release(True)
        return Path(claim.folder)


@pytest.fixture
def world(tmp_path):
    return World(tmp_path)


def shards_of(folder):
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("*.tfrecord-*-of-*")}


def test_the_next_run_goes_on_from_the_shards_of_an_interrupted_conversion(world, monkeypatch):
    def killed(*_):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(job, "publish", killed)
        with pytest.raises(Killed):
            world.convert("first")
    (folder,) = (one for one in Path(world.environ[variables.DATASETS]).iterdir() if one.is_dir())
    before = shards_of(folder)
    assert before
    assert world.convert("second") == folder
    assert shards_of(folder) == before


def test_a_finished_dataset_that_no_cache_knows_is_taken_as_it_is(world):
    folder = world.convert("first")
    written = (folder / MANIFEST).stat().st_mtime_ns
    assert world.convert("second") == folder
    assert (folder / MANIFEST).stat().st_mtime_ns == written
    world.environ.pop(variables.REUSE)
    assert world.claim("anew").folder != str(folder)


def test_a_dataset_that_lost_a_shard_is_made_again_in_its_place(world, capsys):
    folder = world.convert("first")
    whole = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    lost = folder / next(iter(shards_of(folder)))
    lost.unlink()
    assert world.convert("second") == folder
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == whole
    assert f"{lost} is gone: the dataset is made again" in capsys.readouterr().err


def test_another_conversion_or_one_that_runs_at_the_same_time_gets_a_folder_of_its_own(world):
    claims = [
        world.claim("first"),
        world.claim("second"),
        world.claim("third", settings=["data.max_side=256"]),
        world.claim("fourth", code_version="other"),
        world.claim("fifth", raw="other"),
    ]
    assert len({claim.folder for claim in claims}) == len(claims)
    for claim in claims:
        claim.release(False)


def test_without_an_identity_of_the_raw_data_nothing_is_kept(world):
    assert world.claim("first", raw="") == workspace.Claim("output")


# ---- clean

KINDS = ("datasets", "checkpoints", "features", "kfp")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A root with an empty store."""
    folder = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        tracking.open_root(folder)
    return folder


@pytest.fixture
def root(made, tmp_path, monkeypatch):
    """A root with a finished run, which refers to one folder of each kind, and with another folder of each kind."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    folder = tmp_path / "root"
    copy_store(made, folder)
    for kind in KINDS:
        for name in ("needed", "alone"):
            (folder / kind / name).mkdir(parents=True)
            (folder / kind / name / "file").write_bytes(b"1234")
    finished_run(folder, **{kind: f"{folder}/{kind}/needed" for kind in KINDS})
    return folder


@pytest.fixture
def clean(root, capsys):
    """Runs `sogclr clean` and returns its rows by path."""

    def run(*arguments):
        capsys.readouterr()
        assert cli.main(["clean", "--root", str(root), "--json", *arguments]) == 0
        return {row["path"]: row for row in json.loads(capsys.readouterr().out)}

    return run


def there(root):
    return sorted(str(path.relative_to(root)) for kind in KINDS for path in (root / kind).glob("[!.]*"))


@pytest.fixture
def everything():
    return sorted(f"{kind}/{name}" for kind in KINDS for name in ("needed", "alone"))


def test_clean_removes_what_no_run_refers_to_and_nothing_else(root, clean, everything):
    rows = clean("--dry-run")
    assert sorted(rows) == there(root) == everything
    assert {path for path, row in rows.items() if row["removable"]} == {f"{kind}/alone" for kind in KINDS}
    assert all(row["needed_by"] for path, row in rows.items() if path.endswith("needed"))
    assert all(row["bytes"] == 4 for row in rows.values())
    assert all(row["removed"] == row["removable"] for row in clean().values())
    assert there(root) == sorted(f"{kind}/needed" for kind in KINDS)
    assert clean("--force", "features/needed")["features/needed"]["removed"]
    assert there(root) == sorted(f"{kind}/needed" for kind in KINDS if kind != "features")
    assert cli.main(["clean", "--root", str(root), "nothing"]) == 2


def test_a_run_that_was_deleted_in_mlflow_needs_nothing(root, clean):
    store = tracking.open_root(root)
    (run,) = store.client.search_runs([store.experiment_id])
    store.client.delete_run(run.info.run_id)
    clean()
    assert there(root) == []


def test_an_interrupted_conversion_is_needed_by_the_run_that_left_it(root, clean):
    store = tracking.open_root(root)
    (run,) = store.client.search_runs([store.experiment_id])
    claims = [workspace.claim(f"{root}/datasets", f"pipeline run {one}", a=one) for one in (run.info.run_id, "0" * 32)]
    for claim in claims:
        Path(claim.folder).mkdir()
        claim.release(False)
    left, orphan = (f"datasets/{Path(claim.folder).name}" for claim in claims)
    rows = clean()
    assert rows[left]["what"] == "interrupted conversion"
    assert rows[left]["needed_by"] == [f"{run.info.run_id[:8]} {run.info.run_name}"]
    assert rows[orphan]["removed"]
    assert workspace.claim(f"{root}/datasets", "another", a="0" * 32).folder == claims[1].folder


def test_what_a_running_process_uses_stays_even_by_force(root, clean, everything):
    busy = workspace.claim(f"{root}/datasets", "pipeline run x", a=1)
    Path(busy.folder).mkdir()
    name = f"datasets/{Path(busy.folder).name}"
    with workspace.in_use(f"{root}/features"):
        rows = clean("--force", "--dry-run")
        assert rows[name]["used"]
        assert {path for path, row in rows.items() if row["removable"]} == {
            path for path in everything if not path.startswith("features")
        }
        assert not kept.remove(root, name)
        assert not kept.remove(root, "features/alone")
    reader, ready = os.pipe()
    child = os.fork()
    if not child:
        with log_of_new_run(root, lambda token: "f" * 32, lambda run: None):
            os.write(ready, b".")
            signal.pause()
    os.read(reader, 1)
    try:
        rows = clean("--force", "--dry-run")
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert {path for path, row in rows.items() if row["removable"]} == {f"{kind}/alone" for kind in KINDS if kind != "kfp"}


def test_a_clean_that_is_killed_leaves_no_half_a_folder_and_the_next_one_removes_the_rest(root, clean, monkeypatch):
    def killed():
        monkeypatch.setattr(shutil, "rmtree", lambda path: os.kill(os.getpid(), signal.SIGKILL))
        kept.remove(root, "datasets/alone")

    assert in_a_process_of_its_own(killed) == -signal.SIGKILL
    assert "datasets/alone" not in there(root)
    rows = clean()
    assert [row["removed"] for path, row in rows.items() if path.startswith(".removed-")] == [True]
    assert list(root.glob(".removed-*")) == []


def test_a_root_whose_runs_are_in_another_store_is_not_cleaned(root, clean, capsys, everything):
    (root / "logs").mkdir()
    (root / "logs" / f"{'a' * 32}.log").touch()
    assert cli.main(["clean", "--root", str(root)]) == 2
    assert "1 runs of" in capsys.readouterr().err
    assert there(root) == everything

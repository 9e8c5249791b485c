"""What a root keeps for the next command: interrupted conversions, and the features of encoders."""

from pathlib import Path

import pytest
from support.raw_data import striped_archives

from beam_jobs import job
from beam_jobs.raw import raw_identity
from components import datasets, variables, workspace
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

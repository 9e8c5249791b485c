"""Whole folders when two processes make the same one."""

import os
import signal
from pathlib import Path

import pytest

from trainer.shared.files import whole_folder


def test_two_that_fill_the_same_folder_do_not_meet_and_the_first_to_finish_stays(tmp_path):
    target = tmp_path / "raw"

    def fill():
        with whole_folder(str(target)) as slow:
            (Path(slow) / "file").write_text("slow")
            with whole_folder(str(target)) as quick:
                (Path(quick) / "file").write_text("quick")
            assert (Path(slow) / "file").read_text() == "slow"

    with pytest.raises(OSError, match="not empty"):
        fill()
    assert (target / "file").read_text() == "quick"
    assert [path.name for path in tmp_path.iterdir()] == ["raw"]


def test_a_folder_is_replaced_only_where_that_is_asked_for(tmp_path):
    for text in ("old", "new"):
        with whole_folder(str(tmp_path / "export"), replaces=True) as made:
            (Path(made) / text).write_text(text)
    assert [path.name for path in (tmp_path / "export").iterdir()] == ["new"]


@pytest.mark.parametrize("slow", [0.0, 1e9])
def test_a_tree_is_listed_alike_one_by_one_and_in_parallel(slow, tmp_path, monkeypatch):
    """A file system of slow answers, such as NFS, is listed in parallel."""
    from beam_jobs import files

    monkeypatch.setattr(files, "_SECONDS_OF_A_SLOW_ENTRY", slow)
    for number in range(30):
        (tmp_path / f"{number % 7}" / f"{number}").mkdir(parents=True)
        (tmp_path / f"{number % 7}" / f"{number}.x").write_bytes(b"x" * number)
    found = files.walk(str(tmp_path))
    assert [info.name for info in found.files] == sorted(f"{number % 7}/{number}.x" for number in range(30))
    assert found.empty_folders == sorted(f"{number % 7}/{number}" for number in range(30))
    assert [info.size for info in found.files] == [int(info.name[2:-2]) for info in found.files]
    assert [*files.walk(str(tmp_path), 0).files] == []


def test_the_scratch_folder_of_a_killed_process_is_removed_as_the_next_begins(tmp_path, monkeypatch):
    from trainer.shared.scratch import scratch_folder

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with scratch_folder() as living:
        process = os.fork()
        if not process:
            with scratch_folder() as dying:
                (Path(dying) / "file").write_text("left")
                os.kill(os.getpid(), signal.SIGKILL)
        os.waitpid(process, 0)
        assert len([*tmp_path.iterdir()]) == 2
        with scratch_folder() as following:
            assert {str(path) for path in tmp_path.iterdir()} == {living, following}
    assert [*tmp_path.iterdir()] == []


def test_a_listing_is_made_once_for_the_identity_and_the_conversion_of_another_process(tmp_path, monkeypatch):
    from support.raw_data import LABELS, OF_VALIDATION, picture

    from beam_jobs import files
    from beam_jobs.job import build
    from beam_jobs.raw import raw_identity

    raw, listing = tmp_path / "raw", str(tmp_path / "listing")
    for name in ("train/n01000001/a/1.JPEG", "train/n01000001/2.JPEG", "train/n01000001-/3.JPEG", "val/1.JPEG"):
        (raw / name).parent.mkdir(parents=True, exist_ok=True)
        (raw / name).write_bytes(picture(len(name)))
    (raw / OF_VALIDATION).write_text(f"{LABELS[0]}\n")
    options = {"allow_other_counts": True, "subset": None}
    alone = build(str(raw), str(tmp_path / "alone"), **options)
    walked = []
    walk = files.walk
    monkeypatch.setattr(files, "walk", lambda folder, depth=None: walked.append(folder) or walk(folder, depth))

    def taken() -> list[str]:
        """Returns which folders with images were listed since the last call."""
        found = [folder.removeprefix(f"{raw}/") for folder in walked if folder.startswith((f"{raw}/train", f"{raw}/val"))]
        walked.clear()
        return [folder for folder in found if (raw / folder).exists()]

    raw_identity(str(raw), listing=listing)
    assert taken() == ["train", "val"]
    assert build(str(raw), str(tmp_path / "output"), **options, listing=listing).fingerprint == alone.fingerprint
    assert taken() == []
    build(str(raw), str(tmp_path / "unlisted"), **options, listing=str(tmp_path / "gone"))
    assert taken() == ["train", "val"]

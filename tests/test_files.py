"""Whole folders when two processes make the same one."""

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

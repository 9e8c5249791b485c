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

"""Reading the headers of an archive on disks of different speed."""

import io
import os
import tarfile

import pytest

from beam_jobs import forward, tars
from beam_jobs.forward import Forward


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    """A tar of 200 members of 60 KB, one with a name that takes a header of its own."""
    path = tmp_path_factory.mktemp("forward") / "archive.tar"
    with tarfile.open(path, "w") as out:
        for number in range(200):
            member = tarfile.TarInfo(f"{'long/' * 30 * (number == 100)}{number}.JPEG")
            member.size = 60_000
            out.addfile(member, io.BytesIO(bytes([number]) * member.size))
    return path


class Disk:
    """Stands for os.pread on a disk, and for the clock while it answers."""

    def __init__(self, seconds_a_request: float, bytes_a_second: float) -> None:
        self.seconds_a_request, self.bytes_a_second = seconds_a_request, bytes_a_second
        self.now = 0.0
        self.requests = 0
        self.pread = os.pread

    def __call__(self, file: int, size: int, offset: int) -> bytes:
        data = self.pread(file, size, offset)
        self.requests += 1
        self.now += self.seconds_a_request + len(data) / self.bytes_a_second
        return data


@pytest.mark.parametrize(
    ("seconds_a_request", "forwards", "most_seconds"), [(0.01, True, 0.3), (1e-5, False, 0.01)], ids=["hard disk", "SSD"]
)
def test_headers_are_skipped_to_on_a_fast_disk_and_read_past_on_a_slow_one(
    seconds_a_request, forwards, most_seconds, archive, monkeypatch
):
    disk = Disk(seconds_a_request, 150e6)
    monkeypatch.setattr(forward.os, "pread", disk)
    with Forward(str(archive), clock=lambda: disk.now) as file:
        found = tars.members(file, "archive.tar", 0, archive.stat().st_size)
        assert (len(found.files), found.problems) == (200, [])
        assert file.reads_forward == forwards
    assert disk.now < most_seconds
    assert disk.requests < 20 if forwards else disk.requests >= 200


def test_a_slow_disk_is_known_although_its_first_answers_come_from_the_cache(archive, monkeypatch):
    disk = Disk(0.01, 150e6)

    def cached(file: int, size: int, offset: int) -> bytes:
        return disk(file, size, offset) if offset > 3_000_000 else disk.pread(file, size, offset)

    monkeypatch.setattr(forward.os, "pread", cached)
    with Forward(str(archive), clock=lambda: disk.now) as file:
        assert len(tars.members(file, "archive.tar", 0, archive.stat().st_size).files) == 200
        assert file.reads_forward
    assert disk.requests < 20


def test_the_file_is_read_as_any_other(archive):
    with Forward(str(archive)) as file, archive.open("rb") as plain:
        for offset, whence, size in (
            (512, 0, 10),
            (0, 1, 4000),
            (100, 1, 5000),
            (-3, 2, 10),
            (0, 0, 1),
            (10**9, 0, 1),
            (-20, 2, -1),
        ):
            assert file.seek(offset, whence) == plain.seek(offset, whence)
            assert file.read(size) == plain.read(size)
            assert file.tell() == plain.tell()

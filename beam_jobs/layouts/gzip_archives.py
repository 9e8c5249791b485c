"""ImageNet's official archives, compressed with gzip:

ILSVRC2012_img_train.tar.gz    a tar of SYNSET.tar, each a tar of that synset's images
ILSVRC2012_img_val.tar.gz      a flat tar of images, whose labels are those of the archive that is not compressed
"""

import gzip
import posixpath
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, cast

from beam_jobs import files
from beam_jobs.layouts.archives import TRAIN_ARCHIVE, VALIDATION_ARCHIVE
from beam_jobs.layouts.labels import VALIDATION_LABELS, find_labels, read_labels
from beam_jobs.layouts.layout import Found, Stream, StreamedImage, StreamError

_FILES = {"train": f"{TRAIN_ARCHIVE}.gz", "validation": f"{VALIDATION_ARCHIVE}.gz"}
_PIECE = 2**20


class GzipArchives(Stream):
    """One compressed tar for each split."""

    def expects(self, split: str) -> str:
        return _FILES[split]

    def recognise(self, folder: str, split: str) -> Found | None:
        name = _FILES[split]
        info = files.find(files.join(folder, name))
        if info is None:
            return None
        return Found((info._replace(name=name),), f"{name} is there", find_labels(folder) if split == "validation" else None)

    def images(self, folder: str, name: str) -> Iterator[StreamedImage]:
        if name == _FILES["validation"]:
            yield from self._validation_images(folder, name)
            return
        for member, content in gzip_members(folder, name):
            synset = member.removesuffix(".tar")
            if not synset or synset == member:
                raise StreamError(f"holds {member}: it must hold one SYNSET.tar for each synset and nothing else")
            for image, data in _members(content):
                yield StreamedImage(image, synset, data.read())

    def _validation_images(self, folder: str, name: str) -> Iterator[StreamedImage]:
        found = self.recognise(folder, "validation")
        assert found is not None
        labels, _ = read_labels(folder, found, None)
        # The labels are in the order of the names, which are known at the end of a first reading.
        names = sorted(member for member, _ in gzip_members(folder, name))
        if len(names) != len(labels):
            raise StreamError(
                f"has {len(names)} images and there are {len(labels)} labels for them: give {VALIDATION_LABELS} one line for each"
            )
        synset_of = dict(zip(names, labels, strict=True))
        for member, content in gzip_members(folder, name):
            yield StreamedImage(member, synset_of[member], content.read())


def gzip_members(folder: str, name: str) -> Iterator[tuple[str, IO[bytes]]]:
    """Yields the name without folders and the content of each file in a compressed tar. Reads it to its checksum.

    Raises StreamError if the rest cannot be read, or is not a plain file.
    """
    with files.open_to_read(files.join(folder, name)) as file, gzip.GzipFile(fileobj=file) as unzipped, _told():
        yield from _members(cast(IO[bytes], unzipped))
        while unzipped.read(_PIECE):
            pass


def _members(file: IO[bytes]) -> Iterator[tuple[str, IO[bytes]]]:
    with tarfile.open(fileobj=file, mode="r|", bufsize=_PIECE) as archive:
        while (member := archive.next()) is not None:
            archive.members.clear()  # type: ignore[attr-defined]  # tarfile would keep them all
            name = posixpath.basename(member.name)
            if member.isdir() or name.startswith("."):
                continue
            content = archive.extractfile(member) if member.isreg() else None
            if content is None:
                raise StreamError(f"holds {member.name}, which is a link or a device, not a file")
            yield name, content


@contextmanager
def _told() -> Iterator[None]:
    try:
        yield
    except (tarfile.ReadError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise StreamError(f"cannot be read to its end ({error}); get it again") from error


LAYOUT = GzipArchives()

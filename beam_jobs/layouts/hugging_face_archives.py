"""ImageNet as Hugging Face had it at first (imagenet-1k), in data/ or in the raw folder itself:

train_images_N.tar.gz    training images, as n01440764_18_n01440764.JPEG
val_images.tar.gz        validation images, as ILSVRC2012_val_00000293_n01440764.JPEG
"""

import posixpath
import re
from collections.abc import Iterator

from beam_jobs import files
from beam_jobs.layouts.gzip_archives import gzip_members
from beam_jobs.layouts.hugging_face import official_name
from beam_jobs.layouts.layout import Found, Stream, StreamedImage

_PREFIXES = {"train": "train_images_", "validation": "val_images."}
_FILES = {"train": re.compile(r"train_images_\d+\.tar\.gz"), "validation": re.compile(r"val_images\.tar\.gz")}


class HuggingFaceArchives(Stream):
    """Compressed tars, which have to be read from beginning to end."""

    def expects(self, split: str) -> str:
        return "data/train_images_0.tar.gz" if split == "train" else "data/val_images.tar.gz"

    def recognise(self, folder: str, split: str) -> Found | None:
        for within in ("data", ""):
            infos = files.starting_with(files.join(folder, within) if within else folder, _PREFIXES[split])
            found = [info for info in infos if _FILES[split].fullmatch(info.name)]
            if found:
                named = tuple(info._replace(name=posixpath.join(within, info.name)) for info in found)
                return Found(named, f"{named[0].name} is there" + (f" and {len(named) - 1} more" if len(named) > 1 else ""))
        return None

    def images(self, folder: str, name: str) -> Iterator[StreamedImage]:
        for member, content in gzip_members(folder, name):
            image, synset = official_name(member)
            yield StreamedImage(image, synset, content.read())


LAYOUT = HuggingFaceArchives()

"""ImageNet as Hugging Face had it at first (imagenet-1k), in data/ or in the raw folder itself:

train_images_N.tar.gz    training images, as n01440764_18_n01440764.JPEG
val_images.tar.gz        validation images, as ILSVRC2012_val_00000293_n01440764.JPEG
"""

import re
from collections.abc import Iterator

from beam_jobs.layouts.gzip_archives import image_of, members, opened
from beam_jobs.layouts.hugging_face import find_files, official_name
from beam_jobs.layouts.layout import Found, Stream, StreamedImage
from beam_jobs.layouts.passed_over import PassedOver
from beam_jobs.listings import FileInfo

_PREFIXES = {"train": "train_images_", "validation": "val_images.", "test": "test_images."}
_FILES = re.compile(r"(train_images_\d+|val_images)\.tar\.gz")


class HuggingFaceArchives(Stream):
    """Compressed tars, which have to be read from beginning to end."""

    def expects(self, split: str) -> str:
        return "data/train_images_0.tar.gz" if split == "train" else "data/val_images.tar.gz"

    def recognise(self, folder: str, split: str) -> Found | None:
        return find_files(folder, split, _PREFIXES, _FILES)

    def images(self, folder: str, name: str, labels: FileInfo | None) -> Iterator[StreamedImage | PassedOver]:
        with opened(folder, name) as file:
            for one in members(file, name):
                if isinstance(one, PassedOver):
                    yield one
                else:
                    yield image_of(file, one, *official_name(name, one.name))


LAYOUT = HuggingFaceArchives()

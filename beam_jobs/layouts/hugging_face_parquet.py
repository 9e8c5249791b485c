"""ImageNet as Hugging Face has it (imagenet-1k), in data/ or in the raw folder itself:

    train-00000-of-00294-*.parquet        columns `image`, a struct of `bytes` and `path`, and `label`
    validation-00000-of-00014-*.parquet

The class comes from `path`, which ends in the synset, as n01440764_18_n01440764.JPEG. Which synset a label means is not in the
files, so `label` is compared with the synset as far as it can be: within a file, a synset has one label and a label one synset.
"""

import re
from collections.abc import Iterator

from beam_jobs import files
from beam_jobs.layouts.hugging_face import find_files, official_name
from beam_jobs.layouts.layout import Found, Stream, StreamedImage, StreamError
from beam_jobs.layouts.passed_over import PassedOver
from beam_jobs.listings import FileInfo
from trainer.shared.errors import first_few

_PREFIXES = {split: f"{split}-" for split in ("train", "validation", "test")}
_FILE = re.compile(r"(train|validation)-\d{5}-of-\d{5}(-\w+)?\.parquet")
_ROWS, _BUFFER = 32, 2**20
"""Rows and bytes that are read at a time: a file has about 500 MB."""


class HuggingFaceParquet(Stream):
    """Parquet files, in which only groups of rows can be found."""

    def expects(self, split: str) -> str:
        return f"data/{split}-00000-of-N.parquet"

    def recognise(self, folder: str, split: str) -> Found | None:
        return find_files(folder, split, _PREFIXES, _FILE)

    def images(self, folder: str, name: str, labels: FileInfo | None) -> Iterator[StreamedImage | PassedOver]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            with files.open_to_read(files.join(folder, name)) as file:
                table = pq.ParquetFile(file, buffer_size=_BUFFER, pre_buffer=False)
                has_labels = "label" in table.schema_arrow.names
                columns = ["image", "label"] if has_labels else ["image"]
                by_synset = _Labels(name)
                for batch in table.iter_batches(_ROWS, columns=columns, use_threads=False):
                    images = batch.column("image").to_pylist()
                    for image, label in zip(images, batch.column("label").to_pylist() if has_labels else images, strict=True):
                        official, synset = official_name(name, image["path"] or "")
                        # A split without labels has -1.
                        if has_labels and label is not None and label >= 0:
                            by_synset.add(official, synset, label)
                        yield StreamedImage(official, synset, image["bytes"] or b"")
                by_synset.check()
        except (pa.ArrowException, KeyError, TypeError, OSError) as error:
            what = " ".join(str(error).split())
            raise StreamError(f"{name} cannot be read as ImageNet's Parquet ({what}); get it again") from error


class _Labels:
    """The labels of a file's images, by synset."""

    def __init__(self, file: str) -> None:
        self._file = file
        self._images: dict[str, dict[int, list[str]]] = {}
        """Names of images, by synset and label."""

    def add(self, image: str, synset: str, label: int) -> None:
        self._images.setdefault(synset, {}).setdefault(label, []).append(image)

    def check(self) -> None:
        """Raises StreamError if a synset has several labels, or a label several synsets."""
        usual = {synset: max(labels, key=lambda label: len(labels[label])) for synset, labels in self._images.items()}
        odd = [
            f"{image} with {label} for {usual[synset]}"
            for synset, labels in self._images.items()
            for label, images in labels.items()
            if label != usual[synset]
            for image in images
        ]
        if odd:
            raise StreamError(
                f"{self._file} has {len(odd):,} images whose label is not that of most of their synset, {first_few(odd, ', ')}: "
                "get it again"
            )
        by_label: dict[int, str] = {}
        for synset, label in usual.items():
            if by_label.setdefault(label, synset) != synset:
                raise StreamError(f"{self._file} has label {label} for {by_label[label]} and for {synset}: get it again")


LAYOUT = HuggingFaceParquet()

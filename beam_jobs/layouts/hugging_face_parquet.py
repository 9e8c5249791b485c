"""ImageNet as Hugging Face has it (imagenet-1k), in data/ or in the raw folder itself:

    train-00000-of-00294-*.parquet        columns `image`, a struct of `bytes` and `path`, and `label`
    validation-00000-of-00014-*.parquet

The class comes from `path`, which ends in the synset, as n01440764_18_n01440764.JPEG.
"""

import re
from collections.abc import Iterator

from beam_jobs import files
from beam_jobs.layouts.hugging_face import find_files, official_name
from beam_jobs.layouts.layout import Found, Stream, StreamedImage, StreamError
from beam_jobs.layouts.passed_over import PassedOver

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

    def images(self, folder: str, name: str, labels: files.FileInfo | None) -> Iterator[StreamedImage | PassedOver]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            with files.open_to_read(files.join(folder, name)) as file:
                table = pq.ParquetFile(file, buffer_size=_BUFFER, pre_buffer=False)
                for batch in table.iter_batches(_ROWS, columns=["image"], use_threads=False):
                    for image in batch.column("image").to_pylist():
                        yield StreamedImage(*official_name(name, image["path"] or ""), image["bytes"] or b"")
        except (pa.ArrowException, KeyError, TypeError, OSError) as error:
            what = " ".join(str(error).split())
            raise StreamError(f"{name} cannot be read as ImageNet's Parquet ({what}); get it again") from error


LAYOUT = HuggingFaceParquet()

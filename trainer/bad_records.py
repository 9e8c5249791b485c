"""Bad records: what a record must be, the search for the first that is not so, and the raw file that it comes from."""

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TypeVar

import numpy as np
import tensorflow as tf

from trainer.shared import records
from trainer.shared.errors import UserError
from trainer.shared.progress import OnProgress, ProgressBars, silent
from trainer.shared.records import Manifest, Shard, Split, reading_positions
from trainer.shared.sources import sources_file, unpack_source

T = TypeVar("T")

_BYTES_A_READ = 8 * 2**20
_SHARDS_AT_ONCE = max(8, os.cpu_count() or 1)
"""Shards that the search reads and decodes in parallel: at least a few, because Cloud Storage makes each wait."""
_JOB = "bad-record"
"""What the search is called where it is no phase of a job."""


def naming_bad_records(
    batches: Iterable[T], data_dir: str, manifest: Manifest, split_name: str, on_progress: OnProgress | None = None
) -> Iterator[T]:
    """Yields the batches or records of a split. If one fails, raises UserError that names the bad record and its raw file.

    The search for it is a phase of `on_progress`; without one, it shows its own progress.
    """
    coming = iter(batches)
    while True:
        try:
            batch = next(coming)
        except StopIteration:
            return
        except tf.errors.OpError as error:
            with nullcontext(on_progress) if on_progress else _shown() as search:
                found = first_bad_record(data_dir, manifest, split_name, search)
            raise found or UserError(f"{data_dir} cannot be read: {str(error).splitlines()[0]}") from error
        yield batch


def first_bad_record(data_dir: str, manifest: Manifest, split_name: str, on_progress: OnProgress = silent) -> UserError | None:
    """Reads a split from its beginning. Returns an error that names its first bad record by file, number and raw file, or None.

    Reads many shards in parallel until one has a bad record, then that shard record by record. Keeps 4 bytes an image.
    """
    split = manifest.splits[split_name]
    position_of = np.full(split.records, -1, np.int32)
    before = 0
    phase = f"searching the {split_name} images for the bad record"
    on_progress(phase, 0, split.records)
    whole = _ids_by_shard(data_dir, manifest, split_name)
    for shard in split.shards:
        try:
            image_ids = next(whole)
        except (StopIteration, tf.errors.OpError):
            image_ids = None
        if image_ids is None or len(np.unique(image_ids)) < len(image_ids) or (position_of[image_ids] >= 0).any():
            on_progress(f"reading {shard.file} record by record")
            return _first_of_shard(data_dir, manifest, split_name, shard, before, position_of)
        position_of[image_ids] = np.arange(before, before + len(image_ids))
        before += shard.records
        on_progress(phase, before, split.records)
    return None


def parse(serialized: tf.Tensor, num_images: int, num_classes: int) -> dict[str, tf.Tensor]:
    """Parses a record. Fails if its image ID or label is out of range, because a wrong ID would corrupt another image's u."""
    parsed = records.parse_example(serialized)
    image_id, label = parsed[records.IMAGE_ID], parsed[records.LABEL]
    checks = [
        tf.debugging.Assert(
            tf.logical_and(image_id >= 0, image_id < num_images),
            [tf.strings.format(f"image ID {{}} is not within 0..{num_images - 1}: build the dataset again", image_id)],
        ),
        tf.debugging.Assert(
            tf.logical_and(label >= 0, label < num_classes),
            [tf.strings.format(f"label {{}} is not within 0..{num_classes - 1}: build the dataset again", label)],
        ),
    ]
    with tf.control_dependencies(checks):
        return {name: tf.identity(value) for name, value in parsed.items()}


@contextmanager
def _shown() -> Iterator[OnProgress]:
    with ProgressBars() as bars:
        yield bars.of(_JOB)


def by_shard(
    data_dir: str, split: Split, about: Callable[[tf.Tensor], tuple[tf.Tensor, tf.Tensor]]
) -> Iterator[tuple[tf.Tensor, tf.Tensor]]:
    """Yields for each shard, in order, what `about` returns for its records, as tensors [n]. Reads several shards in parallel.

    Raises tf.errors.OpError at a record that cannot be read, and where `about` fails.
    """
    most = max(shard.records for shard in split.shards)
    at_once = min(len(split.shards), _SHARDS_AT_ONCE)
    of_shards = tf.data.Dataset.from_tensor_slices([_path(data_dir, shard) for shard in split.shards]).interleave(
        # A shard gives one element. So the elements have the order of the shards.
        lambda path: tf.data.TFRecordDataset(path, buffer_size=_BYTES_A_READ).map(about).batch(most),
        cycle_length=at_once,
        num_parallel_calls=at_once,
        deterministic=True,
    )
    yield from _untuned(of_shards)


def _ids_by_shard(data_dir: str, manifest: Manifest, split_name: str) -> Iterator[np.ndarray]:
    """Yields the image IDs of each shard, int64 [n], in the order of the shards.

    Raises tf.errors.OpError at a record that cannot be parsed or decoded.
    """
    for image_ids, _ in by_shard(data_dir, manifest.splits[split_name], _decoding(manifest, split_name)):
        yield image_ids.numpy()


def _decoding(manifest: Manifest, split_name: str) -> Callable[[tf.Tensor], tuple[tf.Tensor, tf.Tensor]]:
    """Returns what parses and decodes a record, and returns its image ID."""
    num_images = manifest.splits[split_name].records

    def decoded(serialized: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        parsed = parse(serialized, num_images, manifest.num_classes)
        # The height is returned, because TensorFlow leaves out what nobody uses.
        return parsed[records.IMAGE_ID], tf.shape(tf.io.decode_jpeg(parsed[records.ENCODED], channels=3))[0]

    return decoded


def _first_of_shard(
    data_dir: str, manifest: Manifest, split_name: str, shard: Shard, before: int, position_of: np.ndarray
) -> UserError | None:
    """Returns the error of a shard's first bad record, or None.

    before: number of records in the shards before it
    position_of: by image ID, the position of its record in the order of the shards; -1 if none was read
    """
    path = _path(data_dir, shard)
    read = tf.data.TFRecordDataset(path, buffer_size=_BYTES_A_READ).map(_decoding(manifest, split_name))
    number = -1

    def told(text: str, number: int) -> UserError:
        return UserError(text + _origin(data_dir, manifest, split_name, before + number))

    try:
        for number, (image_id, _) in enumerate(_untuned(read).as_numpy_iterator()):
            if (other := int(position_of[image_id])) >= 0:
                where = _record_at(data_dir, manifest, split_name, other)
                return told(
                    f"record {number} of {path} has image ID {image_id}, which {where} has too: build the dataset again", number
                )
            position_of[image_id] = before + number
    except tf.errors.DataLossError:
        return told(f"{path} is torn or altered after record {number}: build the dataset again", number + 1)
    except tf.errors.OpError as error:
        return told(f"record {number + 1} of {path}: {_first_line(error)}", number + 1)
    return None


def _record_at(data_dir: str, manifest: Manifest, split_name: str, position: int) -> str:
    """Returns the name of the record at a position of a split, in the order of the shards."""
    shards = manifest.splits[split_name].shards
    ends = np.cumsum([shard.records for shard in shards])
    shard = int(np.searchsorted(ends, position, side="right"))
    return f"record {position - int(ends[shard]) + shards[shard].records} of {_path(data_dir, shards[shard])}"


def _origin(data_dir: str, manifest: Manifest, split_name: str, position: int) -> str:
    """Returns the end of a message about the record at a position of a split, in the order of the shards.

    It names the image and its raw file, as in "; it is image 5, from train/n01440764/n01440764_18.JPEG". It is empty if the
    dataset does not know where its images are from, as one of an earlier version.
    """
    image_id = int(np.argsort(reading_positions(manifest.splits[split_name].records))[position])
    try:
        with tf.io.gfile.GFile(f"{data_dir.rstrip('/')}/{sources_file(manifest.name, split_name)}", "rb") as file:
            source = unpack_source(file.read(), image_id)
    except (tf.errors.OpError, ValueError):
        return ""
    return f"; it is image {image_id}, from {source}"


def _path(data_dir: str, shard: Shard) -> str:
    return f"{data_dir.rstrip('/')}/{shard.file}"


def _untuned(dataset: tf.data.Dataset) -> tf.data.Dataset:
    """Returns `dataset` without autotuning, whose thread would hold up the end of the process."""
    options = tf.data.Options()
    options.autotune.enabled = False
    return dataset.with_options(options)


def _first_line(error: tf.errors.OpError) -> str:
    return str(error.message).splitlines()[0].rpartition("}} ")[2]

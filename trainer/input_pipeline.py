"""The input pipeline: from the shards of a dataset to batches of two views, or of what evaluation sees.

Only what has to be done an image at a time is done on the host; `trainer/augmentation.py` says what is left to the accelerator.
No Python runs in it, so that a TPU slice's hosts each run their own.
"""

import os
import sys
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from trainer.augmentation import NUM_DRAWS, central_crop, one_view, two_views
from trainer.config import Config
from trainer.order import Order
from trainer.settings import RunSettings, ViewSettings
from trainer.shared import records
from trainer.shared.blocks import block_extent
from trainer.shared.errors import UserError
from trainer.shared.records import Manifest

Batch = dict[str, tf.Tensor]

_LOCAL_BLOCKS_AT_ONCE, _BLOCKS_AT_ONCE = 4, 16
"""Blocks read at the same time from a local disk, and from Cloud Storage, where a request takes tens of milliseconds."""

_BYTES_A_READ = 8 * 2**20
"""Bytes a read, where a file is read from its beginning to its end."""

_CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def training_batches(
    config: Config, data_dir: str, manifest: Manifest, first_step: int, *, host: int = 0, hosts: int = 1, replicas: int = 1
) -> tf.data.Dataset:
    """Returns batches of training images from `first_step` on, without end, of `replicas` one after another for each step.

    It is what host `host` of `hosts` feeds to its `replicas`. With b = global_batch_size / (hosts * replicas) and S = image_size,
    a batch has `views` [b, 2, S, S, 3] uint8, `draws` [b, 2, NUM_DRAWS] float32, `image_id` [b] int64, each ID at most once in a
    step, and `label` [b] int64. A batch is a function of (config, dataset, step, hosts, replicas).

    Raises UserError where there are fewer images than a batch. Iterating raises tf.errors.OpError at a record that is wrong:
    torn, without its features, with a label or an ID out of range, or with an ID that was there in the same epoch.
    """
    settings, batch_size = config.views, config.optimizer.global_batch_size
    size = settings.image_size
    split = training_split(batch_size, data_dir, manifest)
    taken = _in_order(batch_size, config.run, data_dir, manifest, first_step, host, hosts)

    def example(item: dict[str, tf.Tensor]) -> Batch:
        parsed = _parse(item["serialized"], split.records, manifest.num_classes)
        image_id = parsed[records.IMAGE_ID]
        epoch_key = _epoch_key(config.run.seed, item["epoch"])
        views, draws = two_views(
            parsed[records.ENCODED], size, settings.crop_min_area, epoch_key, image_id, settings.crop_interpolation
        )
        return {
            "views": tf.ensure_shape(views, [2, size, size, 3]),
            "draws": tf.ensure_shape(draws, [2, NUM_DRAWS]),
            "image_id": image_id,
            "label": parsed[records.LABEL],
            "epoch": item["epoch"],
        }

    return _untuned(
        taken.unbatch()
        .map(example, num_parallel_calls=_CORES, deterministic=True)
        .batch(batch_size // (hosts * replicas), drop_remainder=True)
        .scan(tf.fill([split.records], tf.constant(-1, tf.int32)), _refuse_repeats)
        .prefetch(2 * replicas)
    )


def labelled_batches(
    views: ViewSettings,
    batch_size: int,
    run: RunSettings,
    data_dir: str,
    manifest: Manifest,
    image_ids: np.ndarray | None = None,
    first_step: int = 0,
    *,
    host: int = 0,
    hosts: int = 1,
    replicas: int = 1,
) -> tf.data.Dataset:
    """Returns batches of training images for training with labels, from `first_step` on, without end.

    The batches of host `host` of `hosts` are for its `replicas`, one after another for each step. With b = `batch_size` /
    (hosts * replicas) and S = image_size, a batch has `image` [b, S, S, 3] uint8, cropped and flipped at random, and `label` [b]
    int64. It is a function of the arguments and the dataset. With `image_ids`, [n] int64, n at least `batch_size`, an epoch has
    those images only, which then stay in memory, encoded. Raises UserError where there are fewer images than a batch.
    """
    size = views.image_size
    split = training_split(batch_size, data_dir, manifest)
    if image_ids is None:
        taken = _in_order(batch_size, run, data_dir, manifest, first_step, host, hosts)
    else:
        stored = _stored(data_dir, manifest, image_ids)
        order = Order((len(image_ids),), batch_size, len(image_ids), run.seed)
        taken = order.windows(first_step, host, hosts).map(lambda window: _taken(window, stored, window["places"]))

    def example(item: dict[str, tf.Tensor]) -> Batch:
        parsed = _parse(item["serialized"], split.records, manifest.num_classes)
        view = one_view(
            parsed[records.ENCODED],
            size,
            views.crop_min_area,
            _epoch_key(run.seed, item["epoch"]),
            parsed[records.IMAGE_ID],
            views.crop_interpolation,
        )
        return {"image": tf.ensure_shape(view, [size, size, 3]), "label": parsed[records.LABEL]}

    return _untuned(
        taken.unbatch()
        .map(example, num_parallel_calls=_CORES, deterministic=True)
        .batch(batch_size // (hosts * replicas), drop_remainder=True)
        .prefetch(2 * replicas)
    )


PADDING = -1
"""Image ID of what fills up a batch of `evaluation_batches`."""


def evaluation_batches(
    views: ViewSettings,
    data_dir: str,
    manifest: Manifest,
    split_name: str,
    batch_size: int,
    image_ids: np.ndarray | None = None,
    first_step: int = 0,
    *,
    host: int = 0,
    hosts: int = 1,
    replicas: int = 1,
) -> tf.data.Dataset:
    """Returns every image of a split once, or each of `image_ids`, [n] int64, in the order of the shards, from `first_step` on.

    The batches of host `host` of `hosts` are those of its own shards, for its `replicas`, one after another for each step. A
    batch has `image` [b, S, S, 3] uint8, the evaluation crop, `image_id` [b] int64 and `label` [b] int64, with b = `batch_size`.
    Every batch has this shape and every host as many: what is missing at the end is padding, whose image ID is PADDING.
    """
    split = _split(manifest, split_name, data_dir)
    images_of = [sum(shard.records for shard in split.shards[number::hosts]) for number in range(hosts)]
    most = max(images_of) if image_ids is None else min(max(images_of), len(image_ids))
    steps = -(-most // (batch_size * replicas))
    size = views.image_size
    wanted = np.ones(split.records, bool) if image_ids is None else np.isin(np.arange(split.records), image_ids)

    def is_wanted(serialized: tf.Tensor) -> tf.Tensor:
        return tf.gather(wanted, _parse(serialized, split.records, manifest.num_classes)[records.IMAGE_ID])

    def example(serialized: tf.Tensor) -> Batch:
        parsed = _parse(serialized, split.records, manifest.num_classes)
        image = central_crop(parsed[records.ENCODED], size, views.eval_crop_proportion)
        return {
            "image": tf.ensure_shape(image, [size, size, 3]),
            "image_id": parsed[records.IMAGE_ID],
            "label": parsed[records.LABEL],
        }

    padding = tf.data.Dataset.from_tensors(
        {
            "image": tf.zeros([size, size, 3], tf.uint8),
            "image_id": tf.constant(PADDING, tf.int64),
            "label": tf.constant(0, tf.int64),
        }
    ).repeat()
    files = [f"{data_dir.rstrip('/')}/{shard.file}" for shard in split.shards[host::hosts]]
    serialized = tf.data.TFRecordDataset(tf.constant(files, tf.string), buffer_size=_BYTES_A_READ)
    chosen = serialized if image_ids is None else serialized.filter(is_wanted)
    return _untuned(
        chosen.skip(first_step * batch_size * replicas)
        .map(example, num_parallel_calls=_CORES, deterministic=True)
        .concatenate(padding)
        .batch(batch_size, drop_remainder=True)
        .take(max(0, steps - first_step) * replicas)
        .prefetch(2 * replicas)
    )


def _untuned(dataset: tf.data.Dataset) -> tf.data.Dataset:
    """Returns `dataset` without tf.data's autotuning, whose thread sleeps up to a minute while its iterator waits to be deleted.

    A preempted run has half of that to end in.
    """
    options = tf.data.Options()
    options.autotune.enabled = False
    return dataset.with_options(options)


def training_split(batch_size: int, data_dir: str, manifest: Manifest) -> records.Split:
    """Returns the training images. Raises UserError where there are fewer than a batch."""
    split = _split(manifest, "train", data_dir)
    if split.records < batch_size:
        raise UserError(f"global_batch_size={batch_size} is more than the {split.records} training images in {data_dir}")
    return split


def order_of(batch_size: int, run: RunSettings, manifest: Manifest) -> Order:
    """Returns the order in which a run sees the training images."""
    sizes = tuple(count for shard in manifest.splits["train"].shards for count in _block_sizes(shard))
    return Order(sizes, batch_size, run.shuffle_window, run.seed)


def naming_wrong_records(batches: Iterable[Batch], data_dir: str, manifest: Manifest, split_name: str) -> Iterator[Batch]:
    """Yields `batches` of a split. Where one cannot be made, raises UserError that names the file and the wrong record."""
    coming = iter(batches)
    while True:
        try:
            batch = next(coming)
        except StopIteration:
            return
        except tf.errors.OpError as error:
            print("a record is wrong; looking for it", file=sys.stderr)
            wrong = first_wrong_record(data_dir, manifest, split_name)
            raise wrong or UserError(f"{data_dir} cannot be read: {str(error).splitlines()[0]}") from error
        yield batch


def first_wrong_record(data_dir: str, manifest: Manifest, split_name: str) -> UserError | None:
    """Reads a split from its beginning and returns what is wrong with its first wrong record, by file and number, or None.

    What a training run refuses without saying where, as only a slow look can.
    """
    split = manifest.splits[split_name]
    seen: dict[int, str] = {}
    for shard in split.shards:
        path = f"{data_dir.rstrip('/')}/{shard.file}"
        number = -1
        try:
            for number, serialized in enumerate(_untuned(tf.data.TFRecordDataset(path, buffer_size=_BYTES_A_READ))):
                where = f"record {number} of {path}"
                parsed = _parse(serialized, split.records, manifest.num_classes)
                image_id = int(parsed[records.IMAGE_ID])
                if image_id in seen:
                    return UserError(f"{where} has image ID {image_id}, as has {seen[image_id]}: build the dataset again")
                seen[image_id] = where
                tf.io.decode_jpeg(parsed[records.ENCODED], channels=3)
        except tf.errors.DataLossError:
            return UserError(f"{path} is torn or altered after record {number}: build the dataset again")
        except tf.errors.OpError as error:
            return UserError(f"record {number} of {path}: {_first_line(error)}")
    return None


def _in_order(
    batch_size: int, run: RunSettings, data_dir: str, manifest: Manifest, first_step: int, host: int, hosts: int
) -> tf.data.Dataset:
    """Returns the records of a run's training images from `first_step` on, window by window: `serialized` and `epoch`."""
    blocks = _blocks(data_dir, manifest.splits["train"])
    windows = order_of(batch_size, run, manifest).windows(first_step, host, hosts)
    if run.cache:
        whole = tf.data.Dataset.from_tensors(np.arange(len(blocks.counts))).map(blocks.read).cache().repeat()
        return tf.data.Dataset.zip(windows, whole).map(lambda window, stored: _taken(window, stored, window["places"]))
    return windows.map(lambda window: _taken(window, blocks.read(window["blocks"]), window["order"])).prefetch(1)


def _stored(data_dir: str, manifest: Manifest, image_ids: np.ndarray) -> tf.Tensor:
    """Returns the records of the training images `image_ids`, [n] string, in the order of the shards."""
    split = manifest.splits["train"]
    wanted = np.zeros(split.records, bool)
    wanted[image_ids] = True
    files = [f"{data_dir.rstrip('/')}/{shard.file}" for shard in split.shards]
    every = tf.data.TFRecordDataset(files, buffer_size=_BYTES_A_READ)
    chosen = _untuned(
        every.filter(
            lambda serialized: tf.gather(wanted, _parse(serialized, split.records, manifest.num_classes)[records.IMAGE_ID])
        )
    )
    return tf.constant(list(chosen.as_numpy_iterator()))


def _epoch_key(seed: int, epoch: tf.Tensor) -> tf.Tensor:
    return tf.constant(seed, tf.int64) * 2**32 + epoch


def _refuse_repeats(last_epoch: tf.Tensor, batch: Batch) -> tuple[tf.Tensor, Batch]:
    """Passes a batch on if none of its images was there in the same epoch; `last_epoch`, [N] int32, is when each was."""
    image_id, epoch = batch["image_id"], tf.cast(batch["epoch"], tf.int32)
    again = tf.gather(last_epoch, image_id) == epoch
    once = tf.size(tf.unique(image_id)[0]) == tf.size(image_id)
    checks = [
        tf.debugging.Assert(
            once & ~tf.reduce_any(again), [tf.strings.format("image IDs {} twice in an epoch", tf.boolean_mask(image_id, again))]
        )
    ]
    with tf.control_dependencies(checks):
        last_epoch = tf.tensor_scatter_nd_update(last_epoch, image_id[:, None], epoch)
    return last_epoch, {name: batch[name] for name in ("views", "draws", "image_id", "label")}


def _split(manifest: Manifest, name: str, data_dir: str) -> records.Split:
    if name not in manifest.splits or manifest.splits[name].records == 0:
        raise UserError(f"{data_dir} has no images in split {name}")
    return manifest.splits[name]


class _Blocks(NamedTuple):
    """The blocks of a split: each its file's path, its byte offset and size there, and how many records it has."""

    paths: np.ndarray
    offsets: np.ndarray
    sizes: np.ndarray
    counts: np.ndarray

    def read(self, numbers: tf.Tensor) -> tf.Tensor:
        """Returns the serialized records of blocks, in their order, [sum of counts] string."""

        def block(path: tf.Tensor, offset: tf.Tensor, size: tf.Tensor, count: tf.Tensor) -> tf.data.Dataset:
            # The public TFRecordDataset cannot start in the middle of a file; its operation can. With a buffer of the block's
            # size, one request to Cloud Storage reads the block and nothing beyond it.
            variant = tf.raw_ops.TFRecordDatasetV2(
                filenames=path[None], compression_type="", buffer_size=size, byte_offsets=offset[None]
            )
            return tf.data.experimental.from_variant(variant, tf.TensorSpec([], tf.string)).take(count)

        counts = tf.gather(self.counts, numbers)
        about = (self.paths, self.offsets, self.sizes, self.counts)
        blocks = tf.data.Dataset.from_tensor_slices(tuple(tf.gather(values, numbers) for values in about))
        parallel = _BLOCKS_AT_ONCE if "://" in str(self.paths[0]) else _LOCAL_BLOCKS_AT_ONCE
        serialized = blocks.interleave(
            block,
            cycle_length=parallel,
            block_length=records.RECORDS_PER_BLOCK,
            num_parallel_calls=parallel,
            deterministic=True,
        )
        return tf.ensure_shape(serialized.batch(tf.reduce_sum(counts)).get_single_element(), [None])


def _blocks(data_dir: str, split: records.Split) -> _Blocks:
    sizes = [_block_sizes(shard) for shard in split.shards]
    paths = [f"{data_dir.rstrip('/')}/{shard.file}" for shard, of in zip(split.shards, sizes, strict=True) for _ in of]
    extents = [block_extent(shard, block) for shard in split.shards for block in range(len(shard.blocks))]
    offsets, lengths = zip(*extents, strict=True)
    counts = [count for of in sizes for count in of]
    return _Blocks(np.array(paths), *(np.array(values, np.int64) for values in (offsets, lengths, counts)))


def _block_sizes(shard: records.Shard) -> list[int]:
    starts = range(0, shard.records, records.RECORDS_PER_BLOCK)
    return [min(records.RECORDS_PER_BLOCK, shard.records - start) for start in starts]


def _taken(window: dict[str, tf.Tensor], serialized: tf.Tensor, order: tf.Tensor) -> dict[str, tf.Tensor]:
    return {"serialized": tf.gather(serialized, order), "epoch": tf.fill(tf.shape(order), window["epoch"])}


def _parse(serialized: tf.Tensor, num_images: int, num_classes: int) -> dict[str, tf.Tensor]:
    """Parses a record and refuses one whose ID or label is not of this dataset, before it can do harm."""
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


def _first_line(error: tf.errors.OpError) -> str:
    return str(error.message).splitlines()[0].rpartition("}} ")[2]

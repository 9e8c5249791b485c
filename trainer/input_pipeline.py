"""The input pipeline: from the shards of a dataset to batches of two views, of one view with its label, or of evaluation crops.

The host does only the work on single images; `trainer/augmentation.py` describes the work of the accelerator. The pipeline
consists of TensorFlow operations only, so each host of a TPU slice can run its own.
"""

import os
from collections.abc import Callable
from typing import TypeVar

import numpy as np
import tensorflow as tf

from trainer.augmentation import NUM_DRAWS, central_crop, one_view, two_views
from trainer.bad_records import parse
from trainer.config import Config
from trainer.reading import block_sizes, blocks_of, find_records
from trainer.sampler import Sampler
from trainer.settings import RunSettings, ViewSettings
from trainer.shared import records
from trainer.shared.errors import UserError
from trainer.shared.records import Manifest

Batch = dict[str, tf.Tensor]
_MakesDataset = TypeVar("_MakesDataset", bound=Callable[..., tf.data.Dataset])

_RECORDS_AT_ONCE = 256
"""Records of a subset to read together. It reads each record on its own."""

_BYTES_A_READ = 8 * 2**20
"""Bytes per read of a file that is read from its beginning to its end."""

_CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _traced_as_written(function: _MakesDataset) -> _MakesDataset:
    """Returns `function` without AutoGraph, which takes a second of each process to convert Python that needs no conversion."""
    return tf.autograph.experimental.do_not_convert(function)


@_traced_as_written
def training_batches(
    config: Config, data_dir: str, manifest: Manifest, first_step: int, *, host: int = 0, hosts: int = 1, replicas: int = 1
) -> tf.data.Dataset:
    """Returns an infinite dataset of training batches from `first_step` on, for host `host` of `hosts`.

    Each step has one batch for each of the host's `replicas`, one after another. With b = global_batch_size / (hosts * replicas)
    and S = image_size, a batch has `views` [b, 2, S, S, 3] uint8, `draws` [b, 2, NUM_DRAWS] float32, `image_id` [b] int64 and
    `label` [b] int64. An image ID occurs at most once a step. A batch depends only on (config, dataset, step, hosts, replicas).

    Raises UserError if there are fewer images than a global batch. Iteration raises tf.errors.OpError at a bad record: a torn
    one, one that lacks a feature, whose label or ID is out of range, or whose ID occurred before in the same epoch.
    """
    settings, batch_size = config.views, config.optimizer.global_batch_size
    size = settings.image_size
    split = training_split(batch_size, data_dir, manifest)
    taken = _in_order(batch_size, config.run, data_dir, manifest, first_step, host, hosts)

    def example(item: dict[str, tf.Tensor]) -> Batch:
        parsed = parse(item["serialized"], split.records, manifest.num_classes)
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


@_traced_as_written
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
    on_search: Callable[[int], None] = lambda done: None,
) -> tf.data.Dataset:
    """Returns an infinite dataset of batches for supervised training from `first_step` on, for host `host` of `hosts`.

    Each step has one batch for each of the host's `replicas`, one after another. With b = `batch_size` / (hosts * replicas) and
    S = image_size, a batch has `image` [b, S, S, 3] uint8, cropped and flipped at random, and `label` [b] int64. It depends only
    on the arguments and the dataset. `image_ids`, [n] int64 with n >= `batch_size`, restricts an epoch to these images. To find
    their records, it first reads all shards once, calls `on_search(records read)` meanwhile, and then keeps 32 bytes an image.
    Raises UserError if there are fewer images than a batch, or if that search meets a bad record.
    """
    size = views.image_size
    split = training_split(batch_size, data_dir, manifest)
    if image_ids is None:
        taken = _in_order(batch_size, run, data_dir, manifest, first_step, host, hosts)
    else:
        extents = find_records(data_dir, manifest, image_ids, on_search)
        windows = Sampler((len(image_ids),), batch_size, len(image_ids), run.seed).windows(first_step, host, hosts)
        each = windows.map(
            lambda window: (window["positions"], tf.fill(tf.shape(window["positions"]), window["epoch"]))
        ).unbatch()
        taken = (
            each.batch(_RECORDS_AT_ONCE)
            .map(lambda positions, epoch: {"serialized": extents.read(positions), "epoch": epoch})
            .prefetch(1)
        )

    def example(item: dict[str, tf.Tensor]) -> Batch:
        parsed = parse(item["serialized"], split.records, manifest.num_classes)
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
"""Image ID of the padding in `evaluation_batches` and `view_batches`."""
_NO_EPOCH = 2**32 - 1
"""Number of an epoch that no training reaches. It keys the random numbers of `view_batches`."""


@_traced_as_written
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
    """Returns batches with every image of a split once, in the order of the shards, from `first_step` on.

    `image_ids`, [n] int64, restricts them to these images. Host `host` of `hosts` reads its own shards only. Each step has one
    batch for each of the host's `replicas`, one after another. With b = `batch_size` and S = image_size, a batch has `image`
    [b, S, S, 3] uint8, the evaluation crop, `image_id` [b] int64 and `label` [b] int64. All batches have this shape and all hosts
    have the same number of batches: padding, whose image ID is PADDING, fills them up at the end.
    """

    def example(parsed: dict[str, tf.Tensor]) -> Batch:
        image = central_crop(parsed[records.ENCODED], views.image_size, views.eval_crop_proportion)
        return {"image": tf.ensure_shape(image, [views.image_size, views.image_size, 3])}

    return _every_image(example, data_dir, manifest, split_name, batch_size, image_ids, first_step, host, hosts, replicas)


@_traced_as_written
def view_batches(
    views: ViewSettings,
    seed: int,
    data_dir: str,
    manifest: Manifest,
    batch_size: int,
    image_ids: np.ndarray | None = None,
    first_step: int = 0,
    *,
    host: int = 0,
    hosts: int = 1,
    replicas: int = 1,
) -> tf.data.Dataset:
    """Returns batches with two views of every training image once, in the order of the shards, from `first_step` on.

    As `evaluation_batches`, with `views` and `draws` as those of `training_batches` in place of `image`. The views of an image
    depend on `seed`, its ID and the settings only, and are those of no epoch of training.
    """
    size = views.image_size

    def example(parsed: dict[str, tf.Tensor]) -> Batch:
        pair, draws = two_views(
            parsed[records.ENCODED],
            size,
            views.crop_min_area,
            _epoch_key(seed, tf.constant(_NO_EPOCH, tf.int64)),
            parsed[records.IMAGE_ID],
            views.crop_interpolation,
        )
        return {"views": tf.ensure_shape(pair, [2, size, size, 3]), "draws": tf.ensure_shape(draws, [2, NUM_DRAWS])}

    return _every_image(example, data_dir, manifest, "train", batch_size, image_ids, first_step, host, hosts, replicas)


def _every_image(
    example: Callable[[dict[str, tf.Tensor]], Batch],
    data_dir: str,
    manifest: Manifest,
    split_name: str,
    batch_size: int,
    image_ids: np.ndarray | None,
    first_step: int,
    host: int,
    hosts: int,
    replicas: int,
) -> tf.data.Dataset:
    """Returns batches of `example(parsed record)` with image IDs and labels, padded at the end, as `evaluation_batches` says."""
    split = _split(manifest, split_name, data_dir)
    images_of = [sum(shard.records for shard in split.shards[number::hosts]) for number in range(hosts)]
    most = max(images_of) if image_ids is None else min(max(images_of), len(image_ids))
    steps = -(-most // (batch_size * replicas))
    wanted = np.ones(split.records, bool) if image_ids is None else np.isin(np.arange(split.records), image_ids)

    def is_wanted(serialized: tf.Tensor) -> tf.Tensor:
        return tf.gather(wanted, parse(serialized, split.records, manifest.num_classes)[records.IMAGE_ID])

    def labelled(serialized: tf.Tensor) -> Batch:
        parsed = parse(serialized, split.records, manifest.num_classes)
        return {**example(parsed), "image_id": parsed[records.IMAGE_ID], "label": parsed[records.LABEL]}

    files = [f"{data_dir.rstrip('/')}/{shard.file}" for shard in split.shards[host::hosts]]
    serialized = tf.data.TFRecordDataset(tf.constant(files, tf.string), buffer_size=_BYTES_A_READ)
    chosen = serialized if image_ids is None else serialized.filter(is_wanted)
    examples = chosen.skip(first_step * batch_size * replicas).map(labelled, num_parallel_calls=_CORES, deterministic=True)
    blank = {name: tf.zeros(spec.shape, spec.dtype) for name, spec in examples.element_spec.items()}
    padding = tf.data.Dataset.from_tensors(blank | {"image_id": tf.constant(PADDING, tf.int64)}).repeat()
    return _untuned(
        examples.concatenate(padding)
        .batch(batch_size, drop_remainder=True)
        .take(max(0, steps - first_step) * replicas)
        .prefetch(2 * replicas)
    )


def _untuned(dataset: tf.data.Dataset) -> tf.data.Dataset:
    """Returns `dataset` without tf.data's autotuning.

    Deleting an iterator waits for the autotuning thread, which sleeps up to a minute. A preempted run has 30 seconds to exit.
    """
    options = tf.data.Options()
    options.autotune.enabled = False
    return dataset.with_options(options)


def training_split(batch_size: int, data_dir: str, manifest: Manifest) -> records.Split:
    """Returns the training split. Raises UserError if it has fewer images than a batch."""
    split = _split(manifest, "train", data_dir)
    if split.records < batch_size:
        raise UserError(f"global_batch_size={batch_size} is more than the {split.records} training images in {data_dir}")
    return split


def make_sampler(batch_size: int, run: RunSettings, manifest: Manifest) -> Sampler:
    """Returns the sampler of a run's training images."""
    sizes = tuple(count for shard in manifest.splits["train"].shards for count in block_sizes(shard))
    return Sampler(sizes, batch_size, run.shuffle_window, run.seed)


def _in_order(
    batch_size: int, run: RunSettings, data_dir: str, manifest: Manifest, first_step: int, host: int, hosts: int
) -> tf.data.Dataset:
    """Returns the training records in the sampler's order from `first_step` on, in windows of `serialized` and `epoch`."""
    blocks = blocks_of(data_dir, manifest.splits["train"])
    windows = make_sampler(batch_size, run, manifest).windows(first_step, host, hosts)
    if run.cache:
        whole = tf.data.Dataset.from_tensors(np.arange(len(blocks.counts))).map(blocks.read).cache().repeat()
        return tf.data.Dataset.zip(windows, whole).map(lambda window, stored: _taken(window, stored, window["positions"]))
    return windows.map(lambda window: _taken(window, blocks.read(window["blocks"]), window["indices"])).prefetch(1)


def _epoch_key(seed: int, epoch: tf.Tensor) -> tf.Tensor:
    return tf.constant(seed, tf.int64) * 2**32 + epoch


def _refuse_repeats(last_epoch: tf.Tensor, batch: Batch) -> tuple[tf.Tensor, Batch]:
    """Passes a batch on if none of its images occurred before in the same epoch, else fails.

    `last_epoch`, [N] int32, holds the latest epoch in which each image occurred.
    """
    image_id, epoch = batch["image_id"], tf.cast(batch["epoch"], tf.int32)
    again = tf.gather(last_epoch, image_id) == epoch
    once = tf.size(tf.unique(image_id)[0]) == tf.size(image_id)
    message = tf.strings.format("image IDs {} occur twice in an epoch", tf.boolean_mask(image_id, again))
    checks = [tf.debugging.Assert(once & ~tf.reduce_any(again), [message])]
    with tf.control_dependencies(checks):
        last_epoch = tf.tensor_scatter_nd_update(last_epoch, image_id[:, None], epoch)
    return last_epoch, {name: batch[name] for name in ("views", "draws", "image_id", "label")}


def _split(manifest: Manifest, name: str, data_dir: str) -> records.Split:
    if name not in manifest.splits or manifest.splits[name].records == 0:
        raise UserError(f"{data_dir} has no images in split {name}")
    return manifest.splits[name]


def _taken(window: dict[str, tf.Tensor], serialized: tf.Tensor, indices: tf.Tensor) -> dict[str, tf.Tensor]:
    return {"serialized": tf.gather(serialized, indices), "epoch": tf.fill(tf.shape(indices), window["epoch"])}

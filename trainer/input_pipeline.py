"""The input pipeline: from the shards of a dataset to batches of two views, or of what evaluation sees.

Only what has to be done an image at a time is done on the host; `trainer/augmentation.py` says what is left to the accelerator.
"""

from collections.abc import Iterator

import numpy as np
import tensorflow as tf

from trainer import records
from trainer.augmentation import NUM_DRAWS, central_crop, two_views
from trainer.config import Config
from trainer.order import Order
from trainer.records import Manifest, UserError

Batch = dict[str, tf.Tensor]


def training_batches(config: Config, data_dir: str, manifest: Manifest, first_step: int) -> tf.data.Dataset:
    """Returns batches of training images from `first_step` on, without end.

    With B = `config.global_batch_size` and S = `config.image_size`, a batch has `views` [B, 2, S, S, 3] uint8, `draws`
    [B, 2, NUM_DRAWS] float32, `image_id` [B] int64, each ID at most once, and `label` [B] int64. Batch k is a function of
    (config, dataset, k). Raises UserError where there are fewer images than a batch.
    """
    split = _split(manifest, "train", data_dir)
    paths, offsets, counts = _blocks(data_dir, split)
    if split.records < config.global_batch_size:
        raise UserError(
            f"global_batch_size={config.global_batch_size} is more than the {split.records} training images in {data_dir}"
        )
    order = Order(tuple(counts.tolist()), config.global_batch_size, config.shuffle_window, config.seed)

    def plan() -> Iterator[dict[str, np.ndarray | np.int64]]:
        for window in order.windows(first_step):
            yield {"epoch": np.int64(window.epoch), "blocks": window.blocks, "order": window.order[window.skip :]}

    vector = tf.TensorSpec([None], tf.int64)
    windows = tf.data.Dataset.from_generator(
        plan, output_signature={"epoch": tf.TensorSpec([], tf.int64), "blocks": vector, "order": vector}
    )

    def read(window: dict[str, tf.Tensor]) -> tf.data.Dataset:
        blocks = window["blocks"]
        serialized = _read_blocks(tf.gather(paths, blocks), tf.gather(offsets, blocks), tf.gather(counts, blocks))
        epoch_key = tf.constant(config.seed, tf.int64) * 2**32 + window["epoch"]
        return {
            "serialized": tf.gather(serialized, window["order"]),
            "epoch_key": tf.fill(tf.shape(window["order"]), epoch_key),
        }

    def example(item: dict[str, tf.Tensor]) -> Batch:
        parsed = _parse(item["serialized"], split.records, manifest.num_classes)
        image_id, label = parsed[records.IMAGE_ID], parsed[records.LABEL]
        views, draws = two_views(parsed[records.ENCODED], config.image_size, config.crop_min_area, item["epoch_key"], image_id)
        views = tf.ensure_shape(views, [2, config.image_size, config.image_size, 3])
        return {"views": views, "draws": tf.ensure_shape(draws, [2, NUM_DRAWS]), "image_id": image_id, "label": label}

    return (
        windows.map(read)
        .prefetch(1)
        .unbatch()
        .map(example, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)
        .batch(config.global_batch_size, drop_remainder=True)
        .prefetch(2)
    )


def evaluation_batches(config: Config, data_dir: str, manifest: Manifest, split_name: str, batch_size: int) -> tf.data.Dataset:
    """Returns every image of a split once, in the order of the shards; the last batch is as small as it comes.

    A batch of n has `image` [n, S, S, 3] float32 in [0, 1], `image_id` [n] int64 and `label` [n] int64.
    """
    split = _split(manifest, split_name, data_dir)

    def example(serialized: tf.Tensor) -> Batch:
        parsed = _parse(serialized, split.records, manifest.num_classes)
        image = central_crop(parsed[records.ENCODED], config.image_size, config.eval_crop_proportion)
        image = tf.ensure_shape(image, [config.image_size, config.image_size, 3])
        return {"image": image, "image_id": parsed[records.IMAGE_ID], "label": parsed[records.LABEL]}

    return (
        tf.data.TFRecordDataset([f"{data_dir.rstrip('/')}/{shard.file}" for shard in split.shards])
        .map(example, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)
        .batch(batch_size)
        .prefetch(2)
    )


def _split(manifest: Manifest, name: str, data_dir: str) -> records.Split:
    if name not in manifest.splits or manifest.splits[name].records == 0:
        raise UserError(f"{data_dir} has no images in split {name}")
    return manifest.splits[name]


def _blocks(data_dir: str, split: records.Split) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns of every block its file's path, its byte offset in it and how many records it has."""
    paths: list[str] = []
    offsets: list[int] = []
    counts: list[int] = []
    for shard in split.shards:
        starts = range(0, shard.records, records.RECORDS_PER_BLOCK)
        paths += [f"{data_dir.rstrip('/')}/{shard.file}"] * len(starts)
        offsets += shard.blocks
        counts += [min(records.RECORDS_PER_BLOCK, shard.records - start) for start in starts]
    return np.array(paths), np.array(offsets, np.int64), np.array(counts, np.int64)


def _read_blocks(paths: tf.Tensor, offsets: tf.Tensor, counts: tf.Tensor) -> tf.Tensor:
    """Returns the serialized records of blocks, in their order, [sum of counts] string."""

    def block(path: tf.Tensor, offset: tf.Tensor, count: tf.Tensor) -> tf.data.Dataset:
        # The public TFRecordDataset cannot start in the middle of a file; its operation can.
        variant = tf.raw_ops.TFRecordDatasetV2(
            filenames=path[None], compression_type="", buffer_size=tf.constant(1 << 20, tf.int64), byte_offsets=offset[None]
        )
        return tf.data.experimental.from_variant(variant, tf.TensorSpec([], tf.string)).take(count)

    total = tf.reduce_sum(counts)
    blocks = tf.data.Dataset.from_tensor_slices((paths, offsets, counts)).interleave(
        block, cycle_length=4, block_length=records.RECORDS_PER_BLOCK, num_parallel_calls=4, deterministic=True
    )
    return tf.ensure_shape(blocks.batch(total).get_single_element(), [None])


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

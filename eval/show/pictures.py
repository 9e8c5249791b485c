"""Pictures of a dataset's images: reads them by ID from the shards, and crops them."""

import io
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import tensorflow as tf
from PIL import Image

from trainer.augmentation import augment, two_views
from trainer.config import Config
from trainer.shared.blocks import block_extent, framed_records, locate
from trainer.shared.errors import UserError
from trainer.shared.records import RECORDS_PER_BLOCK, Manifest, Shard, decode_example


def read_jpegs(data_dir: str, manifest: Manifest, split: str, image_ids: Iterable[int]) -> dict[int, bytes]:
    """Returns the JPEGs of some images of a split, by ID.

    Reads the blocks in which the conversion puts these images. If the records are in another order, reads further blocks until
    all images are found. Raises UserError if the split does not contain an image.
    """
    of_split = manifest.splits[split]
    wanted = {int(image_id) for image_id in image_ids}
    likely = sorted((shard, within // RECORDS_PER_BLOCK) for shard, within in locate(of_split, sorted(wanted)))
    all_blocks = ((number, block) for number, shard in enumerate(of_split.shards) for block in range(len(shard.blocks)))
    found: dict[int, bytes] = {}
    for number, block in dict.fromkeys([*likely, *all_blocks]):
        if len(found) == len(wanted):
            break
        for encoded, _, image_id in _read_block(data_dir, of_split.shards[number], block):
            if image_id in wanted:
                found[image_id] = encoded
    if len(found) < len(wanted):
        raise UserError(f"{data_dir} has no image ID {min(wanted - set(found))} in split {split}: build the dataset again")
    return found


def _read_block(data_dir: str, shard: Shard, block: int) -> Iterator[tuple[bytes, int, int]]:
    """Yields (JPEG, label, image ID) of each record in a block."""
    offset, size = block_extent(shard, block)
    with tf.io.gfile.GFile(f"{data_dir.rstrip('/')}/{shard.file}", "rb") as file:
        file.seek(offset)
        for _, record in framed_records(file.read(size)):
            yield decode_example(record)


def thumbnail(encoded: bytes, side: int, proportion: float = 1.0) -> Image.Image:
    """Returns the central square of a JPEG, `proportion` of its shorter side, resized to at most `side` x `side` pixels."""
    with Image.open(io.BytesIO(encoded)) as image:
        image.draft("RGB", (2 * side, 2 * side))
        rgb = image.convert("RGB")
    extent = max(1, round(proportion * min(rgb.size)))
    left, top = (rgb.width - extent) // 2, (rgb.height - extent) // 2
    shown = min(side, extent)
    return rgb.resize((shown, shown), Image.Resampling.LANCZOS, (left, top, left + extent, top + extent), reducing_gap=3.0)


def views(jpegs: Sequence[tuple[int, bytes]], config: Config, epoch: int) -> np.ndarray:
    """Returns the two views of each of n training images (ID, JPEG) in `epoch` of a run with `config`.

    They are [n, 2, S, S, 3] float32 in [0, 1], made by the functions that training uses.
    """
    key = tf.constant(config.run.seed * 2**32 + epoch, tf.int64)
    made = [
        two_views(
            tf.constant(encoded),
            config.views.image_size,
            config.views.crop_min_area,
            key,
            tf.constant(image_id, tf.int64),
            config.views.crop_interpolation,
        )
        for image_id, encoded in jpegs
    ]
    crops, draws = (tf.concat(parts, axis=0) for parts in zip(*made, strict=True))
    # Runs the uncompiled function, because compiling it takes longer than running it once.
    augmented = augment.python_function(crops, draws, config.views.color_jitter_strength, config.views.blur)
    return augmented.numpy().reshape(len(jpegs), 2, config.views.image_size, config.views.image_size, 3)


def from_array(pixels: np.ndarray) -> Image.Image:
    """Converts pixels, [H, W, 3] float32 in [0, 1], to a picture."""
    return Image.fromarray(np.round(255 * pixels).astype(np.uint8))


def sheet(thumbnails: Mapping[int, Image.Image], side: int, columns: int) -> Image.Image:
    """Arranges pictures in a grid, row after row in the given order, each resized to `side` x `side` pixels."""
    rows = -(-len(thumbnails) // columns)
    whole = Image.new("RGB", (columns * side, rows * side))
    for number, picture in enumerate(thumbnails.values()):
        whole.paste(picture.resize((side, side), Image.Resampling.LANCZOS), (number % columns * side, number // columns * side))
    return whole

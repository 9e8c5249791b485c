"""Where a record comes from: the image ID that a record must have by its place, and that image's raw file."""

import numpy as np
import tensorflow as tf

from trainer.shared.records import Manifest, reading_positions
from trainer.shared.sources import sources_file, unpack_source


def origin(data_dir: str, manifest: Manifest, split: str, position: int) -> str:
    """Returns the end of a message about the record at `position` of a split, in the order of the shards.

    It names the image and its raw file, as in "; it is image 5, from train/n01440764/n01440764_18.JPEG". It is empty if the
    dataset does not know where its images are from, as one of an earlier version.
    """
    image_id = int(np.argsort(reading_positions(manifest.splits[split].records))[position])
    try:
        with tf.io.gfile.GFile(f"{data_dir.rstrip('/')}/{sources_file(manifest.name, split)}", "rb") as file:
            source = unpack_source(file.read(), image_id)
    except (tf.errors.OpError, ValueError):
        return ""
    return f"; it is image {image_id}, from {source}"

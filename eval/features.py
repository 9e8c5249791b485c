"""Features of a frozen encoder: one forward pass over a split, stored with image IDs.

A file of features is Parquet, with `image_id` int64 (0..n-1, in order), `label` int64 and `features` fixed_size_list<float32>.
Its metadata hold the digest of all that the features are a function of, so that they are computed once.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass

import keras
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tensorflow as tf

from trainer import checkpoint as checkpoints
from trainer.config import Config
from trainer.encoder import make_encoder
from trainer.input_pipeline import evaluation_batches
from trainer.records import Manifest, UserError
from trainer.train import model_variables

_DIGEST = b"sogclr.digest"
_ROWS_AT_ONCE = 1 << 14
_SETTINGS = (
    "image_size",
    "eval_crop_proportion",
    "depth",
    "width_multiplier",
    "selective_kernel_ratio",
    "cifar_stem",
    "precision",
)
"""What, besides weights and images, decides what features are."""


@dataclass(frozen=True)
class Features:
    """What an encoder makes of the n images of a split, in the order of their IDs."""

    values: np.ndarray
    """[n, F] float32."""
    labels: np.ndarray
    """[n] int64."""


def load_encoder(config: Config, checkpoint: checkpoints.Checkpoint) -> keras.Model:
    """Returns the encoder that a pretraining checkpoint holds. Raises UserError where it is of another architecture."""
    encoder = make_encoder(config)
    checkpoints.restore(model_variables("encoder", encoder), checkpoint)
    return encoder


def extract(
    encoder: keras.Model,
    config: Config,
    data_dir: str,
    manifest: Manifest,
    split: str,
    report: Callable[[int], None] = lambda done: None,
) -> Features:
    """Returns the features of every image of `split`; calls `report(images done)` after each batch.

    Raises UserError where the split does not hold every image ID once, and where features are not finite.
    """
    batch_size = config.linear_eval.batch_size
    count = manifest.splits[split].records if split in manifest.splits else 0
    values = np.zeros((count, encoder.output_shape[-1]), np.float32)
    labels = np.full(count, -1, np.int64)

    @tf.function(autograph=False, reduce_retracing=True)
    def forward(images: tf.Tensor) -> tf.Tensor:
        return encoder(images, training=False)

    done = 0
    for batch in evaluation_batches(config, data_dir, manifest, split, batch_size):
        ids = batch["image_id"].numpy()
        values[ids] = forward(batch["image"]).numpy()
        labels[ids] = batch["label"].numpy()
        done += len(ids)
        report(done)
    if done != count or np.any(labels < 0):
        raise UserError(
            f"{data_dir} holds {done} records in split {split}, not image IDs 0..{count - 1} once each: build the dataset again"
        )
    if not np.all(np.isfinite(values)):
        bad = int(np.flatnonzero(~np.isfinite(values).all(axis=1))[0])
        raise UserError(f"the features of image ID {bad} of {split} are not finite: the checkpoint is of a run that diverged")
    return Features(values, labels)


def digest_of(encoder: keras.Model, config: Config, manifest: Manifest, split: str) -> str:
    """Returns a name of the features of `split`: equal for the same encoder, images and eval crop, whatever the batch size."""
    arrays = {name: variable.numpy() for name, variable in model_variables("encoder", encoder).items()}
    about = {
        "encoder": checkpoints.sha256_of(arrays),
        "dataset": manifest.fingerprint,
        "split": split,
        **{name: getattr(config, name) for name in _SETTINGS},
    }
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()


def write_features(path: str, features: Features, digest: str = "") -> None:
    """Writes a Parquet file of features, whole or not at all, in a local folder or a gs:// one."""
    count, dim = features.values.shape
    schema = pa.schema(
        [("image_id", pa.int64()), ("label", pa.int64()), ("features", pa.list_(pa.float32(), dim))],
        metadata={_DIGEST: digest.encode()},
    )
    partial = f"{path}.partial"
    with (
        _File(partial, "wb") as file,
        pq.ParquetWriter(pa.PythonFile(file, mode="w"), schema, use_dictionary=False) as writer,
    ):
        for start in range(0, count, _ROWS_AT_ONCE):
            values = features.values[start : start + _ROWS_AT_ONCE]
            columns = [
                pa.array(np.arange(start, start + len(values))),
                pa.array(features.labels[start : start + len(values)]),
                pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), dim),
            ]
            writer.write_batch(pa.record_batch(columns, schema=schema))
    tf.io.gfile.rename(partial, path, overwrite=True)


def read_features(path: str, digest: str | None = None) -> Features:
    """Reads what `write_features` wrote.

    Raises UserError where there is no such file, where it is something else, and where its digest is not `digest`, if given.
    """
    try:
        with _File(path, "rb") as file:
            stored = pq.ParquetFile(pa.PythonFile(file, mode="r"))
            schema, count = stored.schema_arrow, stored.metadata.num_rows
            if digest is not None and (schema.metadata or {}).get(_DIGEST) != digest.encode():
                raise UserError(f"{path} holds features of another encoder or of other images")
            dim = schema.field("features").type.list_size
            values, labels = np.empty((count, dim), np.float32), np.empty(count, np.int64)
            for batch in stored.iter_batches(_ROWS_AT_ONCE):
                ids = batch["image_id"].to_numpy()
                values[ids] = batch["features"].flatten().to_numpy().reshape(-1, dim)
                labels[ids] = batch["label"].to_numpy()
    except (pa.ArrowInvalid, KeyError, AttributeError, OSError, tf.errors.OpError) as error:
        raise UserError(f"{path} is not a file of features: {str(error).splitlines()[0]}") from error
    return Features(values, labels)


class _File(tf.io.gfile.GFile):
    """A file as pyarrow wants it."""

    closed = False

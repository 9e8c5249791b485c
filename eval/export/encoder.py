"""Exports an encoder: a SavedModel that takes the bytes of pictures, a Keras file, files for PyTorch, and a model card.

An export is a folder, written atomically. On object stores the card is written last: a folder without it is not an export.

    saved_model/    needs only TensorFlow; its signatures take batches of any size n:
                      serving_default    image_bytes, [n] string, to features, [n, F] float32
                      images             images, [n, S, S, 3] float32 in [0, 1], to features, [n, F] float32
    encoder.keras   from images to features, to continue training; needs this project, for its layers
    encoder.safetensors, encoder.py    the same encoder in PyTorch: see `eval.export.pytorch`
    README.md       the model card

A picture is a JPEG, a PNG or a still GIF. Grey becomes three channels, CMYK becomes RGB, transparency is dropped. If a picture
cannot be decoded, its whole batch fails.
"""

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import keras
import tensorflow as tf

from eval.export.card import model_card
from eval.export.pytorch import MODULE, WEIGHTS, write_pytorch
from trainer import checkpoint as checkpoints
from trainer.augmentation import as_floats, central_crop
from trainer.config import Config
from trainer.encoder import make_encoder
from trainer.folder import read_config
from trainer.importing.check import Comparison
from trainer.shared.errors import UserError
from trainer.shared.files import names_in, whole_folder, write_whole
from trainer.state import model_variables

SAVED_MODEL = "saved_model"
KERAS = "encoder.keras"
CARD = "README.md"


@dataclass(frozen=True)
class Exported:
    folder: str
    step: int
    """Train step of the checkpoint."""
    features: int
    """F, the number of features of an image."""
    comparison: Comparison
    """How far the features that PyTorch's files give are from the encoder's."""


def export(checkpoint: str, output: str, *, data_dir: str = "", evaluation: str = "") -> Exported:
    """Exports the encoder in `checkpoint`, a file or a folder (its newest checkpoint), into the folder `output`.

    Replaces an earlier export in `output`. If they are given, the card describes the dataset `data_dir` and the results in
    `evaluation`, the folder of an evaluation of this checkpoint. Raises UserError if `output` holds something else, or if the
    checkpoint, the dataset or the evaluation cannot be used.
    """
    output = output.rstrip("/")
    folder = checkpoints.run_folder(checkpoint)
    config, _ = read_config(folder)
    stored = checkpoints.open_checkpoint(checkpoint)
    if tf.io.gfile.exists(output) and not _is_export(output):
        raise UserError(f"{output} exists and is not an earlier export: name a new folder")
    encoder = make_encoder(config.encoder, config.views.image_size, config.run.seed)
    card = model_card(encoder, folder, stored.step, data_dir=data_dir, evaluation=evaluation)
    checkpoints.restore(model_variables("encoder", encoder), stored)

    if "://" in output:
        with tempfile.TemporaryDirectory(prefix="export-") as made:
            comparison = _write(encoder, config, card, made)
            _upload(made, output)
    else:
        with whole_folder(output, replaces=True) as partial:
            comparison = _write(encoder, config, card, partial)
    return Exported(output, stored.step, encoder.output_shape[-1], comparison)


def _is_export(folder: str) -> bool:
    """Returns whether a folder holds an export, or on an object store a part of an interrupted one."""
    try:
        names = set(names_in(folder))
    except tf.errors.NotFoundError:  # a file
        return False
    return SAVED_MODEL in names or ("://" in folder and names <= {SAVED_MODEL, KERAS, WEIGHTS, MODULE, CARD})


def _write(encoder: keras.Model, config: Config, card: str, folder: str) -> Comparison:
    """Writes an export into a local folder."""
    comparison = write_pytorch(encoder, config, folder)
    _save(encoder, config, f"{folder}/{SAVED_MODEL}")
    encoder.save(f"{folder}/{KERAS}")
    write_whole(f"{folder}/{CARD}", card.encode())
    return comparison


def _upload(made: str, output: str) -> None:
    """Copies an export to an object store, which cannot rename a folder: removes the old card first, writes the new one last."""
    if tf.io.gfile.exists(f"{output}/{CARD}"):
        tf.io.gfile.remove(f"{output}/{CARD}")
    if names_in(output):
        tf.io.gfile.rmtree(output)
    files = [str(path.relative_to(made)) for path in sorted(Path(made).rglob("*")) if path.is_file()]
    for file in sorted(files, key=lambda file: file == CARD):
        tf.io.gfile.makedirs(os.path.dirname(f"{output}/{file}"))
        tf.io.gfile.copy(f"{made}/{file}", f"{output}/{file}", overwrite=True)


def _save(encoder: keras.Model, config: Config, path: str) -> None:
    size = config.views.image_size

    @tf.function(autograph=False, input_signature=[tf.TensorSpec([None, size, size, 3], tf.float32, "images")])
    def of_images(images: tf.Tensor) -> dict[str, tf.Tensor]:
        # For an empty batch, oneDNN's convolution returns a wrong shape.
        none = tf.zeros([0, encoder.output_shape[-1]])
        return {"features": tf.cond(tf.size(images) > 0, lambda: encoder(images, training=False), lambda: none)}

    def decoded(encoded: tf.Tensor) -> tf.Tensor:
        return tf.ensure_shape(as_floats(central_crop(encoded, size, config.views.eval_crop_proportion)), [size, size, 3])

    @tf.function(autograph=False, input_signature=[tf.TensorSpec([None], tf.string, "image_bytes")])
    def of_bytes(image_bytes: tf.Tensor) -> dict[str, tf.Tensor]:
        return of_images(tf.map_fn(decoded, image_bytes, fn_output_signature=tf.TensorSpec([size, size, 3], tf.float32)))

    module = tf.Module(name="encoder")
    module.saved = [variable.value for variable in encoder.variables]
    tf.saved_model.save(module, path, signatures={"serving_default": of_bytes, "images": of_images})

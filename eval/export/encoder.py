"""Writes an encoder as others load it: a SavedModel that takes pictures as they come, a Keras file, and a card.

An export is a folder, whole or not there (on object stores the card is written last, and a folder without it is no export):

    saved_model/    needs TensorFlow alone; its signatures, all of whose batches may be of any size:
                      serving_default    image_bytes, [n] string, to features, [n, F] float32
                      images             images, [n, S, S, 3] float32 in [0, 1], to features, [n, F] float32
    encoder.keras   from images to features, for those who go on training; needs this project, for its layers
    README.md       the model card

A picture is a JPEG, or what TensorFlow decodes as one: a PNG, a GIF that does not move. Grey becomes three channels, CMYK becomes
RGB, transparency is dropped. What is no picture fails the batch.
"""

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import keras
import tensorflow as tf

from eval.export.card import model_card
from trainer import checkpoint as checkpoints
from trainer.augmentation import as_floats, central_crop
from trainer.config import Config
from trainer.encoder import make_encoder
from trainer.shared.errors import UserError
from trainer.shared.files import names_in, whole_folder, write_whole
from trainer.state import model_variables
from trainer.train import read_config

SAVED_MODEL = "saved_model"
KERAS = "encoder.keras"
CARD = "README.md"


@dataclass(frozen=True)
class Exported:
    folder: str
    step: int
    """Of pretraining, that the encoder was taken at."""
    features: int
    """F, how many numbers it makes of an image."""


def export(checkpoint: str, output: str, *, data_dir: str = "", evaluation: str = "") -> Exported:
    """Writes the encoder in `checkpoint`, a folder (the newest in it) or one file, into the folder `output`.

    What an earlier export left there is replaced. The card says more of the data where `data_dir` is given, and what was
    measured where `evaluation` is, the folder of an evaluation of the same checkpoint. Raises UserError for what it cannot use.
    """
    output = output.rstrip("/")
    folder = checkpoints.run_folder(checkpoint)
    config, _ = read_config(folder)
    stored = checkpoints.open_checkpoint(checkpoint)
    if tf.io.gfile.exists(output) and not _is_export(output):
        raise UserError(f"{output} is there and is no earlier export: name a folder that is not there yet")
    encoder = make_encoder(config.encoder, config.views.image_size, config.run.seed)
    card = model_card(encoder, folder, stored.step, data_dir=data_dir, evaluation=evaluation)
    checkpoints.restore(model_variables("encoder", encoder), stored)

    if "://" in output:
        with tempfile.TemporaryDirectory(prefix="export-") as made:
            _write(encoder, config, card, made)
            _upload(made, output)
    else:
        with whole_folder(output) as partial:
            _write(encoder, config, card, partial)
    return Exported(output, stored.step, encoder.output_shape[-1])


def _is_export(folder: str) -> bool:
    """Returns whether a folder holds an export, or on an object store the part of one that was interrupted."""
    try:
        names = set(names_in(folder))
    except tf.errors.NotFoundError:  # a file
        return False
    return SAVED_MODEL in names or ("://" in folder and names <= {SAVED_MODEL, KERAS, CARD})


def _write(encoder: keras.Model, config: Config, card: str, folder: str) -> None:
    """Writes an export into a local folder."""
    _save(encoder, config, f"{folder}/{SAVED_MODEL}")
    encoder.save(f"{folder}/{KERAS}")
    write_whole(f"{folder}/{CARD}", card.encode())


def _upload(made: str, output: str) -> None:
    """Copies an export to an object store, where a folder cannot be renamed at once: the card goes first and comes last."""
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
        # A convolution of oneDNN's gives no images a wrong shape.
        none = tf.zeros([0, encoder.output_shape[-1]])
        return {"features": tf.cond(tf.size(images) > 0, lambda: encoder(images, training=False), lambda: none)}

    def seen(encoded: tf.Tensor) -> tf.Tensor:
        return tf.ensure_shape(as_floats(central_crop(encoded, size, config.views.eval_crop_proportion)), [size, size, 3])

    @tf.function(autograph=False, input_signature=[tf.TensorSpec([None], tf.string, "image_bytes")])
    def of_bytes(image_bytes: tf.Tensor) -> dict[str, tf.Tensor]:
        return of_images(tf.map_fn(seen, image_bytes, fn_output_signature=tf.TensorSpec([size, size, 3], tf.float32)))

    module = tf.Module(name="encoder")
    module.saved = [variable.value for variable in encoder.variables]
    tf.saved_model.save(module, path, signatures={"serving_default": of_bytes, "images": of_images})

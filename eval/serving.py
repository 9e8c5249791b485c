"""Serves an exported encoder: from the bytes of pictures to features.

MLflow's python_function flavor loads a model with this module. Logged models refer to it as `eval.serving`, so it must keep this
name. Every logged model contains a copy of it. It needs TensorFlow, and from this project only `trainer.shared.errors`.
"""

from typing import Any

import numpy as np
import tensorflow as tf

from trainer.shared.errors import UserError

COLUMN = "image_bytes"
"""Column of the request's table, and input of the SavedModel."""
_AT_ONCE = 32
"""Pictures per forward pass. This bounds the memory of a large request."""


class Encoder:
    """An exported encoder, loaded for inference."""

    def __init__(self, folder: str) -> None:
        """Loads the SavedModel in `folder`."""
        self._model = tf.saved_model.load(folder)
        self._features = self._model.signatures["serving_default"]

    def predict(self, model_input: Any) -> np.ndarray:
        """Returns features, [n, F] float32, of the n pictures in the column `image_bytes` of a table.

        If a picture cannot be decoded, raises UserError with its number.
        """
        pictures = list(model_input[COLUMN])
        for number, picture in enumerate(pictures, 1):
            if not isinstance(picture, bytes):
                raise UserError(f"picture {number} of {len(pictures)} is {type(picture).__name__}, not bytes")
        parts = [pictures[start : start + _AT_ONCE] for start in range(0, len(pictures), _AT_ONCE)] or [[]]
        try:
            answers = [self._features(**{COLUMN: tf.constant(part, tf.string, [len(part)])})["features"] for part in parts]
        except tf.errors.InvalidArgumentError:
            _require_decodable(pictures)
            raise
        return np.concatenate(answers)


def _require_decodable(pictures: list[bytes]) -> None:
    for number, picture in enumerate(pictures, 1):
        try:
            tf.io.decode_jpeg(picture, channels=3)
        except tf.errors.InvalidArgumentError as error:
            said = str(error.message).splitlines()[0].rpartition("}} ")[2].removesuffix(" [Op:DecodeJpeg]")
            raise UserError(
                f"picture {number} of {len(pictures)} cannot be decoded ({len(picture)} bytes): {said}; "
                "send the bytes of a JPEG, PNG or still GIF, in base64 if the request is JSON"
            ) from error


def _load_pyfunc(path: str) -> Encoder:
    """Returns the encoder in `path`. MLflow requires this function's name."""
    return Encoder(path)

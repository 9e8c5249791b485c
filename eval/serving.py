"""What a server of an exported encoder runs: pictures as bytes in, features out.

MLflow's python_function flavor names this module, `eval.serving`, as a model's loader. Models that are logged already name it
too, so it keeps this name and place. A copy of it travels with the model. It needs TensorFlow, and of the project only
`trainer.shared.errors`.
"""

from typing import Any

import numpy as np
import tensorflow as tf

from trainer.shared.errors import UserError

COLUMN = "image_bytes"
"""Of the table that a server is sent, and the SavedModel's own name for its input."""
_AT_ONCE = 32
"""Pictures in one forward pass: what a large request needs of memory is that of so many."""


class Encoder:
    """An exported encoder, ready to answer."""

    def __init__(self, folder: str) -> None:
        """Loads the SavedModel in `folder`."""
        self._model = tf.saved_model.load(folder)
        self._features = self._model.signatures["serving_default"]

    def predict(self, model_input: Any) -> np.ndarray:
        """Returns features, [n, F] float32, for a table of n rows whose column `image_bytes` holds pictures.

        Raises UserError, which names the picture, for one that cannot be decoded.
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
                "send the bytes of a JPEG, PNG or still GIF, in base64 where they travel as JSON"
            ) from error


def _load_pyfunc(path: str) -> Encoder:
    """Returns the encoder in `path`; the name is MLflow's."""
    return Encoder(path)

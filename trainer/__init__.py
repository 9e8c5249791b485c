"""Pretraining: from records to a checkpoint, in TensorFlow.

To follow one image, read config, shared/records, input_pipeline, augmentation, encoder, losses, optimizer, train.
"""

import os
import tempfile

from trainer.hardware import tensorflow_environment

# TensorFlow reads these variables at import. The user's own values take precedence.
for _name, _value in tensorflow_environment().items():
    os.environ.setdefault(_name, _value)

# A user ID without a name, as in containers, has no home folder. MLflow would fail, and Keras would make a folder called "~".
if os.path.expanduser("~") == "~":
    os.environ["HOME"] = os.path.join(tempfile.gettempdir(), f"home-{os.getuid()}")

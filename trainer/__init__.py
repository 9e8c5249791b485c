"""Pretraining: from records to a checkpoint, in TensorFlow.

Read config, records, input_pipeline, augmentation, encoder, losses, optimizer, train: one image's way.
"""

import os

from trainer.hardware import tensorflow_environment

# TensorFlow reads them when it is imported; what the user set stays.
for _name, _value in tensorflow_environment().items():
    os.environ.setdefault(_name, _value)

"""Pretraining: from records to a checkpoint, in TensorFlow.

Read config, records, input_pipeline, augmentation, encoder, losses, optimizer, train: one image's way.
"""

import os

# TensorFlow reads it when it is imported, and leaves oneDNN off on many processors, where a step takes twice as long without.
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")

"""Pretraining: from records to a checkpoint, in TensorFlow.

Read config, records, input_pipeline, augmentation, encoder, losses, optimizer, train: one image's way.
"""

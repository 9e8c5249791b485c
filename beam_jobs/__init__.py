"""Converts raw images to TFRecords with image IDs, on Apache Beam."""

"""From raw archives to TFRecords with image IDs, on Apache Beam."""

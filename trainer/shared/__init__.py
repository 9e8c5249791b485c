"""What every room may know: errors for people, whole files, progress, the record schema. Imports without TensorFlow."""

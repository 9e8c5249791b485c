"""What every room may know: errors for people, whole files, progress, the record schema, blocks of records, pages.

Imports without TensorFlow.
"""

"""Shared by all packages: errors for users, atomic writes, progress, the record schema, blocks of records, HTML pages.

Importing this package does not import TensorFlow.
"""

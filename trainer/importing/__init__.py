"""Imports encoders of other code: makes a checkpoint folder of this project from a published checkpoint.

`importer` is the way in. `source` opens the file, a module of `formats` finds the layers in it by name, `translate` makes this
project's arrays and settings of them, and `check` compares the features of the result with the source's.
"""

"""Export of an encoder: `encoder` writes its files, `card` its model card. The command line is `python -m eval.export`."""

"""What hands an encoder on: `encoder` writes it, `card` describes it. The command line is `python -m eval.export`."""

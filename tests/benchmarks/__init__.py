"""Measurements, each a program: `python tests/benchmarks/NAME.py --help` says what it measures, and what it prints or writes."""

"""The pipeline: its graph, its runners and the command line."""

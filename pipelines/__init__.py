"""The pipeline: its DAG, the runners, the command line."""

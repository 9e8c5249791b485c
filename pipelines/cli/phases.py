"""What a command does before it has anything to print. Importing MLflow or TensorFlow takes seconds."""

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def showing(command: str, phase: str) -> Iterator[None]:
    """Shows `phase` as the progress of `command` while the block runs."""
    from trainer.shared.progress import ProgressBars

    with ProgressBars() as bars:
        bars(command, phase)
        yield

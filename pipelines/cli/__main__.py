"""`sogclr` as a command; `python -m pipelines.cli` is the same."""

import sys

from pipelines.cli import main
from trainer.shared.processes import end_with_its_work


def command() -> None:
    """Runs the command line, and ends the process with its exit code as soon as its work is done."""
    end_with_its_work(lambda: sys.exit(main()))


if __name__ == "__main__":
    command()

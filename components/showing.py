"""How a step shows its progress: as often as the program that draws its bars wants, else as a program without a terminal does."""

import os
from collections.abc import Mapping

from components import variables
from trainer.shared.progress import SECONDS_BETWEEN_LINES, ProgressBars


def progress_bars(environ: Mapping[str, str] = os.environ) -> ProgressBars:
    """Returns what shows the progress of a step, with the seconds between two lines that `environ` names."""
    return ProgressBars(float(environ.get(variables.SECONDS_BETWEEN_LINES, SECONDS_BETWEEN_LINES)))

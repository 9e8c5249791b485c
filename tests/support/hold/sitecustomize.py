"""Makes a process of a test stop at places in its work, until the test lets it go on. `support.processes` has it imported.

HOLD says where: JOB PLACE,PLACE,... FOLDER. At the first progress of JOB with a PLACE or more, number N of them, the process
makes FOLDER/N.held and waits for FOLDER/N.released. Signals are handled meanwhile. One process stops at a place: the one that
works, since it comes there before those that show its progress.
"""

import os
import time

from trainer.shared.progress import ProgressBars

job, places, folder = os.environ["HOLD"].split(maxsplit=2)
shown = ProgressBars.__call__


def held(self: ProgressBars, of: str, phase: str, at: int = 0, total: int = 0, text: str = "") -> None:
    for number, place in enumerate(places.split(",")):
        if of == job and total and at >= int(place) and not os.path.exists(f"{folder}/{number}.held"):
            open(f"{folder}/{number}.held", "x").close()
            while not os.path.exists(f"{folder}/{number}.released"):
                time.sleep(0.01)
    shown(self, of, phase, at, total, text)


ProgressBars.__call__ = held  # type: ignore[method-assign]

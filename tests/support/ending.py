"""Runs trainer.task or eval.task again and again, each time in a child: python -m support.ending TASK PLACES OUTPUT ARGUMENT ...

PLACES is a list with commas between:

    kill:WHERE       SIGKILL at a progress
    torn:FILE        SIGKILL when half of the bytes of a file with FILE in its name are written
    term:WHERE       SIGTERM at a progress
    end              to the end

WHERE is the number of steps done, as `kill:3`, or a phase and a count, as `kill:official:3`: at the third count that this child
reports in phases whose names begin so. Writes into OUTPUT, as JSON, how each ended: its exit code, -9 for SIGKILL, and what it
said. The children share the import of TensorFlow, and nothing else: it makes its devices and threads when it is used.
"""

import importlib
import io
import json
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence

from trainer.shared import files
from trainer.shared.progress import ProgressBars

create, shown = files._create, ProgressBars.__call__


def comes_at(where: str) -> Callable[[int, str], bool]:
    """Returns what says of each progress, by how much is done and the phase, whether it is the place."""
    name, _, count = where.rpartition(":")
    met = 0

    def is_place(done: int, phase: str) -> bool:
        nonlocal met
        if not name:
            return done == int(where)
        met += phase.startswith(name)
        return phase.startswith(name) and met == int(count)

    return is_place


def end_at(place: str) -> None:
    what, _, where = place.partition(":")

    class Torn(io.FileIO):
        def write(self, content: bytes) -> int:
            super().write(content[: len(content) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
            return 0

    if what == "torn":
        files._create = lambda path: Torn(path, "wb") if where in path else create(path)  # type: ignore[assignment]
    elif what != "end":
        is_place = comes_at(where)

        def signalled(self: ProgressBars, job: str, phase: str, done: int = 0, total: int = 0, text: str = "") -> None:
            shown(self, job, phase, done, total, text)
            if (total or text) and is_place(done, phase):
                os.kill(os.getpid(), signal.SIGTERM if what == "term" else signal.SIGKILL)

        ProgressBars.__call__ = signalled  # type: ignore[method-assign]


def ended(main: Callable[[Sequence[str]], None], place: str, arguments: Sequence[str]) -> tuple[int, str, str]:
    """Returns exit code, stdout and stderr of a task in a child that ends at `place`."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        child = os.fork()
        if not child:
            os.dup2(out.fileno(), 1)
            os.dup2(err.fileno(), 2)
            end_at(place)
            code = 1
            try:
                main(arguments)
                code = 0
            except SystemExit as end:
                code = int(end.code or 0)
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        for file in (out, err):
            file.seek(0)
        return code, out.read(), err.read()


if __name__ == "__main__":
    task, places, output, *arguments = sys.argv[1:]
    for module in ("trainer.train", "eval.measure.linear_eval"):  # once for all children
        importlib.import_module(module)
    with open(output, "w") as file:
        json.dump([ended(importlib.import_module(task).main, place, arguments) for place in places.split(",")], file)

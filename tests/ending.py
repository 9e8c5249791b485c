"""Runs trainer.task again and again, each time in a child that ends at a place of its own: ending.py PLACES OUTPUT ARGUMENT ...

PLACES is a list with commas between:

    kill:STEP   SIGKILL at the progress of that step
    torn:STEP   SIGKILL when half of what goes into that step's checkpoint is written
    term:STEP   SIGTERM at the progress of that step
    end         to the end

Writes into OUTPUT, as JSON, how each ended: its exit code, -9 for SIGKILL, and what it said. The children share the import of
TensorFlow, and nothing else: it makes its devices and threads when it is used.
"""

import json
import os
import signal
import sys
import tempfile
from collections.abc import Sequence

import tensorflow as tf

import trainer.train  # noqa: F401  once for all children
from trainer import task
from trainer.progress import ProgressBars

GFile, shown = tf.io.gfile.GFile, ProgressBars.__call__


def end_at(place: str) -> None:
    what, _, step = place.partition(":")

    def signalled(self: ProgressBars, job: str, done: int, total: int, text: str = "") -> None:
        shown(self, job, done, total, text)
        if done == int(step):
            os.kill(os.getpid(), signal.SIGTERM if what == "term" else signal.SIGKILL)

    class Torn(GFile):
        def write(self, content: bytes) -> None:
            if f"checkpoint-{int(step):08}" in self.name:
                super().write(content[: len(content) // 2])
                self.flush()
                os.kill(os.getpid(), signal.SIGKILL)
            super().write(content)

    if what == "torn":
        tf.io.gfile.GFile = Torn
    elif what != "end":
        ProgressBars.__call__ = signalled  # type: ignore[method-assign]


def ended(place: str, arguments: Sequence[str]) -> tuple[int, str, str]:
    """Returns exit code, stdout and stderr of trainer.task in a child that ends at `place`."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        child = os.fork()
        if not child:
            os.dup2(out.fileno(), 1)
            os.dup2(err.fileno(), 2)
            end_at(place)
            code = 1
            try:
                task.main(arguments)
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
    places, output, *arguments = sys.argv[1:]
    with open(output, "w") as file:
        json.dump([ended(place, arguments) for place in places.split(",")], file)

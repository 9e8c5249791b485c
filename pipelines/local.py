"""Runs pipelines on this machine with KFP's local runner.

The runner has a process of its own, so that its output and its steps' output go to one log, and so that it can be ended with all
its steps. `run` starts that process, `main` is its code.
"""

import json
import logging
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from components import variables
from components.lineage import COMPONENTS, Artifact
from pipelines.cache import folder_of
from pipelines.logs import Log, lock_as_runner
from trainer.shared.processes import end_with
from trainer.shared.progress import SECONDS_BETWEEN_LINES, parse_line
from trainer.shared.scratch import scratch_folder

_COLOUR = re.compile(r"\x1b\[\d*m")
_REUSED = re.compile(r"Task ([\w-]+) cache hit ")
"""KFP's log line when it reuses a step from its cache."""
_NOTE = re.compile(rf"\[(?:{'|'.join(COMPONENTS)})\] ")
"""The start of a line that a step prints for the user."""
_SECONDS_TO_END = 15
_SECONDS_BETWEEN_LINES = 1.0
"""How often a step says how far it is. Its log gets a part of these lines."""


@dataclass(frozen=True)
class Request:
    """What to run: the whole pipeline, or one component on outputs of earlier runs."""

    root: str
    arguments: Mapping[str, Any]
    component: str = ""
    """Empty for the whole pipeline."""
    inputs: Mapping[str, Artifact] = field(default_factory=dict)
    reuses: bool = True
    """Whether finished steps are reused. Has no effect on a single component, which always runs."""
    listing: str = ""
    """The file of `beam_jobs.raw.raw_identity` that spares the conversion another listing; empty if there is none."""


def run(
    request: Request,
    environment: Mapping[str, str],
    log: Log,
    on_progress: Callable[[str, str, int, int, str], None],
    echo: Callable[[str], None] | None = None,
) -> list[str] | None:
    """Runs a pipeline and returns the IDs of the MLflow runs that it made or reused, or None if it failed.

    The steps get the variables of `environment`. Their output goes to `log` and line by line to `echo`; progress lines
    go to `on_progress`, notes to stderr. If this process dies, the steps die with it.
    """
    project = str(Path(__file__).absolute().parents[1])
    search = os.pathsep.join(filter(None, (project, os.environ.get("PYTHONPATH"))))
    with scratch_folder() as scratch:
        request_file, answer_file = Path(scratch, "request.json"), Path(scratch, "answer.json")
        request_file.write_text(json.dumps(asdict(request)))
        process = subprocess.Popen(
            [sys.executable, "-u", "-m", "pipelines.local", str(request_file), str(answer_file), str(log.path), str(os.getpid())],
            # Steps must find the project's packages before the current folder's, and must leave no temporary files behind.
            env={
                **os.environ,
                **environment,
                variables.SECONDS_BETWEEN_LINES: str(_SECONDS_BETWEEN_LINES),
                "PYTHONPATH": search,
                "PYTHONSAFEPATH": "1",
                "TMPDIR": scratch,
                "TTY_COMPATIBLE": "0",
            },
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        try:
            logged, shown = 0.0, ""
            for line in process.stdout or ():
                text = _COLOUR.sub("", line)
                # KFP indents what a step prints.
                said = text.strip()
                progress = parse_line(said)
                if progress:
                    on_progress(*progress)
                    job, phase, done, total, _ = progress
                    place = f"{job}: {phase}"
                    if place == shown and done != total and time.monotonic() - logged < SECONDS_BETWEEN_LINES:
                        continue
                    logged, shown = time.monotonic(), place
                log.file.write(text)
                if echo:
                    echo(text)
                if reused := _REUSED.search(text):
                    on_progress(reused[1], "reused", 1, 1, "")
                elif not progress and _NOTE.match(said) and not echo:
                    print(said, file=sys.stderr, flush=True)
            process.wait()
        finally:
            _end(process)
        return json.loads(answer_file.read_text()) if process.returncode == 0 else None


def _end(process: subprocess.Popen) -> None:
    """Ends the process and its steps if they still run. They get time to record in MLflow that they were killed."""
    for number in (signal.SIGINT, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            for _ in range(_SECONDS_TO_END * 10):
                process.poll()
                os.killpg(process.pid, 0)
                time.sleep(0.1)
        except ProcessLookupError:
            return


def main(request_file: str, answer_file: str, log: str, command: str) -> None:
    locked = lock_as_runner(Path(log))
    end_with(int(command), _die)

    from kfp import local
    from kfp.local import cache

    from pipelines import pipeline
    from pipelines.kfp_cache import StepCache, WriteOnlyCache

    # A command started in the background ignores SIGINT, and so would every step. `_end` needs SIGINT to interrupt them.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    request = json.loads(Path(request_file).read_text())
    inputs = {name: Artifact(**artifact) for name, artifact in request["inputs"].items()}
    # KFP reports only in its log that it reuses a step from its cache.
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    # KFP puts the interpreter's path into a shell command without quoting it.
    sys.executable = shlex.quote(sys.executable)
    cache.LocalCache = StepCache if request["reuses"] else WriteOnlyCache
    local.init(
        local.SubprocessRunner(use_venv=False),
        pipeline_root=str(Path(request["root"], "kfp")),
        enable_caching=not request["component"],
        cache_root=str(folder_of(Path(request["root"]))),
    )
    if request["component"]:
        pipeline.one_step(request["component"], request["arguments"], inputs)()
        made = []
    else:
        made = [artifact.metadata["run_id"] for artifact in pipeline.run_whole(request["arguments"]).outputs.values()]
    Path(answer_file).write_text(json.dumps(made))
    locked.close()


def _die() -> None:
    """Ends this process and its steps at once, and removes their temporary files."""
    shutil.rmtree(tempfile.gettempdir(), ignore_errors=True)
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main(*sys.argv[1:])

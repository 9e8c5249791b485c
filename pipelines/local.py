"""Runs pipelines on this machine with KFP's local runner.

The runner has a process of its own, so that its output and its steps' output go to one log, and so that it can be ended with all
its steps. `run` starts that process, `main` is its code.
"""

import json
import logging
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from components.lineage import COMPONENTS, Artifact
from trainer.shared.progress import parse_line

_COLOUR = re.compile(r"\x1b\[\d*m")
_REUSED = re.compile(r"Task ([\w-]+) cache hit ")
"""KFP's log line when it reuses a step from its cache."""
_NOTE = re.compile(rf"\[(?:{'|'.join(COMPONENTS)})\] ")
"""The start of a line that a step prints for the user."""
_SECONDS_TO_END = 15


@dataclass(frozen=True)
class Request:
    """What to run: the whole pipeline, or one component on outputs of earlier runs."""

    root: str
    arguments: Mapping[str, Any]
    component: str = ""
    """Empty for the whole pipeline."""
    inputs: Mapping[str, Artifact] = field(default_factory=dict)


def run(
    request: Request,
    environment: Mapping[str, str],
    log: Path,
    on_progress: Callable[[str, int, int, str], None],
    echo: Callable[[str], None] | None = None,
) -> list[str] | None:
    """Runs a pipeline and returns the IDs of the MLflow runs that it made or reused, or None if it failed.

    The steps get the variables of `environment`. Their output goes to the file `log` and line by line to `echo`; progress lines
    go to `on_progress`, notes to stderr.
    """
    project = str(Path(__file__).absolute().parents[1])
    search = os.pathsep.join(filter(None, (project, os.environ.get("PYTHONPATH"))))
    log.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch, log.open("w") as file:
        request_file, answer_file = Path(scratch, "request.json"), Path(scratch, "answer.json")
        request_file.write_text(json.dumps(asdict(request)))
        process = subprocess.Popen(
            [sys.executable, "-u", "-m", "pipelines.local", str(request_file), str(answer_file)],
            # Steps must find the project's packages before the current folder's, and must leave no temporary files behind.
            env={
                **os.environ,
                **environment,
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
            for line in process.stdout or ():
                text = _COLOUR.sub("", line)
                file.write(text)
                if echo:
                    echo(text)
                # KFP indents what a step prints.
                said = text.strip()
                if progress := parse_line(said):
                    on_progress(*progress)
                elif reused := _REUSED.search(text):
                    on_progress(reused[1], 1, 1, "reused")
                elif _NOTE.match(said) and not echo:
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


def forget_lost(cache: Path, known: Callable[[str], bool]) -> None:
    """Removes the entries of KFP's cache whose runs MLflow does not have (any more)."""
    for entry in cache.glob("*.json"):
        made_by = {str(output["metadata"].get("run_id")) for output in json.loads(entry.read_text()).values()}
        if not all(map(known, made_by)):
            entry.unlink()


def cache_of(root: Path) -> Path:
    return root / "cache"


def main(request_file: str, answer_file: str) -> None:
    from kfp import local

    from pipelines import pipeline

    # A command started in the background ignores SIGINT, and so would every step. `_end` needs SIGINT to interrupt them.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    request = json.loads(Path(request_file).read_text())
    inputs = {name: Artifact(**artifact) for name, artifact in request["inputs"].items()}
    # KFP reports only in its log that it reuses a step from its cache.
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    # KFP puts the interpreter's path into a shell command without quoting it.
    sys.executable = shlex.quote(sys.executable)
    local.init(
        local.SubprocessRunner(use_venv=False),
        pipeline_root=str(Path(request["root"], "kfp")),
        enable_caching=not request["component"],
        cache_root=str(cache_of(Path(request["root"]))),
    )
    if request["component"]:
        pipeline.one_step(request["component"], request["arguments"], inputs)()
        made = []
    else:
        made = [artifact.metadata["run_id"] for artifact in pipeline.sogclr(**request["arguments"]).outputs.values()]
    Path(answer_file).write_text(json.dumps(made))


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Commands of this project in copies of one process that has imported what they import, which takes longer than their work.

`Copies` starts that process. It forks a copy for each command, and a copy forks one for each process of this project that it
starts, where Popen would start an interpreter: sessions, parents, signals and files are those of processes of their own.
"""

import atexit
import contextlib
import ctypes
import gc
import importlib
import importlib.machinery
import importlib.util
import inspect
import io
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import traceback
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from support.processes import search_path

_IMPORTED = (
    *("components.tracking", "components.workspace", "pipelines.cli", "pipelines.pipeline", "kfp.local", "kfp.dsl.executor"),
    *("beam_jobs.job", "beam_jobs.inspect_dataset", "trainer.train", "eval.measure.linear_eval"),
    *("eval.export.encoder", "eval.export.card", "eval.show.figures", "eval.show.report"),
)
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_set_by_imports: dict[str, str] = {}
"""The environment variables that the imports have set."""
_abandoned: list[object] = []
"""Pools of connections that belong to the process that forked. Freeing one would close its files."""


@dataclass
class Copy:
    """A command that runs in a copy. Shows itself as Popen does."""

    copies: "Copies"
    args: Sequence[str | Path]
    pid: int
    output: Path
    """Its stdout is in the file `output`.out, its stderr in `output`.err."""
    returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = self.copies.poll(self.pid)
        return self.returncode

    def wait(self) -> int:
        if self.returncode is None:
            self.returncode = self.copies.wait(self.pid)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def communicate(self) -> tuple[str, str]:
        """Returns stdout and stderr once it has ended."""
        self.wait()
        out, err = (self.output.with_suffix(suffix).read_text() for suffix in (".out", ".err"))
        return out, err


class Copies:
    """The process that makes the copies. Ends with the block."""

    def __enter__(self) -> "Copies":
        self._server = subprocess.Popen(
            [sys.executable, "-m", __name__],
            env=_variables(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        return self

    def __exit__(self, *raised: object) -> None:
        self._server.stdin.close()
        self._server.wait()

    def start(self, module: str, *arguments: str | Path, output: Path, cwd: Path | None = None, **environ: str) -> int:
        """Starts `python -m module` in a session of its own and returns its process ID.

        Its stdout goes to the file `output`.out and its stderr to `output`.err. It has the variables of this process that are not
        MLflow's, and `environ`.
        """
        given = [module, list(map(str, arguments)), str(output), str(cwd or Path.cwd()), {**_variables(), **environ}]
        return self._ask("start", *given)

    def poll(self, child: int) -> int | None:
        """Returns the exit code of a command, or None while it runs."""
        return self._ask("poll", child)

    def wait(self, child: int) -> int:
        """Returns the exit code of a command once it has ended."""
        return self._ask("wait", child)

    def has_processes(self) -> bool:
        """Returns whether a command, or any process that one has started, still runs."""
        return self._ask("alive")

    @contextlib.contextmanager
    def started(self, module: str, *arguments: str | Path, cwd: Path | None = None, **environ: str) -> Iterator[Copy]:
        """Runs `python -m module` beside the block, and kills it where that ends before."""
        with tempfile.TemporaryDirectory() as folder:
            output = Path(folder, "said")
            child = self.start(module, *arguments, output=output, cwd=cwd, **environ)
            copy = Copy(self, [module, *arguments], child, output)
            try:
                yield copy
            finally:
                copy.send_signal(signal.SIGKILL)
                copy.wait()

    def run(self, module: str, *arguments: str | Path, cwd: Path | None = None, **environ: str) -> subprocess.CompletedProcess:
        """Runs `python -m module` to its end."""
        with self.started(module, *arguments, cwd=cwd, **environ) as copy:
            out, err = copy.communicate()
        return subprocess.CompletedProcess(arguments, copy.wait(), out, err)

    def printed_by(self, module: str, *arguments: str | Path) -> str:
        """Runs `python -m module` to its end and returns what it printed. Fails where that fails."""
        done = self.run(module, *arguments)
        assert done.returncode == 0, f"{done.stdout}\n{done.stderr[-5000:]}"
        return done.stdout

    def _ask(self, *question: object) -> Any:
        self._server.stdin.write(json.dumps(question) + "\n")
        self._server.stdin.flush()
        return json.loads(self._server.stdout.readline())


def _variables() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")} | search_path()


class _Copied(subprocess.Popen):
    """Popen that forks where the command is a module of Python. After TensorFlow has made its threads, which a fork has not, it
    starts an interpreter.
    """

    def _execute_child(self, *given: Any) -> None:
        about = inspect.signature(super()._execute_child).bind(*given).arguments
        environ = dict(os.environ if about["env"] is None else about["env"])
        module, arguments = _module_of(about["args"], environ)
        if not module or _has_computed():
            super()._execute_child(*given)
            return
        ends = [about[name] for name in ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")]
        session = any(value is True for name, value in about.items() if name.endswith("start_new_session"))
        self.pid = os.fork()
        if not self.pid:
            _become(module, arguments, (ends[0], ends[3], ends[5]), about["cwd"], environ, session)
        self._child_created = True
        self._close_pipe_fds(*ends)


def _has_computed() -> bool:
    """Returns whether TensorFlow has made its devices and threads in this process."""
    from tensorflow.python.eager import context

    made = context.context_safe()
    return made is not None and made._initialized


def _module_of(command: Sequence[str], environ: dict[str, str]) -> tuple[str, Sequence[str]]:
    """Returns the module of a command and its arguments, or "". Does what the shell does with which KFP starts a step."""
    if "-m" in command[1:3] and command[0] == sys.executable:
        at = command.index("-m") + 1
        return command[at], command[at + 1 :]
    if command[:2] == ["sh", "-ec"] and "kfp.dsl.executor_main" in command[2]:
        source = Path(tempfile.mkdtemp(), "ephemeral_component.py")
        source.write_text(command[3])
        environ["_KFP_RUNTIME"] = "true"
        executor = ["kfp.dsl.executor_main", "--component_module_path", str(source), *command[4:]]
        return "components.ending", executor
    return "", ()


def _become(
    module: str,
    arguments: Sequence[str],
    files: Sequence[int],
    cwd: str | None,
    environ: Mapping[str, str],
    session: bool,
) -> NoReturn:
    """Makes a process that was just forked what exec would make it, runs the module in it, and ends it."""
    if session:
        os.setsid()
    for number, file in enumerate(files):
        if file not in (-1, number):
            os.dup2(file, number)
    os.closerange(3, 4096)
    os.chdir(cwd or ".")
    os.environ.clear()
    os.environ.update({**_set_by_imports, **environ})
    tempfile.tempdir = None
    weakref.finalize._registry.clear()  # the folders of the process that forked stay
    _forget_stores()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    sys.stdin, sys.stdout, sys.stderr = (
        io.TextIOWrapper(io.FileIO(number, mode, closefd=False), write_through=True)
        for number, mode in enumerate(("r", "w", "w"))
    )
    sys.argv = [module, *arguments]
    sys.modules.pop(module, None)
    code = 1
    try:
        _customise(environ)
        runpy.run_module(module, run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except KeyboardInterrupt:
        code = 128 + signal.SIGINT
    except BaseException:
        traceback.print_exc()
    with contextlib.suppress(BaseException):
        atexit._run_exitfuncs()
    os._exit(code)


def _customise(environ: Mapping[str, str]) -> None:
    """Runs the sitecustomize of PYTHONPATH, as an interpreter does before all else."""
    found = importlib.machinery.PathFinder.find_spec("sitecustomize", environ.get("PYTHONPATH", "").split(os.pathsep))
    if found and found.loader:
        found.loader.exec_module(importlib.util.module_from_spec(found))


def _forget_stores() -> None:
    """Leaves the connections to MLflow's databases to the process that forked."""
    from mlflow.store.model_registry.sqlalchemy_store import SqlAlchemyStore as Registry
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore as Tracking

    for engine in (*Registry._engine_map.values(), *Tracking._engine_map.values()):
        _abandoned.append(engine.pool)
        engine.dispose(close=False)


def _serve() -> None:
    prctl = ctypes.CDLL(None).prctl
    prctl(_PR_SET_CHILD_SUBREAPER, 1)
    prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # even where a test is killed while it waits
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what an import prints is no reply
    given = dict(os.environ)
    gc.disable()
    for name in _IMPORTED:
        importlib.import_module(name)
    gc.freeze()  # a collection in a copy would write to, and so copy, all memory that was imported
    gc.enable()
    _set_by_imports.update({name: value for name, value in os.environ.items() if name not in given})
    subprocess.Popen = _Copied  # type: ignore[misc]
    ended: dict[int, int] = {}

    def start(module: str, arguments: list[str], output: str, cwd: str, environ: dict[str, str]) -> int:
        child = os.fork()
        if not child:
            prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            files = [os.open("/dev/null", os.O_RDONLY)]
            files += [os.open(f"{output}.{end}", os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o644) for end in ("out", "err")]
            _become(module, arguments, files, cwd, environ, session=True)
        return child

    def reap(options: int) -> bool:
        """Notes a process that has ended. Returns whether there was one, or may be another."""
        child, status = os.waitpid(-1, options)
        if child:
            ended[child] = os.waitstatus_to_exitcode(status)
        return bool(child)

    def poll(child: int) -> int | None:
        while child not in ended and reap(os.WNOHANG):
            pass
        return ended.get(child)

    def wait(child: int) -> int:
        while child not in ended:
            reap(0)
        return ended[child]

    def alive() -> bool:
        try:
            while reap(os.WNOHANG):
                pass
        except ChildProcessError:
            return False
        return True

    answers = {"start": start, "poll": poll, "wait": wait, "alive": alive}
    for line in sys.stdin:
        question, *given = json.loads(line)
        print(json.dumps(answers[question](*given)), file=replies, flush=True)


if __name__ == "__main__":
    _serve()

"""How commands end on a machine that does not let them work: no home folder, a full disk, a folder that cannot be written."""

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import time
from urllib.parse import urlsplit

import pytest
from kfp import dsl
from support.full_disk import fill_disk
from support.processes import search_path, started

from beam_jobs import inspect_dataset
from components import tracking
from components.tracking import recorded
from eval import task as evaluation
from pipelines import cli, ui
from trainer import task as pretraining
from trainer.shared import files
from trainer.shared.errors import UserError

TINY = ["depth=10", "width_multiplier=0.0625", "global_batch_size=24"]


def pretrain(dataset, folder):
    given = ["--preset", "demo", "--data", str(dataset), "--checkpoint-dir", str(folder)]
    with pytest.raises(SystemExit) as ended:
        pretraining.main([*given, "--set", *TINY])
    return ended.value.code


# ---- No home folder


def test_a_user_without_a_name_and_a_home_has_all_libraries_and_no_folder_called_tilde(tmp_path):
    """As in a container that is started with a user ID of the outside."""
    script = (
        "import pwd\n"
        "def nobody(uid): raise KeyError(uid)\n"
        "pwd.getpwuid = nobody\n"
        "from pathlib import Path\n"
        "from components import tracking\n"
        "tracking.open_root(Path('root'))\n"
        "import trainer.encoder"
    )
    unnamed = {name: value for name, value in os.environ.items() if name not in ("HOME", "USER", "LOGNAME")}
    environ = {**unnamed, **search_path(), "TMPDIR": str(tmp_path / "tmp")}
    (tmp_path / "tmp").mkdir()
    work = tmp_path / "work"
    work.mkdir()
    done = subprocess.run([sys.executable, "-c", script], cwd=work, env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [path.name for path in work.iterdir()] == ["root"]


# ---- A full disk, and folders that cannot be written


def test_pretraining_on_a_full_disk_is_one_line_and_leaves_no_file(dataset, tmp_path, monkeypatch, capfd):
    fill_disk(monkeypatch)
    assert pretrain(dataset, tmp_path / "c") == 2
    said = capfd.readouterr().err.splitlines()[-1]
    assert said == (
        f"error: {tmp_path}/c/config.json cannot be written: No space left on device; make room and start the same command again"
    )
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_file_where_pretraining_s_folder_should_be_is_one_line(dataset, tmp_path, capfd):
    (tmp_path / "file").touch()
    assert pretrain(dataset, tmp_path / "file" / "c") == 2
    said = capfd.readouterr().err.splitlines()[-1]
    assert said.startswith(f"error: {tmp_path}/file/c cannot be made: a file is in the way; ")


def test_a_page_of_a_dataset_that_cannot_be_written_is_one_line_and_leaves_nothing(built, tmp_path, monkeypatch, capsys):
    (tmp_path / "page.html").mkdir()
    (tmp_path / "file").touch()
    for output, why in (
        ("page.html", "cannot be written: Is a directory"),
        ("file/page.html", "/file is a file"),
    ):
        assert inspect_dataset.main([str(built), "--output", str(tmp_path / output)]) == 2
        (*_, said) = capsys.readouterr().err.splitlines()
        assert said.startswith("error: ")
        assert said.endswith(f"{why}; fix that and start the same command again")
    fill_disk(monkeypatch)
    assert inspect_dataset.main([str(built), "--output", str(tmp_path / "other.html")]) == 2
    assert "No space left on device; make room" in capsys.readouterr().err.splitlines()[-1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "page.html"]


@pytest.mark.parametrize(("number", "cure"), [(errno.ENOSPC, "make room"), (errno.EROFS, "fix that")])
def test_a_folder_that_cannot_be_filled_or_made_is_one_line_and_leaves_nothing(number, cure, tmp_path):
    line = rf"{tmp_path}/folder cannot be written: {os.strerror(number)}; {cure} and start"
    with pytest.raises(UserError, match=line), files.whole_folder(str(tmp_path / "folder")):
        raise OSError(number, os.strerror(number))
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file cannot be made: a file is in the way"):
        files.whole_folder(str(tmp_path / "file" / "folder")).__enter__()


@pytest.mark.parametrize("refusal", ["PermissionDeniedError", "UnauthenticatedError", "NotFoundError", "FailedPreconditionError"])
def test_storage_that_refuses_a_file_is_one_line(refusal, monkeypatch):
    import tensorflow as tf

    def refuse(path, mode):
        raise getattr(tf.errors, refusal)(None, None, "Error executing an HTTP request: 403\nwith body 'no'")

    monkeypatch.setattr(tf.io.gfile, "GFile", refuse)
    with pytest.raises(UserError, match=r"gs://bucket/x cannot be written: Error executing an HTTP request: 403.*; fix that and"):
        files.write_whole("gs://bucket/x", b"")


def test_a_log_that_the_ui_or_a_run_cannot_write_is_one_line(raw, tmp_path, capsys, monkeypatch):
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)
    root = tmp_path / "root"
    tracking.open_root(root)
    (root / "logs").touch()
    for command in (["ui", "--port", "0"], ["run", "--preset", "demo", "--raw", str(raw)]):
        assert cli.main([*command, "--root", str(root)]) == 2
        (*_, said) = capsys.readouterr().err.splitlines()
        assert said.startswith(f"error: {root}/logs cannot be made: a file is in the way; ")


def test_a_full_disk_is_seen_before_the_ui_s_server_starts(tmp_path):
    log = tmp_path / "ui.log"
    log.symlink_to("/dev/full")
    with pytest.raises(UserError, match=rf"{log} cannot be written: No space left on device; make room and start the same"):
        ui.serve(f"sqlite:///{tmp_path}/mlflow.db", str(tmp_path), 0, log, lambda url: None)


@pytest.mark.parametrize("where", ["/somewhere/artifact", None])
def test_a_disk_that_fills_while_a_step_copies_its_output_is_one_line(where, tmp_path):
    store = tracking.open_root(tmp_path)
    pipeline = tracking.start_pipeline(store, "p", command=["sogclr"], root="", code_version="", params={})
    names = {
        "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db",
        "MLFLOW_EXPERIMENT_NAME": "sogclr",
        "MLFLOW_RUN_ID": pipeline,
    }
    artifact = dsl.Model("model", str(tmp_path / "model"), {})
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), where)
    line = f"{where or artifact.uri} cannot be written: No space left on device; make room and start the same command again"
    with pytest.raises(UserError, match=line), tracking.step("pretrain", {}, {"model": artifact}, environ=names):
        raise full
    (step,) = recorded.lineage(store, pipeline).steps
    assert (step.error, step.user_error) == (line, True)


def test_a_disk_that_fills_while_a_run_writes_its_log_is_one_line(raw, tmp_path, capsys, monkeypatch):
    def fill(request, environment, log, *_):
        with open("/dev/full", "w") as full:
            os.dup2(full.fileno(), log.file.fileno())
        log.file.write("a line of a step\n" * 1000)

    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pipelines.local.run", fill)
    assert cli.main(["run", "--preset", "demo", "--raw", str(raw), "--root", str(tmp_path)]) == 2
    (*_, said) = capsys.readouterr().err.splitlines()
    assert said == (
        f"error: {tmp_path}/logs cannot be written: No space left on device; make room and start the same command again"
    )


# ---- Ctrl-C


def interrupt(*_, **__):
    raise KeyboardInterrupt


def test_ctrl_c_in_pretraining_is_one_line_with_the_way_on(dataset, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr("trainer.train.train", interrupt)
    assert pretrain(dataset, tmp_path) == 130
    *notes, said = capfd.readouterr().err.splitlines()
    assert said == "interrupted: the same command goes on from the newest checkpoint"
    assert all(note.startswith("[pretrain] ") for note in notes)


def test_ctrl_c_in_an_evaluation_is_one_line_with_the_way_on(dataset, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr("eval.measure.linear_eval.linear_eval", interrupt)
    with pytest.raises(SystemExit) as ended:
        evaluation.main(["--data", str(dataset), "--checkpoint", str(tmp_path), "--output", str(tmp_path)])
    assert ended.value.code == 130
    *notes, said = capfd.readouterr().err.splitlines()
    assert said == "interrupted: the same command goes on from the finished features and protocols"
    assert all(note.startswith("[linear-eval] ") for note in notes)


# ---- SIGKILL


@pytest.mark.thorough
def test_the_server_of_a_killed_ui_ends_too(tmp_path):
    tracking.open_root(tmp_path)
    command = [sys.executable, "-m", "pipelines.cli", "ui", "--root", str(tmp_path), "--port", "0"]
    environ = {**os.environ, **search_path()}
    with started(command, env=environ, stdout=subprocess.PIPE, text=True) as opened:
        port = urlsplit(opened.stdout.readline().split()[1]).port
        opened.send_signal(signal.SIGKILL)
        opened.wait()
    assert gone(port)


def gone(port: int, seconds: float = 30) -> bool:
    """Returns whether nobody listens at a port of this machine any more, after `seconds` at the latest."""
    for _ in range(int(10 * seconds)):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)):
                return True
        time.sleep(0.1)
    return False


@pytest.mark.parametrize(
    ("last", "code"),
    [("", 0), ("sys.exit()", 0), ("sys.exit(75)", 75), ("sys.exit('it is wrong')", 1), ("raise ValueError('wrong')", 1)],
)
def test_a_process_ends_with_its_work_and_does_not_die_afterwards(last, code):
    """What aborts here as the interpreter ends stands for threads of TensorFlow."""
    program = f"""
import atexit, os, sys
from trainer.shared.processes import end_with_its_work

class Late:
    def __del__(self):
        os.abort()

late = Late()

def main():
    atexit.register(print, "handlers ran")
    print("worked")
    {last}

{{}}
"""

    def ended(call: str) -> subprocess.CompletedProcess:
        return subprocess.run([sys.executable, "-c", program.format(call)], capture_output=True, text=True, check=False)

    assert ended("main()").returncode == -signal.SIGABRT
    found = ended("end_with_its_work(main)")
    assert (found.returncode, found.stdout) == (code, "worked\nhandlers ran\n")
    assert ("wrong" in found.stderr) == ("wrong" in last)


def test_a_fork_of_a_process_that_ends_with_its_work_has_an_exit_code_of_its_own():
    """It inherits the exit handlers, and may run them."""
    program = """
import atexit, os
from trainer.shared.processes import end_with_its_work

def main():
    child = os.fork()
    if not child:
        atexit._run_exitfuncs()
        os._exit(3)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))

end_with_its_work(main)
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "3\n", "")


def test_sogclr_ends_with_its_work_too():
    program = """
import os, sys
from pipelines.cli import main
from pipelines.cli.__main__ import command

class Late:
    def __del__(self):
        os.abort()

late = Late()
sys.argv = ["sogclr", "presets"]
"""
    for call, code in (("sys.exit(main())", -signal.SIGABRT), ("command()", 0)):
        ended = subprocess.run([sys.executable, "-c", program + call], capture_output=True, text=True, check=False)
        assert ended.returncode == code
        assert ended.stdout.startswith("demo: ")


def test_a_step_ends_with_its_work_too(tmp_path):
    """With KFP's executor as the steps start it. What fails in the executor itself still fails the step."""
    body = tmp_path / "body.py"
    body.write_text("""
import os

class Late:
    def __del__(self):
        os.abort()

def step(number: int) -> int:
    global late
    late = Late()
    return 10 // number
""")

    def ended(number: int, *main: str) -> tuple[int, bool]:
        """Returns the exit code, and whether the outputs are there."""
        folder = tmp_path / f"{number}-{len(main)}"
        task = {"inputs": {"parameterValues": {"number": number}}, "outputs": {"parameters": {"Output": {}}}}
        task["outputs"]["parameters"]["Output"]["outputFile"] = str(folder / "output")
        task["outputs"]["outputFile"] = str(folder / "executor_output.json")
        given = ["--component_module_path", body, "--executor_input", json.dumps(task), "--function_to_execute", "step"]
        command = [sys.executable, *main, "kfp.dsl.executor_main", *given]
        done = subprocess.run(command, capture_output=True, env={**os.environ, **search_path()}, check=False)
        return done.returncode, (folder / "executor_output.json").exists()

    assert ended(5, "-m") == (-signal.SIGABRT, True)
    assert ended(5, "-m", "components.ending") == (0, True)
    assert ended(0, "-m", "components.ending") == (1, False)

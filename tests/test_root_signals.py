"""Commands of a root that died, that a signal or a closed terminal ends, or that meet: the next one closes what they left."""

import os
import signal
import socket
import subprocess
import sys
from urllib.parse import urlsplit

import pytest
from support.processes import Hold, in_a_process_of_its_own, search_path, started
from support.raw_data import raw_as_usual

from components import tracking
from pipelines import logs
from trainer.preemption import ending_noted
from trainer.shared.errors import UserError
from trainer.shared.progress import parse_line

# ---- Commands that died


def test_a_command_is_known_to_be_dead_once_its_process_and_its_runner_are(tmp_path):
    waited = []

    def dead():
        return logs.is_dead(tmp_path, "run", "", lambda: waited.append(os.waitpid(runner, 0)))

    def command():
        with logs.log_of_new_run(tmp_path, lambda token: "run", lambda run: None) as (_, log):
            assert log.path == logs.log_of(tmp_path, "run")
            os.write(ready, b".")
            signal.pause()

    def runs():
        locked = logs.lock_as_runner(logs.log_of(tmp_path, "run"))
        os.write(ready, b".")
        signal.pause()
        locked.close()

    reader, ready = os.pipe()
    pids = []
    for work in (command, runs):
        pid = os.fork()
        if not pid:
            work()
        pids.append(pid)
        os.read(reader, 1)
    first, runner = pids
    assert not dead()
    os.kill(first, signal.SIGKILL)
    os.waitpid(first, 0)
    os.kill(runner, signal.SIGKILL)
    assert dead()
    assert not logs.is_dead(tmp_path, "of another root", "", lambda: None)


def test_a_command_that_died_before_its_log_had_a_name_is_dead_too(tmp_path):
    tokens = tmp_path / "tokens"

    def start(token):
        tokens.write_text(token)
        os.kill(os.getpid(), signal.SIGKILL)

    def command():
        with logs.log_of_new_run(tmp_path, start, lambda run: None):
            pass

    assert in_a_process_of_its_own(command) == -signal.SIGKILL
    assert len(logs.abandoned(tmp_path)) == 1
    assert logs.is_dead(tmp_path, "run", tokens.read_text(), lambda: None)


def test_the_next_command_closes_the_runs_of_a_dead_one_and_leaves_those_of_others(root):
    from pipelines.cli.executing import close_dead

    store = tracking.open_root(root)
    about = {"command": ["sogclr"], "root": "", "code_version": "", "params": {}}
    dead = tracking.start_pipeline(store, "dead", **about, token="begun")
    of_another_root = tracking.start_pipeline(store, "another", **about)
    tags = {"sogclr.component": "pretrain", "mlflow.parentRunId": dead}
    step = store.client.create_run(store.experiment_id, tags=tags).info.run_id
    (root / "logs").mkdir()
    (root / "logs" / "begun.starting").touch()
    close_dead(store, root)
    status = {run: store.client.get_run(run).info.status for run in (dead, step, of_another_root)}
    assert status == {dead: "KILLED", step: "KILLED", of_another_root: "RUNNING"}
    assert list((root / "logs").iterdir()) == []


# ---- Signals


@pytest.fixture(autouse=True)
def heeds_a_closed_terminal():
    """What nohup starts ignores SIGHUP, and so does all that it starts in turn."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_closed_terminal_is_noted_as_sigterm_is(number):
    with ending_noted() as ended:
        assert not ended()
        os.kill(os.getpid(), number)
        assert ended()


def test_under_nohup_a_closed_terminal_ends_nothing():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with ending_noted() as ended:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not ended()
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.thorough
def test_the_ui_takes_any_free_port_and_a_closed_terminal_ends_its_server_too(root):
    command = [sys.executable, "-m", "pipelines.cli", "ui", "--root", str(root), "--port", "0"]
    environ = {**os.environ, **search_path()}
    with started(command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as ui:
        port = urlsplit(ui.stdout.readline().split()[1]).port
        ui.send_signal(signal.SIGHUP)
        assert ui.wait() == 0
        phases = {parse_line(line)[:2] for line in ui.stderr.read().splitlines()}
        assert phases == {("ui", "loading MLflow"), ("ui", "starting the server")}
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", port)) != 0


@pytest.mark.thorough
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_what_a_terminal_sends_to_a_conversion_in_two_processes_ends_it_without_a_traceback(number, tmp_path):
    raw = raw_as_usual(tmp_path / "raw")
    hold = Hold("build-tfrecords", (1,), tmp_path)
    command = [
        sys.executable,
        "-m",
        "beam_jobs.build_tfrecords",
        "--raw",
        raw,
        "--output",
        tmp_path / "output",
        "--processes",
        "2",
    ]
    environ = {**os.environ, **hold.environ}
    with started(command, env=environ, stderr=subprocess.PIPE, text=True, start_new_session=True) as job:
        hold.wait(job)
        os.killpg(job.pid, number)
        hold.release()
        said = job.communicate()[1]
    assert "Traceback" not in said
    assert job.returncode == 128 + number


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_a_worker_leaves_to_its_parent_what_a_terminal_sends_to_both(number):
    program = (
        f"import os; from beam_jobs.pooled import _begin_worker as begin; begin(os.getppid()); os.kill(os.getpid(), {number:d})"
    )
    done = subprocess.run([sys.executable, "-c", f"{program}; os._exit(7)"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (7, "")


def test_of_two_conversions_into_one_folder_the_second_is_refused(raw, tmp_path):
    from beam_jobs.job import build

    def convert_again(phase, done=0, total=0, text=""):
        if phase == "listing raw files":
            return  # the first has not claimed the folder yet
        with pytest.raises(UserError, match=r"another conversion writes to .+: wait until it ends, or give another folder"):
            build(str(raw), str(tmp_path))

    build(str(raw), str(tmp_path), on_progress=convert_again)

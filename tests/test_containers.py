"""What a compiled container starts: PID 1 hears SIGTERM at any time, and a retry of a custom job starts a new one."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from google.cloud.aiplatform_v1.types import JobState
from support.processes import started, until
from vertex.accounts import give_credentials
from vertex.proxy import serving_by_proxy

from pipelines import pipeline
from pipelines.vertex import accelerators
from pipelines.vertex.cluster import Cluster
from pipelines.vertex.images import Images

CONTAINER = ("unshare", "--user", "--map-root-user", "--pid", "--fork", "--kill-child", "--mount-proc")
"""A container's PID namespace: what it starts is PID 1, to which the kernel passes only signals with a handler."""


@pytest.fixture(scope="module")
def spec():
    return pipeline.compile_pipeline(Cluster(Images("registry/sogclr", "abc"), accelerators.get("v5e-8")), {})


def command_of(spec, component):
    """Returns what the container of a component starts, of a custom job or not."""
    executor = spec["deploymentSpec"]["executors"][f"exec-{component}"]["container"]
    parameters = spec["components"][f"comp-{component}"]["inputDefinitions"]["parameters"]
    if pools := parameters.get("worker_pool_specs"):
        executor = pools["defaultValue"][0]["container_spec"]
    return [*executor["command"], *executor["args"]]


@pytest.fixture(params=["dash", "bash"])
def container(request, tmp_path):
    """Starts a command as PID 1 of a namespace of its own, with one of the shells as `sh` and what `python` says as `python3`."""
    if subprocess.run([*CONTAINER, "true"], capture_output=True).returncode:
        pytest.skip("this machine permits no PID namespaces")
    if not (shell := shutil.which(request.param)):
        pytest.skip(f"{request.param} is not installed")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "sh").symlink_to(shell)

    def start(command, python, **environ):
        (tmp_path / "bin" / "python3").write_text(python)
        (tmp_path / "bin" / "python3").chmod(0o755)
        environ = {**os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "FOLDER": str(tmp_path), **environ}
        return started([*CONTAINER, *command], env=environ, stderr=subprocess.PIPE, text=True)

    return start


def terminate_pid_1(process):
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
    os.kill(int(children), signal.SIGTERM)


@pytest.mark.parametrize("component", ["build-tfrecords", "pretrain", "linear-eval", "record-lineage", "end-pipeline"])
def test_a_step_that_still_imports_ends_at_once(spec, container, tmp_path, component):
    """Its Python has no handler yet, and as PID 1 it would not hear the signal."""
    (tmp_path / "sitecustomize.py").write_text("import pathlib, time\npathlib.Path('imports').touch()\ntime.sleep(3600)\n")
    python = f'#!/bin/sh\ncd "$FOLDER" && exec {sys.executable} "$@"\n'
    with container(command_of(spec, component), python, PYTHONPATH=str(tmp_path)) as step:
        until((tmp_path / "imports").exists, step)
        terminate_pid_1(step)
        assert step.wait() == 128 + signal.SIGTERM


@pytest.mark.parametrize("code", [0, 1, 2, 75])
def test_a_step_ends_with_its_own_exit_code(spec, container, code):
    with container(command_of(spec, "pretrain"), f'#!/bin/sh\necho "$_KFP_RUNTIME $*" >&2\nexit {code}\n') as step:
        assert step.wait() == code
        assert step.stderr.read().startswith("true -m components.ending kfp.dsl.executor_main --component_module_path /")


@pytest.mark.parametrize(("code", "signals"), [(75, 1), (0, 1), (2, 1), (75, 3)])
def test_a_step_that_saves_on_sigterm_is_waited_for(spec, container, tmp_path, code, signals):
    """Each signal wakes the shell, whose `wait` then returns with what is not the step's end."""
    python = f"""#!{sys.executable}
import os, pathlib, signal, sys, time
folder, heard = pathlib.Path(os.environ["FOLDER"]), []
signal.signal(signal.SIGTERM, lambda *_: (heard.append(1), (folder / f"heard{{len(heard)}}").touch()))
(folder / "works").touch()
while len(heard) < {signals} or not (folder / "saved").exists():
    time.sleep(0.01)
sys.exit({code})
"""
    with container(command_of(spec, "pretrain"), python) as step:
        until((tmp_path / "works").exists, step)
        for number in range(signals):
            terminate_pid_1(step)
            until((tmp_path / f"heard{number + 1}").exists, step)
        (tmp_path / "saved").touch()
        assert step.wait() == code


def test_a_step_that_is_killed_says_by_which_signal(spec, container):
    with container(command_of(spec, "pretrain"), "#!/bin/sh\nkill -KILL $$\n") as step:
        assert step.wait() == 128 + signal.SIGKILL


def test_a_signal_before_the_step_starts_ends_the_container(spec, container, tmp_path):
    """It comes while the shell makes the step's folder."""
    mktemp = tmp_path / "bin" / "mktemp"
    mktemp.write_text('#!/bin/sh\ntouch "$FOLDER/makes"\nuntil [ -e "$FOLDER/go" ]; do sleep 0.01; done\necho "$FOLDER"\n')
    mktemp.chmod(0o755)
    with container(command_of(spec, "pretrain"), '#!/bin/sh\ntouch "$FOLDER/started"\n') as step:
        until((tmp_path / "makes").exists, step)
        terminate_pid_1(step)
        (tmp_path / "go").touch()
        assert step.wait() == 128 + signal.SIGTERM
    assert not (tmp_path / "started").exists()


# ---- The launcher of custom jobs


HOST = "europe-west4-aiplatform.googleapis.com"


@contextlib.contextmanager
def serving_custom_jobs(folder, *states):
    """Gives a Vertex AI whose custom jobs are in the next of `states` from their beginning, and the variables to find it by."""
    with serving_by_proxy(HOST, folder) as (google, environ):
        left = iter(states)

        def run(job):
            job.state = next(left)

        def cancel(job):
            job.state = JobState.JOB_STATE_CANCELLED

        google.vertex.run_custom, google.vertex.cancel_custom = run, cancel
        yield google.vertex, {**environ, "NO_GCE_CHECK": "true"}


def launcher(spec, component, folder, environ, monkeypatch):
    """Starts the launcher of a component's custom job, as Vertex AI would. What it leaves is in `folder`."""
    container = spec["deploymentSpec"]["executors"][f"exec-{component}"]["container"]
    payload = json.dumps({"display_name": component, "job_spec": {"worker_pool_specs": [{"replica_count": 1}]}})
    resources = folder / "gcp_resources"
    given = {"--payload": payload, "--project": "my-project", "--location": "europe-west4", "--gcp_resources": str(resources)}
    words = iter(container["args"])
    arguments = [word for one in words for word in (one, given.get(one, next(words)))]
    assert container["command"][0] == "python3"
    give_credentials(monkeypatch, folder, "my-project", "http://127.0.0.1:9")
    command = [sys.executable, *container["command"][1:], *arguments]
    return started(command, env={**os.environ, **environ}, stderr=subprocess.PIPE, text=True)


def launch(*arguments):
    """Returns the launcher's exit code and what it said."""
    with launcher(*arguments) as process:
        said = process.communicate()[1]
        return process.returncode, said


@pytest.mark.cloud
def test_a_retry_starts_a_new_custom_job_where_the_first_one_failed(spec, tmp_path, monkeypatch):
    """Its output, which names the first job, may still be there."""
    with serving_custom_jobs(tmp_path, JobState.JOB_STATE_FAILED, JobState.JOB_STATE_SUCCEEDED) as (vertex, environ):
        code, said = launch(spec, "pretrain", tmp_path, environ, monkeypatch)
        assert (code != 0, len(vertex.custom)) == (True, 1), said
        code, said = launch(spec, "pretrain", tmp_path, environ, monkeypatch)
        assert (code, len(vertex.custom)) == (0, 2), said
    assert list(vertex.custom)[1] in (tmp_path / "gcp_resources").read_text()


@pytest.mark.cloud
@pytest.mark.parametrize(("state", "ends_well"), [("SUCCEEDED", True), ("CANCELLED", False)])
def test_a_launcher_that_was_lost_goes_on_with_its_custom_job(spec, tmp_path, monkeypatch, state, ends_well):
    """A job that somebody cancelled is not started anew."""
    with serving_custom_jobs(tmp_path, JobState[f"JOB_STATE_{state}"]) as (vertex, environ):
        for _ in range(2):
            code, said = launch(spec, "pretrain", tmp_path, environ, monkeypatch)
            assert ((code == 0), len(vertex.custom)) == (ends_well, 1), said


@pytest.mark.cloud
def test_a_launcher_that_is_told_to_end_cancels_the_job_that_it_is_just_making(spec, tmp_path, monkeypatch):
    """Its own handler comes later; the custom job would go on without anybody who knows of it."""
    with serving_custom_jobs(tmp_path, JobState.JOB_STATE_RUNNING) as (vertex, environ):
        make, asked, answers = vertex.run_custom, threading.Event(), threading.Event()

        def make_unanswered(job):
            make(job)
            asked.set()
            answers.wait()

        vertex.run_custom = make_unanswered
        with launcher(spec, "pretrain", tmp_path, environ, monkeypatch) as process:
            try:
                until(asked.is_set, process)
                process.terminate()
            finally:
                answers.set()
            said = process.communicate()[1]
            assert process.returncode == 128 + signal.SIGTERM, said
        (job,) = vertex.custom.values()
        assert job.state == JobState.JOB_STATE_CANCELLED

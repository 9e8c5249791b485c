"""The root after what can happen to it: deaths, full disks, two commands at once, moves, deletions. The next command mends it."""

import os
import resource
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
from contextlib import closing
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from kfp import dsl
from support.processes import Hold, search_path, started
from support.raw_data import raw_as_usual

from components import patience, tracking, workspace
from components.tracking import database
from pipelines import cache, cli, logs
from pipelines.kfp_cache import StepCache, WriteOnlyCache
from trainer.preemption import ending_noted
from trainer.shared.errors import UserError
from trainer.shared.records import MANIFEST, Manifest, Shard, Split, manifest_to_json


def in_a_process_of_its_own(do):
    """Runs `do` in a copy of this process and returns how it ended: 0, 1 for an error, or minus the signal's number."""
    child = os.fork()
    if not child:
        try:
            do()
        except BaseException:
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A root whose store was made and has no run."""
    root = tmp_path_factory.mktemp("made")
    tracking.open_root(root)
    return root


@pytest.fixture
def root(made, tmp_path):
    """A root with a store."""
    root = tmp_path / "root"
    root.mkdir()
    shutil.copy(made / "mlflow.db", root)
    with closing(sqlite3.connect(root / "mlflow.db")) as store, store:
        store.execute("UPDATE experiments SET artifact_location = ? WHERE name = 'sogclr'", (f"{root}/artifacts",))
    return root


def finished_run(root, **artifacts):
    """Records a finished step and returns its run's ID."""
    store = tracking.open_root(root)
    run_id = store.client.create_run(store.experiment_id, tags={"sogclr.component": "pretrain"}).info.run_id
    for tag in ("sogclr.run.pretrain", "mlflow.parentRunId"):
        store.client.set_tag(run_id, tag, run_id)
    outputs = {name: {"type": "system.Model", "uri": uri, "metadata": {}} for name, uri in artifacts.items()}
    store.client.log_dict(run_id, {"arguments": {"raw": f"{root}/demo-raw"}, "outputs": outputs}, "step.json")
    store.client.set_terminated(run_id)
    return run_id


# ---- The store is made


def test_a_death_while_the_store_is_made_leaves_none_and_the_next_command_makes_it(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        assert in_a_process_of_its_own(partial(tracking.open_root, tmp_path)) == -signal.SIGKILL
    assert [path.name for path in tmp_path.iterdir()] == [".mlflow.db.partial"]
    tracking.open_root(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mlflow.db"]


def test_two_first_commands_at_once_make_one_store(tmp_path):
    found = []
    threads = [threading.Thread(target=lambda: found.append(tracking.open_root(tmp_path).experiment_id)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == ["1", "1"]
    assert [path.name for path in tmp_path.iterdir()] == ["mlflow.db"]


def test_a_disk_that_is_full_in_the_first_second_is_one_line_and_leaves_nothing(tmp_path):
    def with_a_full_disk():
        resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))
        with pytest.raises(UserError, match=r"mlflow\.db cannot be made \(.+\): fix that and start the same command again"):
            tracking.open_root(tmp_path)

    assert in_a_process_of_its_own(with_a_full_disk) == 0
    assert list(tmp_path.iterdir()) == []


def half_migrate(root):
    with closing(sqlite3.connect(root / "mlflow.db")) as store, store:
        store.execute("CREATE TABLE _alembic_tmp_tags (key TEXT)")
        store.execute("UPDATE alembic_version SET version_num = '451aebb31d03'")


def test_a_half_made_store_without_runs_is_made_again_and_said(root, capsys):
    half_migrate(root)
    (root / "mlflow.db-journal").write_bytes(b"of the old one")
    assert tracking.open_root(root).experiment_id == "1"
    assert "was half made and holds no runs: it is made again" in capsys.readouterr().err
    assert [path.name for path in root.iterdir()] == ["mlflow.db"]


def test_an_empty_store_is_made_again(tmp_path):
    (tmp_path / "mlflow.db").touch()
    assert tracking.open_root(tmp_path).experiment_id == "1"


def test_a_half_migrated_store_with_runs_is_left_alone_and_the_error_says_what_to_do(root):
    finished_run(root)
    half_migrate(root)
    before = (root / "mlflow.db").read_bytes()
    with pytest.raises(UserError, match=r"half migrated and holds runs: put a copy from before .+ or take another --root"):
        tracking.open_root(root)
    assert (root / "mlflow.db").read_bytes() == before


def test_a_file_that_is_no_store_is_left_alone_and_the_error_says_what_to_do(tmp_path):
    (tmp_path / "mlflow.db").write_bytes(b"no database at all" * 100)
    with pytest.raises(UserError, match="move it away, and the same command makes a new one"):
        tracking.open_root(tmp_path)


def test_a_locked_store_is_waited_for_and_said_once(root, monkeypatch, capsys):
    holder = sqlite3.connect(root / "mlflow.db", check_same_thread=False)
    holder.execute("BEGIN EXCLUSIVE")
    said = []

    def release(line):
        said.append(line)
        holder.rollback()

    monkeypatch.setattr(patience, "say", release)
    assert tracking.open_root(root).experiment_id == "1"
    assert said == ["MLflow is locked by another process; waiting for it"]


def test_a_deleted_experiment_is_one_line_with_the_cures(root):
    store = tracking.open_root(root)
    store.client.delete_experiment(store.experiment_id)
    with pytest.raises(UserError, match=r"mlflow experiments restore --experiment-id 1 .+ MLFLOW_EXPERIMENT_NAME=NAME starts"):
        tracking.open_root(root)


@pytest.mark.parametrize("name", ["what?", "a%2Fb", "a#b", "gs://bucket/runs"])
@pytest.mark.parametrize("command", [("run", "--preset", "demo"), ("ui",), ("compare", "0" * 8)], ids=lambda command: command[0])
def test_a_root_that_mlflow_would_take_for_a_part_of_a_url_is_refused(name, command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main([*command, "--root", name]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: --root {name} ")
    assert list(tmp_path.iterdir()) == []


# ---- The root moves


def test_what_a_moved_root_keeps_is_found_in_it_and_nothing_goes_to_the_old_place(root, tmp_path, capsys):
    run_id = finished_run(root, model=f"{root}/checkpoints/a", elsewhere="/elsewhere/b")
    new = root.rename(tmp_path / "root2")
    store = tracking.open_root(new)
    assert capsys.readouterr().err == f"{new} was {root}: its records follow\n"
    step = tracking.find_step(store, run_id, "pretrain")
    assert step.outputs["model"].uri == f"{new}/checkpoints/a"
    assert step.outputs["elsewhere"].uri == "/elsewhere/b"
    assert step.arguments["raw"] == f"{new}/demo-raw"
    store.client.log_dict(finished_run(new), {}, "more.json")
    assert not root.exists()
    tracking.open_root(new)
    assert capsys.readouterr().err == ""


def test_a_root_that_moved_into_its_old_place_is_found_too(root, tmp_path):
    run_id = finished_run(root, model=f"{root}/checkpoints/a")
    aside = root.rename(tmp_path / "aside")
    root.mkdir()
    new = aside.rename(root / "inner")
    assert tracking.find_step(tracking.open_root(new), run_id, "pretrain").outputs["model"].uri == f"{new}/checkpoints/a"


def test_a_copied_root_leaves_the_first_alone(root, tmp_path):
    run_id = finished_run(root, model=f"{root}/checkpoints/a")
    copy = Path(shutil.copytree(root, tmp_path / "copy"))
    for one in (copy, root):
        store = tracking.open_root(one)
        assert tracking.find_step(store, run_id, "pretrain").outputs["model"].uri == f"{one}/checkpoints/a"
        assert store.client.get_run(run_id).info.artifact_uri.startswith(f"{one}/")


def test_a_root_that_is_reached_through_a_link_has_not_moved(root, tmp_path, capsys):
    finished_run(root)
    link = tmp_path / "link"
    link.symlink_to(root)
    tracking.open_root(link)
    tracking.open_root(root)
    assert capsys.readouterr().err == ""


def test_a_move_that_was_cut_short_goes_on(root, tmp_path, monkeypatch):
    run_id = finished_run(root, model=f"{root}/checkpoints/a")
    new = root.rename(tmp_path / "new")
    with monkeypatch.context() as patch:
        patch.setattr(database, "_change_database", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        assert in_a_process_of_its_own(partial(tracking.open_root, new)) == -signal.SIGKILL
    assert tracking.find_step(tracking.open_root(new), run_id, "pretrain").outputs["model"].uri == f"{new}/checkpoints/a"


def test_a_run_whose_artifacts_are_gone_is_lost_and_said(root):
    run_id = finished_run(root, model=f"{root}/checkpoints/a")
    shutil.rmtree(root / "artifacts")
    store = tracking.open_root(root)
    with pytest.raises(UserError, match=rf"the pretrain {run_id[:8]} is lost: its artifacts are gone from {root}/artifacts"):
        tracking.find_step(store, run_id, "pretrain")
    assert "is lost" in tracking.why_lost(store, run_id)


# ---- Finished steps are reused by content


def outputs_of(root, run="run", fingerprint="f" * 64):
    """A whole dataset in a root, as a step's output."""
    folder = root / "kfp" / run / "dataset"
    folder.mkdir(parents=True)
    (folder / "shard").write_bytes(b"1234")
    split = Split(1, (1,), (Shard("shard", 1, 4, "", (0,)),))
    manifest = Manifest("images", fingerprint, ("n1",), {"train": split, "validation": split}, "0")
    (folder / MANIFEST).write_text(manifest_to_json(manifest))
    return {"dataset": dsl.Dataset("dataset", str(folder), {"fingerprint": fingerprint, "run_id": run})}


def key_of(steps, **arguments):
    return steps.compute_key("step", "image", ["code"], arguments)


@pytest.fixture
def steps(tmp_path):
    """The cache of a root, which is in the current folder's parent."""
    return StepCache(str(cache.folder_of(tmp_path / "root")))


def test_a_step_is_found_by_the_content_of_its_inputs_not_by_where_they_are(steps, tmp_path):
    root = tmp_path / "root"
    first, second = outputs_of(root, "first")["dataset"], outputs_of(root, "second")["dataset"]
    other = outputs_of(root, "other", "0" * 64)["dataset"]
    assert key_of(steps, dataset=first, a=1) == key_of(steps, dataset=second, a=1)
    assert key_of(steps, dataset=first, a=1) not in (key_of(steps, dataset=first, a=2), key_of(steps, dataset=other, a=1))
    raw = tmp_path / "raw"
    raw.mkdir()
    (tmp_path / "link").symlink_to(raw)
    assert key_of(steps, raw=str(raw)) == key_of(steps, raw=str(tmp_path / "link")) != key_of(steps, raw=str(tmp_path))


def test_what_the_cache_keeps_is_found_in_a_moved_root(steps, tmp_path):
    root = tmp_path / "root"
    demo = key_of(steps, raw=str(root / "demo-raw"))
    steps.put(demo, outputs_of(root))
    new = root.rename(tmp_path / "new")
    moved = StepCache(str(cache.folder_of(new)))
    assert key_of(moved, raw=str(new / "demo-raw")) == demo
    assert moved.get(demo)["dataset"].uri == str(new / "kfp" / "run" / "dataset")


def test_without_the_cache_nothing_is_reused_and_the_new_outputs_take_the_place_of_the_old(steps, tmp_path):
    root = tmp_path / "root"
    steps.put("key", outputs_of(root, "old"))
    anew = WriteOnlyCache(steps.cache_root)
    assert anew.get("key") is None
    anew.put("key", outputs_of(root, "new"))
    assert steps.get("key")["dataset"].metadata["run_id"] == "new"


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda root: (root / "kfp/run/dataset/shard").write_bytes(b"123"), "dataset/shard has 3 bytes, not 4"),
        (lambda root: (root / "kfp/run/dataset/shard").unlink(), "dataset/shard is gone"),
        (lambda root: (root / f"kfp/run/dataset/{MANIFEST}").write_text("{"), f"dataset/{MANIFEST} is gone or torn"),
        (lambda root: shutil.rmtree(root / "kfp"), "dataset is gone"),
        (lambda root: (root / "cache/key.json").write_text(""), "it is empty"),
        (lambda root: (root / "cache/key.json").write_text("{"), "it is torn"),
    ],
    ids=["torn shard", "lost shard", "torn manifest", "lost dataset", "empty entry", "torn entry"],
)
def test_what_cannot_be_reused_drops_out_of_the_cache_with_one_line(steps, tmp_path, spoil, said):
    root = tmp_path / "root"
    steps.put("key", outputs_of(root))
    assert list(cache.drop_unusable(root, lambda run: "")) == []
    spoil(root)
    assert steps.get("key") is None
    (line,) = cache.drop_unusable(root, lambda run: "")
    assert line.startswith("key drops out of the cache: ")
    assert line.endswith(said)
    assert list(cache.drop_unusable(root, lambda run: "")) == []


def test_finished_work_of_another_job_is_gone_on_from_only_if_that_is_wanted(tmp_path):
    first = workspace.claim(str(tmp_path), "first", a=1)
    (Path(first.folder)).mkdir()
    first.release(finished=True)
    assert workspace.claim(str(tmp_path), "second", a=1).folder != first.folder
    third = workspace.claim(str(tmp_path), "third", True, a=1)
    assert (third.folder, third.finished_by) == (first.folder, "first")
    assert workspace.claim(str(tmp_path), "fourth", True, a=1).folder != first.folder


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
        assert ui.stderr.read() == ""
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


def test_of_two_conversions_into_one_folder_the_second_is_refused(raw, tmp_path):
    from beam_jobs.job import build

    def convert_again(done, total):
        with pytest.raises(UserError, match=r"another conversion writes to .+: wait until it ends, or give another folder"):
            build(str(raw), str(tmp_path))

    build(str(raw), str(tmp_path), on_progress=lambda done, total: done or convert_again(done, total))

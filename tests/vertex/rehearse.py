"""`make rehearse`: a job on Vertex AI from docs/vertex.md's own commands to its end, on this machine, and what it left.

The commands of the section "A first cheap run" are run as they stand, in a shell that knows nothing else. With --fault something
goes wrong on the way; the job must succeed all the same, with the same bits, one model version, and no metric lost or doubled.
"""

import argparse
import os
import random
import re
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vertex.accounts import write_key
from vertex.dataflow import Dataflow
from vertex.executor import Attempt, Executor, end
from vertex.image import REPOSITORY
from vertex.world import MLFLOW, World, world

PAGE = REPOSITORY / "docs" / "vertex.md"
SECTION = "## A first cheap run"
NOT_TRIED = "# not tried"
PROJECT, BUCKET, SECRET = "my-project", "my-bucket", "projects/my-project/secrets/sogclr-mlflow/versions/latest"
USER, PASSWORD = "admin", "planted-mlflow-password"
KEPT = REPOSITORY / "build" / "rehearsal"
_STORAGE = r"(www|storage)\.googleapis\.com/.*storage|storage\.googleapis\.com/"


# ---- What goes wrong


@dataclass(frozen=True)
class Fault:
    """Something that goes wrong on the way."""

    summary: str
    begin: Callable[["Rehearsal"], None]


def _ending(step: str, kind: str, seconds: float) -> Callable[["Rehearsal"], None]:
    """Ends the first attempt at a step, so many seconds after it began."""

    def begin(rehearsal: "Rehearsal") -> None:
        rehearsal.endings.append((step, kind, seconds))

    return begin


def _failing(step: str, kind: str | int, where: str, seconds: float) -> Callable[["Rehearsal"], None]:
    """Lets requests go wrong for a while, from when a step begins."""

    def begin(rehearsal: "Rehearsal") -> None:
        rehearsal.outages.append((step, kind, where, seconds))

    return begin


def _losing(step: str) -> Callable[["Rehearsal"], None]:
    def begin(rehearsal: "Rehearsal") -> None:
        rehearsal.executor.lose_result_of.add(step)

    return begin


FAULTS = {
    "kill-build": Fault("SIGKILL of build-tfrecords while Dataflow works", _ending("build-tfrecords", "SIGKILL", 12)),
    "kill-pretrain": Fault("SIGKILL of pretrain", _ending("pretrain", "SIGKILL", 25)),
    "kill-eval": Fault("SIGKILL of linear-eval", _ending("linear-eval", "SIGKILL", 12)),
    "sigterm": Fault("SIGTERM of pretrain", _ending("pretrain", "SIGTERM", 25)),
    "lost-result": Fault("pretrain ends well, and its machine is lost as it says so", _losing("pretrain")),
    "storage-503": Fault("Cloud Storage answers 503 for 200 s in pretrain", _failing("pretrain", 503, _STORAGE, 200)),
    "storage-taken": Fault("writes fail after their bytes were taken", _failing("pretrain", "taken", r"(POST|PUT) .*upload", 15)),
    "storage-lost": Fault("answers of Cloud Storage are lost", _failing("linear-eval", "lost", r"(POST|PUT) .*upload", 15)),
    "quota": Fault("Cloud Storage is out of quota for 45 s", _failing("pretrain", 429, _STORAGE, 45)),
}


# ---- The rehearsal


@dataclass
class Rehearsal:
    world: World
    executor: Executor
    dataflow: Dataflow
    logs: Path
    endings: list[tuple[str, str, float]] = field(default_factory=list)
    outages: list[tuple[str, str | int, str, float]] = field(default_factory=list)

    def watch(self, attempt: Attempt) -> None:
        """Carries out what is to go wrong with an attempt: it has just begun."""
        say(f"{attempt.step}, attempt {attempt.number}")
        for one in [one for one in self.outages if one[0] == attempt.step]:
            self.outages.remove(one)
            _, kind, where, seconds = one
            say(f"  for {seconds:.0f} s requests that match {where} meet {kind}")
            self.world.google.fail_for(kind, seconds, where)
        for one in [one for one in self.endings if one[0] == attempt.step][:1]:
            self.endings.remove(one)
            threading.Thread(target=self._end_later, args=(attempt, *one[1:]), daemon=True).start()

    def _end_later(self, attempt: Attempt, kind: str, seconds: float) -> None:
        time.sleep(seconds)
        if attempt.container.poll() is None:
            say(f"  {kind} of {attempt.step}, {seconds:.1f} s after it began")
            end(attempt, kind)


def say(line: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {line}", flush=True)


def commands() -> str:
    """Returns what the page has one do in its section on a first run, as a script, without what it says was not tried."""
    section = PAGE.read_text().partition(f"\n{SECTION}\n")[2].partition("\n## ")[0]
    assert section, f"{PAGE.name} has no section {SECTION}"
    lines = [line[4:] for line in section.splitlines() if line.startswith("    ")]
    return re.sub(rf"^(?:.*\\\n)*.*{NOT_TRIED}.*\n?", "", "\n".join(lines) + "\n", flags=re.MULTILINE)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="make rehearse", description=__doc__)
    parser.add_argument("--fault", action="append", choices=[*FAULTS, "all"], default=[], help="what goes wrong, again and again")
    args = parser.parse_args(argv)
    faults = list(FAULTS) if "all" in args.fault else args.fault
    found = rehearse("plain")
    report(found)
    failed = complaints(found, found)
    for name in faults:
        say(f"with a fault: {FAULTS[name].summary}")
        faulted = rehearse(name, FAULTS[name].begin)
        report(faulted)
        failed += complaints(faulted, found)
    for one in failed:
        print(f"error: {one}", file=sys.stderr)
    return 1 if failed else 0


def rehearse(name: str, begin: Callable[[Rehearsal], None] = lambda rehearsal: None) -> dict[str, Any]:
    """Runs the page's commands in a world of their own; returns what the job left."""
    logs = KEPT / "logs" / name
    shutil.rmtree(logs, ignore_errors=True)
    logs.mkdir(parents=True)
    began = time.monotonic()
    with world(page=20) as place:
        executor = Executor(place, logs)
        rehearsal = Rehearsal(place, executor, Dataflow(place, logs), logs)
        executor._watch = rehearsal.watch
        begin(rehearsal)
        google = place.google
        bucket = google.storage.bucket(BUCKET)
        google.accounts.secrets[SECRET] = f"{USER}:{PASSWORD}"
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
        google.accounts.images[f"{PROJECT}/sogclr/sogclr-cpu:{commit[:12]}"] = "sha256:" + "c" * 64
        with mlflow_server(place, logs):
            shell(place, logs, bucket)
            executor.wait()
            return {"name": name, "seconds": time.monotonic() - began, **left(rehearsal)}


def shell(place: World, logs: Path, bucket: Path) -> None:
    """Runs the page's commands, as a user with credentials and the checkout does; says what they print."""
    home = place.folder / "home"
    home.mkdir()
    key = write_key(home, PROJECT, "https://oauth2.googleapis.com")
    environ = {
        "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin",
        "HOME": str(home),
        "GOOGLE_APPLICATION_CREDENTIALS": str(key),
        "BUCKET_FOLDER": str(bucket),
        "PYTHONPATH": "",
    }
    from vertex.world import TRUST

    script = commands()
    process = subprocess.Popen(
        ["bash", "-euxo", "pipefail", "-c", script],
        cwd=REPOSITORY,
        env={**environ, **TRUST},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    with (logs / "shell.log").open("w") as log:
        for line in process.stdout or ():
            log.write(line)
            log.flush()
            print(f"    {line}", end="", flush=True)
    if process.wait():
        say(f"the page's commands ended with {process.returncode}")


class mlflow_server:  # noqa: N801  it is used as a function is
    """The server that the page starts, with SQLite in the place of PostgreSQL."""

    def __init__(self, place: World, logs: Path) -> None:
        certificate, key = place.certificate()
        folder = place.folder / "mlflow"
        folder.mkdir()
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.2", "--port", "443", "--allowed-hosts", MLFLOW]
        command += ["--app-name", "basic-auth", "--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--workers", "1"]
        command += ["--artifacts-destination", f"gs://{BUCKET}/mlflow"]
        command += ["--uvicorn-opts", f"--ssl-keyfile={key} --ssl-certfile={certificate}"]
        from vertex.world import TRUST

        environ = {
            "PATH": os.environ["PATH"],
            "HOME": str(folder),
            "MLFLOW_FLASK_SERVER_SECRET_KEY": "for-the-rehearsal",
            "MLFLOW_AUTH_ADMIN_PASSWORD": PASSWORD,
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "DO_NOT_TRACK": "true",
            **TRUST,
        }
        with (logs / "mlflow.log").open("ab") as log:
            self._process = subprocess.Popen(
                command, env=environ, cwd=folder, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
            )

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()


# ---- What the job left


def left(rehearsal: Rehearsal) -> dict[str, Any]:
    """Returns the job's state, MLflow's runs with their metrics, model versions, what still runs, and what was asked."""
    google = rehearsal.world.google
    (job,) = google.vertex.jobs.values()
    os.environ |= {
        "MLFLOW_TRACKING_URI": f"https://{MLFLOW}",
        "MLFLOW_TRACKING_USERNAME": USER,
        "MLFLOW_TRACKING_PASSWORD": PASSWORD,
        "REQUESTS_CA_BUNDLE": "/etc/ssl/certs/ca-certificates.crt",
    }
    from mlflow import MlflowClient

    client = MlflowClient()
    experiments = [one.experiment_id for one in client.search_experiments()]
    runs = {}
    for run in client.search_runs(experiments):
        component = run.data.tags["sogclr.component"]
        metrics = {
            name: [(point.step, point.value) for point in client.get_metric_history(run.info.run_id, name)]
            for name in run.data.metrics
        }
        runs.setdefault(component, []).append({"status": run.info.status, "metrics": metrics, "name": run.info.run_name})
    versions = client.search_model_versions("name='sogclr-encoder'")
    models = client.search_logged_models(experiments)
    state = {model.params["state_sha256"] for model in models if "state_sha256" in model.params}
    return {
        "state": job.state.name.removeprefix("PIPELINE_STATE_"),
        "tasks": {one.task_name: one.state.name for one in job.job_detail.task_details},
        "runs": runs,
        "versions": len(versions),
        "models": len(models),
        "state_sha256": sorted(state),
        "dataflow": rehearsal.dataflow.active(),
        "attempts": Counter(one.step for one in rehearsal.executor.attempts),
        "custom_jobs": len(google.vertex.custom),
        "requests": dict(google.counts),
        "still_running": [one.step for one in rehearsal.executor.attempts if one.container.poll() is None],
    }


def report(found: dict[str, Any]) -> None:
    print(
        f"\n{found['name']}: job {found['state']} after {found['seconds']:.0f} s; state_sha256 {' '.join(found['state_sha256'])}"
    )
    print("attempts: " + ", ".join(f"{step} {count}" for step, count in found["attempts"].items()))
    for component, runs in found["runs"].items():
        for run in runs:
            points = sum(len(one) for one in run["metrics"].values())
            print(f"  MLflow: {component:<16} {run['status']:<9} {points} points of {len(run['metrics'])} metrics")
    for kind, count in sorted(found["requests"].items(), key=lambda one: -one[1]):
        print(f"  {count:>6}  {kind}")
    print(flush=True)


def complaints(found: dict[str, Any], plain: dict[str, Any]) -> Iterator[str]:
    """Yields what a job left otherwise than it should have; `plain` is one that nothing went wrong with."""
    return list(_complaints(found, plain))


def _complaints(found: dict[str, Any], plain: dict[str, Any]) -> Iterator[str]:
    def differs(what: str, is_so: Any, right: Any) -> Iterator[str]:
        if is_so != right:
            yield f"{found['name']}: {what} is {is_so}, not {right}"

    yield from differs("the job's state", found["state"], "SUCCEEDED")
    yield from differs("state_sha256", found["state_sha256"], plain["state_sha256"])
    yield from differs("the number of states", len(found["state_sha256"]), 1)
    yield from differs("the number of model versions", found["versions"], 1)
    yield from differs("the number of logged models", found["models"], 1)
    yield from differs("what Dataflow still runs", found["dataflow"], [])
    yield from differs("what still runs", found["still_running"], [])
    for component in ("pipeline", "build-tfrecords", "pretrain", "linear-eval"):
        runs = found["runs"].get(component, [])
        yield from differs(f"the runs of {component}", [run["status"] for run in runs], ["FINISHED"])
        if len(runs) == 1:
            for name, points in plain["runs"][component][0]["metrics"].items():
                steps = [step for step, _ in points]
                yield from differs(
                    f"the steps of {component}'s {name}", [step for step, _ in runs[0]["metrics"].get(name, ())], steps
                )


if __name__ == "__main__":
    random.seed(0)
    sys.exit(main())

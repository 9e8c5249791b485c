"""`make rehearse`: a job on Vertex AI from docs/vertex.md's own commands to its end, on this machine, and what it left.

The commands of the section "A first cheap run" are run as they stand, in a shell that knows nothing else. With --fault something
goes wrong on the way; the job must succeed all the same, with the same bits, one model version, and no metric lost or doubled.
"""

import argparse
import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from vertex.accounts import write_key
from vertex.beam import Beam
from vertex.container import possible
from vertex.executor import Attempt, Executor, end
from vertex.image import REPOSITORY, layers
from vertex.world import MLFLOW, REGION, TRUST, World, enter, world

PAGE = REPOSITORY / "docs" / "vertex.md"
SECTION = "## A first cheap run"
NOT_TRIED = "# not tried"
_PRELUDE = """
# Stands in for Google's program, which no package index has.
gcloud() {
    case $* in
        "storage cp --recursive "*) cp -r "$4" "$BUCKETS/${5#gs://}" ;;
        *) echo "gcloud $*: not in a rehearsal" >&2; return 1 ;;
    esac
}
# A tree that differs from its commit is refused without a tag; the image here is made of the tree.
sogclr() {
    if [[ $1 == submit ]]; then command sogclr "$@" --tag "$TAG" $MORE; else command sogclr "$@"; fi
}
cd "$(mktemp -d)"
set -x
"""
PROJECT, BUCKET, SECRET = "my-project", "my-bucket", "projects/my-project/secrets/sogclr-mlflow/versions/latest"
USER, PASSWORD = "admin", "planted-mlflow-password"
TAG = "rehearsed"
_OF_TIME = re.compile("second|wait")
"""Finds in the names of metrics those that differ from run to run."""
_ASKED, _LEFT = "asked.json", "left.json"
KEPT = REPOSITORY / "build" / "rehearsal"
_COMPLAINTS, _LINES, _WIDTH = 4, 6, 160
"""What is shown of a job that is not as it should be: complaints, and lines of each failed attempt, so wide."""


# ---- What goes wrong


@dataclass(frozen=True)
class Ending:
    """An attempt at `step` ends by `kind`, so many seconds after it began. Each takes the next attempt."""

    step: str
    kind: str
    seconds: float


@dataclass(frozen=True)
class Outage:
    """For so many seconds from when `step` begins, requests that match `where` meet a fault of `google.Fault`'s kinds."""

    step: str
    kind: str | int
    where: str
    seconds: float


@dataclass(frozen=True)
class Trouble:
    """What goes wrong on the way."""

    summary: str
    endings: tuple[Ending, ...] = ()
    outages: tuple[Outage, ...] = ()
    lost: tuple[str, ...] = ()
    """Steps whose success Vertex AI does not hear of: their machine is lost as it says so."""
    cancelled: str = ""
    """Step in which `sogclr cancel` ends the job, 15 s after the step began."""


_STORAGE = r"(www|storage)\.googleapis\.com/"
_WRITES = r"^(POST|PUT) \S+/upload/"
_DATA = re.compile(r"^GET storage\.googleapis\.com/.*-train\.tfrecord")
STEPS = ("build-tfrecords", "pretrain", "linear-eval")

TROUBLES = {
    # It takes longest, and waits most of the time.
    "storage": Trouble(
        "Cloud Storage is out of quota for 45 s, answers 503 for 200 s, loses answers, fails after it took the bytes",
        outages=(
            Outage("build-tfrecords", 429, _STORAGE, 45),
            Outage("pretrain", 503, _STORAGE, 200),
            # One after the other: the first that matches counts.
            Outage("linear-eval", "lost", _WRITES, 20),
            Outage("linear-eval", "taken", _WRITES, 40),
        ),
    ),
    "sigkill": Trouble("SIGKILL of each step", tuple(Ending(step, "SIGKILL", 15) for step in STEPS)),
    "sigterm": Trouble("SIGTERM of each step", tuple(Ending(step, "SIGTERM", 15) for step in STEPS)),
    "lost-result": Trouble("each step ends well, and its machine is lost as it says so", lost=STEPS),
    "cancel": Trouble("sogclr cancel while Dataflow works", cancelled="build-tfrecords"),
}
LONG = {
    f"{name}-everywhere": Trouble(f"{summary} in each step", outages=tuple(Outage(step, kind, where, seconds) for step in STEPS))
    for name, summary, kind, where, seconds in (
        ("503", "Cloud Storage answers 503 for 200 s", 503, _STORAGE, 200),
        ("429", "Cloud Storage is out of quota for 45 s", 429, _STORAGE, 45),
        ("taken", "for 15 s writes are answered 503 after their bytes were taken", "taken", _WRITES, 15),
        ("lost", "for 15 s answers to writes are lost", "lost", _WRITES, 15),
        ("half", "for 15 s writes are cut off in the middle", "half", _WRITES, 15),
    )
}
"""Those that `--trouble all` leaves out."""


def random_kills(kills: int, seconds: dict[str, float], seed: int) -> Trouble:
    """Returns SIGKILLs of every step at random moments of the seconds that an attempt at it takes."""
    draw = random.Random(seed)
    endings = [Ending(step, "SIGKILL", draw.uniform(0, seconds[step])) for step in STEPS for _ in range(kills)]
    return Trouble(f"{kills} SIGKILLs of each step at random moments, seed {seed}", tuple(endings))


# ---- The rehearsal


@dataclass
class Rehearsal:
    world: World
    executor: Executor
    logs: Path
    trouble: Trouble
    _met: list[Ending | Outage] = field(default_factory=list)

    def watch(self, attempt: Attempt) -> None:
        """Lets go wrong what is to go wrong with an attempt that begins."""
        say(f"{attempt.step}, attempt {attempt.number}")
        for outage in self._next(self.trouble.outages, attempt.step):
            self._met.append(outage)
            say(f"  for {outage.seconds:.0f} s requests that match {outage.where} meet {outage.kind}")
            self.world.google.fail_for(outage.kind, outage.seconds, outage.where)
        if self.trouble.cancelled == attempt.step and attempt.number == 1:
            threading.Thread(target=self._cancel_later, daemon=True).start()
        for ending in self._next(self.trouble.endings, attempt.step)[:1]:
            self._met.append(ending)
            threading.Thread(target=self._end_later, args=(attempt, ending), daemon=True).start()

    def _next(self, all_of_them: Sequence[Any], step: str) -> list[Any]:
        return [one for one in all_of_them if one.step == step and not any(one is met for met in self._met)]

    def _cancel_later(self) -> None:
        time.sleep(15)
        say("  sogclr cancel")
        command = ["sogclr", "cancel", "first-cpu", "--project", PROJECT, "--region", REGION, "--wait"]
        done = subprocess.run(command, env=user(self.world), capture_output=True, text=True)
        say(f"  {(done.stdout + done.stderr).strip()}")

    def _end_later(self, attempt: Attempt, ending: Ending) -> None:
        time.sleep(ending.seconds)
        if attempt.container.poll() is None:
            say(f"  {ending.kind} of {attempt.step}, {ending.seconds:.1f} s after it began")
            end(attempt, ending.kind)


def say(line: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {line}", flush=True)


def commands() -> str:
    """Returns what the page has one do in its section on a first run, as a script, without what it says was not tried."""
    section = PAGE.read_text().partition(f"\n{SECTION}\n")[2].partition("\n## ")[0]
    assert section, f"{PAGE.name} has no section {SECTION}"
    lines = [line[4:] for line in section.splitlines() if line.startswith("    ")]
    return re.sub(rf"^(?:.*\\\n)*.*{NOT_TRIED}.*\n?", "", "\n".join(lines) + "\n", flags=re.MULTILINE)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="make rehearse", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    listed = "\n".join(f"{name}: {trouble.summary}" for name, trouble in (TROUBLES | LONG).items())
    parser.add_argument("--trouble", nargs="+", choices=[*TROUBLES, *LONG, "all"], default=[], help=f"what goes wrong:\n{listed}")
    parser.add_argument("--jobs", type=int, default=0, metavar="N", help="N jobs with random kills")
    parser.add_argument("--kills", type=int, default=3, metavar="N", help="kills of each step in such a job (default: 3)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the first such job (default: 0)")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="settings of the jobs, to make them shorter")
    parser.add_argument("--at-once", type=int, default=1, metavar="N", help="jobs at the same time (default: 1)")
    args = parser.parse_args(argv)
    if reason := possible():
        parser.error(reason)
    layers()  # once, and where packages can be had
    more = f"--set {' '.join(args.set)}" if args.set else ""
    plain = rehearsed("plain", Trouble("nothing goes wrong"), more)
    if plain is None:
        return 1
    troubles = {name: (TROUBLES | LONG)[name] for name in (TROUBLES if "all" in args.trouble else args.trouble)}
    for seed in range(args.seed, args.seed + args.jobs):
        troubles[f"kills-{seed}"] = random_kills(args.kills, plain["seconds_of"], seed)
    with ThreadPoolExecutor(args.at_once) as pool:
        asked = [pool.submit(rehearsed, name, trouble, more) for name, trouble in troubles.items()]
        found = [plain, *(one.result() for one in asked)]
    failed = 0
    for name, one in zip(["plain", *troubles], found, strict=True):
        wrong = complaints(one, plain) if one else [f"{name}: the rehearsal broke off"]
        failed += len(wrong)
        if wrong:
            print("\n".join(_last_words(KEPT / "logs" / name, one)))
        for complaint in wrong[:_COMPLAINTS]:
            print(f"error: {complaint}")
        if len(wrong) > _COMPLAINTS:
            print(f"error: {name}: and {len(wrong) - _COMPLAINTS} more")
    print(f"{len(found)} jobs, {'all as they should be' if not failed else f'{failed} complaints'}")
    return 1 if failed else 0


def _last_words(logs: Path, found: Mapping[str, Any] | None) -> Iterator[str]:
    """Yields how each attempt of a job ended, and the last lines of those that failed."""
    for step, number, status, seconds, log in found["ends"] if found else ():
        yield f"{logs.name}: {step}, attempt {number}: status {status} after {seconds:.0f} s"
        if status:
            lines = (logs / log).read_text(errors="replace").splitlines()
            yield from (f"    {line[:_WIDTH]}" for line in lines[-_LINES:])


def rehearsed(name: str, trouble: Trouble, more: str = "") -> dict[str, Any] | None:
    """Returns what a job left that ran in a world of its own, or None where that broke off. Says it too.

    `more` are options of `sogclr submit`.
    """
    logs = KEPT / "logs" / name
    shutil.rmtree(logs, ignore_errors=True)
    logs.mkdir(parents=True)
    (logs / _ASKED).write_text(json.dumps({**asdict(trouble), "more": more}))
    print(f"{name}: {trouble.summary}; logs in {os.path.relpath(logs, REPOSITORY)}", flush=True)
    done = enter([sys.executable, "-u", "-m", "vertex.rehearse", "--inside", str(logs)])
    if done or not (logs / _LEFT).exists():
        return None
    found = json.loads((logs / _LEFT).read_text())
    report(found)
    return found


def inside(logs: Path) -> None:
    """Runs the page's commands in a world, and writes down what the job left."""
    asked = json.loads((logs / _ASKED).read_text())
    trouble = Trouble(
        asked["summary"],
        tuple(Ending(**one) for one in asked["endings"]),
        tuple(Outage(**one) for one in asked["outages"]),
        tuple(asked["lost"]),
        asked["cancelled"],
    )
    began = time.monotonic()
    with world(page=20) as place:
        executor = Executor(place, logs)
        Beam(place, logs)
        rehearsal = Rehearsal(place, executor, logs, trouble)
        executor.watch = rehearsal.watch
        executor.lose_result_of |= set(trouble.lost)
        google = place.google
        google.storage.bucket(BUCKET)
        google.accounts.secrets[SECRET] = f"{USER}:{PASSWORD}"
        for number, build in enumerate(("cpu", "gpu", "tpu"), start=1):
            google.accounts.images[f"{PROJECT}/sogclr/sogclr-{build}:{TAG}"] = f"sha256:{number}" + "c" * 63
        with mlflow_server(place, logs):
            shell(place, logs, asked["more"])
            executor.wait()
            seconds = time.monotonic() - began
            found = {"name": logs.name, "seconds": seconds, **left(rehearsal)}
    (logs / _LEFT).write_text(json.dumps(found, indent=1))


def user(place: World) -> dict[str, str]:
    """Returns the environment of somebody who has a key file and nothing else."""
    home = place.folder / "home"
    home.mkdir(exist_ok=True)
    key = home / "key.json"
    return {
        "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin",
        "HOME": str(home),
        "TMPDIR": str(home),
        "GOOGLE_APPLICATION_CREDENTIALS": str(key if key.exists() else write_key(home, PROJECT, "https://oauth2.googleapis.com")),
        **TRUST,
    }


def shell(place: World, logs: Path, more: str) -> None:
    """Runs the page's commands, as a user with credentials does; shows what they print."""
    environ = {**user(place), "BUCKETS": str(place.machine.gcs), "TAG": TAG, "MORE": more}
    process = subprocess.Popen(
        ["bash", "-eu", "-o", "pipefail", "-c", _PRELUDE + commands()],
        env=environ,
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
    """The server that the page starts."""

    def __init__(self, place: World, logs: Path) -> None:
        folder = place.folder / "mlflow"
        folder.mkdir()
        for file in place.certificate():
            shutil.copy(file, folder)
        (block,) = (one for one in re.findall(r"(?:^    .*\n)+", PAGE.read_text(), re.MULTILINE) if "mlflow server" in one)
        environ = {
            "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin",
            "HOME": str(folder),
            "MLFLOW": MLFLOW,
            "BUCKET": BUCKET,
            "KEY": "for-the-rehearsal",
            "PASSWORD": PASSWORD,
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "DO_NOT_TRACK": "true",
            # It would start processes of its own, for jobs that nobody sends.
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            **TRUST,
        }
        # Port 443 of the other addresses is Google's here.
        command = ["bash", "-euc", block.replace("--host 0.0.0.0", "--host 127.0.0.2")]
        with (logs / "mlflow.log").open("ab") as log:
            self._process = subprocess.Popen(
                command,
                env=environ,
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        os.killpg(self._process.pid, signal.SIGKILL)
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
        "cancelled": bool(rehearsal.trouble.cancelled),
        "state": job.state.name.removeprefix("PIPELINE_STATE_"),
        "tasks": {one.task_name: one.state.name for one in job.job_detail.task_details},
        "runs": runs,
        "versions": len(versions),
        "models": len(models),
        "state_sha256": sorted(state),
        "dataflow": [job.name for job in google.dataflow.active()],
        "attempts": Counter(one.step for one in rehearsal.executor.attempts),
        "ends": [(one.step, one.number, one.status, one.seconds, one.log.name) for one in rehearsal.executor.attempts],
        "custom_jobs": len(google.vertex.custom),
        "seconds_of": {one.step: one.seconds for one in rehearsal.executor.attempts},
        "requests": dict(google.counts),
        "still_running": list(_running()),
        "requests_a_minute": _beside_the_data(google.moments, rehearsal.executor.attempts),
    }


def _beside_the_data(moments: Sequence[tuple[float, str]], attempts: Sequence[Attempt]) -> float:
    """Returns how many requests a minute Cloud Storage had beside those for the data, while the last pretraining read them."""
    spans = [(one.begun, one.begun + one.seconds) for one in attempts if one.step == "pretrain"]
    reads = [when for when, what in moments if spans and spans[-1][0] < when < spans[-1][1] and _DATA.search(what)]
    if not reads:
        return 0.0
    others = [
        what
        for when, what in moments
        if reads[0] < when < reads[-1] and re.search(_STORAGE, what) and not re.search(r"-train\.tfrecord", what)
    ]
    return len(others) / ((reads[-1] - reads[0]) / 60)


def _running() -> Iterator[str]:
    """Yields what still runs of the steps, their launchers and Dataflow's workers: every process of this world is seen here."""
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            command = file.read_bytes().replace(b"\0", b" ").decode(errors="replace")
            yield from re.findall(r"-m (components\.ending|google_cloud_pipeline\S+|apache_beam\S+)", command)


def report(found: dict[str, Any]) -> None:
    print(
        f"\n{found['name']}: job {found['state']} after {found['seconds']:.0f} s; state_sha256 {' '.join(found['state_sha256'])}"
    )
    print("attempts: " + ", ".join(f"{step} {count}" for step, count in found["attempts"].items()))
    for component, runs in found["runs"].items():
        for run in runs:
            points = sum(len(one) for one in run["metrics"].values())
            print(f"  MLflow: {component:<16} {run['status']:<9} {points} points of {len(run['metrics'])} metrics")
    print(f"  {found['requests_a_minute']:>6.1f}  requests a minute to Cloud Storage beside the data, while pretraining reads")
    for kind, count in sorted(found["requests"].items(), key=lambda one: -one[1]):
        print(f"  {count:>6}  {kind}")
    print(flush=True)


def complaints(found: dict[str, Any], plain: dict[str, Any]) -> list[str]:
    """Returns what a job left otherwise than it should have; `plain` is one that nothing went wrong with."""
    return list(_complaints(found, plain))


def _complaints(found: dict[str, Any], plain: dict[str, Any]) -> Iterator[str]:
    def differs(what: str, is_so: Any, right: Any) -> Iterator[str]:
        if is_so != right:
            yield f"{found['name']}: {what} is {is_so}, not {right}"

    yield from differs("what Dataflow still runs", found["dataflow"], [])
    yield from differs("what still runs", found["still_running"], [])
    if found["cancelled"]:
        yield from differs("the job's state", found["state"], "CANCELLED")
        yield from differs("the run of the job", [run["status"] for run in found["runs"]["pipeline"]], ["KILLED"])
        return
    yield from differs("the job's state", found["state"], "SUCCEEDED")
    yield from differs("state_sha256", found["state_sha256"], plain["state_sha256"])
    yield from differs("the number of states", len(found["state_sha256"]), 1)
    yield from differs("the number of model versions", found["versions"], 1)
    yield from differs("the number of logged models", found["models"], 1)
    for component in ("pipeline", "build-tfrecords", "pretrain", "linear-eval"):
        runs = found["runs"].get(component, [])
        yield from differs(f"the runs of {component}", [run["status"] for run in runs], ["FINISHED"])
        if len(runs) == 1:
            for name, right in plain["runs"][component][0]["metrics"].items():
                points = runs[0]["metrics"].get(name, [])
                if _OF_TIME.search(name):
                    # The first after a start has none: it would count the start.
                    points, right = [], [one for one in points if one[0] not in dict(right)]
                yield from differs(f"{component}'s {name}", points, right)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--inside"]:
        inside(Path(sys.argv[2]))
    else:
        sys.exit(main())

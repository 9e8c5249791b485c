"""What Dataflow does with a job: runs the staged pipeline with Beam's real worker in the project's image.

Beam's portable runner is in the service's place. It starts workers as Dataflow does: the image's entry point, with options.

    python -m vertex.beam JOB    is one job: the file says where all that it needs is
"""

import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path

from google.cloud import dataflow_v1beta3 as api

from vertex.container import Container, Machine
from vertex.image import image_of
from vertex.world import TRUST, World


class Beam:
    """Runs the jobs of a world's Dataflow; their logs go to the folder `logs`."""

    def __init__(self, world: World, logs: Path) -> None:
        self._world, self._logs = world, logs
        self._processes: dict[str, subprocess.Popen] = {}
        self._dataflow = world.google.dataflow
        self._dataflow.run, self._dataflow.cancel = self._start, self._cancel

    def _start(self, job: api.Job) -> None:
        threading.Thread(target=self._run, args=(job,), daemon=True).start()

    def _cancel(self, job: api.Job) -> None:
        self._dataflow.go_to(job, "CANCELLED")
        if process := self._processes.get(job.id):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)

    def _run(self, job: api.Job) -> None:
        options = dict(job.environment.sdk_pipeline_options)["options"]
        (image,) = {pool.worker_harness_container_image for pool in job.environment.worker_pools}
        _, _, digest = image.partition("@")
        assert digest in self._world.google.accounts.images.values(), f"no registry here has {image}"
        assert job.environment.service_account_email, "workers would run as another account than the steps"
        log = self._logs / f"dataflow-{len(self._dataflow.jobs)}.log"
        asked = self._logs / f"dataflow-{len(self._dataflow.jobs)}.json"
        pipeline = self._world.machine.gcs / str(options["pipelineUrl"]).removeprefix("gs://")
        asked.write_text(
            json.dumps({"pipeline": str(pipeline), "machine": asdict(self._world.machine), "log": str(log)}, default=str)
        )
        with self._dataflow.lock, log.open("ab") as output:
            if job.current_state.name == "JOB_STATE_CANCELLED":
                return
            # Whatever the job starts ends with it.
            unshare = ["unshare", "--pid", "--fork", "--kill-child=KILL", "--mount-proc"]
            command = [*unshare, sys.executable, "-m", "vertex.beam", str(asked)]
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )
            self._processes[job.id] = process
            self._dataflow.go_to(job, "RUNNING")
        process.wait()
        with self._dataflow.lock:
            if job.current_state.name == "JOB_STATE_CANCELLED":
                return
            if process.returncode:
                self._dataflow.errors[job.id] = _last_error(log)
            self._dataflow.go_to(job, "FAILED" if process.returncode else "DONE")


def _last_error(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if re.match(r"[\w.]*(Error|Exception)\b", line)]
    return lines[-1] if lines else "Workflow failed."


def run(asked: Path) -> None:
    """Runs a job to its end; raises what its pipeline raises."""
    from apache_beam.options.pipeline_options import PipelineOptions
    from apache_beam.portability import common_urns
    from apache_beam.portability.api import beam_runner_api_pb2
    from apache_beam.runners.portability.fn_api_runner import fn_runner

    about = json.loads(asked.read_text())
    pipeline = beam_runner_api_pb2.Pipeline.FromString(Path(about["pipeline"]).read_bytes())
    worker = shlex.join([sys.executable, "-m", "vertex.beam", str(asked), "worker"])
    for environment in pipeline.components.environments.values():
        assert environment.urn == common_urns.environments.DOCKER.urn, environment.urn
        environment.urn = "beam:env:harness_subprocess_python:v1"
        environment.payload = worker.encode()
    runner = fn_runner.FnApiRunner()
    result = runner.run_via_runner_api(pipeline, PipelineOptions(["--runner=FnApiRunner"]))
    result.wait_until_finish()


def work(asked: Path) -> int:
    """Starts a worker in the image and waits until it ends."""
    about = json.loads(asked.read_text())
    machine = Machine(tuple(map(Path, about["machine"]["layers"])), Path(about["machine"]["etc"]), Path(about["machine"]["gcs"]))
    image = image_of("cpu")
    address = {
        name: re.search(r'url:\s*"([^"]+)"', os.environ[f"{name}_API_SERVICE_DESCRIPTOR"])[1]  # type: ignore[index]
        for name in ("CONTROL", "LOGGING")
    }
    command = [
        *image.entrypoint,
        f"--id={os.environ.get('WORKER_ID', 'worker-1')}",
        f"--logging_endpoint={address['LOGGING']}",
        f"--control_endpoint={address['CONTROL']}",
        "--semi_persist_dir=/var/opt/google",
    ]
    # What boot learns from the provisioning service.
    environ = {"PIPELINE_OPTIONS": os.environ.get("PIPELINE_OPTIONS", "{}"), **TRUST}
    return Container(machine, image, command, environ, Path(about["log"])).wait()


if __name__ == "__main__":
    started = time.monotonic()
    if sys.argv[2:] == ["worker"]:
        sys.exit(work(Path(sys.argv[1])))
    run(Path(sys.argv[1]))
    print(f"done in {time.monotonic() - started:.0f} s", file=sys.stderr)

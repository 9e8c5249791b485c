"""What Vertex AI does with a job that it was given: its tasks, their retries, their custom jobs, its exit handler, its end.

It takes the job as sent, reads KFP's IR in it, and starts containers with the commands that stand there. Source of the IR:
pipeline_spec.proto of kubeflow/pipelines; of the folders and variables: Vertex AI's documentation.
"""

import itertools
import json
import re
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from google.cloud import aiplatform_v1
from google.protobuf import json_format

from vertex.container import Container
from vertex.image import Image, image_of
from vertex.jobs import PROJECT_NUMBER
from vertex.world import World

State = aiplatform_v1.PipelineTaskDetail.State
_ENDED = ("SUCCEEDED", "FAILED", "CANCELLED", "SKIPPED", "NOT_TRIGGERED")
_SECONDS_TO_END = 30.0
"""Between SIGTERM and SIGKILL, as Vertex AI gives them."""
_LAUNCHES = ".launcher"
"""Ends the name of a task whose own code runs in the custom job that it launches."""
_LAUNCHER = "gcr.io/ml-pipeline/google-cloud-pipeline-components:"


@dataclass
class Attempt:
    """One container of a step, from its start to its end: what a test kills."""

    step: str
    number: int
    """1 for the first."""
    container: Container
    log: Path
    begun: float = field(default_factory=time.monotonic)
    seconds: float = 0.0
    """That it took; 0 while it runs."""
    status: int | None = None
    """Exit status; None while it runs."""


class Executor:
    """Runs the pipeline jobs and custom jobs of a world.

    `watch` is called with every attempt at a step's own code as it starts. `time_scale` shortens the waits between attempts.
    """

    def __init__(
        self,
        world: World,
        logs: Path,
        watch: Callable[[Attempt], None] = lambda attempt: None,
        time_scale: float = 0.02,
    ) -> None:
        self.attempts: list[Attempt] = []
        self.broken: list[str] = []
        """Tracebacks of the executor's own errors."""
        self.logs = logs
        self.lose_result_of: set[str] = set()
        """Steps whose next success Vertex AI does not hear of: their machine is lost as it says so."""
        self._world, self.watch, self._scale = world, watch, time_scale
        self._cancelled: set[str] = set()
        self._running: dict[str, Container] = {}
        """Containers by the name of the pipeline job or custom job that they are of."""
        self._tasks = itertools.count(1)
        self._threads: list[threading.Thread] = []
        self._image = image_of("cpu")
        jobs = world.google.vertex
        jobs.run, jobs.cancel = self._start, self._cancel
        jobs.run_custom, jobs.cancel_custom = self._start_custom, self._cancel_custom

    def wait(self) -> None:
        """Waits until every job has ended. Fails where this executor itself broke."""
        for thread in self._threads:
            thread.join()
        assert not self.broken, "\n".join(self.broken)

    # ---- Pipeline jobs

    def _start(self, job: aiplatform_v1.PipelineJob) -> None:
        self._thread(self._run, job)

    def _thread(self, work: Callable[[Any], None], job: Any) -> None:
        def watched() -> None:
            try:
                work(job)
            except BaseException:
                self.broken.append(traceback.format_exc())
                job.state = type(job.state)["PIPELINE_STATE_FAILED" if hasattr(job, "pipeline_spec") else "JOB_STATE_FAILED"]

        thread = threading.Thread(target=watched, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _cancel(self, job: aiplatform_v1.PipelineJob) -> None:
        self._cancelled.add(job.name)
        if job.state.name.removeprefix("PIPELINE_STATE_") not in _ENDED:
            self._world.google.vertex.step_on(job, {"job": "CANCELLING"})
        if container := self._running.get(job.name):
            threading.Thread(target=container.stop, args=(_SECONDS_TO_END,), daemon=True).start()

    def _run(self, job: aiplatform_v1.PipelineJob) -> None:
        raw = aiplatform_v1.PipelineJob.pb(job)
        spec = _plain(raw.pipeline_spec)
        given = _plain(raw.runtime_config).get("parameterValues", {})
        root = spec["root"]
        known = root.get("inputDefinitions", {}).get("parameters", {})
        values = {name: given.get(name, definition.get("defaultValue")) for name, definition in known.items()}
        self._world.google.vertex.step_on(job, {"job": "RUNNING"})
        run = _Run(self, job, spec)
        state = run.dag(root["dag"], values, {})
        self._world.google.vertex.step_on(job, {"job": state})

    def run_container(self, owner: str, step: str, number: int, image: Image, command: list[str], environ: dict) -> int:
        """Runs a container to its end; returns its exit status. Cancelling `owner`, a job by name, ends it."""
        log = self.logs / f"{step}-{number}.log"
        container = self._world.container(image, command, environ, log)
        self._running[owner] = container
        attempt = Attempt(step, number, container, log)
        if not step.endswith(_LAUNCHES):
            self.attempts.append(attempt)
            self.watch(attempt)
        if owner in self._cancelled:
            container.stop(_SECONDS_TO_END)
        status = container.wait()
        attempt.seconds, attempt.status = time.monotonic() - attempt.begun, status
        if status == 0 and step in self.lose_result_of:
            self.lose_result_of.remove(step)
            return 1
        return status

    # ---- Custom jobs

    def _start_custom(self, job: aiplatform_v1.CustomJob) -> None:
        self._thread(self._run_custom, job)

    def _cancel_custom(self, job: aiplatform_v1.CustomJob) -> None:
        self._cancelled.add(job.name)
        if container := self._running.get(job.name):
            threading.Thread(target=container.stop, args=(_SECONDS_TO_END,), daemon=True).start()

    def _run_custom(self, job: aiplatform_v1.CustomJob) -> None:
        spec = job.job_spec
        (pool,) = spec.worker_pool_specs
        assert pool.replica_count == 1
        assert spec.service_account, "without an account a custom job runs as Vertex AI's own agent"
        folder = spec.base_output_directory.output_uri_prefix.rstrip("/")
        environ = {one.name: one.value for one in pool.container_spec.env}
        environ |= {"CLOUD_ML_PROJECT_ID": PROJECT_NUMBER, "CLOUD_ML_JOB_ID": job.name.rpartition("/")[2]}
        if folder:
            environ |= {
                "AIP_MODEL_DIR": f"{folder}/model/",
                "AIP_CHECKPOINT_DIR": f"{folder}/checkpoints/",
                "AIP_TENSORBOARD_LOG_DIR": f"{folder}/logs/",
            }
        image = self.image(pool.container_spec.image_uri)
        command = [*pool.container_spec.command, *pool.container_spec.args]
        step = job.display_name.removeprefix("sogclr-")
        job.state = aiplatform_v1.JobState.JOB_STATE_RUNNING
        number = 1 + sum(one.step == step for one in self.attempts)
        status = self.run_container(job.name, step, number, image, command, environ)
        if job.name in self._cancelled:
            job.state = aiplatform_v1.JobState.JOB_STATE_CANCELLED
        elif status == 0:
            job.state = aiplatform_v1.JobState.JOB_STATE_SUCCEEDED
        else:
            job.error = {"code": 13, "message": f"The replica workerpool0-0 exited with a non-zero status of {status}."}
            job.state = aiplatform_v1.JobState.JOB_STATE_FAILED

    def image(self, uri: str) -> Image:
        """Returns the image of a URI; Google's launcher is in the same Python environment here, and has none of our variables."""
        if uri.startswith(_LAUNCHER):
            return Image({"PATH": self._image.environ["PATH"]}, "root", "/", [])
        name, _, digest = uri.partition("@")
        assert digest in self._world.google.accounts.images.values(), f"no registry here has {uri}"
        assert name.endswith("/sogclr-cpu"), f"only the CPU image is here, not {name}"
        return self._image

    def scaled(self, seconds: float) -> float:
        return seconds * self._scale

    def has_cancelled(self, name: str) -> bool:
        return name in self._cancelled

    def number_of_task(self) -> int:
        return next(self._tasks)


class _Run:
    """One pipeline job on its way."""

    def __init__(self, executor: Executor, job: aiplatform_v1.PipelineJob, spec: Mapping[str, Any]) -> None:
        self._executor, self._job, self._spec = executor, job, spec
        self._world = executor._world
        self._id = job.name.rpartition("/")[2]
        self._project, self._region = job.name.split("/")[1], job.name.split("/")[3]
        root = aiplatform_v1.PipelineJob.pb(job).runtime_config.gcs_output_directory.rstrip("/")
        self._folder = f"{root}/{PROJECT_NUMBER}/{self._id}"

    def dag(self, dag: Mapping[str, Any], values: Mapping[str, Any], artifacts: Mapping[str, Any]) -> str:
        """Runs the tasks of a DAG, each after those that it depends on; returns its state."""
        states: dict[str, str] = {}
        outputs: dict[str, dict[str, Any]] = {}
        for name in _in_order(dag["tasks"]):
            task = dag["tasks"][name]
            before = [states[one] for one in task.get("dependentTasks", ())]
            always = task.get("triggerPolicy", {}).get("strategy") == "ALL_UPSTREAM_TASKS_COMPLETED"
            if not always and any(state != "SUCCEEDED" for state in before):
                states[name] = "NOT_TRIGGERED"
                continue
            if not always and self._executor.has_cancelled(self._job.name):
                states[name] = "CANCELLED"
                continue
            parameters, inputs = self._inputs(task, values, artifacts, outputs, states)
            component = self._spec["components"][task["componentRef"]["name"]]
            if "dag" in component:
                states[name] = self.dag(component["dag"], parameters, inputs)
                continue
            states[name], outputs[name] = self._task(name, task, component, parameters, inputs, always)
        last = [state for name, state in states.items() if dag["tasks"][name].get("triggerPolicy") is None]
        for state in ("FAILED", "CANCELLED"):
            if state in last or (state == "FAILED" and state in states.values()):
                return state
        return "SUCCEEDED"

    def _inputs(
        self, task: Mapping[str, Any], values: Mapping[str, Any], artifacts: Mapping, outputs: Mapping, states: Mapping
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Returns the parameters and artifacts that a task is given."""
        given, parameters, found = task.get("inputs", {}), {}, {}
        for name, source in given.get("parameters", {}).items():
            if "runtimeValue" in source:
                parameters[name] = self._with_names(source["runtimeValue"]["constant"])
            elif "componentInputParameter" in source:
                parameters[name] = values[source["componentInputParameter"]]
            elif "taskFinalStatus" in source:
                producer = source["taskFinalStatus"]["producerTask"]
                state = states[producer]
                parameters[name] = {
                    "state": state,
                    "pipelineJobResourceName": self._job.name,
                    "pipelineTaskName": producer,
                    **({} if state == "SUCCEEDED" else {"error": {"code": 9, "message": f"{producer} {state.lower()}"}}),
                }
            else:
                raise NotImplementedError(f"input {source}")
        for name, source in given.get("artifacts", {}).items():
            if "taskOutputArtifact" in source:
                producer = source["taskOutputArtifact"]
                found[name] = outputs[producer["producerTask"]][producer["outputArtifactKey"]]
            else:
                found[name] = artifacts[source["componentInputArtifact"]]
        return parameters, found

    def _task(
        self, name: str, task: Mapping, component: Mapping, parameters: dict, artifacts: Mapping, always: bool
    ) -> tuple[str, dict[str, Any]]:
        """Runs a task, again after it failed as often as its policy says; returns its state and its artifacts."""
        executor = self._spec["deploymentSpec"]["executors"][component["executorLabel"]]
        if "importer" in executor:
            about = executor["importer"]
            kind = about["typeSchema"]
            uri = about["artifactUri"]["constant"]
            artifact = {"name": name, "uri": uri, "type": kind, "metadata": about.get("metadata", {})}
            return "SUCCEEDED", {"artifact": artifact}
        number = self._executor.number_of_task()
        folder = f"{self._folder}/{name}_{number}"
        for key, definition in component.get("inputDefinitions", {}).get("parameters", {}).items():
            if key not in parameters and "defaultValue" in definition:
                parameters[key] = self._with_names(definition["defaultValue"])
        outputs = {
            key: {"name": key, "uri": f"{folder}/{key}", "type": definition["artifactType"], "metadata": {}}
            for key, definition in component.get("outputDefinitions", {}).get("artifacts", {}).items()
        }
        files = {
            key: {"outputFile": _mounted(f"{folder}/{key}")}
            for key in component.get("outputDefinitions", {}).get("parameters", {})
        }
        executor_input = {
            "inputs": {
                "parameterValues": parameters,
                "artifacts": {key: {"artifacts": [one]} for key, one in artifacts.items()},
            },
            "outputs": {
                "artifacts": {key: {"artifacts": [one]} for key, one in outputs.items()},
                "parameters": files,
                "outputFile": _mounted(f"{folder}/executor_output.json"),
            },
        }
        kinds = {key: one["parameterType"] for key, one in component.get("inputDefinitions", {}).get("parameters", {}).items()}
        container = executor["container"]
        command = [_resolved(one, executor_input, kinds) for one in (*container.get("command", ()), *container.get("args", ()))]
        environ = {one["name"]: one["value"] for one in container.get("env", ())}
        image = self._executor.image(container["image"])
        policy = task.get("retryPolicy", {})
        wait = float(policy.get("backoffDuration", "0s").rstrip("s"))
        step = f"{name}{_LAUNCHES}" if "custom_job.launcher" in " ".join(container["command"]) else name
        # Vertex AI makes the folders of outputs before a container starts.
        local = self._world.google.storage.folder / folder.removeprefix("gs://")
        local.mkdir(parents=True, exist_ok=True)
        self._say(name, "RUNNING")
        for attempt in range(1, 2 + int(policy.get("maxRetryCount", 0))):
            owner = "" if always else self._job.name
            status = self._executor.run_container(owner, step, attempt, image, command, environ)
            if status == 0:
                outputs = self._taken(outputs, local)
                self._say(name, "SUCCEEDED", outputs)
                return "SUCCEEDED", outputs
            if self._executor.has_cancelled(owner):
                self._say(name, "CANCELLED")
                return "CANCELLED", {}
            time.sleep(self._executor.scaled(wait))
            wait = min(wait * float(policy.get("backoffFactor", 2)), float(policy.get("backoffMaxDuration", "3600s").rstrip("s")))
        self._say(name, f"FAILED: exited with status {status}")
        return "FAILED", {}

    def _taken(self, outputs: dict[str, Any], local: Path) -> dict[str, Any]:
        """Returns the artifacts as the step left them, in what KFP's executor wrote."""
        file = local / "executor_output.json"
        # A custom job's launcher writes none; the step in the custom job does, in the same place.
        said = json.loads(file.read_text()).get("artifacts", {}) if file.exists() else {}
        for key, one in outputs.items():
            for left in said.get(key, {}).get("artifacts", ()):
                outputs[key] = {**one, "uri": left["uri"], "metadata": left.get("metadata", {})}
        return outputs

    def _say(self, name: str, state: str, outputs: Mapping[str, Any] | None = None) -> None:
        vertex = self._world.google.vertex
        vertex.step_on(self._job, {name: state})
        if not outputs:
            return
        with vertex.lock:
            details = list(self._job.job_detail.task_details)
            (detail,) = (one for one in details if one.task_name == name)
            detail.outputs = {
                key: {
                    "artifacts": [
                        {"uri": one["uri"], "schema_title": one["type"].get("schemaTitle", ""), "metadata": one["metadata"]}
                    ]
                }
                for key, one in outputs.items()
            }
            self._job.job_detail = aiplatform_v1.PipelineJobDetail(task_details=details)

    def _with_names(self, value: Any) -> Any:
        """Returns a value with the names that only a running job has."""
        if not isinstance(value, str):
            return value
        names = {
            "pipeline_job_name": self._id,
            "pipeline_job_resource_name": self._job.name,
            "pipeline_job_uuid": "1",
            "pipeline_root": self._folder,
            "pipeline_google_cloud_project_id": self._project,
            "pipeline_google_cloud_location": self._region,
            "pipeline_service_account": self._account,
            "pipeline_persistent_resource_id": "",
        }
        return re.sub(r"\{\{\$\.(\w+)\}\}", lambda found: names.get(found[1], found[0]), value)

    @property
    def _account(self) -> str:
        return self._job.service_account or f"{PROJECT_NUMBER}-compute@developer.gserviceaccount.com"


def _plain(message: Any) -> Any:
    """Returns a message as plain data, whole numbers as such: a struct holds 200 as 200.0, and the service writes it as 200."""

    def whole(text: str) -> int | float:
        number = float(text)
        return int(number) if number.is_integer() else number

    return json.loads(json_format.MessageToJson(message), parse_float=whole)


def _in_order(tasks: Mapping[str, Any]) -> Iterator[str]:
    """Yields names of tasks, each after those that it depends on."""
    left = dict(tasks)
    while left:
        ready = [name for name, task in left.items() if not set(task.get("dependentTasks", ())) & set(left)]
        assert ready, f"a circle among {list(left)}"
        for name in ready:
            del left[name]
            yield name


def _mounted(uri: str) -> str:
    return uri.replace("gs://", "/gcs/", 1)


_EMPTY = {"STRUCT": "{}", "LIST": "[]"}


def _resolved(text: str, executor_input: Mapping[str, Any], kinds: Mapping[str, str]) -> str:
    """Returns a part of a command with values in the place of its placeholders."""
    values = executor_input["inputs"]["parameterValues"]

    def value_of(found: re.Match) -> str:
        name = found[1]
        if name not in values:
            return _EMPTY.get(kinds.get(name, ""), "")
        return values[name] if isinstance(values[name], str) else json.dumps(values[name])

    text = re.sub(r"\{\{\$\.inputs\.parameters\['([^']+)'\]\}\}", value_of, text)
    text = re.sub(
        r"\{\{\$\.outputs\.parameters\['([^']+)'\]\.output_file\}\}",
        lambda found: executor_input["outputs"]["parameters"][found[1]]["outputFile"],
        text,
    )
    whole = json.dumps(executor_input)
    text = re.sub(r"\{\{\$\.json_escape\[1\]\}\}", lambda _: json.dumps(whole)[1:-1], text)
    return text.replace("{{$}}", whole)


def end(attempt: Attempt, kind: str) -> None:
    """Ends an attempt as a machine does: SIGKILL is a lost one, SIGTERM one that is taken away with notice."""
    if kind == "SIGKILL":
        attempt.container.kill()
    else:
        attempt.container.signal(signal.SIGTERM)

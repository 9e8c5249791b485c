"""Pipeline jobs of Vertex AI as plain data: location, state, arguments and outputs."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from components import console
from components.lineage import Artifact
from trainer.shared.errors import UserError

REQUEST_LABEL = "sogclr-plan"
"""Label with a digest of the request. Jobs with the same digest are the same job."""
_ENDED = ("SUCCEEDED", "FAILED", "CANCELLED", "PAUSED")


@dataclass(frozen=True)
class Place:
    """A project and a region of Vertex AI."""

    project: str
    region: str
    endpoint: str = ""
    """URL of the API, for example for Private Service Connect; empty for Google's public one."""

    @property
    def folder(self) -> str:
        return f"projects/{self.project}/locations/{self.region}"

    def job_link(self, job_id: str) -> str:
        return console.pipeline_job_page(self.project, self.region, job_id)


@dataclass(frozen=True)
class JobName:
    """Identifies a job: its place and its ID there."""

    place: Place
    job_id: str


@dataclass(frozen=True)
class Task:
    """The current state of one step of a job."""

    name: str
    state: str
    """PENDING, RUNNING, SUCCEEDED, SKIPPED (reused from the cache), CANCELLED, FAILED, ..."""
    error: str
    logs: str
    """Link to the task's logs; empty until there are any."""
    outputs: Mapping[str, Artifact]


@dataclass(frozen=True)
class Job:
    """The current state of a pipeline job."""

    job_id: str
    state: str
    """QUEUED, PENDING, RUNNING, SUCCEEDED, FAILED, CANCELLING, CANCELLED or PAUSED."""
    error: str
    link: str
    request_digest: str
    """The value of `REQUEST_LABEL`."""
    tasks: tuple[Task, ...]
    """The steps of the pipeline, in the order in which they run."""
    spec: Mapping[str, Any]
    parameters: Mapping[str, Any]
    pipeline_root: str

    @property
    def ended(self) -> bool:
        return self.state in _ENDED

    def task(self, component: str) -> Task:
        """Returns the task of a component. Raises UserError if the job has no such task, or the task has no outputs."""
        found = next((task for task in self.tasks if task.name == component), None)
        if found is None or not found.outputs:
            state = f"it is {found.state}" if found else "it has no such step"
            raise UserError(f"job {self.job_id} has no output of {component} to go on from: {state}")
        return found

    def first_of(self, *components: str) -> str:
        """Returns the first of `components` that this job has as a step; the first of all if it has none."""
        there = {task for dag in _dags(self.spec) for task in dag.get("tasks", {})}
        return next((one for one in components if one in there), components[0])

    def arguments(self, component: str) -> dict[str, Any]:
        """Returns the arguments of a component in this job, without those of the custom job around it."""
        for dag in _dags(self.spec):
            if component in dag.get("tasks", {}):
                given = dag["tasks"][component].get("inputs", {}).get("parameters", {})
                return {name: self._value(one) for name, one in given.items() if name != "base_output_directory"}
        raise UserError(f"job {self.job_id} has no step {component}")

    def run_of(self, component: str) -> str:
        """Returns the ID of a component's MLflow run, from the metadata of its outputs; empty if none has it."""
        made = (one for task in self.tasks if task.name == component for one in task.outputs.values())
        return next((str(one.metadata.get("run_id", "")) for one in made), "")

    def _value(self, given: Mapping[str, Any]) -> Any:
        if "runtimeValue" in given:
            return given["runtimeValue"].get("constant")
        # The exit handler passes the pipeline's parameters on under names with a prefix.
        name = given["componentInputParameter"].removeprefix("pipelinechannel--")
        known = self.spec["root"].get("inputDefinitions", {}).get("parameters", {})
        return self.parameters.get(name, known.get(name, {}).get("defaultValue"))


def _dags(spec: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    yield spec["root"].get("dag", {})
    for component in spec.get("components", {}).values():
        yield component.get("dag", {})


def parse_job(text: str, project: str, region: str, endpoint: str) -> JobName:
    """Returns the name of a job from its ID or its full resource name. Raises UserError if `text` is neither."""
    parts = text.removeprefix("vertex:").split("/")
    if len(parts) == 6 and parts[::2] == ["projects", "locations", "pipelineJobs"]:
        return JobName(Place(parts[1], parts[3], endpoint), parts[5])
    if len(parts) != 1 or not parts[0]:
        raise UserError(f"{text} names no job: give its ID, or projects/PROJECT/locations/REGION/pipelineJobs/ID")
    missing = [option for option, value in (("--project", project), ("--region", region)) if not value]
    if missing:
        raise UserError(f"{' and '.join(missing)} must say where job {parts[0]} runs")
    return JobName(Place(project, region, endpoint), parts[0])


def parse_schedule(text: str, endpoint: str) -> Place | None:
    """Returns the place of a schedule from its full resource name, or None if `text` is something else."""
    parts = text.split("/")
    return Place(parts[1], parts[3], endpoint) if parts[::2] == ["projects", "locations", "schedules"] else None


def as_json(job: Job) -> dict[str, Any]:
    """Returns a job as JSON for scripts."""
    return {
        "job_id": job.job_id,
        "state": job.state,
        "error": job.error,
        "link": job.link,
        "tasks": {
            task.name: {
                "state": task.state,
                "error": task.error,
                "logs": task.logs,
                "outputs": {name: asdict(one) for name, one in task.outputs.items()},
            }
            for task in job.tasks
        },
    }

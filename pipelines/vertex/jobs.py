"""Pipeline jobs of Vertex AI as plain data: where they are, how they stand, what they were given and what they left."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from components import console
from components.lineage import Artifact
from trainer.shared.errors import UserError

PLAN_LABEL = "sogclr-plan"
"""Label with a digest of all that was asked for: a job that has it is the same job."""
_ENDED = ("SUCCEEDED", "FAILED", "CANCELLED", "PAUSED")


@dataclass(frozen=True)
class Place:
    """A project's part of Vertex AI in one region."""

    project: str
    region: str
    endpoint: str = ""
    """URL of the API; empty for Google's public one. Private Service Connect has another."""

    @property
    def folder(self) -> str:
        return f"projects/{self.project}/locations/{self.region}"

    def job_link(self, job_id: str) -> str:
        return console.pipeline_job_page(self.project, self.region, job_id)


@dataclass(frozen=True)
class JobName:
    """Which job: its place and its ID there."""

    place: Place
    job_id: str


@dataclass(frozen=True)
class Task:
    """One step of a job as it stands."""

    name: str
    state: str
    """PENDING, RUNNING, SUCCEEDED, SKIPPED (taken from the cache), CANCELLED, FAILED, ..."""
    error: str
    logs: str
    """Link to its logs; empty before it has any."""
    outputs: Mapping[str, Artifact]


@dataclass(frozen=True)
class Job:
    """A pipeline job as it stands."""

    job_id: str
    state: str
    """QUEUED, PENDING, RUNNING, SUCCEEDED, FAILED, CANCELLING, CANCELLED, PAUSED"""
    error: str
    link: str
    plan: str
    """The value of `PLAN_LABEL`."""
    tasks: tuple[Task, ...]
    """The steps of the pipeline, in its order."""
    spec: Mapping[str, Any]
    parameters: Mapping[str, Any]
    pipeline_root: str

    @property
    def ended(self) -> bool:
        return self.state in _ENDED

    def task(self, component: str) -> Task:
        """Returns the task of a component. Raises UserError if the job has none, or it left nothing."""
        found = next((task for task in self.tasks if task.name == component), None)
        if found is None or not found.outputs:
            state = f"it is {found.state}" if found else "it has no such step"
            raise UserError(f"job {self.job_id} has nothing of {component} to go on from: {state}")
        return found

    def arguments(self, component: str) -> dict[str, Any]:
        """Returns the arguments that the job gave to a component, without those of the custom job that it ran in."""
        for dag in _dags(self.spec):
            if component in dag.get("tasks", {}):
                given = dag["tasks"][component].get("inputs", {}).get("parameters", {})
                return {name: self._value(one) for name, one in given.items() if name != "base_output_directory"}
        raise UserError(f"job {self.job_id} has no step {component}")

    def run_of(self, component: str) -> str:
        """Returns the MLflow run of a component, as the metadata of what it made says it; empty if nothing does."""
        made = (one for task in self.tasks if task.name == component for one in task.outputs.values())
        return next((str(one.metadata.get("run_id", "")) for one in made), "")

    def _value(self, given: Mapping[str, Any]) -> Any:
        if "runtimeValue" in given:
            return given["runtimeValue"].get("constant")
        # Through the exit handler, which passes parameters on under another name.
        name = given["componentInputParameter"].removeprefix("pipelinechannel--")
        known = self.spec["root"].get("inputDefinitions", {}).get("parameters", {})
        return self.parameters.get(name, known.get(name, {}).get("defaultValue"))


def _dags(spec: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    yield spec["root"].get("dag", {})
    for component in spec.get("components", {}).values():
        yield component.get("dag", {})


def parse_job(text: str, project: str, region: str, endpoint: str) -> JobName:
    """Returns the name of a job from its ID, or from its whole resource name. Raises UserError."""
    parts = text.removeprefix("vertex:").split("/")
    if len(parts) == 6 and parts[::2] == ["projects", "locations", "pipelineJobs"]:
        return JobName(Place(parts[1], parts[3], endpoint), parts[5])
    if len(parts) != 1 or not parts[0]:
        raise UserError(f"{text} names no job: give its ID, or projects/PROJECT/locations/REGION/pipelineJobs/ID")
    missing = [option for option, value in (("--project", project), ("--region", region)) if not value]
    if missing:
        raise UserError(f"{' and '.join(missing)} must say where job {parts[0]} is")
    return JobName(Place(project, region, endpoint), parts[0])


def parse_schedule(text: str, endpoint: str) -> Place | None:
    """Returns the place of a schedule that is named by its whole resource name, or None for anything else."""
    parts = text.split("/")
    return Place(parts[1], parts[3], endpoint) if parts[::2] == ["projects", "locations", "schedules"] else None


def as_json(job: Job) -> dict[str, Any]:
    """Returns a job as JSON, for scripts."""
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

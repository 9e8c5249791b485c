"""The lineage of a pipeline run as plain data: its steps, and the artifacts that connect them. Knows neither KFP nor MLflow."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

COMPONENTS = ("build-tfrecords", "pretrain", "import-encoder", "linear-eval")
"""The components, each after those whose outputs it needs. A pipeline has either pretrain or import-encoder."""
NEEDS: Mapping[str, tuple[str, ...]] = {
    "build-tfrecords": (),
    "pretrain": ("dataset",),
    "import-encoder": (),
    "linear-eval": ("dataset", "model"),
}
"""The names of the artifacts that a component reads."""
MADE_BY: Mapping[str, tuple[str, ...]] = {"dataset": ("build-tfrecords",), "model": ("pretrain", "import-encoder")}
"""The components that can make an artifact, by its name."""


def source_of(arguments: Mapping[str, Any]) -> str:
    """Returns the component that makes the encoder of a pipeline with these arguments."""
    return "import-encoder" if "encoder" in arguments else "pretrain"


def components_of(source: str) -> tuple[str, ...]:
    """Returns the components of a whole pipeline whose encoder `source` makes, in the order in which they run."""
    return tuple(one for one in COMPONENTS if one == source or one not in MADE_BY["model"])


@dataclass(frozen=True)
class Artifact:
    """An output of one step and an input of the next."""

    type: str
    """KFP's schema title, for example system.Dataset."""
    uri: str
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """KFP returns integers as floats."""

    def short(self, key: str, length: int = 12) -> str:
        return str(self.metadata.get(key, ""))[:length]

    def count(self, key: str) -> int:
        return int(self.metadata.get(key, 0))


@dataclass(frozen=True)
class Step:
    """One run of one component."""

    component: str
    run_id: str
    pipeline_id: str
    """The pipeline run that created this step."""
    status: str
    """RUNNING, FINISHED, FAILED or KILLED."""
    seconds: float
    arguments: Mapping[str, Any]
    outputs: Mapping[str, Artifact]
    """Artifacts by name. Empty until the step has finished."""
    metrics: Mapping[str, float]
    error: str = ""
    """Why the step failed, in one line."""
    user_error: bool = False
    """Whether the user can fix the error."""


@dataclass(frozen=True)
class Lineage:
    """A pipeline run with all its steps, including the steps that it reused from earlier pipeline runs."""

    run_id: str
    name: str
    steps: tuple[Step, ...]
    """The recorded steps, in the order of `COMPONENTS`."""

    def reused(self, step: Step) -> bool:
        return step.pipeline_id != self.run_id

    def output(self, name: str) -> Artifact | None:
        return next((step.outputs[name] for step in self.steps if name in step.outputs), None)

    @property
    def failed(self) -> Step | None:
        return next((step for step in self.steps if step.status not in ("FINISHED", "RUNNING")), None)


def short(run_id: str) -> str:
    """Returns the first 8 characters of a run ID, which the command line accepts in place of the whole ID."""
    return run_id[:8]

"""What a pipeline run came from and what came of it, as plain data. Knows neither KFP nor MLflow."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

COMPONENTS = ("build-tfrecords", "pretrain", "linear-eval")
"""In the order in which each needs the ones before it."""


@dataclass(frozen=True)
class Artifact:
    """What one step hands to the next."""

    type: str
    """KFP's schema title, as in system.Dataset."""
    uri: str
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """Whole numbers come back from KFP as floats."""

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
    """The run that it was made under."""
    status: str
    """RUNNING, FINISHED, FAILED or KILLED."""
    seconds: float
    arguments: Mapping[str, Any]
    outputs: Mapping[str, Artifact]
    """By name; empty until it finished."""
    metrics: Mapping[str, float]
    error: str = ""
    """Why it failed, one line."""
    user_error: bool = False
    """Whether the user can mend it."""


@dataclass(frozen=True)
class Lineage:
    """A pipeline run with every step that leads to what it made, those of earlier pipeline runs included."""

    run_id: str
    name: str
    steps: tuple[Step, ...]
    """In the order of `COMPONENTS`; those there are."""

    def reused(self, step: Step) -> bool:
        return step.pipeline_id != self.run_id

    def output(self, name: str) -> Artifact | None:
        return next((step.outputs[name] for step in self.steps if name in step.outputs), None)

    @property
    def failed(self) -> Step | None:
        return next((step for step in self.steps if step.status not in ("FINISHED", "RUNNING")), None)


def short(run_id: str) -> str:
    """Returns as much of a run ID as the command line needs to know it."""
    return run_id[:8]

"""One job as it is sent to Vertex AI: in words for the person who sends it, in bytes for the service.

It is put into words without a word to the network; `submit` is what sends it.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from google.cloud import aiplatform_v1
from google.protobuf import json_format

from components.lineage import COMPONENTS
from pipelines.vertex.client import Vertex
from pipelines.vertex.cluster import Cluster, base_output_directory
from pipelines.vertex.jobs import PLAN_LABEL, Job, Place
from trainer.shared.errors import UserError

if TYPE_CHECKING:
    from google.auth.credentials import Credentials

_DEFAULT_ACCOUNT = (
    "PROJECT_NUMBER-compute@developer.gserviceaccount.com, the project's default service account of Compute Engine; "
    "--service-account names another"
)
"""Whom Vertex AI's pipelines and Dataflow's workers run as where no account is named."""


@dataclass(frozen=True)
class Submission:
    """One job, as it is to be sent."""

    place: Place
    job_id: str
    title: str
    cluster: Cluster
    pipeline_root: str
    raw: str
    """Folder of the raw archives that the job reads; empty if it reads none."""
    compile: Callable[[Cluster], dict[str, Any]]
    parameters: Mapping[str, Any]
    components: tuple[str, ...] = COMPONENTS
    """Those that it runs."""
    schedule: str = ""
    """Five fields of cron, for a schedule that makes the job again and again."""
    max_runs: int = 0
    """The schedule ends after so many jobs; 0 for never."""

    def lines(self) -> Iterable[tuple[str, str]]:
        """Yields the job in words: a name, and what it is."""
        cluster, place = self.cluster, self.place
        yield "what", self.title
        times = f", {self.max_runs} times" if self.max_runs else ""
        yield ("schedule", f"{self.schedule}{times}") if self.schedule else ("job", self.job_id)
        yield "where", f"project {place.project}, region {place.region}{f', API at {place.endpoint}' if place.endpoint else ''}"
        yield "who", cluster.service_account or _DEFAULT_ACCOUNT
        beam = [one for one in cluster.beam_args if one.startswith(("--region", "--max_num_workers", "--worker_machine_type"))]
        for component in self.components:
            if component == "build-tfrecords":
                yield component, f"Dataflow: {' '.join(beam)}" if cluster.beam_args else "in its own container, without Dataflow"
            if accelerator := cluster.accelerator_of(component):
                hosts = f", {accelerator.hosts} hosts" if accelerator.hosts > 1 else ""
                yield (
                    component,
                    f"{accelerator.name}: {accelerator.summary}, {accelerator.replicas} replica{'s' * (accelerator.replicas > 1)}"
                    f"{hosts}, "
                    f"{'spot' if cluster.spot else 'on demand'}, {cluster.disk_gb} GB disk, at most {cluster.timeout_hours:g} h "
                    f"an attempt, {cluster.retries} more attempts",
                )
        for build in cluster.builds:
            yield f"image, {build}", cluster.images.reference(build)
        yield "reads", self.raw or "what an earlier job left"
        yield "writes", self.pipeline_root
        if "pretrain" in self.components:
            yield (
                "checkpoints",
                f"{base_output_directory(self.pipeline_root)}/checkpoints; a job that does the same again goes on from there",
            )
        yield "MLflow", cluster.mlflow
        yield "cache", "steps that did the same before are reused" if cluster.caching else "off: every step runs"
        for name, value in (("network", cluster.network), ("encryption key", cluster.encryption_key)):
            if value:
                yield name, value
        if cluster.labels:
            yield "labels", ", ".join(f"{key}={value}" for key, value in cluster.labels.items())
        for name, value in self.parameters.items():
            yield f"parameter {name}", json.dumps(value)

    def job(self) -> aiplatform_v1.PipelineJob:
        """Returns the job as it is sent. Raises UserError for what Vertex AI would not take."""
        spec = self.compile(self.cluster)
        check_parameters(spec, self.parameters)
        body: dict[str, Any] = {
            "displayName": self.job_id,
            "pipelineSpec": spec,
            "runtimeConfig": {"gcsOutputDirectory": self.pipeline_root, "parameterValues": dict(self.parameters)},
        }
        if self.cluster.service_account:
            body["serviceAccount"] = self.cluster.service_account
        if self.cluster.network:
            body["network"] = self.cluster.network
        if self.cluster.encryption_key:
            body["encryptionSpec"] = {"kmsKeyName": self.cluster.encryption_key}
        digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()[:32]
        body["labels"] = {**self.cluster.labels, PLAN_LABEL: digest}
        job = aiplatform_v1.PipelineJob()
        json_format.ParseDict(body, aiplatform_v1.PipelineJob.pb(job))
        return job


_TYPES: dict[str, tuple[type, ...]] = {
    "STRING": (str,),
    "NUMBER_INTEGER": (int,),
    "NUMBER_DOUBLE": (int, float),
    "BOOLEAN": (bool,),
    "LIST": (list,),
    "STRUCT": (dict,),
}


def check_parameters(spec: Mapping[str, Any], values: Mapping[str, Any]) -> None:
    """Raises UserError if `values` are not the parameters of the pipeline `spec`: the service finds out only later."""
    known = spec["root"].get("inputDefinitions", {}).get("parameters", {})
    for name, definition in known.items():
        if name not in values:
            if "defaultValue" not in definition and not definition.get("isOptional"):
                raise UserError(f"the pipeline's parameter {name} has no value")
            continue
        right, value = _TYPES[definition["parameterType"]], values[name]
        if not isinstance(value, right) or (isinstance(value, bool) and bool not in right):
            raise UserError(f"the pipeline's parameter {name} is {json.dumps(value)}, not a {right[0].__name__}")
    for name in values:
        if name not in known:
            raise UserError(f"the pipeline has no parameter {name}, only {', '.join(known)}")


@dataclass(frozen=True)
class Sent:
    """What came of a submission."""

    name: str
    """ID of the job, or resource name of the schedule."""
    is_new: bool
    """False where the same was there already."""
    job: Job | None
    """None for a schedule."""


def submit(submission: Submission, credentials: "Credentials") -> Sent:
    """Sends a submission. Raises UserError if Vertex AI refuses it or does not answer."""
    vertex, job = Vertex(submission.place, credentials), submission.job()
    if submission.schedule:
        name, is_new = vertex.schedule(submission.job_id, submission.schedule, job, submission.max_runs)
        return Sent(name, is_new, None)
    found, is_new = vertex.create(submission.job_id, job)
    return Sent(found.job_id, is_new, found)

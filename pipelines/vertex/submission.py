"""A job for Vertex AI: its description for the user, its request for the service. Only `submit` uses the network."""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from google.cloud import aiplatform_v1
from google.protobuf import json_format

from components.lineage import components_of
from pipelines.vertex.client import Vertex
from pipelines.vertex.cluster import Cluster, base_output_directory
from pipelines.vertex.jobs import REQUEST_LABEL, Job, Place
from trainer.config import Config
from trainer.shared.errors import UserError

if TYPE_CHECKING:
    from google.auth.credentials import Credentials

_DEFAULT_ACCOUNT = (
    "PROJECT_NUMBER-compute@developer.gserviceaccount.com, the project's default service account of Compute Engine; "
    "--service-account names another"
)
"""The account that Vertex AI's pipelines and Dataflow's workers run as by default."""


@dataclass(frozen=True)
class Submission:
    """A job to send to Vertex AI."""

    place: Place
    job_id: str
    title: str
    cluster: Cluster
    pipeline_root: str
    raw: str
    """Folder of the raw archives; empty if the job reads none."""
    compile: Callable[[Cluster], dict[str, Any]]
    parameters: Mapping[str, Any]
    components: tuple[str, ...] = components_of("pretrain")
    """Components that the job runs."""
    init_from: str = ""
    """Checkpoint, or folder of checkpoints, that pretraining starts from; empty for none."""
    config: Config | None = None
    """Config of pretraining, which that checkpoint must fit."""
    encoder: str = ""
    """Checkpoint of other code that the job imports; empty for none."""
    schedule: str = ""
    """Cron expression of five fields for a recurring job; empty for a single job."""
    max_runs: int = 0
    """Number of jobs after which the schedule ends; 0 for no end."""

    def lines(self) -> Iterable[tuple[str, str]]:
        """Yields a description of the job for the user, as pairs of a name and a text."""
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
            if component == "import-encoder":
                yield component, "in its own container"
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
        if self.init_from:
            yield "starts from", self.init_from
        if self.encoder:
            yield "imports", self.encoder
        yield "writes", self.pipeline_root
        if "pretrain" in self.components:
            yield (
                "checkpoints",
                f"{base_output_directory(self.pipeline_root)}/checkpoints; a job with the same settings resumes from there",
            )
        yield "MLflow", cluster.mlflow
        yield "cache", "on: steps that ran before with the same inputs are reused" if cluster.caching else "off: every step runs"
        for name, value in (("network", cluster.network), ("encryption key", cluster.encryption_key)):
            if value:
                yield name, value
        if cluster.labels:
            yield "labels", ", ".join(f"{key}={value}" for key, value in cluster.labels.items())
        for name, value in self.parameters.items():
            yield f"parameter {name}", json.dumps(value)

    def job(self) -> aiplatform_v1.PipelineJob:
        """Returns the job as Vertex AI's message. Raises UserError for a job that Vertex AI would reject."""
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
        body["labels"] = {**self.cluster.labels, REQUEST_LABEL: digest}
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
    """Raises UserError if `values` do not match the parameters of the pipeline `spec`. The service reports this only later."""
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
    """The result of a submission."""

    name: str
    """ID of the job, or resource name of the schedule."""
    is_new: bool
    """False if the same job or schedule already existed."""
    job: Job | None
    """The job, or None for a schedule."""


def submit(submission: Submission, credentials: "Credentials") -> Sent:
    """Sends a submission and returns the result. Raises UserError if Vertex AI refuses it or does not answer."""
    vertex, job = Vertex(submission.place, credentials), submission.job()
    if submission.schedule:
        name, is_new = vertex.schedule(submission.job_id, submission.schedule, job, submission.max_runs)
        return Sent(name, is_new, None)
    found, is_new = vertex.create(submission.job_id, job)
    return Sent(found.job_id, is_new, found)

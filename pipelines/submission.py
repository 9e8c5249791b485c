"""What is sent to Vertex AI: the plan of a job in words, what is looked at before, the job itself.

A plan is made without a word to the network. The checks only read. `submit` is the one that sends.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from google.api_core import exceptions
from google.auth import exceptions as auth_exceptions
from google.cloud import aiplatform_v1
from google.protobuf import json_format

from components.lineage import COMPONENTS
from pipelines import accelerators
from pipelines.evaluation_plan import EvaluationPlan
from pipelines.images import Images
from pipelines.pipeline import Cluster
from pipelines.plan import Plan
from pipelines.vertex import PLAN_LABEL, Job, Place, Vertex, credentials
from trainer.shared.errors import UserError

if TYPE_CHECKING:
    from google.auth.credentials import Credentials

_PATTERNS = {
    "--project": (r"([a-z0-9.-]+:)?[a-z][a-z0-9-]{4,28}[a-z0-9]", "a project ID, as in my-project-123"),
    "--region": (r"[a-z]+-[a-z]+\d+", "a region, as in europe-west4"),
    "--pipeline-root": (r"gs://[a-z0-9][-_.a-z0-9]{1,220}[a-z0-9](/.*)?", "a folder in Cloud Storage, as in gs://BUCKET/sogclr"),
    "--raw": (r"gs://[a-z0-9][-_.a-z0-9]{1,220}[a-z0-9](/.*)?", "a folder in Cloud Storage, as in gs://BUCKET/imagenet"),
    "--job-id": (r"[a-z][-a-z0-9]{0,127}", "small letters, digits and hyphens, a letter first, 128 at most"),
    "--service-account": (r"[^@\s]+@[^@\s]+\.gserviceaccount\.com", "as in NAME@PROJECT.iam.gserviceaccount.com"),
    "--network": (r"projects/\d+/global/networks/[a-z][-a-z0-9]*", "as in projects/PROJECT_NUMBER/global/networks/NAME"),
    "--encryption-key": (
        r"projects/[^/]+/locations/[^/]+/keyRings/[^/]+/cryptoKeys/[^/]+",
        "as in projects/P/locations/REGION/keyRings/RING/cryptoKeys/KEY",
    ),
    "--mlflow-uri": (r"https?://[^/@\s]+(/[^@\s]*)?", "the URL of a server, without credentials: those are --mlflow-secret's"),
    "--mlflow-secret": (r"projects/[^/]+/secrets/[^/]+/versions/[^/]+", "as in projects/P/secrets/NAME/versions/latest"),
    "--schedule": (
        r"((CRON_)?TZ=\S+ )?[-*/,0-9A-Za-z]+( [-*/,0-9A-Za-z]+){4}",
        "five fields of cron, a time zone before them or not, as in 'TZ=Europe/Berlin 0 3 * * 1'",
    ),
}
_LABEL = re.compile(r"[a-z][-_a-z0-9]{0,62}=[-_a-z0-9]{0,63}")
_PATIENCE = 120.0
"""Seconds that Cloud Storage is asked again while it fails in a way that may pass."""
_DEFAULT_ACCOUNT = (
    "PROJECT_NUMBER-compute@developer.gserviceaccount.com, the project's default service account of Compute Engine; "
    "--service-account names another"
)
"""Whom Vertex AI's pipelines and Dataflow's workers run as where no account is named."""
_NEEDED_OF_BUCKET = ["storage.objects.create", "storage.objects.delete", "storage.objects.get", "storage.objects.list"]


def check_options(options: Mapping[str, str]) -> None:
    """Raises UserError for the first of the options, by name, that is not written as it must be; empty ones pass."""
    for name, value in options.items():
        pattern, right = _PATTERNS[name]
        if value and not re.fullmatch(pattern, value):
            # What stands in a secret's place may be the secret.
            shown = "VALUE" if name == "--mlflow-secret" else _without_secret(value)
            raise UserError(f"{name} {shown} is none: it must be {right}")


def parse_labels(items: Iterable[str]) -> dict[str, str]:
    """Returns KEY=VALUE items as labels. Raises UserError for what Google Cloud does not take as one."""
    for item in items:
        if not _LABEL.fullmatch(item):
            raise UserError(f"--label {item} is none: it must be key=value of small letters, digits, - and _, 63 each at most")
    return dict(item.split("=", 1) for item in items)


def _without_secret(value: str) -> str:
    return re.sub(r"//[^/@]*@", "//***@", value)


@dataclass(frozen=True)
class Submission:
    """One job, as it is to be sent."""

    place: Place
    job_id: str
    title: str
    cluster: Cluster
    pipeline_root: str
    raw: str
    """Folder of the raw archives that the job reads; empty where it reads none."""
    compile: Callable[[Cluster], dict[str, Any]]
    parameters: Mapping[str, Any]
    components: tuple[str, ...] = COMPONENTS
    """Those that it runs."""
    schedule: str = ""
    max_runs: int = 0
    plan: Plan | None = None
    """What `sogclr plan` found of its step, if it was asked."""
    evaluation: EvaluationPlan | None = None
    """What its evaluation will need; None where it runs none."""

    def lines(self) -> Iterable[tuple[str, str]]:
        """Yields the plan, a name and what it is."""
        cluster, place = self.cluster, self.place
        yield "what", self.title
        yield (
            ("schedule", f"{self.schedule}{f', {self.max_runs} times' if self.max_runs else ''}")
            if self.schedule
            else (
                "job",
                self.job_id,
            )
        )
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
        yield "MLflow", _mlflow_in_words(cluster.environment)
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


def base_output_directory(pipeline_root: str) -> str:
    """Returns the folder that custom jobs write under: the same for every job of a root, so that a later one finds it."""
    return f"{pipeline_root.rstrip('/')}/custom-jobs"


def _mlflow_in_words(environment: Mapping[str, str]) -> str:
    from components import variables

    uri, secret = environment.get("MLFLOW_TRACKING_URI", ""), environment.get(variables.SECRET, "")
    return f"{uri}, {f'credentials from {secret}' if secret else 'without credentials'}" if uri else "nowhere yet: --mlflow-uri"


_TYPES: dict[str, tuple[type, ...]] = {
    "STRING": (str,),
    "NUMBER_INTEGER": (int,),
    "NUMBER_DOUBLE": (int, float),
    "BOOLEAN": (bool,),
    "LIST": (list,),
    "STRUCT": (dict,),
}


def check_parameters(spec: Mapping[str, Any], values: Mapping[str, Any]) -> None:
    """Raises UserError where `values` are not the parameters of the pipeline `spec`: the service finds out only later."""
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


# ---- What is looked at before


@dataclass(frozen=True)
class Finding:
    """What one check found."""

    name: str
    ok: bool
    text: str
    """What is so, or what is missing and what to do."""
    looked: bool = True
    """Whether it could be looked at."""


@dataclass(frozen=True)
class Checked:
    """A submission that was looked at, with what was found out on the way."""

    submission: Submission
    findings: tuple[Finding, ...]
    credentials: "Credentials | None" = None

    @property
    def problems(self) -> list[Finding]:
        return [one for one in self.findings if not one.ok]


def look(submission: Submission, skip: Iterable[str] = ()) -> Checked:
    """Looks at all that can be known before anything is sent. Reads only; whatever it finds, it looks at the rest."""
    findings: list[Finding] = []
    found: list[Any] = [None, None]

    def run(name: str, check: Callable[[], str]) -> None:
        if name in skip:
            findings.append(Finding(name, True, "skipped", looked=False))
            return
        if name in _NEED_CREDENTIALS and found[0] is None:
            findings.append(Finding(name, False, "not looked at: that needs credentials", looked=False))
            return
        try:
            findings.append(Finding(name, True, check()))
        except UserError as error:
            findings.append(Finding(name, False, str(error)))

    def have_credentials() -> str:
        found[0], project = credentials()
        who = getattr(found[0], "service_account_email", "") or "a user"
        return f"of {who}{f', project {project}' if project else ''}"

    def have_images() -> str:
        images = submission.cluster.images.resolved(_token(found[0]), submission.cluster.builds)
        found[1] = images
        return ", ".join(images.reference(build) for build in submission.cluster.builds)

    run("options", lambda: _check_spec(submission))
    run("region", lambda: _check_region(submission))
    if "memory" not in skip:
        findings += _memory(submission)
    if submission.evaluation:
        run("evaluation", lambda: _check_evaluation(submission))
    run("mlflow", lambda: _check_mlflow(submission))
    run("credentials", have_credentials)
    run("vertex", lambda: _check_vertex(submission, found[0]))
    run("bucket", lambda: _check_bucket(submission, found[0]))
    run("images", have_images)
    identity = ""
    if submission.raw:

        def have_raw() -> str:
            nonlocal identity
            identity, text = _check_raw(submission)
            return text

        run("raw", have_raw)
    images: Images | None = found[1]
    checked = submission
    if images is not None:
        checked = replace(
            checked, cluster=replace(checked.cluster, images=images, beam_args=_with_image(checked.cluster, images))
        )
    if "raw_identity" in submission.parameters and identity:
        checked = replace(checked, parameters={**checked.parameters, "raw_identity": identity})
    return Checked(checked, tuple(findings), found[0])


CHECKS = ("options", "region", "memory", "evaluation", "mlflow", "vertex", "bucket", "images", "raw")
"""Those that can be skipped: all but the one for credentials, without which nothing can be sent."""
_NEED_CREDENTIALS = ("vertex", "bucket", "images", "raw")


def _with_image(cluster: Cluster, images: Images) -> tuple[str, ...]:
    """Returns Beam's options with the image by digest: its workers run exactly what the step runs."""
    option = "--sdk_container_image="
    return tuple(f"{option}{images.reference('cpu')}" if one.startswith(option) else one for one in cluster.beam_args)


def _check_spec(submission: Submission) -> str:
    size = len(json_format.MessageToJson(aiplatform_v1.PipelineJob.pb(submission.job())))
    return f"compiled and parsed, {size:,} bytes"


def _check_region(submission: Submission) -> str:
    region = submission.place.region
    used = {one for component in submission.components if (one := submission.cluster.accelerator_of(component))}
    for accelerator in used:
        accelerators.check_region(accelerator, region)
    if known := sorted(one.name for one in used if one.regions):
        return f"{region} has {', '.join(known)}, as Google's list says; quota is the project's own"
    return "no list of regions is kept but for TPUs"


def _memory(submission: Submission) -> list[Finding]:
    accelerator = submission.cluster.accelerator_of("pretrain")
    if "pretrain" not in submission.components or not accelerator or accelerator.build != "tpu":
        return []
    if submission.plan is None:
        text = f"whether the step fits into {accelerator.name} is not known; sogclr plan with the same preset and settings says"
        return [Finding("memory", True, text, looked=False)]
    return [Finding("memory", submission.plan.values["fits"], submission.plan.memory)]


def _check_evaluation(submission: Submission) -> str:
    assert submission.evaluation is not None
    if submission.evaluation.problems:
        raise UserError("; ".join(submission.evaluation.problems))
    return submission.evaluation.summary


def _check_mlflow(submission: Submission) -> str:
    if not submission.cluster.environment.get("MLFLOW_TRACKING_URI"):
        raise UserError("no MLflow server: --mlflow-uri URL, or MLFLOW_TRACKING_URI, must name one that the steps can reach")
    return _mlflow_in_words(submission.cluster.environment)


def _check_vertex(submission: Submission, who: "Credentials") -> str:
    vertex = Vertex(submission.place, who)
    vertex.check()
    there = None if submission.schedule else vertex.find(submission.job_id)
    return f"job {there.job_id} is there already ({there.state})" if there else "jobs can be made"


def _storage(submission: Submission, who: "Credentials") -> Any:
    from google.cloud import storage

    return storage.Client(project=submission.place.project, credentials=who)


def _check_bucket(submission: Submission, who: "Credentials") -> str:
    from google.cloud.storage.retry import DEFAULT_RETRY

    name = submission.pipeline_root.removeprefix("gs://").partition("/")[0]
    with _storage_errors(name, "roles/storage.objectUser and roles/storage.legacyBucketReader on it allow it"):
        patience = DEFAULT_RETRY.with_timeout(_PATIENCE)
        bucket = _storage(submission, who).get_bucket(name, retry=patience)
        # The steps write as themselves; who only submits need not be allowed to.
        needed = _NEEDED_OF_BUCKET[-2:] if submission.cluster.service_account else _NEEDED_OF_BUCKET
        allowed = bucket.test_iam_permissions(needed, retry=patience)
    missing = [one for one in needed if one not in allowed]
    if missing:
        raise UserError(f"gs://{name}: {', '.join(missing)} may not be done; roles/storage.objectUser on it allows it")
    what = f"gs://{name} is there" if submission.cluster.service_account else f"gs://{name} can be written"
    place = (bucket.location or "").lower()
    if place and not submission.place.region.startswith(place) and not place.startswith(submission.place.region):
        return f"{what}; it is in {place}, so reading it from {submission.place.region} may cost transfer"
    return what


def _check_raw(submission: Submission) -> tuple[str, str]:
    """Returns what identifies the raw data, and a word on it."""
    from apache_beam.io.filesystem import BeamIOError

    from beam_jobs.raw import raw_identity

    bucket = submission.raw.removeprefix("gs://").partition("/")[0]
    with _storage_errors(bucket, "roles/storage.objectViewer and roles/storage.legacyBucketReader on it allow it"):
        try:
            identity = raw_identity(submission.raw)
        except BeamIOError as error:
            if "NotFound" in str(error):
                raise UserError(f"there is no bucket gs://{bucket}: --raw must name the folder of the raw archives") from error
            raise UserError(f"{submission.raw} cannot be read: {' '.join(str(error).split())[:200]}") from error
    return identity, f"{submission.raw} can be read, identity {identity}"


class _storage_errors:  # noqa: N801  it is used as a function is
    """Says in words what Cloud Storage says of a bucket."""

    def __init__(self, bucket: str, remedy: str) -> None:
        self._bucket, self._remedy = bucket, remedy

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        import requests

        match error:
            case exceptions.NotFound():
                raise UserError(f"there is no bucket gs://{self._bucket}; docs/vertex.md makes it") from error
            case exceptions.Forbidden():
                raise UserError(f"gs://{self._bucket} may not be read: {self._remedy}") from error
            case exceptions.Unauthorized() | auth_exceptions.GoogleAuthError():
                raise UserError("the credentials do not hold: gcloud auth application-default login renews them") from error
            case exceptions.GoogleAPICallError() | requests.RequestException() | exceptions.RetryError():
                raise UserError(f"Cloud Storage does not answer for gs://{self._bucket}: {type(error).__name__}") from error


def _token(who: "Credentials") -> str:
    import google.auth.transport.requests

    try:
        who.refresh(google.auth.transport.requests.Request())
    except auth_exceptions.GoogleAuthError as error:
        raise UserError("the credentials do not hold: gcloud auth application-default login renews them") from error
    return str(who.token or "")


# ---- Sending


def submit(checked: Checked) -> tuple[Job | None, str, bool]:
    """Sends what was looked at. Returns the job, or None for a schedule; its name; and whether it was made just now."""
    submission = checked.submission
    assert checked.credentials is not None, "a submission without credentials has problems"
    vertex, job = Vertex(submission.place, checked.credentials), submission.job()
    if submission.schedule:
        name, made = vertex.schedule(submission.job_id, submission.schedule, job, submission.max_runs)
        return None, name, made
    found, made = vertex.create(submission.job_id, job)
    return found, found.job_id, made

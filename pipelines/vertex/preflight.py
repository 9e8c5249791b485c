"""The checks before a job is sent. They only read, and a failed check does not stop the others.

Each check imports Google's libraries itself, so that the command line can list the checks in its help without them.
"""

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from pipelines.vertex.accelerators import check_region
from trainer.config import config_from_dict, data_from, require_same_encoder
from trainer.shared.errors import UserError

if TYPE_CHECKING:
    from google.auth.credentials import Credentials

    from pipelines.vertex.cluster import Cluster
    from pipelines.vertex.images import Images
    from pipelines.vertex.submission import Submission

T = TypeVar("T")

CHECKS = ("options", "region", "memory", "evaluation", "mlflow", "vertex", "bucket", "images", "raw", "init-from", "encoder")
"""The checks that can be skipped: all but the check for credentials, because nothing can be sent without them."""


@dataclass(frozen=True)
class Finding:
    """The result of one check."""

    name: str
    ok: bool
    text: str
    """What the check found, or what is missing and what to do."""
    looked: bool = True
    """Whether the check ran."""


@dataclass(frozen=True)
class PreflightReport:
    """A submission and the results of its checks."""

    submission: "Submission"
    """The submission, completed with what the checks found: images' digests, identities of raw data and first checkpoint."""
    findings: tuple[Finding, ...]
    credentials: "Credentials | None" = None

    @property
    def problems(self) -> list[Finding]:
        return [one for one in self.findings if not one.ok]


def run_preflight(submission: "Submission", estimates: Iterable[Finding] = (), skip: Collection[str] = ()) -> PreflightReport:
    """Runs all checks but those in `skip`. `estimates` are the findings about memory and evaluation."""

    def run_check(name: str, check: Callable[[], tuple[str, T]]) -> tuple[Finding, T | None]:
        if name in skip:
            return _skipped(name), None
        try:
            text, found = check()
            return Finding(name, True, text), found
        except UserError as error:
            return Finding(name, False, str(error)), None

    def check_with_credentials(
        name: str, check: Callable[["Submission", "Credentials"], tuple[str, T]]
    ) -> tuple[Finding, T | None]:
        if who is None:
            absent = Finding(name, False, "not checked: it needs credentials", looked=False)
            return (_skipped(name) if name in skip else absent), None
        return run_check(name, partial(check, submission, who))

    options, _ = run_check("options", lambda: _check_spec(submission))
    region, _ = run_check("region", lambda: _check_region(submission))
    estimated = [_skipped(one.name) if one.name in skip else one for one in estimates]
    mlflow, _ = run_check("mlflow", lambda: _check_mlflow(submission))
    access, who = run_check("credentials", _check_credentials)
    vertex, _ = check_with_credentials("vertex", _check_vertex)
    bucket, _ = check_with_credentials("bucket", _check_bucket)
    images, resolved = check_with_credentials("images", _check_images)
    raw, identity = check_with_credentials("raw", _check_raw) if submission.raw else (None, None)
    begun, started = check_with_credentials("init-from", _check_init_from) if submission.init_from else (None, None)
    imported, source = check_with_credentials("encoder", _check_encoder) if submission.encoder else (None, None)
    findings = (options, region, *estimated, mlflow, access, vertex, bucket, images, *filter(None, (raw, begun, imported)))
    return PreflightReport(_completed(submission, resolved, identity, started or source or {}), findings, who)


def _skipped(name: str) -> Finding:
    return Finding(name, True, "skipped", looked=False)


def _completed(
    submission: "Submission", images: "Images | None", identity: str | None, started: Mapping[str, str]
) -> "Submission":
    """Returns a submission with these images, this identity of the raw data and these parameters of its checkpoint.

    None and empty leave the submission's own.
    """
    if images is not None:
        cluster = submission.cluster
        cluster = replace(cluster, images=images, beam_args=_with_image(cluster, images))
        submission = replace(submission, cluster=cluster)
    if identity and "raw_identity" in submission.parameters:
        submission = replace(submission, parameters={**submission.parameters, "raw_identity": identity})
    if started.keys() <= submission.parameters.keys():
        submission = replace(submission, parameters={**submission.parameters, **started})
    return submission


def _with_image(cluster: "Cluster", images: "Images") -> tuple[str, ...]:
    """Returns Beam's options with the image by digest, so that Beam's workers run exactly the step's image."""
    option = "--sdk_container_image="
    return tuple(f"{option}{images.reference('cpu')}" if one.startswith(option) else one for one in cluster.beam_args)


# ---- The checks. Each returns a text about what it found, and the thing itself or None


def _check_spec(submission: "Submission") -> tuple[str, None]:
    from google.cloud import aiplatform_v1
    from google.protobuf import json_format

    size = len(json_format.MessageToJson(aiplatform_v1.PipelineJob.pb(submission.job())))
    return f"compiled and parsed, {size:,} bytes", None


def _check_region(submission: "Submission") -> tuple[str, None]:
    region = submission.place.region
    used = {one for component in submission.components if (one := submission.cluster.accelerator_of(component))}
    for accelerator in used:
        check_region(accelerator, region)
    if known := sorted(one.name for one in used if one.regions):
        return f"{region} has {', '.join(known)} by Google's list; the project's quota is not checked", None
    return "not checked: this project keeps lists of regions for TPUs only", None


def _check_mlflow(submission: "Submission") -> tuple[str, None]:
    if not submission.cluster.environment.get("MLFLOW_TRACKING_URI"):
        raise UserError("no MLflow server: name one that the steps can reach with --mlflow-uri URL or MLFLOW_TRACKING_URI")
    return submission.cluster.mlflow, None


def _check_credentials() -> tuple[str, "Credentials"]:
    from pipelines.vertex.credentials import find_credentials

    found, project = find_credentials()
    who = getattr(found, "service_account_email", "") or "a user"
    return f"of {who}{f', project {project}' if project else ''}", found


def _check_vertex(submission: "Submission", who: "Credentials") -> tuple[str, None]:
    from pipelines.vertex.client import Vertex

    vertex = Vertex(submission.place, who)
    vertex.check()
    existing = None if submission.schedule else vertex.find(submission.job_id)
    return f"job {existing.job_id} already exists ({existing.state})" if existing else "jobs can be made", None


def _check_bucket(submission: "Submission", who: "Credentials") -> tuple[str, None]:
    from pipelines.vertex.storage import check_bucket

    # With a service account, the steps write with that account, and the submitting user needs no write access.
    writes = not submission.cluster.service_account
    return check_bucket(submission.pipeline_root, submission.place, who, writes=writes), None


def _check_images(submission: "Submission", who: "Credentials") -> tuple[str, "Images"]:
    from pipelines.vertex.credentials import access_token

    builds = submission.cluster.builds
    images = submission.cluster.images.resolved(access_token(who), builds)
    return ", ".join(images.reference(build) for build in builds), images


def _check_raw(submission: "Submission", who: "Credentials") -> tuple[str, str]:
    from pipelines.vertex.storage import raw_identity

    data = data_from(submission.parameters.get("data_settings", []))
    identity = raw_identity(submission.raw, data.files.values(), validation=data.validation)
    return f"{submission.raw} can be read, identity {identity}", identity


def _check_init_from(submission: "Submission", who: "Credentials") -> tuple[str, Mapping[str, str]]:
    from pipelines.vertex.storage import find_checkpoint

    path, identity, about = find_checkpoint(submission.init_from, submission.place, who)
    if submission.config is not None:
        # A run's own checkpoint has its heads. An imported encoder, which has no dataset, may lack them.
        has_head = "dataset_fingerprint" in about
        require_same_encoder(path, config_from_dict(about["config"]), submission.config, has_head)
    return f"{path} fits", {"init_from": path, "init_identity": identity}


def _check_encoder(submission: "Submission", who: "Credentials") -> tuple[str, Mapping[str, str]]:
    from pipelines.vertex.storage import identity_of_files

    files, identity = identity_of_files(submission.encoder, submission.place, who)
    return f"{submission.encoder} can be read, {files} file{'s' * (files > 1)}", {"encoder_identity": identity}

"""Formats of the options that Google Cloud reads: projects, regions, folders, accounts, labels."""

import re
from collections.abc import Iterable, Mapping

from trainer.shared.errors import UserError

_PATTERNS = {
    "--project": (r"([a-z0-9.-]+:)?[a-z][a-z0-9-]{4,28}[a-z0-9]", "a project ID, as in my-project-123"),
    "--region": (r"[a-z]+-[a-z]+\d+", "a region, as in europe-west4"),
    "--pipeline-root": (r"gs://[a-z0-9][-_.a-z0-9]{1,220}[a-z0-9](/.*)?", "a folder in Cloud Storage, as in gs://BUCKET/sogclr"),
    "--raw": (r"gs://[a-z0-9][-_.a-z0-9]{1,220}[a-z0-9](/.*)?", "a folder in Cloud Storage, as in gs://BUCKET/imagenet"),
    "--init-from": (
        r"gs://[a-z0-9][-_.a-z0-9]{1,220}[a-z0-9](/.*)?",
        "a checkpoint or a folder of checkpoints in Cloud Storage, as in gs://BUCKET/sogclr/checkpoints/RUN",
    ),
    "--encoder": (
        r"gs://[a-z0-9][-_.a-z0-9]{1,220}[a-z0-9]/.+",
        "a checkpoint in Cloud Storage, as in gs://BUCKET/encoders/model.ckpt-2: gcloud storage cp copies it there",
    ),
    "--job-id": (r"[a-z][-a-z0-9]{0,127}", "at most 128 lower-case letters, digits and hyphens, a letter first"),
    "--service-account": (r"[^@\s]+@[^@\s]+\.gserviceaccount\.com", "as in NAME@PROJECT.iam.gserviceaccount.com"),
    "--network": (r"projects/\d+/global/networks/[a-z][-a-z0-9]*", "as in projects/PROJECT_NUMBER/global/networks/NAME"),
    "--encryption-key": (
        r"projects/[^/]+/locations/[^/]+/keyRings/[^/]+/cryptoKeys/[^/]+",
        "as in projects/P/locations/REGION/keyRings/RING/cryptoKeys/KEY",
    ),
    "--mlflow-uri": (r"https?://[^/@\s]+(/[^@\s]*)?", "the URL of a server without credentials, which --mlflow-secret names"),
    "--mlflow-secret": (r"projects/[^/]+/secrets/[^/]+/versions/[^/]+", "as in projects/P/secrets/NAME/versions/latest"),
    "--schedule": (
        r"((CRON_)?TZ=\S+ )?[-*/,0-9A-Za-z]+( [-*/,0-9A-Za-z]+){4}",
        "five fields of cron with an optional time zone, as in 'TZ=Europe/Berlin 0 3 * * 1'",
    ),
}
_LABEL = re.compile(r"[a-z][-_a-z0-9]{0,62}=[-_a-z0-9]{0,63}")


def check_options(options: Mapping[str, str]) -> None:
    """Raises UserError for the first option with an invalid value. Empty values are valid."""
    for name, value in options.items():
        pattern, right = _PATTERNS[name]
        if value and not re.fullmatch(pattern, value):
            # The user may have given the secret itself instead of its name.
            shown = "VALUE" if name == "--mlflow-secret" else _without_secret(value)
            raise UserError(f"{name} {shown} is not valid: it must be {right}")


def parse_labels(items: Iterable[str]) -> dict[str, str]:
    """Returns KEY=VALUE items as labels. Raises UserError for an item that is not a valid label on Google Cloud."""
    for item in items:
        if not _LABEL.fullmatch(item):
            raise UserError(
                f"--label {item} is not valid: it must be key=value, each at most 63 lower-case letters, digits, - and _"
            )
    return dict(item.split("=", 1) for item in items)


def _without_secret(value: str) -> str:
    return re.sub(r"//[^/@]*@", "//***@", value)

"""The label by which a Dataflow job says which pipeline job it belongs to."""

import hashlib
import re

JOB_LABEL = "sogclr-job"
_LONGEST = 63


def label_of(job: str) -> str:
    """Returns the value of `JOB_LABEL` for a pipeline job's name: itself, or cut and with a digest if no label can hold it."""
    if len(job) <= _LONGEST and re.fullmatch(r"[a-z0-9_-]+", job):
        return job
    digest = hashlib.sha256(job.encode()).hexdigest()[:12]
    return f"{re.sub(r'[^a-z0-9_-]', '-', job.lower())[: _LONGEST - len(digest) - 1]}-{digest}"

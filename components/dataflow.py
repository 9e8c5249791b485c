"""The label that links a Dataflow job to its pipeline job."""

import hashlib
import re

JOB_LABEL = "sogclr-job"
_LONGEST = 63


def label_of(job: str) -> str:
    """Returns the value of `JOB_LABEL` for a pipeline job: its name, shortened with a digest if it is not a valid label."""
    if len(job) <= _LONGEST and re.fullmatch(r"[a-z0-9_-]+", job):
        return job
    digest = hashlib.sha256(job.encode()).hexdigest()[:12]
    return f"{re.sub(r'[^a-z0-9_-]', '-', job.lower())[: _LONGEST - len(digest) - 1]}-{digest}"

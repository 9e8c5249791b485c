"""Everything that knows MLflow: stores, runs and their contents, and the notes and the picture that link runs.

A pipeline's run is the parent of its steps' runs. `names` lists the tags that lead from one run to the others. A step's
arguments and outputs are in its run's artifact `step.json`. Nothing here uses MLflow's active run: every call names its run.

An unreachable server does not stop a job: metrics queue in a file, other calls retry until a timeout, the store's patience.
"""

from components.patience import without_credentials
from components.tracking.credentials import move_credentials, read_secret
from components.tracking.names import CURVES, DATASET_PAGE, IMPORT_FILE, REPORT
from components.tracking.pipeline_runs import (
    end_job,
    end_pipeline,
    find_job,
    job_of,
    join,
    log_estimate,
    note_started,
    pipeline_of_job,
    running,
    start_pipeline,
)
from components.tracking.recorded import find_run, find_step, history_behind, knows, picture_uri, was_recorded, why_lost
from components.tracking.references import references
from components.tracking.registry import ENCODER
from components.tracking.step_runs import StepRun, recorded_before, step
from components.tracking.store import EXPERIMENT, Store, describe_store, open_job_store, open_root, open_store, patient

__all__ = [
    "CURVES",
    "DATASET_PAGE",
    "ENCODER",
    "EXPERIMENT",
    "IMPORT_FILE",
    "REPORT",
    "StepRun",
    "Store",
    "describe_store",
    "end_job",
    "end_pipeline",
    "find_job",
    "find_run",
    "find_step",
    "history_behind",
    "job_of",
    "join",
    "knows",
    "log_estimate",
    "move_credentials",
    "note_started",
    "open_job_store",
    "open_root",
    "open_store",
    "patient",
    "picture_uri",
    "pipeline_of_job",
    "read_secret",
    "recorded_before",
    "references",
    "running",
    "start_pipeline",
    "step",
    "was_recorded",
    "why_lost",
    "without_credentials",
]

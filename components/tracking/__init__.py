"""All that is known of MLflow: stores, runs, what they record, and the words and the picture that join them.

A pipeline's run is the parent of its steps' runs. `names` lists the tags by which one run leads to the others. The arguments
and outputs of a step are in its run's artifact `step.json`. Nothing here uses MLflow's notion of an active run: every call
names its run.

An unreachable server does not stop a job: metrics queue in a file, and other calls are repeated until the store's patience
ends.
"""

from components.patience import without_credentials
from components.tracking.credentials import move_credentials, read_secret
from components.tracking.names import CURVES, DATASET_PAGE, REPORT
from components.tracking.pipeline_runs import (
    end_job,
    end_pipeline,
    find_job,
    job_of,
    join,
    log_plan,
    pipeline_of_job,
    start_pipeline,
)
from components.tracking.recorded import find_run, find_step, history_behind, knows, picture_uri
from components.tracking.registry import ENCODER
from components.tracking.step_runs import StepRun, recorded_before, step
from components.tracking.store import EXPERIMENT, Store, describe_store, open_job_store, open_store, patient

__all__ = [
    "CURVES",
    "DATASET_PAGE",
    "ENCODER",
    "EXPERIMENT",
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
    "log_plan",
    "move_credentials",
    "open_job_store",
    "open_store",
    "patient",
    "picture_uri",
    "pipeline_of_job",
    "read_secret",
    "recorded_before",
    "start_pipeline",
    "step",
    "without_credentials",
]

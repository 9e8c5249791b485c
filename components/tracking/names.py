"""Names of the tags and files that describe runs in MLflow and link them.

Names that begin with `mlflow.` are MLflow's own: its UI shows their values.
"""

# ---- Tags of a run

COMPONENT = "sogclr.component"
"""The kind of run: one of `lineage.COMPONENTS`, or `PIPELINE`, or `ESTIMATE`."""
PIPELINE = "pipeline"
"""A pipeline's run, the parent of its steps' runs."""
ESTIMATE = "plan"
"""A run that holds the cost estimate of `sogclr plan`."""

PARENT = "mlflow.parentRunId"
"""The pipeline's run that is the parent of a step's run."""
RUN_OF = "sogclr.run."
"""Prefix, followed by a component's name: the run of that component. On a step's run, that is the run itself or a run whose
output it used. On a pipeline's run, it is one of its steps. So one search finds every run that depends on a given run."""
RERUN_OF = "sogclr.rerun_of"
"""The step's run that this pipeline's run repeats."""
RESUMED_FROM = "sogclr.resumed_from"
"""The run whose checkpoints and metrics this run resumed from."""

INIT_FROM = "sogclr.init_from"
"""The checkpoint that this run started from."""
INIT_STATE = "sogclr.init_from.state_sha256"
"""Digest of the state in that checkpoint."""
INIT_RUN = "sogclr.init_from.run_id"
"""The run that made that checkpoint. Absent if this store has no encoder of that state."""
STARTING = "sogclr.starting"
"""Name of a pipeline run's log until the log has the run's ID. Removed then."""

JOB = "sogclr.job"
"""Name of the pipeline job."""
JOB_FOLDER = "sogclr.job_folder"
"""Parent resource of the pipeline job: projects/PROJECT/locations/REGION."""
JOB_LINK = "sogclr.job_link"
"""Page of the pipeline job in Google's console."""

CODE = "sogclr.code_version"
"""Digest of the project's sources."""
COMMIT = "mlflow.source.git.commit"
"""Commit of the project's sources."""
IMAGE = "sogclr.image"
"""The container image of the run."""
COMMAND = "sogclr.command"
"""The command that repeats the run."""
ROOT = "sogclr.root"
"""The --root of that command. Absent if the command needs none."""

DEVICE = "sogclr.device"
"""Device of the step's last attempt."""
TENSORFLOW = "sogclr.tensorflow"
"""TensorFlow version of the step's last attempt."""
REPLICAS = "sogclr.replicas"
"""Number of replicas of the step's last attempt."""

PHASE = "sogclr.phase"
"""What the step does now, or was doing when it failed. Absent from a finished run."""

ERROR = "sogclr.error"
"""Why the step failed, in one line."""
USER_ERROR = "sogclr.user_error"
"""Whether the user can fix the error: true or false."""

DATASET_FINGERPRINT = "sogclr.dataset_fingerprint"
"""Fingerprint of the dataset that the step made or read."""
ENCODER_URI = "sogclr.encoder_uri"
"""Folder of the encoder that the step read. Set if the encoder's model is in another store."""
NOTE = "mlflow.note.content"
"""The run's description in Markdown."""

# ---- Tags of a dataset that is a run's input

CONTEXT = "mlflow.data.context"
"""The role of the dataset in the run: "training", "eval", "output" or "features"."""
DATASET_URI = "uri"
"""Folder or file of the dataset."""
FINGERPRINT = "fingerprint"
"""Fingerprint of the dataset of images."""
DATASET_RUN = "run_id"
"""The run that made the dataset."""

# ---- Tags of a registered version and of a logged model. The version also has the parameters of pretraining as tags.

STATE = "state_sha256"
"""Digest of the encoder's training state. A parameter of the logged model and a tag of the version."""
TRAINED_ON = "dataset_fingerprint"
"""Fingerprint of the dataset that the encoder was pretrained on."""
MODEL_URI = "uri"
"""Folder of the encoder's checkpoints."""
TOP_1 = "top_1"
"""Top-1 accuracy of the last linear eval, between 0 and 1."""
TOP_1_DATASET = "top_1.dataset_fingerprint"
"""Fingerprint of the dataset that top-1 was measured on."""
TOP_1_RUN = "top_1.run_id"
"""The run that measured top-1."""
MODEL_VERSIONS = "mlflow.modelVersions"
"""Registered versions of the logged model, as JSON."""

# ---- Files

ARGUMENTS_FILE = "arguments.json"
"""Arguments of a step."""
STEP_FILE = "step.json"
"""Arguments and outputs of a step that made its outputs."""
LINEAGE_PICTURE = "lineage.png"
"""The picture of a pipeline run's lineage."""
ESTIMATE_FILE = "plan.json"
"""The cost estimate of `sogclr plan`."""
DATASET_PAGE = "dataset.html"
"""A page that shows the contents of a dataset."""
CURVES = "curves.png"
"""Training curves of pretraining."""
REPORT = "report.html"
"""The report of a linear eval."""

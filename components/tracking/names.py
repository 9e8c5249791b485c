"""Names of the tags and files by which runs in MLflow say what they are and lead to each other.

Names that begin with `mlflow.` are MLflow's own: its UI shows what they hold.
"""

# ---- Tags of a run

COMPONENT = "sogclr.component"
"""What the run is of: one of `lineage.COMPONENTS`, or `PIPELINE`, or `PLAN`."""
PIPELINE = "pipeline"
"""A pipeline's run, the parent of its steps' runs."""
PLAN = "plan"
"""The run that holds a plan."""

PARENT = "mlflow.parentRunId"
"""The pipeline's run that a step's run is nested in."""
RUN_OF = "sogclr.run."
"""With a component's name behind it: the run of that component. It is the run itself, or one that the run follows from, or one
that a pipeline's run consists of. So one search finds everything that came of a run."""
RERUN_OF = "sogclr.rerun_of"
"""The step's run that this pipeline's run does again."""
RESUMED_FROM = "sogclr.resumed_from"
"""The run whose checkpoints and metrics this run goes on from."""

JOB = "sogclr.job"
"""Name of the pipeline job."""
JOB_FOLDER = "sogclr.job_folder"
"""Where the pipeline job is: projects/PROJECT/locations/REGION."""
JOB_LINK = "sogclr.job_link"
"""Page of the pipeline job in Google's console."""

CODE = "sogclr.code_version"
"""Digest of the project's sources."""
COMMIT = "mlflow.source.git.commit"
"""Commit of the project's sources."""
IMAGE = "sogclr.image"
"""The image that the run was in."""
COMMAND = "sogclr.command"
"""The command that does the same again."""
ROOT = "sogclr.root"
"""The --root that the command needs. Absent where it needs none."""

DEVICE = "sogclr.device"
"""What the step last ran on."""
TENSORFLOW = "sogclr.tensorflow"
"""Version of TensorFlow that the step last ran with."""
REPLICAS = "sogclr.replicas"
"""Number of replicas that the step last ran with."""

ERROR = "sogclr.error"
"""Why the step failed, one line."""
USER_ERROR = "sogclr.user_error"
"""Whether the user can fix the error: true or false."""

DATASET_FINGERPRINT = "sogclr.dataset_fingerprint"
"""Fingerprint of the dataset that the step made or read."""
ENCODER_URI = "sogclr.encoder_uri"
"""Folder of the encoder that the step read, where another store has its model."""
NOTE = "mlflow.note.content"
"""The run's description in Markdown."""

# ---- Tags of a dataset that is a run's input

CONTEXT = "mlflow.data.context"
"""What the dataset is to the run: "training", "eval", "output" or "features"."""
DATASET_URI = "uri"
"""Folder or file of the dataset."""
FINGERPRINT = "fingerprint"
"""Fingerprint of the dataset of images."""
DATASET_RUN = "run_id"
"""The run that made the dataset."""

# ---- Tags of a registered version, and of a logged model. Parameters of pretraining are tags of the version too.

STATE = "state_sha256"
"""Digest of the encoder's training state. A parameter of the logged model, and a tag of the version."""
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

STEP_FILE = "step.json"
"""Arguments and outputs of a step."""
LINEAGE_PICTURE = "lineage.png"
"""The picture of a pipeline run's lineage."""
PLAN_FILE = "plan.json"
"""What `sogclr plan` foresees."""
DATASET_PAGE = "dataset.html"
"""What a dataset holds."""
CURVES = "curves.png"
"""Curves of pretraining."""
REPORT = "report.html"
"""What a linear eval measured."""

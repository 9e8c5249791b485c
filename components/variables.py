"""The environment variables by which a pipeline tells its steps where they are. MLflow's own come beside them."""

SECRET = "SOGCLR_MLFLOW_SECRET"
"""Version of a Secret Manager secret with what MLflow's server wants to see: a token, or USER:PASSWORD."""

JOB_FOLDER = "SOGCLR_JOB_FOLDER"
"""Where on Vertex AI pipeline jobs are: projects/PROJECT/locations/REGION."""

IMAGE = "SOGCLR_IMAGE"
"""The image that a step runs in."""

COMMIT = "SOGCLR_COMMIT"
"""The commit of the code in an image, which has no repository to ask."""

RERUN_OF = "SOGCLR_RERUN_OF"
"""MLflow run of the step that this job does again."""

ACCELERATOR = "SOGCLR_ACCELERATOR"
"""The accelerator that a step was given and must find, as in "v5e-8 tpu 8": name, build of TensorFlow, replicas."""

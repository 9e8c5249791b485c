"""Environment variables that a pipeline sets for its steps, besides MLflow's own."""

SECRET = "SOGCLR_MLFLOW_SECRET"
"""Version of the Secret Manager secret that holds the credentials of MLflow's server: a token, or USER:PASSWORD."""

JOB_FOLDER = "SOGCLR_JOB_FOLDER"
"""Parent resource of the pipeline jobs on Vertex AI: projects/PROJECT/locations/REGION."""

IMAGE = "SOGCLR_IMAGE"
"""The container image that a step runs in."""

COMMIT = "SOGCLR_COMMIT"
"""The commit of the code in an image. An image has no git repository to read it from."""

RERUN_OF = "SOGCLR_RERUN_OF"
"""MLflow run of the step that this job reruns."""

ACCELERATOR = "SOGCLR_ACCELERATOR"
"""The accelerator that a step must use: its name, TensorFlow build and replicas, for example "v5e-8 tpu 8"."""

REUSE = "SOGCLR_REUSE"
"""Set if a step goes on from work with the same settings and data that another job on this machine has finished."""

SECONDS_BETWEEN_LINES = "SOGCLR_SECONDS_BETWEEN_LINES"
"""How often a step says how far it is, for a program that draws bars of it."""

DATASETS = "SOGCLR_DATASETS"
"""Parent folder of the datasets that conversions make. An interrupted conversion is found again in it."""

FEATURES = "SOGCLR_FEATURES"
"""Parent folder of stored features. Every evaluation of this machine finds them again in it."""

LISTING = "SOGCLR_LISTING"
"""File with the listing of the raw folder that the command made for the raw data's identity."""

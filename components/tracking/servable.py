"""Writes a model folder that MLflow can serve: a SavedModel, the code that loads it, and the server's requirements."""

from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import mlflow
import numpy as np
from mlflow.models import Model, ModelSignature
from mlflow.types import ColSpec, DataType, Schema, TensorSpec

_LOADER = "eval.serving"
_SERVED_WITH = ("mlflow", "numpy", "pandas", "keras", "protobuf")
"""Packages that a server installs besides TensorFlow, in the versions installed here."""


def save_servable(folder: str, saved_model: Path, model_id: str, run_id: str) -> None:
    """Writes the servable model to `folder`.

    It includes the packages that the loader needs, so a server needs neither this project nor the machine that trained.
    """
    tensorflow = metadata.packages_distributions()["tensorflow"][0]
    needed = [f"{name}=={metadata.version(name)}" for name in _SERVED_WITH]
    # The TPU build of TensorFlow is for training only; a server installs the standard build.
    needed.append(f"{tensorflow.replace('_', '-').removesuffix('-tpu')}=={metadata.version(tensorflow)}")
    packages = [str(Path(str(spec.origin)).parent) for spec in map(find_spec, ("eval", "trainer")) if spec]
    inputs, outputs = ColSpec(DataType.binary, "image_bytes"), TensorSpec(np.dtype(np.float32), (-1, -1))
    mlflow.pyfunc.save_model(
        folder,
        loader_module=_LOADER,
        data_path=str(saved_model),
        code_paths=packages,
        pip_requirements=needed,
        mlflow_model=Model(
            run_id=run_id, model_id=model_id, signature=ModelSignature(inputs=Schema([inputs]), outputs=Schema([outputs]))
        ),
    )

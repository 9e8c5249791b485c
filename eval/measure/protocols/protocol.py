"""The interface of a protocol: a name, a description, the work it takes, and a function from a context to scores or values."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from eval.measure.features import Features, StoredFeatures
from trainer.checkpoint import Checkpoint
from trainer.config import Config
from trainer.settings import LinearEvalSettings
from trainer.shared.progress import OnProgress, silent
from trainer.shared.records import Manifest


@dataclass(frozen=True)
class Sizes:
    """The sizes that determine the work of an evaluation."""

    train: int
    """Number of training images."""
    validation: int
    """Number of validation images."""
    classes: int
    features: int
    """F, the number of features of an image."""


@dataclass(frozen=True)
class Work:
    """The computation of a protocol, without the forward pass that all protocols share."""

    forward: int = 0
    """Number of images in forward passes with BN in inference mode."""
    trained: int = 0
    """Number of images in forward and backward passes of training."""
    flops: float = 0.0
    """FLOPs of the matrix products in fits, neighbour searches and the global objective."""
    memory_bytes: float = 0.0
    """Memory that no other protocol needs."""
    disk_bytes: float = 0.0
    """Size of the files that no other protocol reads."""


@dataclass(frozen=True)
class Context:
    """The input of a protocol: an encoder, a dataset, their features, and callbacks."""

    config: Config
    """Settings of pretraining and of this evaluation."""
    data_dir: str
    manifest: Manifest
    strategy: tf.distribute.Strategy
    checkpoint: Checkpoint
    encoder: keras.Model
    train: StoredFeatures
    """Features of the training images. For the control, those of the images that it is fitted to."""
    validation: Features
    """Features of all validation images, in the order of their IDs."""
    features_dir: str
    """Parent of the folders of features."""
    shares_features: bool
    """Whether other evaluations of this machine use `features_dir` too."""
    work_dir: str
    """Folder for the state that an interrupted protocol resumes from."""
    on_progress: OnProgress = silent
    should_stop: Callable[[], bool] = lambda: False
    """Returns whether to raise PreemptedError soon."""

    @property
    def settings(self) -> LinearEvalSettings:
        return self.config.linear_eval

    @property
    def sizes(self) -> Sizes:
        return Sizes(self.train.count, len(self.validation.labels), self.manifest.num_classes, self.train.dim)


@dataclass(frozen=True)
class Scores:
    """The output of a protocol: scores of every class for every validation image."""

    logits: np.ndarray
    """[n, C] float32, in the order of image IDs. The prediction is the label with the largest logit."""
    settings: Mapping[str, Any]
    """Settings that the protocol used, to record with the accuracy."""
    arrays: Mapping[str, Any] = field(default_factory=dict)
    """Learned weights to save."""


@dataclass(frozen=True)
class Values:
    """The output of a protocol that classifies nothing: numbers."""

    values: Mapping[str, float]
    """Numbers by name. MLflow's names are `eval/` and these. The one with the protocol's name stands for it."""
    conditions: Mapping[str, Any]
    """What the numbers depend on, besides the dataset and the encoder. Only numbers of equal conditions are comparable."""
    settings: Mapping[str, Any]
    """Other settings that the protocol used, to record with the values."""


@dataclass(frozen=True)
class Protocol:
    name: str
    description: str
    """One line for reports."""
    work: Callable[[Config, Sizes], Work]
    measure: Callable[[Context], Scores | Values]
    check: Callable[[Config, Manifest, int], None] = lambda config, manifest, replicas: None
    """Raises UserError if the settings do not fit the dataset or the number of replicas. Runs before any computation."""
    uses_features_of: tuple[str, ...] = ()
    """Splits whose features it uses. The duration of their forward pass is added to the protocol's."""
    encoder: str = "pretrained"
    """The encoder that it measures: `pretrained` or `untrained`."""
    needs: str = ""
    """The part of a checkpoint that it needs besides the encoder: `classifier` or `projection`. Imported encoders may lack it."""

    @property
    def row(self) -> str:
        """Unique name of this protocol's row in an evaluation."""
        return self.name if self.encoder == "pretrained" else self.encoder

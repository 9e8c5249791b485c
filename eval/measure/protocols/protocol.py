"""What a protocol is: a name, a line of description, the work it takes, and one function from a context to scores."""

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
from trainer.shared.records import Manifest


@dataclass(frozen=True)
class Sizes:
    """What the work of an evaluation grows with."""

    train: int
    """Images."""
    validation: int
    """Images."""
    classes: int
    features: int
    """F, dimensions."""


@dataclass(frozen=True)
class Work:
    """What a protocol computes besides what others leave it."""

    forward: int = 0
    """Images through the encoder with BN in inference mode."""
    trained: int = 0
    """Images through the encoder forward and backward."""
    flops: float = 0.0
    """Of the matrix products of fits and neighbours."""


@dataclass(frozen=True)
class Context:
    """What a protocol measures: an encoder on a dataset, and the means to do it."""

    config: Config
    """Of pretraining, with the settings of this evaluation."""
    data_dir: str
    manifest: Manifest
    strategy: tf.distribute.Strategy
    checkpoint: Checkpoint
    encoder: keras.Model
    train: StoredFeatures
    """Of the training images, or of those that `encoder` is fitted to."""
    validation: Features
    """Of all validation images, in the order of their IDs."""
    features_dir: str
    """Folder that features are kept under."""
    work_dir: str
    """Folder that keeps what an interrupted protocol goes on from."""
    on_progress: Callable[[float, str], None] = lambda done, text: None
    """Told the part done, in [0, 1], and what is being done."""
    should_stop: Callable[[], bool] = lambda: False
    """Whether to raise PreemptedError soon."""

    @property
    def settings(self) -> LinearEvalSettings:
        return self.config.linear_eval

    @property
    def sizes(self) -> Sizes:
        return Sizes(self.train.count, len(self.validation.labels), self.manifest.num_classes, self.train.dim)


@dataclass(frozen=True)
class Scores:
    """What a protocol says of the validation images."""

    logits: np.ndarray
    """[n, C] float32, by image ID: the label that is told is the largest's."""
    settings: Mapping[str, Any]
    """What it used, to stand beside the accuracy."""
    arrays: Mapping[str, Any] = field(default_factory=dict)
    """What it learned, if that is kept."""


@dataclass(frozen=True)
class Protocol:
    name: str
    description: str
    """One line, for people."""
    work: Callable[[Config, Sizes], Work]
    scores: Callable[[Context], Scores]
    check: Callable[[Config, Manifest, int], None] = lambda config, manifest, replicas: None
    """Raises UserError for settings that cannot work on a dataset and so many replicas, before anything is computed."""
    stands_on: tuple[str, ...] = ()
    """Splits whose features it uses: their forward pass counts as its time too."""
    encoder: str = "pretrained"
    """What it measures: the `pretrained` encoder, or an `untrained` one."""

    @property
    def row(self) -> str:
        """Names what it makes among all that an evaluation does."""
        return self.name if self.encoder == "pretrained" else self.encoder

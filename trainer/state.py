"""The train state: everything that a train step changes and a checkpoint holds."""

from collections.abc import Mapping
from dataclasses import dataclass

import keras
import numpy as np
import tensorflow as tf

from trainer.config import Config
from trainer.distribution import Replicas
from trainer.encoder import make_encoder
from trainer.heads import make_classifier, make_projection
from trainer.losses import make_loss
from trainer.optimizer import Optimizer, make_optimizer


@dataclass(frozen=True)
class TrainState:
    """Everything that a train step changes. With several replicas, every replica has each variable, with the same value."""

    encoder: keras.Model
    projection: keras.Model
    classifier: keras.Model
    optimizer: Optimizer
    by_image: Mapping[str, tf.Variable]
    """Vectors over the dataset, [N] float32, indexed by image ID: `u` (0 before an image's first visit) and, with
    variant=isogclr, `temperature` and `temperature_velocity`."""
    step: tf.Variable
    """Number of finished train steps, an int64 scalar."""

    @property
    def u(self) -> tf.Variable:
        return self.by_image["u"]

    @property
    def trainable(self) -> list[tf.Variable]:
        return [v.value for model in (self.encoder, self.projection, self.classifier) for v in model.trainable_variables]

    def variables(self) -> dict[str, tf.Variable]:
        """Returns every variable, by its name in a checkpoint."""
        named = model_variables("encoder", self.encoder)
        named |= model_variables("projection", self.projection)
        named |= model_variables("classifier", self.classifier)
        by_id = {id(variable): name for name, variable in named.items()}
        slots = {
            f"{kind}/{by_id[id(variable)]}": slot
            for kind, of_kind in self.optimizer.slots.items()
            for variable, slot in zip(self.trainable, of_kind, strict=True)
        }
        return named | slots | dict(self.by_image) | {"step": self.step}

    def arrays(self) -> dict[str, np.ndarray]:
        return {name: variable.numpy() for name, variable in self.variables().items()}


def model_variables(name: str, model: keras.Model) -> dict[str, tf.Variable]:
    """Returns the variables of `model`, each named `name`/LAYER/VARIABLE."""
    return {f"{name}/{variable.path}": variable.value for variable in model.variables}


def create_train_state(config: Config, num_images: int, num_classes: int, replicas: Replicas | None = None) -> TrainState:
    """Returns the state before the first step. It depends on the arguments only.

    Within the scope of a strategy, creates it on all of the strategy's replicas.
    """
    seed = config.run.seed
    ghost_rows = 2 * config.optimizer.ghost_batch_size
    encoder = make_encoder(config.encoder, config.views.image_size, seed, replicas, ghost_rows)
    features = encoder.output_shape[-1]
    heads = config.encoder
    projection = make_projection(
        features, heads.projection_layers, heads.projection_dim, seed, replicas, heads.projection_hidden_dim, ghost_rows
    )
    classifier = make_classifier(features, num_classes, seed)
    contrastive = [v.value for v in (*encoder.trainable_variables, *projection.trainable_variables)]
    supervised = [v.value for v in classifier.trainable_variables]
    # Variables of one dimension are BN's.
    no_decay = [len(variable.shape) == 1 for variable in contrastive] + [True for _ in supervised]
    # Every state has u, whatever the loss, so that checkpoints of all losses have the same variables.
    by_image = {"u": 0.0, **make_loss(config.loss).vectors}
    return TrainState(
        encoder=encoder,
        projection=projection,
        classifier=classifier,
        optimizer=make_optimizer(config.optimizer, [*contrastive, *supervised], no_decay),
        by_image={
            name: tf.Variable(tf.fill([num_images], value), trainable=False, name=name) for name, value in by_image.items()
        },
        step=tf.Variable(0, dtype=tf.int64, trainable=False, name="step"),
    )

"""The steps of an evaluation as HLO programs, made without the accelerator that they are for: see trainer/lowering.py."""

import tensorflow as tf

from eval.measure.features import features_of_pixels
from eval.measure.supervised import Recipe, make_replica_step, make_state
from trainer.config import Config
from trainer.encoder import make_encoder
from trainer.lowering import OneOfMany, Program, to_program
from trainer.state import model_variables


def lower_forward(config: Config, images: int) -> Program:
    """Returns the program of a forward pass of one replica over `images` images, with BN in inference mode."""
    one = OneOfMany(1)
    encoder = make_encoder(config.encoder, config.views.image_size, config.run.seed, one)
    features_of = features_of_pixels(encoder)
    return to_program(
        lambda batch: {"features": features_of(batch["image"])},
        {"image": _images(config.views.image_size, images)},
        model_variables("encoder", encoder),
        one,
    )


def lower_labelled_step(config: Config, recipe: Recipe, num_classes: int, replicas: int = 1) -> Program:
    """Returns the program of a supervised training step on one of `replicas`.

    If the recipe freezes the encoder, this is the step of the protocol `official`, else that of fine-tuning.
    """
    one = OneOfMany(replicas)
    encoder = make_encoder(config.encoder, config.views.image_size, config.run.seed, one)
    state = make_state(encoder, recipe.optimizer, num_classes, recipe.frozen)
    replica_step = make_replica_step(state, recipe, config.linear_eval.batch_size, one)
    step = tf.Variable(0, dtype=tf.int64, trainable=False)
    count = recipe.batch_size // replicas
    batch = {"image": _images(config.views.image_size, count), "label": tf.TensorSpec([count], tf.int64)}
    variables = model_variables("encoder", state.encoder) | state.variables() | {"step": step}
    return to_program(lambda batch: {"loss": replica_step(batch, tf.convert_to_tensor(step))}, batch, variables, one)


def _images(size: int, count: int) -> tf.TensorSpec:
    return tf.TensorSpec([count, size, size, 3], tf.uint8)

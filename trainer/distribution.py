"""Replicas: one train step on a CPU, on one GPU or several, on a TPU or a slice of them."""

import os

import tensorflow as tf

from trainer.records import UserError


def make_strategy() -> tf.distribute.Strategy:
    """Returns TPUStrategy where there is a TPU, MirroredStrategy where there are several GPUs, else TensorFlow's default.

    A TPU slice of several hosts is found by TensorFlow's own variable TPU_NAME; else it is the machine's own TPU.
    """
    if "TPU_NAME" in os.environ or tf.config.list_physical_devices("TPU"):
        resolver = tf.distribute.cluster_resolver.TPUClusterResolver.connect(os.environ.get("TPU_NAME", "local"))
        return tf.distribute.TPUStrategy(resolver)
    if len(tf.config.list_physical_devices("GPU")) > 1:
        return tf.distribute.MirroredStrategy()
    return tf.distribute.get_strategy()


def check_divides(global_batch_size: int, replicas: int) -> None:
    """Raises UserError where the replicas cannot have equal parts of a batch, naming the nearest sizes that would do."""
    below = global_batch_size // replicas * replicas
    if below != global_batch_size:
        fitting = " or ".join(str(size) for size in (below, below + replicas) if size > 0)
        raise UserError(f"global_batch_size={global_batch_size} does not divide over {replicas} replicas: take {fitting}")


def jit_compile(strategy: tf.distribute.Strategy) -> bool:
    """Whether the step is to be compiled by XLA. TPUs always do; a GPU gains by it; CPUs lose, and collectives of GPUs bar it."""
    return strategy.num_replicas_in_sync == 1 and bool(tf.config.list_physical_devices("GPU"))

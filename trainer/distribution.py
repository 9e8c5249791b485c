"""Replicas: one train step on a CPU, on one GPU or several, on a TPU or a slice of them.

    python -m trainer.distribution

prints what TensorFlow sees of this machine, as one JSON object.
"""

import json
import os
from typing import Any

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


def describe_devices() -> dict[str, Any]:
    """Returns TensorFlow's `version`, whether `onednn` is on, and `devices`: by kind (CPU, GPU, TPU) the product of each."""
    from tensorflow.python.util import _pywrap_util_port

    devices: dict[str, list[str]] = {}
    for device in tf.config.list_physical_devices():
        details = tf.config.experimental.get_device_details(device)
        devices.setdefault(device.device_type, []).append(details.get("device_name", device.device_type))
    return {"version": tf.__version__, "onednn": bool(_pywrap_util_port.IsMklEnabled()), "devices": devices}


class Replicas:
    """The replicas that a step runs on, seen from one of them: those of tf.distribute, or one alone.

    Every replica has to make the same calls in the same order. Gradients flow through all of them.
    """

    @property
    def fuses(self) -> bool:
        """Whether XLA compiles the step for a device where a layer had better compute a thing again than keep it: a TPU."""
        return isinstance(tf.distribute.get_strategy(), tf.distribute.TPUStrategy)

    @property
    def count(self) -> int:
        context = tf.distribute.get_replica_context()
        return 1 if context is None else context.num_replicas_in_sync

    def index(self) -> tf.Tensor | int:
        """Returns which of them this one is, an int32 scalar."""
        return tf.distribute.get_replica_context().replica_id_in_sync_group

    def gather(self, values: tf.Tensor) -> tf.Tensor:
        """Returns the [b, ...] of every replica, one after another: [count * b, ...]."""
        if self.count == 1:
            return values
        gathered = tf.distribute.get_replica_context().all_gather(values, axis=0)
        return tf.ensure_shape(gathered, [self.count * values.shape[0], *values.shape[1:]])

    def sum(self, values: Any) -> Any:
        """Returns the sum over replicas of a tensor, or of each in a list."""
        return self._reduced(values, tf.distribute.ReduceOp.SUM)

    def mean(self, values: Any) -> Any:
        """Returns the mean over replicas of a tensor, or of each in a list."""
        return self._reduced(values, tf.distribute.ReduceOp.MEAN)

    def _reduced(self, values: Any, how: tf.distribute.ReduceOp) -> Any:
        return values if self.count == 1 else tf.distribute.get_replica_context().all_reduce(how, values)


def check_divides(batch_size: int, replicas: int, setting: str = "global_batch_size") -> None:
    """Raises UserError where the replicas cannot have equal parts of a batch. It names the nearest values that fit."""
    below = batch_size // replicas * replicas
    if below != batch_size:
        fitting = " or ".join(str(size) for size in (below, below + replicas) if size > 0)
        raise UserError(f"{setting}={batch_size} does not divide over {replicas} replicas: take {fitting}")


def jit_compile(strategy: tf.distribute.Strategy) -> bool:
    """Whether the step is to be compiled by XLA. TPUs always do; a GPU gains by it; CPUs lose, and collectives of GPUs bar it."""
    return strategy.num_replicas_in_sync == 1 and bool(tf.config.list_physical_devices("GPU"))


if __name__ == "__main__":
    print(json.dumps(describe_devices()))

"""The train step of one replica as an HLO module, made without the accelerator that it is for.

An XLA compiler can tell what the step costs, and an XLA runtime can run it. `pipelines/plan/program.py` does both.
"""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import tensorflow as tf

from trainer.augmentation import NUM_DRAWS
from trainer.config import Config
from trainer.distribution import Replicas, check_divides
from trainer.shared.errors import UserError
from trainer.state import TrainState, create_train_state
from trainer.step import make_replica_step


@dataclass(frozen=True)
class Collective:
    """One collective operation between the replicas."""

    kind: Literal["all-gather", "reduce-scatter", "all-reduce"]
    bytes: int
    """Size of the whole tensor: the result of a gather or an all-reduce, the input of a reduce-scatter."""


class OneOfMany(Replicas):
    """One replica of `count` without the others. It reads the data that they would send from memory.

    A mean over the replicas returns the replica's own values. So the train step has the same shapes as on `count` replicas, but
    performs no collectives; `collectives` lists the omitted ones.
    """

    def __init__(self, count: int, recompute_in_backward: bool = True) -> None:
        self._count = count
        self._recompute_in_backward = recompute_in_backward
        self.own_index = tf.Variable(0, trainable=False)
        self.received: list[tf.Variable] = []
        self.collectives: list[Collective] = []
        self._gathers = 0

    def begin(self) -> None:
        """Resets the list of collectives. Call it before each tracing of the train step."""
        self.collectives.clear()
        self._gathers = 0

    @property
    def recompute_in_backward(self) -> bool:
        return self._recompute_in_backward

    @property
    def count(self) -> int:
        return self._count

    def index(self) -> tf.Tensor:
        return tf.convert_to_tensor(self.own_index)

    def gather(self, values: tf.Tensor) -> tf.Tensor:
        if self.count == 1:
            return values
        others = self._received((self.count - 1) * values.shape[0], values)
        whole = self.count * _bytes(values)
        self.collectives.append(Collective("all-gather", whole))

        @tf.custom_gradient
        def gathered(values: tf.Tensor) -> Any:
            def gradient(upstream: tf.Tensor) -> tf.Tensor:
                self.collectives.append(Collective("reduce-scatter", whole))
                return upstream[: values.shape[0]]

            return tf.concat([values, others], axis=0), gradient

        return gathered(values)

    def _received(self, rows: int, like: tf.Tensor) -> tf.Variable:
        """Returns the variable with the other replicas' rows of this gather. Every tracing of the step gets the same one."""
        if self._gathers == len(self.received):
            with tf.init_scope():
                self.received.append(tf.Variable(tf.zeros([rows, *like.shape[1:]], like.dtype), trainable=False))
        self._gathers += 1
        return self.received[self._gathers - 1]

    def sum(self, values: Any) -> Any:
        return tf.nest.map_structure(lambda one: one * self.count, self.mean(values))

    def mean(self, values: Any) -> Any:
        if self.count > 1:
            self.collectives.append(Collective("all-reduce", sum(map(_bytes, tf.nest.flatten(values)))))
        return values


def _bytes(values: tf.Tensor) -> int:
    return int(math.prod(values.shape) * values.dtype.size)


@dataclass(frozen=True)
class Program:
    """A train step as HLO. Its arguments are a batch, then variables. Its results are metrics, then the changed variables."""

    hlo: bytes
    """A serialized HloModuleProto."""
    arguments: Mapping[str, tuple[tuple[int, ...], str]]
    """Name -> (shape, dtype) of each argument, in order. Names are `batch/NAME`, the names of variables in a checkpoint,
    `replica` (index of the replica) and `received/NUMBER` (data from the other replicas)."""
    metrics: tuple[str, ...]
    """Names of the metrics, which are the first results."""
    collectives: tuple[Collective, ...]
    """Collectives that the step omits."""


def lower(config: Config, num_images: int, num_classes: int, replicas: int = 1) -> Program:
    """Returns the program of the train step on one of `replicas`, for a dataset of `num_images` images and `num_classes` classes.

    Raises UserError if the global batch does not divide over the replicas, or a replica's batch into the parts that are set.
    """
    check_divides(config.optimizer.global_batch_size, replicas)
    config.optimizer.check_parts(replicas)
    one = OneOfMany(replicas)
    return lower_step(config, create_train_state(config, num_images, num_classes, one), one)


def lower_step(config: Config, state: TrainState, replicas: OneOfMany) -> Program:
    """Returns the program of the train step on one of `replicas`. The step updates `state`."""
    step = make_replica_step(config, state, replicas)
    return to_program(step, batch_spec(config, replicas.count), state.variables(), replicas)


def to_program(
    replica_step: Callable[[dict[str, tf.Tensor]], Mapping[str, tf.Tensor]],
    batch: Mapping[str, tf.TensorSpec],
    variables: Mapping[str, tf.Variable],
    replicas: OneOfMany,
) -> Program:
    """Returns the program of `replica_step`, a step of one of `replicas` that reads and changes `variables`.

    `batch` gives the shapes and dtypes of its batches.
    """
    metrics: list[str] = []

    @tf.function(autograph=False, jit_compile=True)
    def step(*values: tf.Tensor) -> list[tf.Tensor]:
        replicas.begin()
        result = replica_step(dict(zip(batch, values, strict=True)))
        metrics[:] = result
        return list(result.values())

    hlo = to_hlo(step, list(batch.values()))
    traced = step.get_concrete_function(*batch.values())
    variables = {**variables, "replica": replicas.own_index}
    variables |= {f"received/{number}": variable for number, variable in enumerate(replicas.received)}
    by_handle = {id(variable.handle): (name, variable) for name, variable in variables.items()}
    arguments = {f"batch/{name}": (tuple(spec.shape), spec.dtype.name) for name, spec in batch.items()}
    for handle in traced.captured_inputs:
        name, variable = by_handle[id(handle)]
        arguments[name] = (tuple(variable.shape), variable.dtype.name)
    return Program(hlo, arguments, tuple(metrics), tuple(replicas.collectives))


def to_hlo(function: Any, specs: Sequence[tf.TensorSpec]) -> bytes:
    """Lowers a tf.function of tensors like `specs` to a serialized HloModuleProto. Raises UserError if XLA cannot compile it."""
    # Without device_name, TensorFlow finds the device by drawing a random number, which deterministic ops forbid without a seed.
    # It warns about device_name, but the alternative, platform_name, draws that number too.
    try:
        with warnings.catch_warnings(action="ignore"):
            return bytes(function.experimental_get_compiler_ir(*specs)(stage="hlo_serialized", device_name="/device:CPU:0"))
    except (tf.errors.OpError, ValueError, TypeError) as error:
        said = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise UserError(f"XLA cannot compile the step: {said.strip()[:400]}") from error


def batch_spec(config: Config, replicas: int = 1) -> dict[str, tf.TensorSpec]:
    """Returns the shapes and dtypes of the batches that `training_batches` makes for one of `replicas`."""
    count, size = config.optimizer.global_batch_size // replicas, config.views.image_size
    return {
        "views": tf.TensorSpec([count, 2, size, size, 3], tf.uint8),
        "draws": tf.TensorSpec([count, 2, NUM_DRAWS], tf.float32),
        "image_id": tf.TensorSpec([count], tf.int64),
        "label": tf.TensorSpec([count], tf.int64),
    }


def arguments_of(program: Program, state: TrainState, batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns the arguments of `program` for `batch` and `state`, by name and in order. Data from other replicas is zero."""
    arrays = {f"batch/{name}": np.asarray(values) for name, values in batch.items()} | state.arrays()
    return {name: arrays.get(name, np.zeros(shape, dtype)) for name, (shape, dtype) in program.arguments.items()}

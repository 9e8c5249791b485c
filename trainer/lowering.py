"""A step as a program for XLA, without the machine that it is for: what one replica of many does, as an HLO module.

Any compiler of XLA's can say of it what a step needs, and any of its runtimes can run it: `pipelines/plan/program.py` does both.
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
    """One exchange between replicas."""

    kind: Literal["all-gather", "reduce-scatter", "all-reduce"]
    bytes: int
    """Size of the whole: of what every replica has after a gather or a reduction, before a scatter."""


class OneOfMany(Replicas):
    """One replica of `count`, the others missing: what they would send is read from memory, and a mean over them is its own.

    So a step has the shapes that it has among the others, all but the exchanges themselves, which are noted in `collectives`.
    """

    def __init__(self, count: int, fuses: bool = True) -> None:
        self._count = count
        self._fuses = fuses
        self.place = tf.Variable(0, trainable=False)
        self.received: list[tf.Variable] = []
        self.collectives: list[Collective] = []
        self._gathers = 0

    def begin(self) -> None:
        """Says that a step begins: its exchanges are counted from here."""
        self.collectives.clear()
        self._gathers = 0

    @property
    def fuses(self) -> bool:
        return self._fuses

    @property
    def count(self) -> int:
        return self._count

    def index(self) -> tf.Tensor:
        return tf.convert_to_tensor(self.place)

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
        """Returns the memory of this gather, the same each time that the step is traced."""
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
    """A step as HLO. Its arguments are a batch and then variables; its results are metrics and then the variables it changed."""

    hlo: bytes
    """A serialized HloModuleProto."""
    arguments: Mapping[str, tuple[tuple[int, ...], str]]
    """Shape and type by name, in their order: `batch/NAME`, variables by the name that a checkpoint has, `replica`, which of
    them it is, and `received/NUMBER` for what the others would send."""
    metrics: tuple[str, ...]
    """The names of the first results."""
    collectives: tuple[Collective, ...]


def lower(config: Config, num_images: int, num_classes: int, replicas: int = 1) -> Program:
    """Returns the train step of one of `replicas`, on its part of a global batch, over a dataset of so many images and classes.

    Raises UserError where the batch does not divide.
    """
    check_divides(config.optimizer.global_batch_size, replicas)
    one = OneOfMany(replicas)
    return lower_step(config, create_train_state(config, num_images, num_classes, one), one)


def lower_step(config: Config, state: TrainState, replicas: OneOfMany) -> Program:
    """Returns the program of a step that moves `state`, one replica's."""
    step = make_replica_step(config, state, replicas)
    return to_program(step, batch_spec(config, replicas.count), state.variables(), replicas)


def to_program(
    replica_step: Callable[[dict[str, tf.Tensor]], Mapping[str, tf.Tensor]],
    batch: Mapping[str, tf.TensorSpec],
    variables: Mapping[str, tf.Variable],
    replicas: OneOfMany,
) -> Program:
    """Returns the program of what one of `replicas` does with a batch like `batch`, which reads and changes `variables`."""
    metrics: list[str] = []

    @tf.function(autograph=False, jit_compile=True)
    def step(*values: tf.Tensor) -> list[tf.Tensor]:
        replicas.begin()
        result = replica_step(dict(zip(batch, values, strict=True)))
        metrics[:] = result
        return list(result.values())

    hlo = to_hlo(step, list(batch.values()))
    traced = step.get_concrete_function(*batch.values())
    variables = {**variables, "replica": replicas.place}
    variables |= {f"received/{number}": variable for number, variable in enumerate(replicas.received)}
    by_handle = {id(variable.handle): (name, variable) for name, variable in variables.items()}
    arguments = {f"batch/{name}": (tuple(spec.shape), spec.dtype.name) for name, spec in batch.items()}
    for handle in traced.captured_inputs:
        name, variable = by_handle[id(handle)]
        arguments[name] = (tuple(variable.shape), variable.dtype.name)
    return Program(hlo, arguments, tuple(metrics), tuple(replicas.collectives))


def to_hlo(function: Any, specs: Sequence[tf.TensorSpec]) -> bytes:
    """Returns a tf.function of tensors like `specs` as a serialized HloModuleProto. Raises UserError where XLA has no such."""
    # Left to itself, TensorFlow finds the device by drawing a random number, which deterministic ops forbid without a seed. It
    # warns of a named one, for which its other way, a platform's name, draws that number just the same.
    try:
        with warnings.catch_warnings(action="ignore"):
            return bytes(function.experimental_get_compiler_ir(*specs)(stage="hlo_serialized", device_name="/device:CPU:0"))
    except (tf.errors.OpError, ValueError, TypeError) as error:
        said = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise UserError(f"the step is no program for XLA: {said.strip()[:400]}") from error


def batch_spec(config: Config, replicas: int = 1) -> dict[str, tf.TensorSpec]:
    """Returns what `training_batches` gives one of `replicas`."""
    count, size = config.optimizer.global_batch_size // replicas, config.views.image_size
    return {
        "views": tf.TensorSpec([count, 2, size, size, 3], tf.uint8),
        "draws": tf.TensorSpec([count, 2, NUM_DRAWS], tf.float32),
        "image_id": tf.TensorSpec([count], tf.int64),
        "label": tf.TensorSpec([count], tf.int64),
    }


def arguments_of(program: Program, state: TrainState, batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns the arrays that `program` takes for `batch` from `state`, by name and in order; nothing comes from others."""
    arrays = {f"batch/{name}": np.asarray(values) for name, values in batch.items()} | state.arrays()
    return {name: arrays.get(name, np.zeros(shape, dtype)) for name, (shape, dtype) in program.arguments.items()}

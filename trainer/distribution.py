"""Replicas: the same train step on a CPU, on one or more GPUs, on a TPU or a TPU slice.

    python -m trainer.distribution

prints the devices that TensorFlow finds on this machine, as one JSON object.
"""

import json
import os
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import tensorflow as tf

from trainer import hardware
from trainer.shared.errors import UserError

_CONTAINER_OPTION = {"gpu": "--gpus all", "tpu": "--privileged"}
"""Docker's option that gives a container the devices of its host."""


def make_strategy() -> tf.distribute.Strategy:
    """Returns TPUStrategy if there is a TPU, MirroredStrategy if there are several GPUs, else TensorFlow's default strategy.

    TensorFlow's variable TPU_NAME names a TPU slice of several hosts. Without it, the TPU is the machine's own.
    """
    if _kind_in_use() == "tpu":
        resolver = tf.distribute.cluster_resolver.TPUClusterResolver.connect(os.environ.get("TPU_NAME", "local"))
        return tf.distribute.TPUStrategy(resolver)
    if len(tf.config.list_physical_devices("GPU")) > 1:
        return tf.distribute.MirroredStrategy()
    return tf.distribute.get_strategy()


def claim_devices(
    given: str = "", say: Callable[[str], None] = lambda line: print(line, file=sys.stderr, flush=True)
) -> tf.distribute.Strategy:
    """Returns the strategy of `make_strategy`, and calls `say` with one line that names the devices of the run.

    If the machine has an accelerator that TensorFlow does not use, a second line is a warning. `given` is the accelerator that
    the job was given, as "NAME BUILD REPLICAS", for example "v5e-8 tpu 8"; empty if the job was given none. Raises UserError if
    TensorFlow does not have exactly that accelerator, or if the TPU does not start.
    """
    name, required, replicas = _parse_given(given)
    if required != "cpu" and _kind_in_use() != required:
        raise UserError(_what_is_missing(name, required, replicas, 0))
    try:
        strategy = make_strategy()
    except (OSError, RuntimeError, ValueError, tf.errors.OpError) as error:
        if _kind_in_use() != "tpu":
            raise
        cure = "end the process that holds it, or run as root"
        if "TPU_NAME" in os.environ:
            cure = f"TPU_NAME={os.environ['TPU_NAME']} names it: correct or unset TPU_NAME"
        reason = str(error).partition("\n")[0]
        raise UserError(f"TensorFlow cannot start the TPU ({reason}): {cure}") from error
    found = strategy.num_replicas_in_sync
    if required != "cpu" and found != replicas:
        raise UserError(_what_is_missing(name, required, replicas, found))
    run = describe_run(strategy)
    say(f"running on {run['device']}, TensorFlow {run['tensorflow']}, {found} replica{'s' if found > 1 else ''}")
    # A job that has its accelerator does not wait for the NVIDIA driver.
    if required == "cpu" and (unused := hardware.why_unused(hardware.visible(), _build(), {_kind_in_use(): found})):
        say(f"warning: {unused}")
    return strategy


def describe_run(strategy: tf.distribute.Strategy) -> dict[str, str]:
    """Returns `device` (count and product), `tensorflow` (version and build) and `replicas` (number) of a run on `strategy`."""
    kind, replicas = _kind_in_use(), strategy.num_replicas_in_sync
    if kind == "tpu":
        shown = hardware.tpus()
        device = f"{replicas} x {shown[0].product if shown else 'TPU'}"
    elif kind == "gpu":
        gpus = map(tf.config.experimental.get_device_details, tf.config.list_physical_devices("GPU"))
        products = Counter(details.get("device_name", "NVIDIA GPU") for details in gpus)
        device = " + ".join(f"{count} x {product}" for product, count in products.items())
    else:
        device = hardware.processors()
    build = _build()
    tensorflow = f"{tf.__version__} for {build}" if build else tf.__version__
    return {"device": device, "tensorflow": tensorflow, "replicas": str(replicas)}


def describe_devices() -> dict[str, Any]:
    """Returns TensorFlow's `version`, whether `onednn` is on, and `devices`: for each kind (CPU, GPU, TPU) the products."""
    from tensorflow.python.util import _pywrap_util_port

    devices: dict[str, list[str]] = {}
    for device in tf.config.list_physical_devices():
        details = tf.config.experimental.get_device_details(device)
        devices.setdefault(device.device_type, []).append(details.get("device_name", device.device_type))
    return {"version": tf.__version__, "onednn": bool(_pywrap_util_port.IsMklEnabled()), "devices": devices}


def _parse_given(given: str) -> tuple[str, str, int]:
    """Returns (name, build of TensorFlow, number of replicas). The build "cpu" means that no accelerator is required."""
    if not given:
        return "", "cpu", 1
    try:
        name, build, replicas = given.split()
        if build in hardware.BUILDS:
            return name, build, int(replicas)
    except ValueError:
        pass
    raise UserError(f'"{given}" is not an accelerator of a job: write NAME BUILD REPLICAS, for example v5e-8 tpu 8')


def _what_is_missing(name: str, kind: str, replicas: int, found: int) -> str:
    """Returns the error message if TensorFlow has `found` devices instead of the `replicas` devices of accelerator `name`.

    The message is one line, with the reason and the remedy. `kind` is `gpu` or `tpu`.
    """
    device = kind.upper()
    given = f"this job was given {name}, {replicas} x {device}, and TensorFlow has {found or 'none'}"
    shown = [one for one in hardware.visible() if one.build == kind]
    if reason := hardware.why_unused(shown, _build(), {kind: found}):
        return f"{given}: {reason}"
    if found:
        return f"{given}: run the job on a machine with {name}, or compile it for {found} x {device} (sogclr accelerators)"
    option = _CONTAINER_OPTION[kind]
    return f"{given}: the system shows no {device}; run the job on a machine with {name}, and its container with {option}"


def _kind_in_use() -> str:
    """Returns the kind of device that TensorFlow uses: `tpu`, `gpu` or `cpu`."""
    if "TPU_NAME" in os.environ or tf.config.list_physical_devices("TPU"):
        return "tpu"
    return "gpu" if tf.config.list_physical_devices("GPU") else "cpu"


def _build() -> str:
    return hardware.installed_build()[0]


class Replicas:
    """Communication between the replicas of a train step, seen from one of them. By default the replicas of tf.distribute.

    Every replica must make the same calls in the same order. Gradients flow through all calls.
    """

    @property
    def recompute_in_backward(self) -> bool:
        """Whether layers recompute values in the backward pass instead of storing them, which is faster on a TPU."""
        return isinstance(tf.distribute.get_strategy(), tf.distribute.TPUStrategy)

    @property
    def count(self) -> int:
        context = tf.distribute.get_replica_context()
        return 1 if context is None else context.num_replicas_in_sync

    def index(self) -> tf.Tensor | int:
        """Returns the index of this replica, an int32 scalar."""
        return tf.distribute.get_replica_context().replica_id_in_sync_group

    def gather(self, values: tf.Tensor) -> tf.Tensor:
        """Concatenates `values`, [b, ...], of all replicas in the order of their indices. Returns [count * b, ...]."""
        if self.count == 1:
            return values
        gathered = tf.distribute.get_replica_context().all_gather(values, axis=0)
        return tf.ensure_shape(gathered, [self.count * values.shape[0], *values.shape[1:]])

    def sum(self, values: Any) -> Any:
        """Returns the sum over replicas of a tensor, or of each tensor in a list."""
        return self._reduced(values, tf.distribute.ReduceOp.SUM)

    def mean(self, values: Any) -> Any:
        """Returns the mean over replicas of a tensor, or of each tensor in a list."""
        return self._reduced(values, tf.distribute.ReduceOp.MEAN)

    def _reduced(self, values: Any, how: tf.distribute.ReduceOp) -> Any:
        return values if self.count == 1 else tf.distribute.get_replica_context().all_reduce(how, values)


class Alone(Replicas):
    """A replica that does not communicate with the others."""

    @property
    def count(self) -> int:
        return 1

    def index(self) -> int:
        return 0


def check_divides(batch_size: int, replicas: int, setting: str = "global_batch_size") -> None:
    """Raises UserError if a batch does not divide evenly over the replicas. The message names the nearest sizes that do."""
    below = batch_size // replicas * replicas
    if below != batch_size:
        fitting = " or ".join(str(size) for size in (below, below + replicas) if size > 0)
        raise UserError(f"{setting}={batch_size} does not divide over {replicas} replicas: take {fitting}")


def jit_compile(strategy: tf.distribute.Strategy) -> bool:
    """Returns whether to request that XLA compiles the train step: only on a single GPU, which it makes faster.

    On CPUs it is slower, collectives between GPUs do not allow it, and TPUs use XLA anyway.
    """
    return strategy.num_replicas_in_sync == 1 and bool(tf.config.list_physical_devices("GPU"))


if __name__ == "__main__":
    print(json.dumps(describe_devices()))

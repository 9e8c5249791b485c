"""The estimate of a run's evaluation: hours and price of each protocol, memory, disk, and whether it can end on its machine.

The encoder's forward pass is compiled for the TPU like the training step (`estimate.py`). Without the compiler, as in
`sogclr submit`, its FLOPs and bytes are counted from the convolutions (`trainer/encoder_cost.py`). Times on TPUs and GPUs are a
roofline: a real evaluation is slower. Times on CPUs are based on measurements.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.plan.compiler import cache_file, compile_program, read_cache, used_bytes, write_cache
from pipelines.plan.estimate import Assumptions, Source
from pipelines.plan.machines import DEVICES, device_of, dollars_per_hour, host_of
from pipelines.vertex.accelerators import ACCELERATORS, Accelerator
from trainer.config import Config, values_of
from trainer.encoder_cost import Cost, forward_cost

if TYPE_CHECKING:
    from eval.measure.protocols import Work

IMAGES_A_CORE = 530.0
"""Random crops of 224 px a second on one core, from 500x375 JPEGs. Measured: see docs/plan.md. Central crops are faster."""
A_DAY = 24.0
"""The longest allowed evaluation, in hours."""
_PASSES_A_TRAINED_IMAGE = 3
"""One forward pass and a backward pass, which costs about two: the gradients of each convolution's input and kernel."""
_SHAPES = (
    *("image_size", "depth", "width_multiplier", "selective_kernel_ratio", "cifar_stem", "precision"),
    *("pool_padding", "input_normalization"),
)
"""The settings that determine the compiled forward pass, besides the batch size."""


@dataclass(frozen=True)
class Limits:
    """The limits of the job that an evaluation runs in."""

    disk_gb: float = 200
    timeout_hours: float = 168
    option: str = "--eval-accelerator"
    """The command-line option that selects the machine."""
    region: str = ""
    """Region that a recommended machine must be in; empty for any region."""


@dataclass(frozen=True)
class Demand:
    """The requirements of an evaluation, which do not depend on the machine."""

    work: Mapping[str, "Work"]
    """The work of each protocol, in the order in which the protocols run."""
    cost: Cost
    """Cost of one image in the forward pass."""
    precision: str
    """Precision of the encoder: "float32" or "bfloat16"."""
    memory_bytes: float
    """Memory of a host."""
    disk_bytes: float


@dataclass(frozen=True)
class ProtocolEstimate:
    """The estimate of one protocol."""

    forward_images: int
    trained_images: int
    fit_flops: float
    hours: float
    price: float
    bound_by: str
    """The part that takes longest: compute, memory, input or fit."""


@dataclass(frozen=True)
class EvaluationEstimate:
    """The estimate of one run's evaluation."""

    accelerator: str
    protocols: Mapping[str, ProtocolEstimate]
    """Estimates by protocol, in the order in which the protocols run."""
    values: Mapping[str, Any]
    sources: Mapping[str, Source]
    """The source of each figure in `values`, and of `protocols`."""
    problems: tuple[str, ...]
    """Reasons why the evaluation cannot end on this machine, each with advice."""
    notes: tuple[str, ...]

    @property
    def summary(self) -> str:
        needed = time_and_price(self.accelerator, self.values["total_hours"], self.values["price"])
        return f"{', '.join(self.protocols)} take {needed} on {self.accelerator}"

    def as_json(self) -> dict[str, Any]:
        return {
            "accelerator": self.accelerator,
            "protocols": {name: asdict(one) for name, one in self.protocols.items()},
            **self.values,
            "fits": not self.problems,
            "problems": self.problems,
            "sources": dict(self.sources),
            "notes": self.notes,
        }


def make_evaluation_estimate(
    config: Config,
    accelerator: Accelerator,
    assumed: Assumptions,
    limits: Limits,
    *,
    python: Path | None,
    cache: Path,
    version: str,
    say: Callable[[str], None] = lambda text: None,
) -> EvaluationEstimate:
    """Returns the estimate of the evaluation of `config` on `accelerator`, to which `assumed` applies.

    `python`, `cache` and `version` are as for `estimate.make_estimate`. Without `python`, the estimate uses an earlier compiler
    result, or else counts the convolutions. Raises UserError if the forward pass does not compile for a TPU.
    """
    from eval.measure.protocols import Sizes, disk_bytes, memory_bytes, work_of

    compiled = _compiled_forward(config, accelerator, python, cache, version, say)
    fits = compiled is not None and compiled["fits"]
    at_once = config.linear_eval.batch_size
    cost = forward_cost(config.encoder, config.views.image_size)
    if compiled is not None and fits:
        cost = Cost(compiled["flops"] / at_once, compiled["bytes_accessed"] / at_once)
    sizes = Sizes(assumed.num_images, assumed.num_validation, assumed.num_classes, config.encoder.feature_dim)
    demand = Demand(
        work_of(config, sizes), cost, config.encoder.precision, memory_bytes(config, sizes), disk_bytes(config, sizes)
    )
    protocols = estimate_protocols(demand, accelerator, assumed.dollars_per_device_hour)
    host = host_of(accelerator)
    values: dict[str, Any] = {}
    sources: dict[str, Source] = {"protocols": "computed"}

    def put(source: Source, **named: Any) -> None:
        values.update(named)
        sources.update(dict.fromkeys(named, source))

    hours = sum(one.hours for one in protocols.values())
    put("computed", total_hours=hours, price=sum(one.price for one in protocols.values()))
    put("computed", memory_bytes=demand.memory_bytes, disk_bytes=demand.disk_bytes)
    put("compiled" if fits else "computed", forward_flops=cost.flops, forward_bytes=cost.bytes)
    put("measured", images_per_second_a_core=IMAGES_A_CORE)
    put("assumed", images_at_once=at_once, host_cores=host.cpus, host_memory_bytes=host.memory_bytes)
    put("assumed", disk_limit_bytes=1e9 * limits.disk_gb, dollars_per_device_hour=assumed.dollars_per_device_hour)

    problems = list(_problems(demand, accelerator, limits, hours))
    if compiled is not None and device_of(accelerator).topology and not fits:
        problems.append(
            f"{at_once} images at once do not fit into a device of {accelerator.name}: "
            f"take --set linear_eval.batch_size={max(1, at_once // 2)}"
        )
    return EvaluationEstimate(
        accelerator.name, protocols, values, sources, tuple(problems), tuple(_notes(demand, accelerator, fits))
    )


def estimate_protocols(demand: Demand, accelerator: Accelerator, dollars_per_device_hour: float) -> dict[str, ProtocolEstimate]:
    """Returns the estimate of each protocol on `accelerator`.

    Images and fits are divided among its devices and hosts. A CPU decodes images and computes on the same cores, one after the
    other. On other machines, the hosts decode while the devices compute.
    """
    device, host = device_of(accelerator), host_of(accelerator)
    estimates = {}
    for name, work in demand.work.items():
        passes = (work.forward + _PASSES_A_TRAINED_IMAGE * work.trained) / accelerator.replicas
        images = (work.forward + work.trained) / accelerator.hosts
        compute = passes * demand.cost.flops / device.rate(demand.precision)
        memory = passes * demand.cost.bytes / device.bytes_per_second
        input_ = images / (host.cpus * IMAGES_A_CORE)
        fit = work.flops / accelerator.replicas / device.rate("float32")
        passing = compute + input_ if accelerator.build == "cpu" else max(compute, memory, input_)
        hours = (passing + fit) / 3600
        seconds = {"compute": compute, "memory": memory, "input": input_, "fit": fit}
        estimates[name] = ProtocolEstimate(
            forward_images=work.forward,
            trained_images=work.trained,
            fit_flops=work.flops,
            hours=hours,
            price=hours * accelerator.replicas * dollars_per_device_hour,
            bound_by=max(seconds, key=seconds.__getitem__),
        )
    return estimates


def _problems(demand: Demand, accelerator: Accelerator, limits: Limits, hours: float) -> Iterator[str]:
    """Yields the reasons why an evaluation of `hours` cannot end on `accelerator`, each with advice."""
    memory = host_of(accelerator).memory_bytes
    if memory is not None and demand.memory_bytes > memory:
        yield (
            f"the evaluation needs {demand.memory_bytes / 1e9:,.0f} GB of memory, and a host of {accelerator.name} has "
            f"{memory / 1e9:,.0f}: {_better_machine(demand, limits)}"
        )
    if hours > min(A_DAY, limits.timeout_hours):
        limit = "a day" if limits.timeout_hours >= A_DAY else f"--timeout-hours {limits.timeout_hours:g}"
        yield (
            f"the evaluation takes {hours:,.1f} hours on {accelerator.name}, more than {limit}: {_better_machine(demand, limits)}"
        )
    if demand.disk_bytes > 1e9 * limits.disk_gb:
        yield (
            f"features take {demand.disk_bytes / 1e9:,.0f} GB of disk, more than --disk-gb {limits.disk_gb:g}: "
            f"take --disk-gb {math.ceil(demand.disk_bytes / 1e9)}"
        )


def _better_machine(demand: Demand, limits: Limits) -> str:
    """Returns advice that names the cheapest usable machine that has enough memory and ends in time."""
    found: list[tuple[float, float, str]] = []
    for one in ACCELERATORS.values():
        memory = host_of(one).memory_bytes
        estimates = estimate_protocols(demand, one, dollars_per_hour(one)).values()
        hours = sum(protocol.hours for protocol in estimates)
        in_region = not limits.region or not one.regions or limits.region in one.regions
        has_memory = memory is not None and demand.memory_bytes <= memory
        if not one.refused and in_region and has_memory and hours <= min(A_DAY, limits.timeout_hours):
            # `min` takes the faster of two machines at the same price.
            found.append((round(sum(protocol.price for protocol in estimates), 2), hours, one.name))
    if not found:
        return "no machine ends in time; take fewer linear_eval.protocols"
    price, hours, name = min(found)
    return f"take {limits.option} {name} ({time_and_price(name, hours, price)}), or fewer linear_eval.protocols"


def duration(hours: float) -> str:
    """Returns a duration as text, in hours, minutes or seconds."""
    sizes = (("hours", hours), ("minutes", 60 * hours), ("seconds", 3600 * hours))
    unit, number = next((one for one in sizes if one[1] >= 1), sizes[-1])
    return f"{number:,.1f} {unit}"


def time_and_price(accelerator: str, hours: float, price: float) -> str:
    """Returns time and price as text. All but those of a CPU are lower bounds, marked "at best"."""
    return f"{duration(hours)}{'' if accelerator == 'cpu' else ' at best'}, ${price:,.2f}"


def _notes(demand: Demand, accelerator: Accelerator, is_compiled: bool) -> Iterator[str]:
    device = device_of(accelerator)
    if accelerator.build == "cpu":
        yield "a virtual CPU is taken to be as fast as the core that was measured, an AMD EPYC's in float32"
    else:
        yield "times are a roofline, without start, compilation and reading: a real evaluation is slower"
        if not is_compiled:
            yield "FLOPs and bytes are counted from the convolutions; make tpu-check installs the compiler for better figures"
        elif not device.topology:
            yield "FLOPs and bytes are those of the program for a v5e"
    if demand.precision == "float32" and not device.float32_flops_per_second:
        yield "precision=float32: computed at the device's rate for bfloat16"
    if any(work.trained for work in demand.work.values()):
        yield f"fine-tuning: an image is taken to cost {_PASSES_A_TRAINED_IMAGE} forward passes"


def _compiled_forward(
    config: Config, accelerator: Accelerator, python: Path | None, cache: Path, version: str, say: Callable[[str], None]
) -> Mapping[str, Any] | None:
    """Returns the compiler's result for the forward pass on one device, or None if there is none.

    There is no compiler for GPUs here, so a v5e's program stands in for a GPU's. A CPU needs none, because it was measured.
    """
    if accelerator.build == "cpu":
        return None
    device = device_of(accelerator) if device_of(accelerator).topology else DEVICES["v5e"]
    shapes = {key: value for key, value in values_of(config).items() if key in _SHAPES}
    images = config.linear_eval.batch_size
    file = cache_file(cache, {"forward": shapes, "images": images, "device": device.topology, "version": version})
    if known := read_cache(file):
        return known
    if python is None:
        return None
    from eval.measure.programs import lower_forward

    say("lowering the forward pass of the evaluation")
    program = lower_forward(config, images)
    say(f"compiling it for {device.topology}: a minute or more")
    known = compile_program(program.hlo, device, python)
    if known["fits"]:
        known["fits"] = used_bytes(known) <= device.memory_bytes
    write_cache(file, known)
    return known

"""The estimate of pretraining: whether the training step compiles and fits, what bounds it, its time and its price.

A replica's training step is lowered by the trainer's own code (`trainer/lowering.py`) and compiled for the TPU (`compiler.py`).
All other figures are computed from that and from the tables in `machines.py` and `prices.py`. Every figure has a source:
compiled, measured, assumed, or computed from the others.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from pipelines.plan.compiler import cache_file, compile_program, read_cache, used_bytes, write_cache
from pipelines.plan.machines import Device, device_of, dollars_per_hour, host_of
from pipelines.vertex.accelerators import Accelerator, check
from trainer.config import Config, pretraining_of
from trainer.presets import find
from trainer.shared.data import DataSettings, KnownDataset

_SECONDS_A_COLLECTIVE = 10e-6
_IMAGES_A_CORE = 453.0
"""Images a second on one core, each from a 500x375 JPEG to two views of 224 px: 906 on two cores, docs/trainer.md, 2026-11-24."""

_DEMO = KnownDataset("the demo's photographs", 19, {"train": 1_995, "validation": 570})

_SIZE_OF = {"float32": 4, "int64": 8, "int32": 4, "uint8": 1, "bfloat16": 2}
"""Bytes per number, by dtype."""

Source = Literal["compiled", "measured", "assumed", "computed"]


@dataclass(frozen=True)
class Estimate:
    """The estimate of one run's pretraining."""

    preset: str
    accelerator: str
    values: Mapping[str, Any]
    """The figures, by name. Without the compiler, the figures that need it are missing."""
    sources: Mapping[str, Source]
    """The source of each figure, by the figure's name."""
    notes: tuple[str, ...]

    @property
    def memory(self) -> str:
        """A text about the memory of a device. Requires that the step was compiled."""
        v = self.values
        held = f"{v['used_bytes'] / 1e9:.1f} of {v['memory_bytes'] / 1e9:.1f} GB a device"
        if v["fits"]:
            return f"the step fits: {held}"
        return (
            f"the step does not fit into {self.accelerator}: {held}; take --set global_batch_size={v['largest_batch']} or less, "
            "or more replicas"
        )

    def as_json(self) -> dict[str, Any]:
        return {
            "preset": self.preset,
            "accelerator": self.accelerator,
            **self.values,
            "sources": dict(self.sources),
            "notes": self.notes,
        }


@dataclass(frozen=True)
class Assumptions:
    """Figures of data, host and price that the estimate assumes. The user may know better ones."""

    num_images: int
    num_validation: int
    num_classes: int
    dollars_per_device_hour: float
    images_a_core: float = _IMAGES_A_CORE
    host_cores: int = 0


def assumptions(
    preset: str,
    accelerator: Accelerator,
    manifest: Any = None,
    price: float | None = None,
    *,
    data: DataSettings | None = None,
    **known: Any,
) -> Assumptions:
    """Returns the assumptions for a preset on an accelerator.

    The counts are those of `manifest`, if it is given, else those of the dataset that the conversion makes with the settings
    `data`, by default the preset's. If `data` allows any dataset, the counts are those of the preset's own.
    """
    if manifest is not None:
        counts = {name: split.records for name, split in manifest.splits.items()}
        images, validation, classes = counts["train"], counts.get("validation", 0), manifest.num_classes
    else:
        usual = find(preset).config.data
        dataset = (data and data.dataset) or usual.dataset or _DEMO
        images, validation, classes = dataset.images["train"], dataset.images["validation"], dataset.classes
        if data and data.images_per_class:
            images = min(images, classes * data.images_per_class)
    dollars = dollars_per_hour(accelerator) if price is None else price
    return Assumptions(images, validation, classes, dollars, host_cores=host_of(accelerator).cpus, **known)


def make_estimate(
    preset: str,
    config: Config,
    accelerator: Accelerator,
    assumed: Assumptions,
    *,
    python: Path | None,
    cache: Path,
    version: str,
    listing: Path | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Estimate:
    """Returns the estimate of a run's pretraining.

    `python` is the interpreter that has the TPU's compiler, or None. `cache` is a folder that keeps compiler results by config,
    device, replicas and `version`, the digest of the code. `listing` is a file to write the compiled program to. Raises UserError
    if the global batch does not divide among the replicas, or if the training step does not compile for a TPU.
    """
    check(accelerator, config)
    device = device_of(accelerator)
    file = _train_step_cache(cache, config, accelerator, assumed, version)
    known = {} if listing else read_cache(file)
    compiles = python is not None and device.topology != ""
    if not known or (compiles and "compiled" not in known):
        known = _lower_and_compile(config, accelerator, assumed, device, python if compiles else None, listing, say)
        write_cache(file, known)
    return _estimate(preset, config, accelerator, assumed, device, known, python is not None)


def cached_estimate(preset: str, config: Config, accelerator: Accelerator, *, cache: Path, version: str) -> Estimate | None:
    """Returns the estimate from earlier compiler results of `make_estimate`, or None if there are none.

    The counts are those of the preset's dataset.
    """
    assumed = assumptions(preset, accelerator, data=config.data)
    known = read_cache(_train_step_cache(cache, config, accelerator, assumed, version))
    if "compiled" not in known:
        return None
    return _estimate(preset, config, accelerator, assumed, device_of(accelerator), known, has_compiler=True)


def _train_step_cache(cache: Path, config: Config, accelerator: Accelerator, assumed: Assumptions, version: str) -> Path:
    settings = pretraining_of(config)
    key = {"config": settings, "images": assumed.num_images, "classes": assumed.num_classes}
    key |= {"device": device_of(accelerator).topology, "replicas": accelerator.replicas, "version": version}
    return cache_file(cache, key)


def _lower_and_compile(
    config: Config,
    accelerator: Accelerator,
    assumed: Assumptions,
    device: Device,
    python: Path | None,
    listing: Path | None,
    say: Callable[[str], None],
) -> dict[str, Any]:
    from trainer.lowering import lower

    say("lowering the step")
    program = lower(config, assumed.num_images, assumed.num_classes, accelerator.replicas)
    sizes = {name: math.prod(shape) * _SIZE_OF[kind] for name, (shape, kind) in program.arguments.items()}
    known: dict[str, Any] = {
        "state_bytes": sum(size for name, size in sizes.items() if not name.startswith(("batch/", "received/", "replica"))),
        "collectives": [asdict(one) for one in program.collectives],
    }
    if python is not None:
        say(f"compiling it for {device.topology}: some minutes")
        known["compiled"] = compile_program(program.hlo, device, python, listing)
    return known


def _estimate(
    preset: str,
    config: Config,
    accelerator: Accelerator,
    assumed: Assumptions,
    device: Device,
    known: Mapping[str, Any],
    has_compiler: bool,
) -> Estimate:
    from trainer.optimizer import total_steps

    values: dict[str, Any] = {}
    sources: dict[str, Source] = {}
    notes: list[str] = []

    def put(source: Source, **named: Any) -> None:
        values.update(named)
        sources.update(dict.fromkeys(named, source))

    replicas, batch = accelerator.replicas, config.optimizer.global_batch_size
    steps = total_steps(config.optimizer, assumed.num_images)
    put("assumed", num_images=assumed.num_images)
    put(
        "computed",
        steps=steps,
        epochs=config.optimizer.epochs,
        batch_per_replica=batch // replicas,
        checkpoint_bytes=known["state_bytes"],
    )
    exchanged = sum(one["bytes"] for one in known["collectives"])
    put("computed", collectives=len(known["collectives"]), collectives_bytes=exchanged)
    compiled = known.get("compiled")
    if not device.topology:
        notes.append(f"there is no compiler for {accelerator.name}: pretraining has only the figures that follow from the config")
    elif compiled is None:
        notes.append("memory, time and money need the TPU's compiler: make tpu-check installs it" if not has_compiler else "")
    elif not compiled["fits"]:
        put("compiled", fits=False, used_bytes=compiled["used_bytes"])
        put("assumed", memory_bytes=device.memory_bytes)
        room = device.memory_bytes - known["state_bytes"]
        fitting = batch // replicas * room / (compiled["used_bytes"] - known["state_bytes"])
        put("computed", largest_batch=_rounded_down(fitting) * replicas)
        notes.append("the step does not fit into the memory of a device: take a smaller batch or more replicas")
    else:
        _put_times(put, config, accelerator, assumed, device, compiled, known["collectives"], steps)
        if config.encoder.precision == "float32":
            notes.append("precision=float32: FLOPs and bytes are those of float32, at the device's rate for bfloat16")
    return Estimate(preset, accelerator.name, values, sources, tuple(filter(None, notes)))


def _put_times(
    put: Callable[..., None],
    config: Config,
    accelerator: Accelerator,
    assumed: Assumptions,
    device: Device,
    compiled: Mapping[str, Any],
    collectives: list[Mapping[str, Any]],
    steps: int,
) -> None:
    replicas = accelerator.replicas
    own = config.optimizer.global_batch_size // replicas
    used = used_bytes(compiled)
    named = ("compiler", "compile_seconds", "arguments_bytes", "temp_bytes", "code_bytes", "flops", "bytes_accessed")
    put("compiled", fits=used <= device.memory_bytes, used_bytes=used, **{name: compiled[name] for name in named})
    put(
        "compiled",
        bytes_per_sample=compiled["bytes_accessed"] / own,
        flops_per_sample=compiled["flops"] / own,
        temp_bytes_per_sample=compiled["temp_bytes"] / own,
    )
    put("assumed", memory_bytes=device.memory_bytes, host_cores=assumed.host_cores)
    put("measured", images_per_second_a_core=assumed.images_a_core)
    rates = {
        "compute": compiled["flops"] / device.flops_per_second,
        "memory": compiled["bytes_accessed"] / device.bytes_per_second,
        "interconnect": _exchange_seconds(collectives, device, replicas),
        "input": config.optimizer.global_batch_size / accelerator.hosts / (assumed.host_cores * assumed.images_a_core),
    }
    on_device = max(rates["compute"], rates["memory"]) + rates["interconnect"]
    step = max(on_device, rates["input"])
    put("computed", **{f"{name}_seconds": seconds for name, seconds in rates.items()})
    rate = config.optimizer.global_batch_size / on_device
    put(
        "computed",
        step_seconds=step,
        bound_by=max(rates, key=rates.__getitem__),
        samples_per_second=config.optimizer.global_batch_size / step,
        host_images_per_second_needed=rate / accelerator.hosts,
        host_cores_needed=math.ceil(rate / accelerator.hosts / assumed.images_a_core),
        input_starved=rates["input"] > on_device,
        total_hours=steps * step / 3600,
        price=steps * step / 3600 * replicas * assumed.dollars_per_device_hour,
        largest_batch=_rounded_down(own * (device.memory_bytes - used + compiled["temp_bytes"]) / compiled["temp_bytes"])
        * replicas,
    )
    put("assumed", dollars_per_device_hour=assumed.dollars_per_device_hour)


def _exchange_seconds(collectives: list[Mapping[str, Any]], device: Device, replicas: int) -> float:
    """Returns the seconds that a step's collectives take, one after another, at the pod's all-reduce rate."""
    if replicas == 1 or not device.all_reduce_bytes_per_second:
        return 0.0
    passes = {"all-reduce": 2.0, "all-gather": 1.0, "reduce-scatter": 1.0}
    moved = sum(passes[one["kind"]] * one["bytes"] for one in collectives) * (replicas - 1) / replicas
    return moved / device.all_reduce_bytes_per_second + len(collectives) * _SECONDS_A_COLLECTIVE


def _rounded_down(batch: float) -> int:
    return max(0, int(batch) // 8 * 8)

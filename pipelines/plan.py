"""What a run will cost, before it is paid for: does the step compile and fit, what bounds it, how long, how much.

A replica's step is lowered as it is trained (`trainer/lowering.py`) and compiled for its TPU by that TPU's own compiler, which
needs no TPU, in an environment of its own (`make tpu-check`). All else is arithmetic on that and on the tables here. Every figure
says where it comes from: it is compiled, measured, assumed, or computed from the others.
"""

import hashlib
import json
import math
import re
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pipelines.accelerators import Accelerator, check
from pipelines.machines import Device, device_of, host_of
from trainer.config import Config
from trainer.shared.errors import UserError
from trainer.shared.files import write_whole

if TYPE_CHECKING:
    from pipelines.evaluation_plan import EvaluationPlan

OFFICIAL_BYTES_PER_SAMPLE = 1198e6
"""What the official step moves, float32, 128 samples a chip, ResNet-50 at 224 px, compiled for a v5e."""


_SECONDS_A_COLLECTIVE = 10e-6
_IMAGES_A_CORE = 453.0
"""Two views of 224 px a second from JPEGs of 500x375: 906 on two cores, docs/trainer.md of 2026-11-24."""

_SIZES = {
    "imagenet": (1_281_167, 50_000, 1000),
    "imagenet_s": (129_395, 5_000, 100),
    "cifar10": (50_000, 10_000, 10),
    "demo": (1_995, 570, 19),
}
"""Training images, validation images and classes, by the dataset in a preset's name."""

Source = Literal["compiled", "measured", "assumed", "computed"]


@dataclass(frozen=True)
class Plan:
    """What one run will need."""

    preset: str
    accelerator: str
    values: Mapping[str, Any]
    """By name; those that are not known without the compiler are not there."""
    sources: Mapping[str, Source]
    """By the same names."""
    notes: tuple[str, ...]
    evaluation: "EvaluationPlan | None" = None

    @property
    def memory(self) -> str:
        """What a device must hold, in words; only where it was compiled."""
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
            **({"evaluation": self.evaluation.as_json()} if self.evaluation else {}),
        }


@dataclass(frozen=True)
class Assumptions:
    """What a user may know better."""

    num_images: int
    num_validation: int
    num_classes: int
    dollars_per_device_hour: float
    images_a_core: float = _IMAGES_A_CORE
    host_cores: int = 0


def assumptions(
    preset: str, accelerator: Accelerator, manifest: Any = None, price: float | None = None, **known: Any
) -> Assumptions:
    """Returns what is assumed of data, host and price; the counts are those of `manifest` where there is one."""
    if manifest is not None:
        counts = {name: split.records for name, split in manifest.splits.items()}
        images, validation, classes = counts["train"], counts.get("validation", 0), manifest.num_classes
    else:
        dataset = next((name for name in sorted(_SIZES, key=len, reverse=True) if f"_{name}_" in f"_{preset}_"), "imagenet")
        images, validation, classes = _SIZES[dataset]
    dollars = device_of(accelerator).dollars_per_hour if price is None else price
    return Assumptions(images, validation, classes, dollars, host_cores=host_of(accelerator).cpus, **known)


def make_plan(
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
) -> Plan:
    """Returns the plan of a run.

    `python` is the interpreter that has the TPU's compiler, or None; `cache` a folder that keeps what was compiled, by config,
    device, replicas and `version`, which names the code; `listing` a file for the compiled program. Raises UserError where the
    batch does not divide, and where the step is none that a TPU can run.
    """
    check(accelerator, config)
    device = device_of(accelerator)
    file = _step_in(cache, config, accelerator, assumed, version)
    known = {} if listing else kept(file)
    compiles = python is not None and device.topology != ""
    if not known or (compiles and "compiled" not in known):
        known = _lower_and_compile(config, accelerator, assumed, device, python if compiles else None, listing, say)
        keep(file, known)
    return _plan(preset, config, accelerator, assumed, device, known, python is not None)


def kept_plan(preset: str, config: Config, accelerator: Accelerator, *, cache: Path, version: str) -> Plan | None:
    """Returns the plan that follows from what `make_plan` compiled before for the preset's dataset, or None where it did not."""
    assumed = assumptions(preset, accelerator)
    known = kept(_step_in(cache, config, accelerator, assumed, version))
    if "compiled" not in known:
        return None
    return _plan(preset, config, accelerator, assumed, device_of(accelerator), known, has_compiler=True)


def _step_in(cache: Path, config: Config, accelerator: Accelerator, assumed: Assumptions, version: str) -> Path:
    settings = {name: value for name, value in asdict(config).items() if name != "linear_eval"}
    key = {"config": settings, "images": assumed.num_images, "classes": assumed.num_classes}
    key |= {"device": device_of(accelerator).topology, "replicas": accelerator.replicas, "version": version}
    return kept_in(cache, key)


def kept_in(cache: Path, key: Mapping[str, Any]) -> Path:
    """Returns the file in the folder `cache` that keeps what was found out of `key`, any JSON object."""
    return cache / f"{hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]}.json"


def kept(file: Path) -> dict[str, Any]:
    """Returns what `keep` left, or nothing."""
    return json.loads(file.read_text()) if file.exists() else {}


def keep(file: Path, known: Mapping[str, Any]) -> None:
    """Writes `known`, whole or not at all."""
    write_whole(str(file), json.dumps(known).encode())


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


_SIZE_OF = {"float32": 4, "int64": 8, "int32": 4, "uint8": 1, "bfloat16": 2}
_OUT_OF_MEMORY = re.compile(r"Used ([\d.]+)([KMG]) of ([\d.]+)([KMG]) hbm")


def compile_program(hlo: bytes, device: Device, python: Path, listing: Path | None = None, quick: bool = False) -> dict[str, Any]:
    """Returns what a program needs on a device, by the device's compiler, and `fits`.

    `quick` has it optimise little: to see that it compiles. Raises UserError with the compiler's words where it does not.
    """
    with tempfile.NamedTemporaryFile(suffix=".hlo") as file:
        file.write(hlo)
        file.flush()
        command = [
            str(python),
            str(Path(__file__).with_name("xla_program.py")),
            "compile",
            file.name,
            "--topology",
            device.topology,
        ]
        command += ["--chip-config", device.chip_config] if device.chip_config else []
        command += ["--listing", str(listing)] if listing else []
        command += ["--quick"] if quick else []
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == 0:
        return {"fits": True, **json.loads(done.stdout)}
    said = done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"it ended with {done.returncode}"
    if found := _OUT_OF_MEMORY.search(done.stderr):
        unit = {"K": 2**10, "M": 2**20, "G": 2**30}
        return {"fits": False, "used_bytes": float(found[1]) * unit[found[2]]}
    raise UserError(f"the step does not compile for a TPU: {said[:500]}")


def used_bytes(compiled: Mapping[str, Any]) -> float:
    """Returns what a compiled program holds in the memory of a device."""
    return sum(compiled[name] for name in ("arguments_bytes", "results_bytes", "temp_bytes", "code_bytes"))


def _plan(
    preset: str,
    config: Config,
    accelerator: Accelerator,
    assumed: Assumptions,
    device: Device,
    known: Mapping[str, Any],
    has_compiler: bool,
) -> Plan:
    from trainer.optimizer import total_steps

    values: dict[str, Any] = {}
    sources: dict[str, Source] = {}
    notes: list[str] = []

    def put(source: Source, **named: Any) -> None:
        values.update(named)
        sources.update(dict.fromkeys(named, source))

    replicas, batch = accelerator.replicas, config.global_batch_size
    steps = total_steps(config, assumed.num_images)
    put("assumed", num_images=assumed.num_images)
    put("computed", steps=steps, epochs=config.epochs, batch_per_replica=batch // replicas, checkpoint_bytes=known["state_bytes"])
    exchanged = sum(one["bytes"] for one in known["collectives"])
    put("computed", collectives=len(known["collectives"]), collectives_bytes=exchanged)
    compiled = known.get("compiled")
    if not device.topology:
        notes.append(f"no compiler is here for {accelerator.name}: of pretraining there is only what follows from the config")
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
        if config.precision == "float32":
            notes.append("precision=float32: FLOPs and bytes are those of float32, at the device's rate for bfloat16")
    return Plan(preset, accelerator.name, values, sources, tuple(filter(None, notes)))


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
    own = config.global_batch_size // replicas
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
        "input": config.global_batch_size / accelerator.hosts / (assumed.host_cores * assumed.images_a_core),
    }
    on_device = max(rates["compute"], rates["memory"]) + rates["interconnect"]
    step = max(on_device, rates["input"])
    put("computed", **{f"{name}_seconds": seconds for name, seconds in rates.items()})
    rate = config.global_batch_size / on_device
    put(
        "computed",
        step_seconds=step,
        bound_by=max(rates, key=rates.__getitem__),
        samples_per_second=config.global_batch_size / step,
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
    """Returns how long a step's exchanges take on their own, one after another, at the pod's rate of all-reduces."""
    if replicas == 1 or not device.all_reduce_bytes_per_second:
        return 0.0
    passes = {"all-reduce": 2.0, "all-gather": 1.0, "reduce-scatter": 1.0}
    moved = sum(passes[one["kind"]] * one["bytes"] for one in collectives) * (replicas - 1) / replicas
    return moved / device.all_reduce_bytes_per_second + len(collectives) * _SECONDS_A_COLLECTIVE


def _rounded_down(batch: float) -> int:
    return max(0, int(batch) // 8 * 8)


def as_lines(plan: Plan) -> list[tuple[str, str, str]]:
    """Returns a plan for people: what, how much, and where that comes from."""
    rows: list[tuple[str, str, str]] = []

    def row(title: str, text: str, name: str) -> None:
        rows.append((title, text, plan.sources[name]))

    v = plan.values
    row(
        "steps",
        f"{v['steps']:,} of {v['batch_per_replica']} images a replica, {v['epochs']} epochs of {v['num_images']:,}",
        "steps",
    )
    row("checkpoint", f"{v['checkpoint_bytes'] / 1e6:,.0f} MB", "checkpoint_bytes")
    row("exchanged a step", f"{v['collectives_bytes'] / 1e6:,.1f} MB in {v['collectives']} collectives", "collectives_bytes")
    if "fits" in v:
        row(
            "memory a device",
            f"{v['used_bytes'] / 1e9:.1f} of {v['memory_bytes'] / 1e9:.1f} GB: {'fits' if v['fits'] else 'does NOT fit'}",
            "fits",
        )
        row("largest batch", f"{v['largest_batch']:,}, or more where the compiler saves temporaries", "largest_batch")
    if "step_seconds" not in v:
        return rows
    row("  arguments", f"{v['arguments_bytes'] / 1e6:,.0f} MB", "arguments_bytes")
    row("  temporaries", f"{v['temp_bytes'] / 1e6:,.0f} MB, {v['temp_bytes_per_sample'] / 1e6:.1f} a sample", "temp_bytes")
    row(
        "memory traffic",
        f"{v['bytes_accessed'] / 1e9:.1f} GB a step, {v['bytes_per_sample'] / 1e6:.0f} MB a sample",
        "bytes_accessed",
    )
    row("FLOPs", f"{v['flops'] / 1e12:.2f} T a step, {v['flops_per_sample'] / 1e9:.1f} G a sample", "flops")
    for name in ("compute", "memory", "interconnect", "input"):
        row(f"time, {name}", f"{1e3 * v[f'{name}_seconds']:.1f} ms", f"{name}_seconds")
    row("step", f"{1e3 * v['step_seconds']:.1f} ms at best, bound by {v['bound_by']}", "step_seconds")
    row("samples", f"{v['samples_per_second']:,.0f} a second", "samples_per_second")
    starved = ": it would starve" if v["input_starved"] else ""
    needed = f"{v['host_images_per_second_needed']:,.0f} images/s a host"
    row("host", f"{needed}, {v['host_cores_needed']} of its {v['host_cores']} virtual CPUs{starved}", "host_cores_needed")
    row("whole run", f"{v['total_hours']:,.1f} hours", "total_hours")
    row("price", f"${v['price']:,.0f} at ${v['dollars_per_device_hour']:.2f} a device and hour", "price")
    return rows


def tpu_python(project: Path) -> Path | None:
    """Returns the interpreter that `make tpu-check` installed, if it did."""
    python = project / ".venv-tpu" / "bin" / "python"
    return python if python.exists() else None

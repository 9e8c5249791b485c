"""The machines of Vertex AI that a step can run on, and checks whether a config can use one.

`get` finds a machine by name. `check_usable` and `check` refuse a machine that cannot work before anything is paid for.
`sogclr plan` makes estimates for all of them. Names are Google's: v2, v3 and v4 count TPU cores, v5e counts chips.
"""

from dataclasses import dataclass
from typing import Any, Literal

from trainer.config import Config
from trainer.shared.errors import UserError, nearest

Build = Literal["cpu", "gpu", "tpu"]
"""The build of TensorFlow, which selects the container image."""


@dataclass(frozen=True)
class Accelerator:
    """One machine, or one slice of a TPU pod."""

    name: str
    build: Build
    machine_type: str
    accelerator_type: str = ""
    """Vertex AI's name of the accelerator; empty if the machine type implies it."""
    accelerator_count: int = 0
    """Number of GPUs or TPU cores, as Vertex AI counts them."""
    tpu_topology: str = ""
    replicas: int = 1
    """Number of replicas that share a global batch: GPUs or TPU cores, or chips if TensorFlow sees a chip as one device."""
    hosts: int = 1
    regions: tuple[str, ...] = ()
    """Regions in which Google lists the machine; empty if this project keeps no list."""

    @property
    def refused(self) -> str:
        """Returns why Vertex AI cannot train this project on the machine; empty if it can."""
        if self.accelerator_type == "TPU_V4_POD":
            return "Vertex AI lists no v4 for TensorFlow"
        if self.hosts > 1:
            return f"each of its {self.hosts} hosts would train alone"
        return ""

    @property
    def machine_spec(self) -> dict[str, Any]:
        """Returns Vertex AI's `MachineSpec` as JSON."""
        fields: dict[str, Any] = {
            "machine_type": self.machine_type,
            "accelerator_type": self.accelerator_type,
            "accelerator_count": self.accelerator_count,
            "tpu_topology": self.tpu_topology,
        }
        return {key: value for key, value in fields.items() if value}

    @property
    def summary(self) -> str:
        count = f" x {self.accelerator_count}" if self.accelerator_count else ""
        what = " ".join(filter(None, (self.accelerator_type + count, self.tpu_topology)))
        return f"{self.machine_type}{f' ({what})' if what else ''}"


# Regions change. docs.cloud.google.com/tpu/docs/regions-zones has the current list; `--skip-check region` ignores this one.
_V2 = ("us-central1", "europe-west4", "asia-east1")
_V3 = ("us-central1", "europe-west4")
_V3_POD = ("europe-west4",)
_V4 = ("us-central2",)
_V5E = ("us-central1", "us-south1", "us-west1", "us-west4", "europe-west4", "asia-southeast1")

_GPUS = {
    "t4": ("NVIDIA_TESLA_T4", {1: "n1-standard-8", 2: "n1-standard-16", 4: "n1-standard-32"}),
    "l4": ("NVIDIA_L4", {1: "g2-standard-12", 2: "g2-standard-24", 4: "g2-standard-48", 8: "g2-standard-96"}),
    "a100": ("NVIDIA_TESLA_A100", {1: "a2-highgpu-1g", 2: "a2-highgpu-2g", 4: "a2-highgpu-4g", 8: "a2-highgpu-8g"}),
    "a100-80gb": ("NVIDIA_A100_80GB", {1: "a2-ultragpu-1g", 2: "a2-ultragpu-2g", 4: "a2-ultragpu-4g", 8: "a2-ultragpu-8g"}),
    "h100": ("NVIDIA_H100_80GB", {8: "a3-highgpu-8g"}),
}
_V5E_SLICES = {
    1: ("ct5lp-hightpu-1t", "1x1"),
    4: ("ct5lp-hightpu-4t", "2x2"),
    8: ("ct5lp-hightpu-8t", "2x4"),
    16: ("ct5lp-hightpu-4t", "4x4"),
    32: ("ct5lp-hightpu-4t", "4x8"),
    64: ("ct5lp-hightpu-4t", "8x8"),
    128: ("ct5lp-hightpu-4t", "8x16"),
    256: ("ct5lp-hightpu-4t", "16x16"),
}
_CHIPS_PER_HOST = 4


def _all() -> dict[str, Accelerator]:
    found = [Accelerator("cpu", "cpu", "n2-standard-16")]
    for name, (kind, machines) in _GPUS.items():
        found += [Accelerator(f"{name}-{n}", "gpu", machine, kind, n, replicas=n) for n, machine in machines.items()]
    found += [Accelerator("v2-8", "tpu", "cloud-tpu", "TPU_V2", 8, replicas=8, regions=_V2)]
    for cores in (8, 32, 64, 128, 256, 512, 1024, 2048):
        regions, hosts = (_V3 if cores == 8 else _V3_POD), cores // (2 * _CHIPS_PER_HOST)
        found.append(
            Accelerator(f"v3-{cores}", "tpu", "cloud-tpu", "TPU_V3", cores, replicas=cores, hosts=hosts, regions=regions)
        )
    for cores in (8, 16, 32, 64, 128, 256, 512):
        # TensorFlow sees the two cores of a v4 chip as one device.
        chips = cores // 2
        hosts = chips // _CHIPS_PER_HOST
        found.append(
            Accelerator(f"v4-{cores}", "tpu", "cloud-tpu", "TPU_V4_POD", cores, replicas=chips, hosts=hosts, regions=_V4)
        )
    for chips, (machine, topology) in _V5E_SLICES.items():
        hosts = max(1, chips // _CHIPS_PER_HOST) if chips > 8 else 1
        found.append(
            Accelerator(f"v5e-{chips}", "tpu", machine, tpu_topology=topology, replicas=chips, hosts=hosts, regions=_V5E)
        )
    return {one.name: one for one in found}


ACCELERATORS = _all()

_TOO_NEW = ("v5p", "v6e", "v7x", "tpu7x")
"""Families of TPUs that no TensorFlow supports."""


def get(name: str) -> Accelerator:
    """Returns the accelerator of a name. Raises UserError for an unknown name, with the nearest name or the reason."""
    wanted = name.lower()
    if wanted in ACCELERATORS:
        return ACCELERATORS[wanted]
    family, _, size = wanted.rpartition("-")
    if (family or wanted).startswith(_TOO_NEW):
        raise UserError(
            f"--accelerator {name}: TPU {family or wanted} runs no TensorFlow, because tensorflow-tpu ends at 2.20: "
            "take v5e-8, or another v2, v3 or v5e"
        )
    usable = [one for one in ACCELERATORS if not ACCELERATORS[one].refused]
    if size and any(one.startswith(f"{family}-") for one in ACCELERATORS):
        same = [one for one in usable if one.rpartition("-")[0] == family]
        advice = f": take {' or '.join(same)}" if same else "; sogclr accelerators lists them"
        raise UserError(f"--accelerator {name}: there is no {family} of size {size}{advice}")
    raise UserError(f"there is no accelerator {name}{nearest(wanted, usable)}; sogclr accelerators lists them")


def check_usable(accelerator: Accelerator, option: str, *, spot: bool = False, force: bool = False) -> None:
    """Raises UserError if Vertex AI cannot train this project on `accelerator`, or if `spot` is set and it has no spot machine.

    `option` is the command-line option that names the machine. `force` allows a refused machine, but not as spot.
    """
    if accelerator.refused and not force:
        family = accelerator.name.rpartition("-")[0]
        usable = [one for one in ACCELERATORS.values() if one.build == "tpu" and not one.refused]
        best = max(usable, key=lambda one: (one.name.startswith(f"{family}-"), one.name == "v5e-8", one.replicas))
        raise UserError(
            f"{option} {accelerator.name} is refused: {accelerator.refused}; take {best.name}, "
            "or --force-accelerator to use it anyway"
        )
    if spot and accelerator.hosts > 1:
        # Source: docs.cloud.google.com/vertex-ai/docs/predictions/use-spot-vms, "Using Spot VMs with TPU Pods isn't supported".
        raise UserError(
            "--spot: Vertex AI does not sell TPU slices of several hosts as spot, and "
            f"{accelerator.name} has {accelerator.hosts}: leave out --spot"
        )


def check(accelerator: Accelerator, config: Config) -> None:
    """Raises UserError if the global batch of `config` does not divide among the replicas of `accelerator`.

    The same if the batch of a replica does not divide into ghost batches. Does not check whether a training step fits into a
    device's memory.
    """
    batch, replicas = config.optimizer.global_batch_size, accelerator.replicas
    if batch % replicas or batch // replicas < 1:
        below, above = batch // replicas * replicas, -(-batch // replicas) * replicas
        near = " or ".join(str(one) for one in dict.fromkeys((below, above)) if one >= max(2, replicas))
        raise UserError(
            f"global_batch_size={batch} does not divide among the {replicas} replicas of {accelerator.name}: "
            f"take --set global_batch_size={near}, or another accelerator"
        )
    config.optimizer.check_parts(replicas)


def check_region(accelerator: Accelerator, region: str) -> None:
    """Raises UserError if Google does not list `accelerator` in `region`."""
    if accelerator.regions and region not in accelerator.regions:
        raise UserError(f"--region {region} has no {accelerator.name}: Google lists it in {', '.join(accelerator.regions)}")

"""Figures of the machines in `pipelines/vertex/accelerators.py`: their devices and hosts. Prices are in `prices.py`.

Every figure here has a source. A figure without a source is left out.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from pipelines.plan.prices import PRICES
from pipelines.vertex.accelerators import Accelerator


@dataclass(frozen=True)
class Device:
    """A device as TensorFlow counts them: a TPU core (v2, v3), a TPU chip (v4, v5e), a GPU, or all CPUs of a machine."""

    memory_bytes: float
    bytes_per_second: float
    flops_per_second: float
    """FLOP/s in bfloat16."""
    float32_flops_per_second: float = 0.0
    """FLOP/s in float32; 0 if no figure is published."""
    all_reduce_bytes_per_second: float = 0.0
    """All-reduce rate of a whole pod, divided by its number of devices; 0 if no figure is published."""
    topology: str = ""
    """The smallest slice with this device that the TPU's compiler knows; empty if there is no compiler for it."""
    chip_config: str = ""

    def rate(self, precision: str) -> float:
        """Returns FLOP/s in `precision`, "float32" or "bfloat16". If the rate in float32 is unknown, returns that in bfloat16."""
        return (self.float32_flops_per_second if precision == "float32" else 0.0) or self.flops_per_second


@dataclass(frozen=True)
class Host:
    """CPUs and memory of a machine type."""

    cpus: int
    """Number of virtual CPUs."""
    memory_bytes: float | None = None
    """Memory of the host; None if unknown."""


CORE_FLOPS_PER_SECOND = 190e9
"""FLOP/s of one CPU core in the forward pass of a ResNet-50 at 224 px in float32. Measured: see docs/plan.md."""

_GIB = 2**30

DEVICES: Mapping[str, Device] = {
    # An n2 (Cascade Lake, Ice Lake) has no bfloat16, so float32's rate is in both places. It includes the cost of memory access.
    "cpu": Device(64 * _GIB, math.inf, 16 * CORE_FLOPS_PER_SECOND, 16 * CORE_FLOPS_PER_SECOND),
    # A T4 has no bfloat16, so float32's rate is in both places.
    "t4": Device(16 * _GIB, 320e9, 8.1e12, 8.1e12),
    "l4": Device(24 * _GIB, 300e9, 121e12, 60e12),
    "a100": Device(40 * _GIB, 1555e9, 312e12, 156e12),
    "a100-80gb": Device(80 * _GIB, 2039e9, 312e12, 156e12),
    "h100": Device(80 * _GIB, 3350e9, 989.4e12, 494.7e12),
    # v2 and v3: a device is a core, half a chip. v4: the two cores of a chip are one device.
    "v2": Device(8 * _GIB, 350e9, 23e12, topology="v2:2x2"),
    "v3": Device(16 * _GIB, 450e9, 61.5e12, all_reduce_bytes_per_second=340e12 / 2048, topology="v3:2x2"),
    "v4": Device(
        32 * _GIB,
        1200e9,
        275e12,
        all_reduce_bytes_per_second=1.1e15 / 4096,
        topology="v4:2x2x1",
        chip_config="megacore",
    ),
    "v5e": Device(16e9, 819e9, 197e12, all_reduce_bytes_per_second=51.2e12 / 256, topology="v5e:2x4"),
}
"""Devices by family. Sources:

TPUs: Google's page on each (docs.cloud.google.com/tpu/docs/v3, v4, v5e); v2 recalled, without a source.
GPUs: NVIDIA's data sheets of T4, L4, A100 (SXM) and H100 (SXM), dense matrices, TF32 for float32; memory rates of L4 and T4 from
docs.cloud.google.com/compute/docs/gpus.
"""

HOSTS: Mapping[str, Host] = {
    "n2-standard-16": Host(16, 64 * _GIB),
    "n1-standard-8": Host(8, 30 * _GIB),
    "n1-standard-16": Host(16, 60 * _GIB),
    "n1-standard-32": Host(32, 120 * _GIB),
    "g2-standard-12": Host(12, 48 * _GIB),
    "g2-standard-24": Host(24, 96 * _GIB),
    "g2-standard-48": Host(48, 192 * _GIB),
    "g2-standard-96": Host(96, 384 * _GIB),
    "a2-highgpu-1g": Host(12, 85 * _GIB),
    "a2-highgpu-2g": Host(24, 170 * _GIB),
    "a2-highgpu-4g": Host(48, 340 * _GIB),
    "a2-highgpu-8g": Host(96, 680 * _GIB),
    "a2-ultragpu-1g": Host(12, 170 * _GIB),
    "a2-ultragpu-2g": Host(24, 340 * _GIB),
    "a2-ultragpu-4g": Host(48, 680 * _GIB),
    "a2-ultragpu-8g": Host(96, 1360 * _GIB),
    "a3-highgpu-8g": Host(208, 1872 * _GIB),
    "ct5lp-hightpu-1t": Host(24, 48 * _GIB),
    "ct5lp-hightpu-4t": Host(112, 192 * _GIB),
    "ct5lp-hightpu-8t": Host(224, 384 * _GIB),
    # Vertex AI's machine type is cloud-tpu for all hosts of v2, v3 and v4.
    "v2": Host(96),
    "v3": Host(96, 340 * _GIB),
    "v4": Host(240, 407 * _GIB),
}
"""Hosts by machine type, or by family for `cloud-tpu`.

Source: Compute Engine's machine types in tools/machinetypes.csv of Cyclenerd/google-cloud-pricing-cost-calculator at 0026ae3,
where v3 and v4 are ct3-hightpu-4t and ct4p-hightpu-4t. The host of a v2 is recalled, without a source; its memory is unknown.
"""


def family(accelerator: Accelerator) -> str:
    """Returns the family of an accelerator, for example v5e for v5e-8."""
    return accelerator.name.rpartition("-")[0] or accelerator.name


def device_of(accelerator: Accelerator) -> Device:
    return DEVICES[family(accelerator)]


def host_of(accelerator: Accelerator) -> Host:
    """Returns the figures of one of an accelerator's hosts."""
    return HOSTS[family(accelerator) if accelerator.machine_type == "cloud-tpu" else accelerator.machine_type]


def dollars_per_hour(accelerator: Accelerator) -> float:
    """Returns the price of one of an accelerator's devices, including its share of the host."""
    return PRICES[family(accelerator)].dollars_per_hour

"""Google's prices of devices, with dates and source. A price change needs a change of this file only."""

from collections.abc import Mapping
from dataclasses import dataclass

SOURCE = "SkyPilot's catalog (v8/gcp/vms.csv at 006059e)"
REGION = "us-central1"
_OTHERS_READ, _TPUS_READ = "2026-11-26", "2026-11-25"


@dataclass(frozen=True)
class Price:
    """The on-demand price of one device and its share of the host."""

    dollars_per_hour: float
    read: str
    """The date on which the price was read, for example 2026-11-25."""
    region: str = REGION


PRICES: Mapping[str, Price] = {
    "cpu": Price(0.77694, _OTHERS_READ),
    # GPUs: the GPU itself, plus its share of the machine.
    "t4": Price(0.35 + 0.38, _OTHERS_READ),
    "l4": Price(0.56004 + 0.44038, _OTHERS_READ),
    "a100": Price(2.93391 + 0.73948, _OTHERS_READ),
    "a100-80gb": Price(4.4242 + 1.09962, _OTHERS_READ, "us-east5"),
    "h100": Price(9.79655 + 1.18251, _OTHERS_READ, "us-east4"),
    # TPUs: the catalog has the price of 8 cores of v2 and v3, of 4 chips of v4, of one chip of v5e.
    "v2": Price(4.50 / 8, _TPUS_READ),
    "v3": Price(8.00 / 8, _TPUS_READ),
    "v4": Price(12.88 / 4, _TPUS_READ),
    "v5e": Price(1.20, _TPUS_READ),
}
"""Prices by family. us-central1 lists a100-80gb and h100 at less than half of other regions' prices, so those are used."""

IN_WORDS = (
    f"Google's in the USA, on demand, from {SOURCE}, read {_TPUS_READ} (TPUs) and {_OTHERS_READ} (others): {REGION}, but "
    f"{PRICES['a100-80gb'].region} for a100-80gb and {PRICES['h100'].region} for h100; --price takes another"
)

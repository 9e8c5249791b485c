"""The protocols that measure an encoder, one file each. Read `protocol.py` first, then `cached.py`.

To add a protocol, add a file with a constant PROTOCOLS here, and the protocol's name to `trainer.settings.ProtocolName`. Its
settings are fields of `trainer.settings.LinearEvalSettings`.
"""

import importlib
import pkgutil
from collections.abc import Iterator
from typing import get_args

from eval.measure.features import PART_BYTES
from eval.measure.logistic import HELD_BYTES
from eval.measure.protocols.cached import CACHED
from eval.measure.protocols.control import CONTROL
from eval.measure.protocols.protocol import Context, Protocol, Scores, Sizes, Values, Work
from trainer.config import Config
from trainer.settings import ProtocolName

_BASE_BYTES = 1.5e9
"""Memory of TensorFlow, the encoder and a batch."""
_SEARCH_VECTORS = 30
"""Number of vectors that L-BFGS holds, each as long as the weights, in float64."""

__all__ = [
    "PROTOCOLS",
    "Context",
    "Protocol",
    "Scores",
    "Sizes",
    "Values",
    "Work",
    "description_of",
    "disk_bytes",
    "memory_bytes",
    "work_of",
]


def _in_this_folder() -> Iterator[Protocol]:
    for module in pkgutil.iter_modules(__path__):
        yield from getattr(importlib.import_module(f"{__name__}.{module.name}"), "PROTOCOLS", ())


_FOUND = {one.name: one for one in _in_this_folder()}
PROTOCOLS: dict[str, Protocol] = {name: _FOUND[name] for name in get_args(ProtocolName)}
"""Protocols by name, in the order of `trainer.settings.ProtocolName`."""


def memory_bytes(config: Config, sizes: Sizes) -> float:
    """Returns the estimated peak memory of an evaluation. docs/evaluation.md lists measurements.

    Counts what a protocol needs for itself, the features and scores of the validation images, the vectors of L-BFGS, the
    features that a fit holds, and the parts that are read ahead. For other protocols than `global-objective`, of the training
    images only IDs and labels grow with their number.
    """
    validation = 4.0 * sizes.validation * (2 * sizes.features + 3 * sizes.classes)
    search = 8.0 * _SEARCH_VECTORS * sizes.features * sizes.classes
    held = min(4.0 * sizes.train * sizes.features, HELD_BYTES)
    shared = _BASE_BYTES + validation + search + held + 4.0 * PART_BYTES + 40.0 * sizes.train
    return shared + sum(one.memory_bytes for one in work_of(config, sizes).values())


def disk_bytes(config: Config, sizes: Sizes) -> float:
    """Returns the size of an evaluation's features on disk, including those of the control, and of projections."""
    control = min(sizes.train, config.linear_eval.control_images)
    images = sizes.train + sizes.validation + (control + sizes.validation if control else 0)
    return 4.0 * images * sizes.features + sum(one.disk_bytes for one in work_of(config, sizes).values())


def chosen(config: Config) -> list[Protocol]:
    """Returns the protocols of an evaluation in order of execution: always `cached` first, then the control, then the others."""
    others = (PROTOCOLS[name] for name in dict.fromkeys(config.linear_eval.protocols) if name != CACHED.name)
    return [CACHED, *([CONTROL] if config.linear_eval.control_images else []), *others]


def work_of(config: Config, sizes: Sizes) -> dict[str, Work]:
    """Returns the work of each row of an evaluation, in order of execution.

    The row `features` is the forward pass over both splits, which protocols share. The row `untrained` is the control. All other
    rows are protocols.
    """
    return {"features": Work(sizes.train + sizes.validation)} | {one.row: one.work(config, sizes) for one in chosen(config)}


def description_of(protocol: str) -> str:
    """Returns the description of a protocol, or an empty string if this version does not know it."""
    return PROTOCOLS[protocol].description if protocol in PROTOCOLS else ""

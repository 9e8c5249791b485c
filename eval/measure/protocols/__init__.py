"""The ways to measure an encoder, a file each. Read `protocol.py` first, then `cached.py`.

A new protocol takes a file here, whose PROTOCOLS holds it, and its name in `trainer.settings.ProtocolName`. Its settings are
fields of `trainer.settings.LinearEvalSettings`.
"""

import importlib
import pkgutil
from collections.abc import Iterator
from typing import get_args

from eval.measure.features import PART_BYTES
from eval.measure.logistic import HELD_BYTES
from eval.measure.protocols.cached import CACHED
from eval.measure.protocols.control import CONTROL
from eval.measure.protocols.protocol import Context, Protocol, Scores, Sizes, Work
from trainer.config import Config
from trainer.settings import ProtocolName

_BASE_BYTES = 1.5e9
"""Of TensorFlow, the encoder and a batch."""
_SEARCH_VECTORS = 30
"""As long as the weights, float64, that L-BFGS remembers and works with."""

__all__ = [
    "PROTOCOLS",
    "Context",
    "Protocol",
    "Scores",
    "Sizes",
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
"""By name, in the order of `trainer.settings.ProtocolName`."""


def memory_bytes(sizes: Sizes) -> float:
    """Returns what an evaluation holds in memory at most; docs/evaluation.md has what was measured.

    The validation images' features and scores, the vectors of a fit's search, the features that it holds, and parts that are read
    ahead. What grows with the training images is their IDs and labels.
    """
    validation = 4.0 * sizes.validation * (2 * sizes.features + 3 * sizes.classes)
    search = 8.0 * _SEARCH_VECTORS * sizes.features * sizes.classes
    held = min(4.0 * sizes.train * sizes.features, HELD_BYTES)
    return _BASE_BYTES + validation + search + held + 4.0 * PART_BYTES + 40.0 * sizes.train


def disk_bytes(config: Config, sizes: Sizes) -> float:
    """Returns how much disk its features take, the control's included."""
    control = min(sizes.train, config.linear_eval.control_images)
    images = sizes.train + sizes.validation + (control + sizes.validation if control else 0)
    return 4.0 * images * sizes.features


def chosen(config: Config) -> list[Protocol]:
    """Returns the protocols of an evaluation in the order in which they are done: `cached` first, always, then the control."""
    others = (PROTOCOLS[name] for name in dict.fromkeys(config.linear_eval.protocols) if name != CACHED.name)
    return [CACHED, *([CONTROL] if config.linear_eval.control_images else []), *others]


def work_of(config: Config, sizes: Sizes) -> dict[str, Work]:
    """Returns the work of an evaluation by its rows, in the order in which they are done.

    The row `features` is the forward pass over both splits that protocols share, `untrained` the control.
    """
    return {"features": Work(sizes.train + sizes.validation)} | {one.row: one.work(config, sizes) for one in chosen(config)}


def description_of(protocol: str) -> str:
    """Returns the line that describes a protocol, or nothing where this version does not know it."""
    return PROTOCOLS[protocol].description if protocol in PROTOCOLS else ""

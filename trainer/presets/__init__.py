"""The presets, one file per dataset. All other code gets its config from `resolve`."""

from collections.abc import Iterable

from trainer.config import Config, override, refuse_data
from trainer.presets import cifar10, demo, imagenet, published
from trainer.presets.preset import Preset
from trainer.shared.errors import UserError, nearest

__all__ = ["PRESETS", "PUBLISHED", "Preset", "find", "resolve", "resolve_pretraining"]

PRESETS: dict[str, Preset] = {one.name: one for one in (*demo.PRESETS, *imagenet.PRESETS, *cifar10.PRESETS, *published.PRESETS)}

PUBLISHED = frozenset(one.name for one in published.PRESETS)
"""Presets of published encoders, which are imported."""


def find(name: str) -> Preset:
    """Returns the preset with this name. Raises UserError with the nearest name if there is none."""
    if name not in PRESETS:
        raise UserError(f"there is no preset {name}{nearest(name, PRESETS)}; sogclr presets lists them")
    return PRESETS[name]


def resolve(preset: str, overrides: Iterable[str] = ()) -> Config:
    """Returns the config of `preset` with `overrides` ("key=value") applied.

    Raises UserError for an unknown preset or an invalid override.
    """
    return override(find(preset).config, overrides)


def resolve_pretraining(preset: str, overrides: Iterable[str] = ()) -> Config:
    """Returns the config of `preset` with `overrides` applied, for pretraining on a finished dataset.

    Raises UserError as `resolve` does, and for a setting that only the conversion has.
    """
    items = list(overrides)
    config = resolve(preset, items)
    refuse_data(items)
    return config

"""Configuration: one frozen value, changed only by `key=value` overrides, whole and checked from the start.

`resolve(preset, overrides)` of `trainer.presets` is the single way to a `Config`. Nothing here needs TensorFlow.
"""

import dataclasses
import json
import math
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from trainer.settings import (
    LINEAR_EVAL,
    EncoderSettings,
    LinearEvalSettings,
    LossSettings,
    OptimizerSettings,
    RunSettings,
    Setting,
    ViewSettings,
    settings,
)
from trainer.shared.errors import UserError, nearest


@dataclass(frozen=True)
class Config:
    """All that a pretraining run depends on besides the data and the code, and how its encoder is measured."""

    views: ViewSettings = field(default_factory=ViewSettings)
    encoder: EncoderSettings = field(default_factory=EncoderSettings)
    loss: LossSettings = field(default_factory=LossSettings)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    run: RunSettings = field(default_factory=RunSettings)
    linear_eval: LinearEvalSettings = field(default_factory=LinearEvalSettings)


def values_of(config: Config) -> dict[str, Any]:
    """Returns the value of every setting, by its key."""
    return {key: getattr(getattr(config, one.group), one.name) for key, one in settings().items()}


def replace(config: Config, **values: Any) -> Config:
    """Returns `config` with `values`, by key, in place: `replace(config, depth=18, loss="nt_xent")`."""
    changes: dict[str, dict[str, Any]] = {}
    for key, value in values.items():
        one = settings()[key]
        changes.setdefault(one.group, {})[one.name] = value
    groups = {group: dataclasses.replace(getattr(config, group), **fields) for group, fields in changes.items()}
    return dataclasses.replace(config, **groups)


def override(config: Config, overrides: Iterable[str]) -> Config:
    """Returns `config` with each `key=value` of `overrides` in place, coerced to its setting's type.

    Numbers may come as any text that has the value, since pipelines turn 512 into 512.0. Raises UserError for what is no
    `key=value`, an unknown key (with the nearest one that exists), a value of another type or out of its bounds, and a setting
    that has no effect.
    """
    changes: dict[str, Any] = {}
    for item in overrides:
        key, separator, text = item.partition("=")
        key = key.strip()
        if not separator:
            raise UserError(f"{item!r} is not an override: write key=value, as in epochs=100")
        if key not in settings():
            raise UserError(f"{key} is not a setting{nearest(key, settings())}")
        changes[key] = _coerce(settings()[key], text.strip())
    changed = replace(config, **changes)
    _require_effect(changed)
    return changed


def _require_effect(config: Config) -> None:
    """Raises UserError for a setting that differs from its default and that nothing in `config` uses."""
    values = values_of(config)
    for key, one in settings().items():
        for need in one.needs:
            if values[key] != one.default and values[need.key] not in need.values:
                users = " or ".join(f"{need.key}={value}" for value in need.values)
                raise UserError(
                    f"{key}={values[key]} has no effect with {need.key}={values[need.key]}: only {users} uses it; "
                    f"leave {key} at {one.default}, or take {users}"
                )


def split_overrides(overrides: Iterable[str]) -> tuple[list[str], list[str]]:
    """Returns the overrides of pretraining and those of the linear eval, each in its order."""
    items = list(overrides)
    return (
        [item for item in items if not item.strip().startswith(LINEAR_EVAL)],
        [item for item in items if item.strip().startswith(LINEAR_EVAL)],
    )


def _coerce(setting: Setting, text: str) -> Any:
    """Returns what `text` says, in the setting's type. Raises UserError where it says nothing of this type."""
    kind = setting.kind
    try:
        if typing.get_origin(kind) is tuple:
            inner, *_ = typing.get_args(kind)
            inner = typing.get_args(inner)[0] if typing.get_origin(inner) is typing.Annotated else inner
            parts = (part.strip() for part in text.strip("()[]").split(","))
            return tuple(_scalar(inner, part) for part in parts if part)
        return _scalar(kind, text)
    except (ValueError, KeyError) as error:
        wanted = {int: "a whole number", float: "a number", bool: "true or false"}.get(kind)
        choices = ", ".join(map(str, setting.choices))
        wanted = wanted or (f"one of {choices}" if choices else "numbers with commas between")
        raise UserError(f"{setting.key}={text} is not {wanted}") from error


def _scalar(kind: Any, text: str) -> Any:
    if kind is str:
        return text
    if kind is bool:
        return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
    if typing.get_origin(kind) is Literal:
        # Which choices there are is checked with the bounds.
        return text if isinstance(typing.get_args(kind)[0], str) else _number(text, int)
    return _number(text, kind)


def _number(text: str, kind: type) -> int | float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(text)
    if kind is int:
        if value != int(value):
            raise ValueError(text)
        return int(text) if text.strip().lstrip("+-").isdigit() else int(value)
    return value


def pretraining_of(config: Config) -> dict[str, Any]:
    """Returns the value of every setting of pretraining, by its key."""
    return {key: value for key, value in values_of(config).items() if not key.startswith(LINEAR_EVAL)}


def as_dict(config: Config) -> dict[str, Any]:
    """Returns every setting by its key, those of the linear eval in an object of their own: what config.json holds."""
    return {**pretraining_of(config), "linear_eval": dataclasses.asdict(config.linear_eval)}


def config_to_json(config: Config) -> str:
    return json.dumps(as_dict(config), indent=1, sort_keys=True) + "\n"


def config_from_dict(values: Mapping[str, Any]) -> Config:
    """Reads what `config_to_json` wrote, parsed. Raises UserError where a setting is missing or unknown.

    A setting of the linear eval may be missing, and has its default then: it is chosen anew at every evaluation.
    """
    flat = {key: value for key, value in values.items() if key != "linear_eval"}
    flat |= {LINEAR_EVAL + key: value for key, value in dict(values.get("linear_eval", {})).items()}
    known = set(settings())
    unlike = (set(flat) - known) | {key for key in known - set(flat) if not key.startswith(LINEAR_EVAL)}
    if unlike:
        raise UserError(f"the stored config is of another version: it differs from this one's in {', '.join(sorted(unlike))}")
    typed = {
        key: tuple(value) if isinstance(value, list) else float(value) if settings()[key].kind is float else value
        for key, value in flat.items()
    }
    return replace(Config(), **typed)

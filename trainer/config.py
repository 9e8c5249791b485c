"""The configuration of a run: a frozen dataclass, validated on creation and changed only by `key=value` overrides.

`trainer.presets.resolve(preset, overrides)` makes every `Config`. This module does not need TensorFlow.
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
    ViewSettings,
    settings,
)
from trainer.shared.data import ALLOW_OTHER_COUNTS, DATA, DataSettings
from trainer.shared.errors import UserError, nearest
from trainer.shared.settings import Setting

BOOKKEEPING = ("linear_eval", "log_every_steps", "checkpoint_every_minutes", "keep_checkpoints", "cache")
"""Settings that may change when a run resumes, because they do not affect its state."""


@dataclass(frozen=True)
class Config:
    """All settings of a run: those of the conversion, of pretraining, and of the linear eval of its encoder.

    The result of pretraining depends on its settings, the data and the code, and on nothing else.
    """

    data: DataSettings = field(default_factory=DataSettings)
    views: ViewSettings = field(default_factory=ViewSettings)
    encoder: EncoderSettings = field(default_factory=EncoderSettings)
    loss: LossSettings = field(default_factory=LossSettings)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    run: RunSettings = field(default_factory=RunSettings)
    linear_eval: LinearEvalSettings = field(default_factory=LinearEvalSettings)


def values_of(config: Config) -> dict[str, Any]:
    """Returns the value of every setting, by key."""
    return {key: getattr(getattr(config, one.group), one.name) for key, one in settings().items()}


def replace(config: Config, **values: Any) -> Config:
    """Returns `config` with some settings changed, each named by its key: `replace(config, depth=18, loss="nt_xent")`."""
    changes: dict[str, dict[str, Any]] = {}
    for key, value in values.items():
        one = settings()[key]
        changes.setdefault(one.group, {})[one.name] = value
    groups = {group: dataclasses.replace(getattr(config, group), **fields) for group, fields in changes.items()}
    return dataclasses.replace(config, **groups)


def override(config: Config, overrides: Iterable[str]) -> Config:
    """Returns `config` with each `key=value` of `overrides` applied. The value is parsed as the setting's type.

    Accepts "512.0" for an integer setting, because KFP passes integers as floats. Raises UserError if an override is not
    `key=value`, its key is unknown (the message names the nearest key), its value has the wrong type or is out of bounds, or
    the setting would have no effect.
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
    """Raises UserError if a setting differs from its default and nothing in `config` uses it."""
    values = values_of(config)
    for key, one in settings().items():
        for need in one.needs:
            if values[key] != one.default and values[need.key] not in need.values:
                users = " or ".join(f"{need.key}={_text(value)}" for value in need.values)
                raise UserError(
                    f"{key}={values[key]} has no effect with {need.key}={_text(values[need.key])}: only {users} uses it; "
                    f"leave {key} at {one.default}, or set {users}"
                )


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def require_same_encoder(path: str, before: Config, config: Config, has_head: bool) -> None:
    """Raises UserError if `config` has another encoder than `before`, the config of the checkpoint `path`.

    Compares the projection head too if the checkpoint has one.
    """
    then, now = values_of(before), values_of(config)
    of_the_head = () if has_head else ("projection_layers", "projection_hidden_dim", "projection_dim")
    for key, one in settings().items():
        if one.group == "encoder" and key not in ("precision", *of_the_head) and then[key] != now[key]:
            raise UserError(
                f"{path} has {key}={then[key]}, not {now[key]}: set {key}={then[key]}, or start from another checkpoint"
            )


def split_overrides(overrides: Iterable[str]) -> tuple[list[str], list[str]]:
    """Returns (overrides of pretraining, overrides of the linear eval), each in the given order.

    Those of the conversion are in neither, apart from the one that pretraining has too: `data.allow_other_counts`.
    """
    items = list(overrides)
    return (
        [item for item in items if not _is_of_conversion(item) and not item.strip().startswith(LINEAR_EVAL)],
        [item for item in items if item.strip().startswith(LINEAR_EVAL)],
    )


def refuse_data(overrides: Iterable[str]) -> None:
    """Raises UserError if an override is of the conversion alone, which is finished before pretraining."""
    for item in overrides:
        if _is_of_conversion(item):
            raise UserError(
                f"{item} cannot be set here: the dataset is finished; give it to the conversion, "
                f"python -m beam_jobs.build_tfrecords or sogclr run"
            )


def data_from(overrides: Iterable[str]) -> DataSettings:
    """Returns the settings of the conversion that `overrides` make of the defaults. Raises UserError for any other setting."""
    items = list(overrides)
    for item in items:
        if not item.strip().startswith(DATA):
            raise UserError(f"{item} is not a setting of the conversion: they begin with {DATA}")
    return override(Config(), items).data


def _is_of_conversion(item: str) -> bool:
    key = item.partition("=")[0].strip()
    return key.startswith(DATA) and key != ALLOW_OTHER_COUNTS


def _coerce(setting: Setting, text: str) -> Any:
    """Parses `text` as the setting's type. Raises UserError if it is not a value of this type."""
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
        wanted = wanted or (f"one of {choices}" if choices else "a list of numbers separated by commas")
        raise UserError(f"{setting.key}={text} is not {wanted}") from error


def _scalar(kind: Any, text: str) -> Any:
    if kind is str:
        return text
    if kind is bool:
        return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
    if typing.get_origin(kind) is Literal:
        # Setting.check compares the value with the choices.
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
    """Returns the value of every setting of pretraining, by key."""
    return {key: value for key, value in values_of(config).items() if not key.startswith((LINEAR_EVAL, DATA))}


def as_dict(config: Config) -> dict[str, Any]:
    """Returns the content of config.json: the settings of pretraining by key, and the linear eval's under `linear_eval`."""
    return {**pretraining_of(config), "linear_eval": dataclasses.asdict(config.linear_eval)}


def config_to_json(config: Config) -> str:
    return json.dumps(as_dict(config), indent=1, sort_keys=True) + "\n"


def config_from_dict(values: Mapping[str, Any]) -> Config:
    """Returns the config that `config_to_json` wrote, from its parsed JSON. Raises UserError if a setting is unknown.

    A missing setting takes its default: the default of a new setting is what versions without it did. The settings of the
    conversion are not stored: they are those of the dataset.
    """
    flat = {key: value for key, value in values.items() if key != "linear_eval"}
    flat |= {LINEAR_EVAL + key: value for key, value in dict(values.get("linear_eval", {})).items()}
    unlike = set(flat) - {key for key in settings() if not key.startswith(DATA)}
    if unlike:
        raise UserError(f"another version wrote the stored config: these settings do not match: {', '.join(sorted(unlike))}")
    # Somebody may have edited the file: each value is parsed as an override's is.
    texts = {key: ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value) for key, value in flat.items()}
    return replace(Config(), **{key: _coerce(settings()[key], text) for key, text in texts.items()})

"""What a setting is: a field of a frozen group, with its type, bounds and choices beside it. Does not need TensorFlow.

A setting's type is annotated with its bounds (annotated-types); choices are a Literal. `trainer.settings` has the groups.
"""

import dataclasses
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Ge, Gt, Interval, MinLen

from trainer.shared.errors import UserError, nearest


@dataclass(frozen=True)
class OnlyWith:
    """Marks a setting that has an effect only if the setting `key` has one of `values`."""

    key: str
    values: tuple[str | bool, ...]


@dataclass(frozen=True)
class Group:
    """Settings that belong together. Raises UserError with the name of the setting if a value is out of bounds."""

    GROUP: ClassVar[str]
    """Name of the group. Also the key of its field `name`, if it has one."""
    PREFIX: ClassVar[str] = ""
    """Start of the keys of its settings."""

    def __post_init__(self) -> None:
        for one in fields_of(type(self)):
            one.check(getattr(self, one.name))


@dataclass(frozen=True)
class Setting:
    """One setting: a field of a group."""

    key: str
    """Name of the setting in `--set`."""
    group: str
    name: str
    kind: Any
    """Type of the setting: int, float, bool, str, a Literal, or a tuple of one of them."""
    bounds: tuple[Any, ...]
    needs: tuple[OnlyWith, ...]
    default: Any

    @property
    def choices(self) -> tuple[Any, ...]:
        """All allowed values of a setting whose type is a Literal, else nothing."""
        return _choices_of(self.kind)

    def check(self, value: Any) -> None:
        """Raises UserError if `value` is not one of the choices, or is out of bounds."""
        for one, kind, bounds in self._parts(value):
            choices = _choices_of(kind)
            if choices and one not in choices:
                named = ", ".join(map(str, choices))
                raise UserError(f"{self.key}={one} is not one of {named}{nearest(str(one), map(str, choices))}")
            for bound in bounds:
                if not _holds(bound, one):
                    raise out_of_bounds(self.key, one, _in_words(bound))

    def _parts(self, value: Any) -> Iterator[tuple[Any, Any, tuple[Any, ...]]]:
        """Yields `value`, and the elements of a tuple, each with its type and bounds."""
        yield value, self.kind, self.bounds
        if typing.get_origin(self.kind) is tuple:
            kind, markers = _plain(typing.get_args(self.kind)[0])
            for one in value:
                yield one, kind, markers


def fields_of(group: type[Group]) -> tuple[Setting, ...]:
    """Returns the settings of a subclass of `Group`, in the order of its fields."""
    hints = typing.get_type_hints(group, include_extras=True)
    return tuple(_setting(group, field, hints[field.name]) for field in dataclasses.fields(group))


def _setting(group: type[Group], field: "dataclasses.Field[Any]", hint: Any) -> Setting:
    key = group.GROUP if field.name == "name" else f"{group.PREFIX}{field.name}"
    kind, markers = _plain(hint)
    needs = tuple(marker for marker in markers if isinstance(marker, OnlyWith))
    bounds = tuple(marker for marker in markers if not isinstance(marker, OnlyWith))
    return Setting(key, group.GROUP, field.name, kind, bounds, needs, field.default)


def _plain(hint: Any) -> tuple[Any, tuple[Any, ...]]:
    """Returns (the type without its annotations, the annotations)."""
    if typing.get_origin(hint) is not Annotated:
        return hint, ()
    kind, *markers = typing.get_args(hint)
    return kind, tuple(markers)


def _choices_of(kind: Any) -> tuple[Any, ...]:
    return typing.get_args(kind) if typing.get_origin(kind) is Literal else ()


def _holds(bound: Any, value: Any) -> bool:
    match bound:
        case Ge(ge):
            return bool(value >= ge)
        case Gt(gt):
            return bool(value > gt)
        case MinLen(length):
            return len(value) >= length
        case Interval(gt=gt, ge=ge, lt=lt, le=le):
            above = (gt is None or value > gt) and (ge is None or value >= ge)
            return above and (lt is None or value < lt) and (le is None or value <= le)
    raise TypeError(f"no check for {bound}")


def _in_words(bound: Any) -> str:
    """Returns the allowed values in words, as in "in (0, 1]"."""
    match bound:
        case Ge(ge):
            return "0 or more" if ge == 0 else f"at least {ge:g}"
        case Gt(gt):
            return f"above {gt}"
        case MinLen(length):
            return f"a list of at least {length}, separated by commas"
        case Interval(gt=gt, ge=ge, lt=lt, le=le):
            left = f"[{ge}" if gt is None else f"({gt}"
            return f"in {left}, {f'{le}]' if lt is None else f'{lt})'}"
    raise TypeError(f"no words for {bound}")


def out_of_bounds(key: str, value: Any, allowed: str) -> UserError:
    return UserError(f"{key}={value} makes no sense: it must be {allowed}")

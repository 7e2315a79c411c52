"""Configuration fields that know their meaning and their limits."""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any


@dataclasses.dataclass(frozen=True)
class Option:
    """What a field means, and its limits; stands in the field's annotation.

    Attributes:
      help: one line for people.
      least: smallest value allowed.
      most: largest value allowed.
      above: every value must be greater.
    """

    help: str
    least: float | None = None
    most: float | None = None
    above: float | None = None


class Field(typing.NamedTuple):
    """One field of a configuration.

    Attributes:
      name: the field's name.
      kind: its type; `str` for a `Literal`.
      optional: whether it may be None.
      choices: the values of a `Literal`, or None.
      option: its meaning and limits.
      default: `dataclasses.MISSING` if required.
    """

    name: str
    kind: type
    optional: bool
    choices: tuple[str, ...] | None
    option: Option
    default: Any


def fields_of(config: type) -> list[Field]:
    """The fields of a dataclass, every one annotated `Annotated[type, Option(...)]`."""
    hints = typing.get_type_hints(config, include_extras=True)
    fields = []
    for field in dataclasses.fields(config):
        hint = hints[field.name]
        kind, optional, choices = _take_apart(hint.__origin__)
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        fields.append(
            Field(field.name, kind, optional, choices, hint.__metadata__[0], default)
        )
    return fields


def _take_apart(hint: Any) -> tuple[type, bool, tuple[str, ...] | None]:
    """(type, optional, choices) of `T`, `T | None`, or `Literal["a", "b"]`."""
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) is typing.Literal:
        return str, False, arguments
    return (arguments[0], True, None) if arguments else (hint, False, None)


def check_fields(config: Any) -> None:
    """Convert and check the fields of a frozen dataclass, from its `__post_init__`.

    Paths may come as strings and floats as integers.

    Raises:
      ValueError: names the field, what was expected, and the value.
    """
    owner = type(config).__name__
    for field in fields_of(type(config)):
        value = getattr(config, field.name)
        if value is None and field.optional:
            continue
        value = _convert(f"{owner}.{field.name}", field.kind, value)
        object.__setattr__(config, field.name, value)
        _check_limits(f"{owner}.{field.name}", value, field)


def _convert(name: str, kind: type, value: Any) -> Any:
    if kind is Path and isinstance(value, str | Path):
        return Path(value)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if kind is float and number and math.isfinite(value):
        return float(value)
    if kind is float or type(value) is not kind:
        raise ValueError(f"{name} must be of type {kind.__name__}, got {value!r}")
    return value


def _check_limits(name: str, value: Any, field: Field) -> None:
    option = field.option
    tests: list[tuple[str, Any, Callable[[Any], bool]]] = [
        ("at least", option.least, lambda limit: value >= limit),
        ("at most", option.most, lambda limit: value <= limit),
        ("above", option.above, lambda limit: value > limit),
        ("one of", field.choices, lambda limit: value in limit),
    ]
    for words, limit, passes in tests:
        if limit is not None and not passes(limit):
            shown = ", ".join(limit) if isinstance(limit, tuple) else limit
            raise ValueError(f"{name} must be {words} {shown}, got {value!r}")

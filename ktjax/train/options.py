"""Configuration fields that know their meaning and their limits."""

from __future__ import annotations

import dataclasses
import difflib
import math
import typing
from collections.abc import Callable, Iterable
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
      kind: its type; `str` for a `Literal`, `dict` for a mapping.
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
    """(type, optional, choices) of `T`, `T | None`, `Literal[...]` or `dict[...]`."""
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) is typing.Literal:
        return str, False, arguments
    if typing.get_origin(hint) is dict:
        return dict, False, None
    return (arguments[0], True, None) if arguments else (hint, False, None)


def check_fields(config: Any) -> None:
    """Convert and check the fields of a frozen dataclass, from its `__post_init__`.

    Raises:
      ValueError: names the field, what was expected, and the value.
    """
    owner = type(config).__name__
    for field in fields_of(type(config)):
        value = getattr(config, field.name)
        value = check_value(field, value, f"{owner}.{field.name}")
        object.__setattr__(config, field.name, value)


def check_value(field: Field, value: Any, name: str) -> Any:
    """`value` as the type of `field`; paths may come as strings, floats as integers.

    Args:
      field: whose type and limits count.
      value: what was given.
      name: how errors call it.

    Raises:
      ValueError: names the field, what was expected, and the value.
    """
    if value is None and field.optional:
        return None
    value = _convert(name, field.kind, value)
    _check_limits(name, value, field)
    return value


def unknown_name(name: str, known: Iterable[str]) -> str:
    """What to say of a name that is not among `known`: the nearest, or all of them."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}"


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

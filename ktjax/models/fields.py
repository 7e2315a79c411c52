"""The content of a config.json, read key by key with checks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

_REQUIRED = object()


class ConfigError(ValueError):
    """A config.json that is broken, or asks for something that is not built."""


class Fields:
    """A JSON object; a key that is missing or null is the default, or an error.

    Every method raises a `ConfigError` that names the key and its value.
    """

    def __init__(self, raw: Mapping[str, Any], at: str = "") -> None:
        """Wrap `raw`; `at`, such as "rope_scaling.", comes before keys in errors."""
        self.raw = raw
        self._at = at

    def has(self, name: str) -> bool:
        """Whether the key is there, and not null."""
        return self.raw.get(name) is not None

    def size(self, *names: str, default: Any = _REQUIRED) -> int:
        """A positive integer, under the first of the names that is there."""
        name, value = self._find(names, default)
        if value is not default and not (is_int(value) and value > 0):
            raise ConfigError(f"{self._at}{name} must be positive, got {value!r}")
        return value

    def count(self, name: str, default: Any = _REQUIRED) -> int:
        """An integer that is not negative."""
        _, value = self._find((name,), default)
        if value is not default and not (is_int(value) and value >= 0):
            raise ConfigError(
                f"{self._at}{name} must be an integer from 0, got {value!r}"
            )
        return value

    def number(self, name: str, default: Any = _REQUIRED) -> float:
        """A positive, finite number."""
        _, value = self._find((name,), default)
        if value is default:
            return value
        if not _is_positive(value):
            raise ConfigError(
                f"{self._at}{name} must be a positive number, got {value!r}"
            )
        return float(value)

    def flag(self, name: str, default: Any = _REQUIRED) -> bool:
        """True or false."""
        _, value = self._find((name,), default)
        if not isinstance(value, bool):
            raise ConfigError(f"{self._at}{name} must be true or false, got {value!r}")
        return value

    def integers(self, name: str) -> tuple[int, ...]:
        """A list of integers from 0, or one of them; () by default."""
        value = self.raw.get(name)
        if value is None:
            return ()
        values = value if isinstance(value, list) else [value]
        if not all(is_int(item) and item >= 0 for item in values):
            kind = "token ids" if name.endswith("_token_id") else "integers from 0"
            raise ConfigError(f"{self._at}{name} must be {kind}, got {value!r}")
        return tuple(values)

    def object(self, name: str) -> Fields:
        """A JSON object; empty by default."""
        value = self.raw.get(name)
        if value is None:
            value = {}
        if not isinstance(value, Mapping):
            raise ConfigError(f"{self._at}{name} must be an object, got {value!r}")
        return Fields(value, f"{self._at}{name}.")

    def only(self, name: str, *values: Any) -> None:
        """What would change the model's output and is not built is an error.

        Raises:
          ConfigError: the key is there and none of the values.
        """
        if self.has(name) and self.raw[name] not in values:
            raise ConfigError(f"{self._at}{name} = {self.raw[name]!r} is not supported")

    def _find(self, names: tuple[str, ...], default: Any) -> tuple[str, Any]:
        for name in names:
            if self.has(name):
                return name, self.raw[name]
        if default is _REQUIRED:
            raise ConfigError(f"{self._at}{names[0]} is missing")
        return names[0], default


def is_int(value: object) -> bool:
    """Whether a JSON value is an integer: true and false are not."""
    return isinstance(value, int) and not isinstance(value, bool)


def _is_positive(value: object) -> bool:
    return (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and math.isfinite(value)
        and value > 0
    )

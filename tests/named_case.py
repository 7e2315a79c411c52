"""Test cases whose name is what makes them different."""

from __future__ import annotations

import dataclasses


class NamedCase:
    """For dataclasses: str() names the fields that are not at their defaults."""

    def __str__(self) -> str:
        default = {f.name: f.default for f in dataclasses.fields(self)}
        return "-".join(
            f"{name}={value}"
            for name, value in dataclasses.asdict(self).items()
            if value != default[name]
        )

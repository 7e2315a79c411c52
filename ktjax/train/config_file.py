"""Configurations as YAML files: `option: value`, a line each."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from ktjax.io.atomic import new_file
from ktjax.train.options import Field, check_value, fields_of, unknown_name


class ConfigFileError(ValueError):
    """A configuration file that cannot be used; the message begins with file:line."""


def read_config_file(path: Path, config: type) -> dict[str, Any]:
    """The fields of the dataclass `config` that the YAML file at `path` sets.

    Keys are the names of the fields, with `_` or `-`. Paths are relative to the working
    directory, as on the command line. `null` stands for an option that is not given.

    Args:
      path: a file that holds a mapping.
      config: a dataclass whose fields have an `Option` each.

    Returns:
      Checked values by name, for the constructor.

    Raises:
      ConfigFileError: the file cannot be read, is no mapping, or has a key that is
        unknown or there twice, or a value of the wrong type or outside its limits.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigFileError(f"{path}:1: cannot read it: {error}") from None
    fields = {field.name: field for field in fields_of(config)}
    values: dict[str, Any] = {}
    for key, value, where in _pairs(text, path):
        name = key.replace("-", "_") if isinstance(key, str) else key
        if name not in fields:
            hint = unknown_name(str(name), fields)
            raise ConfigFileError(f"{where}: unknown option {key!r}; {hint}")
        if value is not None:
            values[name] = _value(fields[name], value, where)
    return values


def write_config_file(path: Path, config: Any) -> None:
    """Write the fields of `config` that are set, so that `path` reads as the same.

    Without `resume`: that is a matter of one call.

    Args:
      path: the file; appears whole, or stays as it was.
      config: a dataclass as in `read_config_file`.
    """
    plain = {
        field.name: str(value) if isinstance(value, Path) else value
        for field in dataclasses.fields(config)
        if (value := getattr(config, field.name)) is not None and field.name != "resume"
    }
    with new_file(path) as file:
        file.write(yaml.safe_dump(plain, sort_keys=False, allow_unicode=True).encode())


def _pairs(text: str, path: Path) -> Iterator[tuple[Any, Any, str]]:
    """Every (key, value, file:line) of a YAML mapping, each key once."""
    loader = yaml.SafeLoader(text)
    try:
        root = loader.get_single_node()
        if root is None:
            return
        if not isinstance(root, yaml.MappingNode):
            raise ConfigFileError(
                f"{path}:1: expected lines of the form 'option: value'"
            )
        seen = set()
        for key_node, value_node in root.value:
            where = f"{path}:{key_node.start_mark.line + 1}"
            key = loader.construct_object(key_node, deep=True)
            if str(key) in seen:
                raise ConfigFileError(f"{where}: {key!r} is there twice")
            seen.add(str(key))
            yield key, loader.construct_object(value_node, deep=True), where
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = 1 if mark is None else mark.line + 1
        problem = getattr(error, "problem", None) or error
        raise ConfigFileError(f"{path}:{line}: not YAML: {problem}") from None
    finally:
        loader.dispose()


def _value(field: Field, value: Any, where: str) -> Any:
    if field.kind is float and isinstance(value, str):
        # YAML 1.1 takes 1e-4, which has no point, for a string.
        with contextlib.suppress(ValueError):  # then the check says what is wrong
            value = float(value)
    try:
        return check_value(field, value, field.name)
    except ValueError as error:
        raise ConfigFileError(f"{where}: {error}") from None

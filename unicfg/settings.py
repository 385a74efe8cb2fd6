"""Settings in YAML files: strictly read into dataclasses."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, TypeVar

import dacite
import yaml

T = TypeVar("T")


def read_mapping(file: Path | str, what: str) -> dict[str, Any]:
    """The keys and values of a YAML file.

    Args:
        file: to read.
        what: it is, for the error.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no YAML, or no mapping.
    """
    if not Path(file).is_file():
        raise FileNotFoundError(f"no {what} at {file}, expected a YAML file")
    try:
        values = yaml.safe_load(Path(file).read_text("utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is no YAML: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{file} holds {type(values).__name__}, expected a mapping of sections")
    return values


def build(section: type[T], values: dict[str, Any], where: str) -> T:
    """A dataclass from the values of its fields.

    Args:
        section: the dataclass.
        values: by field; sections of it as mappings, tuples as lists.
        where: they are from, for the error.

    Raises:
        ValueError: if a key is unknown or missing, or a value is of another type or out of its range; names the key.
    """
    try:
        return dacite.from_dict(
            section,
            _typed(values, section, where),
            dacite.Config(strict=True),
        )
    except dacite.DaciteError as error:
        raise ValueError(f"{where}: {error}") from error


def _typed(values: dict[str, Any], section: type[Any], where: str) -> dict[str, Any]:
    """The values with lists as tuples and whole numbers as floats where the section wants these.

    Raises:
        ValueError: if a key is unknown, a list is no list, or a number no number.
    """
    known = {f.name: f for f in dataclasses.fields(section)}
    typed: dict[str, Any] = {}
    for key, value in values.items():
        if key not in known:
            raise ValueError(f"{where}: unknown key {key!r}, expected one of {sorted(known)}")
        kind, factory = str(known[key].type), known[key].default_factory
        if isinstance(factory, type):
            if not isinstance(value, dict):
                raise ValueError(f"{where}: {key} is {value!r}, expected a section of keys")
            value = _typed(value, factory, f"{where}: {key}")
        elif kind.startswith("tuple"):
            if not isinstance(value, list):
                raise ValueError(f"{where}: {key} is {value!r}, expected a list")
            value = tuple(value)
        elif kind.startswith("float") and value is not None:
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                hint = " (YAML reads 1e-3 as text: write 1.0e-3)" if isinstance(value, str) else ""
                raise ValueError(f"{where}: {key} is {value!r}, expected a number{hint}")
            value = float(value)
        typed[key] = value
    return typed

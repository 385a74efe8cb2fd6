"""Settings in YAML files: strictly read into dataclasses."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import dacite
import yaml

from tokenizers_vq.files import read_bounded, shortened

T = TypeVar("T")

# far beyond what a person writes, and read in seconds
MOST_YAML_BYTES = 1 << 17
MOST_VALUES = 20_000
DEEPEST_YAML = 20
# up to here each whole number is a float
LARGEST = 1 << 53
# of YAML's own values
TAGS = [
    f"tag:yaml.org,2002:{kind}" for kind in ("str", "int", "float", "bool", "null", "seq", "map")
]


class _Loader(yaml.SafeLoader):
    """Plain values only: no key twice, and no aliases or merges that stand for more than fits into memory."""

    depth = 0

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.sizes: dict[int, int] = {}  # values that a finished node stands for, by its id

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        alias = isinstance(event, yaml.AliasEvent)
        if not alias and event.tag not in (None, "!", *TAGS):
            raise _refused(f"found the tag {event.tag!r}, expected none or one of {TAGS}", event)
        if self.depth >= DEEPEST_YAML:
            raise _refused(f"it is nested more than {DEEPEST_YAML} deep", event)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        if alias and id(node) not in self.sizes:
            raise _refused(f"*{event.anchor} stands inside of itself", event)
        parts: list[yaml.Node] = []
        if isinstance(node, yaml.ScalarNode):
            node.value.encode()  # half of a character, written as \ud800, is none
        elif isinstance(node, yaml.SequenceNode):
            parts = node.value
        elif isinstance(node, yaml.MappingNode):
            seen: set[str] = set()
            for key, value in node.value:
                if isinstance(key, yaml.ScalarNode) and key.value in seen:
                    raise _refused(f"found the key {key.value!r:.100} twice", key)
                seen.add(str(key.value))
                parts += (key, value)  # the value of a merging key <<: all that it brings
        self.sizes[id(node)] = 1 + sum(self.sizes[id(part)] for part in parts)
        if self.sizes[id(node)] > MOST_VALUES:
            raise _refused(f"it holds more than {MOST_VALUES} values, aliases counted", event)
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, LookupError, OverflowError) as error:  # numbers and dates that are none
            found = f"{node.value!r:.100} does not suit the tag {node.tag!r}"
            raise _refused(f"{found}: {error}", node) from error

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        number: int = super().construct_yaml_int(node)
        if number.bit_length() > 63:
            raise ValueError(f"a number has {number.bit_length()} bits, expected at most 63")
        return number


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)


def _refused(problem: str, place: Any) -> yaml.YAMLError:
    """An error that names the line of an event or a node."""
    return yaml.composer.ComposerError(None, None, problem, place.start_mark)


def read_mapping(file: Path | str, what: str) -> dict[str, Any]:
    """The keys and values of a YAML file.

    Args:
        file: to read.
        what: it is, for the error.

    Raises:
        FileNotFoundError: if there is no such file.
        OSError: if it cannot be read.
        ValueError: if it is no YAML, or no mapping; has a tag that is none of YAML's own or a key twice; or is too deep or too
            long, with aliases and merges counted.
    """
    if not Path(file).is_file():
        raise FileNotFoundError(f"no {what} at {file}, expected a YAML file")
    content = read_bounded(Path(file), MOST_YAML_BYTES)
    try:
        values = yaml.load(content.decode("utf-8"), _Loader)
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{file} is no YAML: {shortened(error)}") from error
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
            _typed(values, section),
            dacite.Config(strict=True),
        )
    except (dacite.DaciteError, ValueError, TypeError) as error:
        raise ValueError(f"{where}: {shortened(error)}") from error


def _choices(hint: Any) -> list[Any]:
    """What a field may be that is a ``Literal``, or one or None; [] for others."""
    parts = (hint, *get_args(hint))
    choices = [own for part in parts if get_origin(part) is Literal for own in get_args(part)]
    return [*choices, None] if choices and type(None) in get_args(hint) else choices


def _length_of(hint: Any) -> int | None:
    """How many values a tuple has; None where that is open."""
    parts = get_args(hint)
    return None if get_origin(hint) is not tuple or Ellipsis in parts else len(parts)


def _typed(values: dict[str, Any], section: type[Any], within: str = "") -> dict[str, Any]:
    """The values with lists as tuples and whole numbers as floats where the section wants these.

    Args:
        values: by field.
        section: the dataclass.
        within: sections that it is in, as "model: training: ", for errors.

    Raises:
        ValueError: if a key is unknown, a list is no list or has another length, a number no number, or a value none of the
            few that are allowed.
    """
    known = {f.name: f for f in dataclasses.fields(section)}
    hints = get_type_hints(section)
    typed: dict[str, Any] = {}
    for key, value in values.items():
        if key not in known:
            raise ValueError(f"{within}unknown key {key!r:.100}, expected one of {sorted(known)}")
        kind, factory = str(known[key].type), known[key].default_factory
        if isinstance(factory, type) and dataclasses.is_dataclass(factory):
            if not isinstance(value, dict):
                raise ValueError(f"{within}{key} is {value!r:.100}, expected a section of keys")
            value = _typed(value, factory, f"{within}{key}: ")
        elif kind.startswith("tuple"):
            if not isinstance(value, list):
                raise ValueError(f"{within}{key} is {value!r:.100}, expected a list")
            if "bool" not in kind and any(isinstance(own, bool) for own in value):
                raise ValueError(
                    f"{within}{key} is {value!r:.100}, expected no true or false in it"
                )
            length = _length_of(hints[key])
            if length is not None and len(value) != length:
                raise ValueError(f"{within}{key} is {value!r:.100}, expected {length} values")
            value = tuple(value)
        elif (allowed := _choices(hints[key])) and value not in allowed:
            raise ValueError(f"{within}{key} is {value!r:.100}, expected one of {allowed}")
        elif kind.startswith("int") and isinstance(value, bool):
            raise ValueError(f"{within}{key} is {value!r}, expected a whole number")
        elif kind.startswith("float") and value is not None:
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                hint = " (YAML reads 1e-3 as text: write 1.0e-3)" if isinstance(value, str) else ""
                raise ValueError(f"{within}{key} is {value!r:.100}, expected a number{hint}")
            if isinstance(value, int) and abs(value) > LARGEST:
                raise ValueError(f"{within}{key} has {value.bit_length()} bits, expected a number")
            value = float(value)
        typed[key] = value
    return typed

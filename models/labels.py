"""Class labels as conditions: the same thing as captions, with length 1."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from models.text import TextTokenizer
from tokenizers_vq.files import (
    FORMAT_VERSION,
    check_format_version,
    read_json,
    shortened,
    write_text_atomically,
)


class PromptEncoder(Protocol):
    """What turns prompts into conditions: a :class:`TextTokenizer` or :class:`ClassLabels`."""

    length: int

    @property
    def vocabulary(self) -> int:
        """Number of condition ids, that of the null condition included."""

    @property
    def null_condition(self) -> Tensor:
        """The null condition, ids (T,)."""

    def encode(self, captions: Sequence[str]) -> Tensor:
        """Prompts -> ids (B, T)."""

    def decode(self, ids: Tensor) -> list[str]:
        """Ids (B, T) -> prompts."""

    def save(self, file: Path | str) -> None:
        """Write everything into one JSON file."""


class ClassLabels:
    """Class names -> ids (B, 1); the null condition is one class more.

    Args:
        names: the classes, in the order of their ids.

    Raises:
        ValueError: if there are none, or a name stands twice.
    """

    length = 1

    def __init__(self, names: Sequence[str]) -> None:
        self.names = list(names)
        self._ids = {name: i for i, name in enumerate(self.names)}
        if not self.names or len(self._ids) != len(self.names):
            raise ValueError(f"names is {self.names[:8]}, expected distinct names, at least one")

    @property
    def vocabulary(self) -> int:
        """Number of classes, the null class included."""
        return len(self.names) + 1

    @property
    def null_condition(self) -> Tensor:
        """The null class, ids (1,)."""
        return torch.tensor([len(self.names)])

    def encode(self, captions: Sequence[str]) -> Tensor:
        """Class names -> ids (B, 1), int64.

        Raises:
            TypeError: if ``captions`` is a single string.
            ValueError: if a name is no class; names some that are.
        """
        if isinstance(captions, str):
            raise TypeError(f"captions is {captions!r}, expected a list of strings")
        for name in captions:
            if name not in self._ids:
                some = ", ".join(repr(known) for known in self.names[:8])
                raise ValueError(
                    f"{name!r} is no class, expected one of {len(self.names)}: {some}, ..."
                )
        return torch.tensor([[self._ids[name]] for name in captions], dtype=torch.long)

    def decode(self, ids: Tensor) -> list[str]:
        """Ids (B, 1) -> class names; "" for the null class."""
        return [[*self.names, ""][i] for i in ids.flatten().tolist()]

    def save(self, file: Path | str) -> None:
        """Write the names into a JSON file."""
        text = json.dumps(
            {"format_version": FORMAT_VERSION, "classes": self.names}, indent=2, ensure_ascii=False
        )
        write_text_atomically(text + "\n", Path(file))


def load_prompt_encoder(file: Path) -> PromptEncoder:
    """Read what ``save`` of either encoder wrote.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file holds something else, or another release wrote it.
    """
    values = read_json(file)
    if "classes" not in values:
        return TextTokenizer.load(file)
    classes = values["classes"]
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise ValueError(f"{file}: classes is {classes!r:.200}, expected a list of names")
    try:
        check_format_version(values)
        return ClassLabels(classes)
    except ValueError as error:
        raise ValueError(f"{file}: {shortened(error)}") from error

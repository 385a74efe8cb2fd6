"""Prompts from a text file."""

from __future__ import annotations

from pathlib import Path


def read_prompts(file: Path) -> list[str]:
    """The prompts of a text file, one a line.

    Raises:
        FileNotFoundError: if the file is not there.
        ValueError: if it is no text, or holds none.
    """
    if not file.is_file():
        raise FileNotFoundError(f"no prompts at {file}, expected a text file with one a line")
    try:
        lines = [line.strip() for line in file.read_text("utf-8").splitlines()]
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is no text in UTF-8: {error}") from None
    lines = [line for line in lines if line]
    if not lines:
        raise ValueError(f"{file} is empty, expected one prompt a line")
    return lines

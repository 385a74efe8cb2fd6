"""Prompts from a text file."""

from __future__ import annotations

from pathlib import Path

from tokenizers_vq.files import read_bounded

MOST_PROMPTS_BYTES = 1 << 24  # of a file of prompts


def read_prompts(file: Path) -> list[str]:
    """The prompts of a text file, one a line.

    Raises:
        FileNotFoundError: if the file is not there.
        OSError: if it cannot be read.
        ValueError: if it is no text, too long, or holds none.
    """
    if not file.is_file():
        raise FileNotFoundError(f"no prompts at {file}, expected a text file with one a line")
    try:
        lines = [
            line.strip() for line in read_bounded(file, MOST_PROMPTS_BYTES).decode().splitlines()
        ]
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is no text in UTF-8: {error}") from None
    lines = [line for line in lines if line]
    if not lines:
        raise ValueError(f"{file} is empty, expected one prompt a line")
    return lines

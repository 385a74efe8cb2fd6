"""Pictures for people: image grids with labels, as PNG."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

LINE = 14  # pixels a line of text


def grid(
    rows: Sequence[Sequence[Image.Image]],
    *,
    row_labels: Sequence[str] | None = None,
    column_labels: Sequence[str] | None = None,
    cell: int = 128,
) -> Image.Image:
    """Images in rows and columns, enlarged to whole multiples of their pixels.

    Args:
        rows: images, row by row; rows may differ in length.
        row_labels: text at the left of each row, wrapped.
        column_labels: text above each column.
        cell: least pixels a side of one image in the grid; small images keep their hard pixels.

    Raises:
        ValueError: if there are no images, or the labels are fewer than rows or columns.
    """
    if not rows or not any(len(row) for row in rows):
        raise ValueError("rows is empty, expected at least one image")
    columns = max(len(row) for row in rows)
    for name, labels, count in (
        ("row_labels", row_labels, len(rows)),
        ("column_labels", column_labels, columns),
    ):
        if labels is not None and len(labels) != count:
            raise ValueError(f"{name} has {len(labels)} entries, expected {count}")
    font = ImageFont.load_default(12)
    size = max(image.width for row in rows for image in row)
    size *= max(1, -(-cell // size))
    gap, left = 4, 120 if row_labels is not None else 0
    top = LINE + 2 * gap if column_labels is not None else 0
    sheet = Image.new(
        "RGB", (left + columns * (size + gap) + gap, top + len(rows) * (size + gap) + gap), "white"
    )
    pen = ImageDraw.Draw(sheet)
    for j, label in enumerate(column_labels or ()):
        pen.text((left + gap + j * (size + gap) + size / 2, gap), label, "black", font, anchor="ma")
    for i, row in enumerate(rows):
        y = top + gap + i * (size + gap)
        if row_labels is not None:
            lines = textwrap.wrap(row_labels[i], 18)[: size // LINE]
            pen.multiline_text((gap, y + gap), "\n".join(lines), "black", font)
        for j, image in enumerate(row):
            big = image.convert("RGB").resize((size, size), Image.Resampling.NEAREST)
            sheet.paste(big, (left + gap + j * (size + gap), y))
    return sheet


def check_picture_name(file: Path) -> None:
    """Refuse a file name whose suffix is no format that can be written.

    Raises:
        ValueError: if so.
    """
    Image.init()
    if Image.registered_extensions().get(file.suffix.lower()) not in Image.SAVE:
        raise ValueError(f"{file} has the suffix {file.suffix!r}, expected one like '.png'")


def save_picture(image: Image.Image, file: Path) -> Path:
    """Write a picture, making its folder.

    Raises:
        ValueError: if the suffix is no picture format.
        OSError: if it cannot be written.
    """
    check_picture_name(file)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        image.save(file)
    except OSError as error:
        raise OSError(f"could not write {file}: {error}") from error
    return file

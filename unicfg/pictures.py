"""Pictures: grids with labels for people, and files of pictures, written whole and read within bounds."""

from __future__ import annotations

import io
import stat
import textwrap
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps

from tokenizers_vq.files import read_bounded, replace_whole

LINE = 14  # pixels a line of text
# what Pillow may open, whatever the name says: nothing that runs another program or has fallen out of use
FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "JPEG2000", "BMP", "GIF", "TIFF", "PPM", "ICO")
MOST_PICTURE_BYTES = 1 << 28  # of a file
MOST_TEXT_BYTES = 1 << 24  # of a PPM file in text, whose bytes take long to read
MOST_PIECES = 300_000  # of a file
# filters of warnings are shared by all threads
_OPENING = threading.Lock()


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
    """Write a picture that is there whole or not at all, making its folder.

    Raises:
        ValueError: if the suffix is no picture format.
        OSError: if it cannot be written; what stood there before is untouched.
    """
    check_picture_name(file)
    # said, because the file has another suffix at first
    kind = Image.registered_extensions()[file.suffix.lower()]
    replace_whole(file, lambda beside: image.save(beside, kind))
    return file


def open_picture(source: Path | io.BytesIO) -> Image.Image:
    """A picture from a file or from memory, decoded and turned as its EXIF orientation says; of an animated one the first frame.

    Formats are PNG, JPEG, WebP, AVIF, JPEG 2000, BMP, GIF, TIFF, PPM and ICO, whatever the name says, as far as this Pillow
    has them. A file has at most ``MOST_PICTURE_BYTES``, a picture at most as many pixels as Pillow takes without a warning
    (``PIL.Image.MAX_IMAGE_PIXELS``, 89 million).

    Raises:
        OSError: if it cannot be read, or is cut off or no picture.
        ValueError: if it is too large or damaged, or no regular file.
    """
    Image.init()
    known = [name for name in FORMATS if name in Image.OPEN]
    content = _Pieces(_content(source) if isinstance(source, Path) else source.getvalue())
    with content.getbuffer() as held:
        if bytes(held[:2]) in (b"P1", b"P2", b"P3") and len(held) > MOST_TEXT_BYTES:
            raise ValueError(
                f"it is a PPM of more than {MOST_TEXT_BYTES} bytes of text, expected a binary one"
            )
    with known_errors():
        with _OPENING, warnings.catch_warnings():
            # what Pillow makes the best of; of too many pixels it only warns
            warnings.simplefilter("ignore")
            opened = Image.open(content, formats=known)
        with opened:
            most = Image.MAX_IMAGE_PIXELS
            if most is not None and opened.width * opened.height > most:
                raise Image.DecompressionBombError(
                    f"it has {opened.width} x {opened.height} pixels, expected at most {most}"
                )
            opened.load()
            ImageOps.exif_transpose(opened, in_place=True)
    return opened


@contextmanager
def known_errors() -> Iterator[None]:
    """Raise what Pillow raises, which has no common base class, as an OSError or a ValueError."""
    try:
        yield
    except (OSError, ValueError):
        raise
    except Exception as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error


def _content(file: Path) -> bytes:
    """The bytes of a picture: once in memory, no change of the file can pull them away."""
    if not stat.S_ISREG(file.stat().st_mode):  # a pipe would be waited for
        raise ValueError("it is no regular file")
    return read_bounded(file, MOST_PICTURE_BYTES)


class _Pieces(io.BytesIO):
    """Bytes that are read in so many pieces and no more: some files consist of millions, which takes minutes."""

    left = MOST_PIECES

    def read(self, size: int | None = -1, /) -> bytes:
        self.left -= 1
        if self.left < 0:
            raise OSError(f"it consists of more than {MOST_PIECES} pieces")
        return super().read(size)

    def __repr__(self) -> str:
        return "of these bytes"

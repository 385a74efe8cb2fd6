"""Captioned images: a folder on disk becomes one tensor of pixels and a list of captions."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count, repeat
from pathlib import Path, PureWindowsPath
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from unicfg.pictures import known_errors, open_picture

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
MOST_TEXT = 1 << 20  # characters of a line of metadata, and of a caption's file
MOST_NAME = 4096  # characters of a path
NAMED = 5  # files that a warning or an error names before it only counts

# what is raised for an image that is missing, cut off, none, or too large
UNREADABLE = (OSError, ValueError)


@dataclass(frozen=True)
class ImageSet:
    """Images with their captions, in memory.

    Attributes:
        images: uint8 (N, 3, H, W) in 0..255, RGB.
        captions: one text an image.
        attributes: all else that is known of each image, {} where nothing is.
        skipped: (file, reason) of whatever was found and could not be used.
        names: of the images' files, [] where they have none; an image that is there with several captions has one name.

    Raises:
        TypeError: if the images are not uint8.
        ValueError: if the images are not (N, 3, H, W), or captions, attributes or names are not N.
    """

    images: Tensor
    captions: list[str]
    attributes: list[dict[str, Any]]
    skipped: tuple[tuple[str, str], ...] = ()
    names: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Check dtype, shape and lengths."""
        if self.images.dtype != torch.uint8:
            raise TypeError(f"images are {self.images.dtype}, expected torch.uint8")
        if self.images.ndim != 4 or self.images.shape[1] != 3:
            raise ValueError(f"images have shape {tuple(self.images.shape)}, expected (N, 3, H, W)")
        for name, values in (("captions", self.captions), ("attributes", self.attributes)):
            if len(values) != len(self.images):
                raise ValueError(f"{name} has {len(values)} entries, expected {len(self.images)}")
        if len(self.names) not in (0, len(self.images)):
            raise ValueError(
                f"names has {len(self.names)} entries, expected {len(self.images)} or none"
            )

    def __len__(self) -> int:
        """N, the number of images."""
        return len(self.images)

    def select(self, indices: Sequence[int]) -> ImageSet:
        """Some of the images, in the order given; nothing counts as skipped in a selection.

        Raises:
            IndexError: if an index is not in 0..N-1.
        """
        for i in indices:
            if not 0 <= i < len(self):
                raise IndexError(f"indices hold {i}, expected 0 to {len(self) - 1}")
        chosen = torch.tensor(indices, dtype=torch.long)
        return ImageSet(
            self.images[chosen],
            [self.captions[i] for i in indices],
            [self.attributes[i] for i in indices],
            names=[self.names[i] for i in indices] if self.names else [],
        )

    def split(self, fraction: float) -> tuple[ImageSet, ImageSet]:
        """Training and validation images.

        Where any image has an attribute "split", that decides: values that begin with val, valid, validation or dev are
        validation, those that begin with test or eval are in neither, all else is training. Otherwise a hash of the file's
        name decides, or where there is none of position and caption: images that are added later leave each earlier one
        on its side, and a picture with several captions is on one.

        Args:
            fraction: share of validation images in [0, 1); unused where the data names its split.

        Raises:
            ValueError: if ``fraction`` is outside of [0, 1).
        """
        if not 0 <= fraction < 1:
            raise ValueError(f"fraction is {fraction}, expected a share in [0, 1)")
        if any("split" in attributes for attributes in self.attributes):
            sides = [side_of(a.get("split")) for a in self.attributes]
        else:
            names: Sequence[str | None] = self.names or [None] * len(self)
            held_out = map(is_held_out, names, count(), self.captions, repeat(fraction))
            sides = [VALIDATION if own else TRAIN for own in held_out]
        train, validation = (
            self.select([i for i, own in enumerate(sides) if own == side])
            for side in (TRAIN, VALIDATION)
        )
        return train, validation


def read_folder(path: Path | str, size: int, *, progress: bool = True) -> ImageSet:
    """Read a folder of captioned images.

    The first of these conventions that is found is used:

    1. ``metadata.jsonl``: an object a line with ``file_name`` (relative to the folder) and ``text``; all other
       fields become attributes.
    2. ``metadata.csv``: the same as columns, as in the imagefolder convention of datasets.
    3. subfolders like ``train`` and ``validation`` with such a file each: their names become the "split".
    4. the caption in a ``.txt`` file beside each image, of the same name; subfolders are read too.

    Images are turned as their EXIF orientation says and composited on white where they are transparent; of an animated one
    the first frame is taken. The longer side is resized to ``size`` (Lanczos); an image that is not square is padded with
    white, not cropped. An image that the metadata names twice is there twice, with each caption.

    A file that cannot be used does not end the reading: broken, missing or oversized images and those of rare formats
    (see :func:`unicfg.pictures.open_picture`), images with pixels in floating point, links that lead out of the folder
    (other than the hub's cache has them), images without a caption and captions without an image are listed in
    ``skipped`` and told in one warning. Where there is metadata, images count as lacking a caption if they lie in a folder
    that the metadata speaks of. Hidden files are not looked at.

    Args:
        path: the folder.
        size: pixels a side of the result.
        progress: show a progress bar on stderr.

    Returns:
        images (N, 3, size, size), in the order of the metadata or else of their names.

    Raises:
        FileNotFoundError: if there is no such folder.
        OSError: if metadata cannot be read.
        ValueError: if ``size`` is below 1, the folder holds none of the conventions, a metadata line is malformed, too long
            or names a file outside of the folder, or no image at all could be used.
    """
    folder = Path(path)
    if size < 1:
        raise ValueError(f"size is {size}, expected at least 1 pixel")
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder at {folder}, expected one with captioned images")
    entries, skipped = find_entries(folder)
    images: list[np.ndarray[Any, Any]] = []
    read: list[_Entry] = []
    for entry in tqdm(entries, desc=f"reading {folder.name}", disable=not progress):
        try:
            images.append(read_image(folder / entry.file, size))
            read.append(entry)
        except UNREADABLE as error:
            skipped.append((entry.file, f"{type(error).__name__}: {error}"))
    if not images:
        raise ValueError(f"{folder} has no usable image, {summary_of(skipped)}")
    if skipped:
        warnings.warn(f"{folder}: {summary_of(skipped)}", stacklevel=2)
    return ImageSet(
        torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous(),
        [entry.caption for entry in read],
        [entry.attributes for entry in read],
        tuple(skipped),
        [entry.file for entry in read],
    )


@dataclass(frozen=True)
class _Entry:
    """An image to read: its file relative to the folder, and what is known of it."""

    file: str
    caption: str
    attributes: dict[str, Any]


def find_entries(folder: Path) -> tuple[list[_Entry], list[tuple[str, str]]]:
    """The captioned images of a folder by the first convention found, and what lacks its partner."""
    for name, rows in (("metadata.jsonl", _json_rows), ("metadata.csv", _csv_rows)):
        file = folder / name
        if file.is_file():
            return _metadata_entries(folder, file, rows(file))
    parts = [part for part in sorted(folder.iterdir()) if _has_metadata(part)]
    if parts:
        return _split_entries(parts)
    if not _files(folder, IMAGE_SUFFIXES):
        raise ValueError(
            f"{folder} holds no captioned images, looked for metadata.jsonl, metadata.csv "
            f"and images ({', '.join(IMAGE_SUFFIXES)}) with a .txt file beside each"
        )
    return _sidecar_entries(folder)


def _has_metadata(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("metadata.jsonl", "metadata.csv"))


def _split_entries(parts: list[Path]) -> tuple[list[_Entry], list[tuple[str, str]]]:
    """Entries of subfolders with metadata of their own; the name of the subfolder is the split."""
    entries: list[_Entry] = []
    skipped: list[tuple[str, str]] = []
    for part in parts:
        if reason := _out_of_reach(part.parent, part.name):
            skipped.append((part.name, reason))
            continue
        found, missed = find_entries(part)
        for entry in found:
            attributes = {"split": part.name, **entry.attributes}
            entries.append(_Entry(f"{part.name}/{entry.file}", entry.caption, attributes))
        skipped += [(f"{part.name}/{name}", reason) for name, reason in missed]
    return entries, skipped


def _metadata_entries(
    folder: Path, file: Path, rows: Iterator[tuple[int, dict[str, Any]]]
) -> tuple[list[_Entry], list[tuple[str, str]]]:
    """Entries from the rows of a metadata file, and the images beside them that it does not name."""
    entries: list[_Entry] = []
    skipped: list[tuple[str, str]] = []
    named: set[str] = set()
    for line, row in rows:
        name, caption = (_text_field(row, key, f"{file} line {line}") for key in _REQUIRED)
        if reason := _out_of_reach(folder, name):
            skipped.append((name[:100], reason))
            named.add(Path(name).as_posix())
            continue
        inside = os.path.normpath(name)
        elsewhere = PureWindowsPath(name)  # the same folder may be read on another system
        if os.path.isabs(inside) or inside.split(os.sep)[0] == os.pardir or elsewhere.drive:
            raise ValueError(
                f"{file} line {line}: file_name {name!r:.200} is outside of the folder"
            )
        named.add(Path(inside).as_posix())
        if caption.strip():
            rest = {key: value for key, value in row.items() if key not in _REQUIRED}
            entries.append(_Entry(Path(inside).as_posix(), caption.strip(), rest))
        else:
            skipped.append((name, f"empty text in {file.name}"))
    folders = {str(Path(name).parent) for name in named}
    for image in _files(folder, IMAGE_SUFFIXES):
        if image not in named and str(Path(image).parent) in folders:
            skipped.append((image, f"no line in {file.name}"))
    return entries, skipped


_REQUIRED = ("file_name", "text")


def _text_field(row: dict[str, Any], key: str, where: str) -> str:
    """A required field of a metadata row."""
    if key not in row:
        raise ValueError(f"{where}: no {key!r}, expected file_name and text")
    value = row[key]
    if not isinstance(value, str):
        raise ValueError(f"{where}: {key} is {value!r:.200}, expected a text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{where}: {key} holds half of a character: {error}") from None
    return value


def _out_of_reach(folder: Path, name: str) -> str | None:
    """Why a file of a folder is not read, as far as its name tells; None if it may be."""
    if "\0" in name:
        return "a NUL in its name"
    if len(name) > MOST_NAME:
        return f"its name has {len(name)} characters, expected at most {MOST_NAME}"
    root, file = Path(os.path.realpath(folder)), Path(os.path.realpath(folder / name))
    # the hub's cache: REPOSITORY/snapshots/REVISION/a.png is a link to ../../blobs/HASH
    snapshots = (own for own in (root, *root.parents) if own.parent.name == "snapshots")
    allowed = [root, *(own.parent.parent / "blobs" for own in snapshots)]
    if not any(map(file.is_relative_to, allowed)) and os.path.lexists(folder / name):
        return "a link that leads out of the folder"
    return None


def _json_rows(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, object) of each line that is not blank."""
    for number, line in enumerate(_lines(file), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line, parse_constant=_no_number)
        except ValueError as error:
            raise ValueError(f"{file} line {number} is no JSON: {error}") from error
        except RecursionError:
            raise ValueError(f"{file} line {number} is nested too deeply") from None
        if not isinstance(row, dict):
            raise ValueError(f"{file} line {number} is {row!r:.200}, expected an object")
        yield number, row


def _no_number(name: str) -> float:
    """Refuse NaN and Infinity, which Python reads and JSON does not have."""
    raise ValueError(f"found {name}, expected a number")


def _csv_rows(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, row) of each row below the header."""
    reader = csv.DictReader(_lines(file), strict=True)
    try:
        for row in reader:
            # DictReader gives None as the key of values too many and as the value of columns too few.
            if None in row or None in row.values():
                columns = len(reader.fieldnames or ())
                raise ValueError(f"{file} line {reader.line_num}: expected {columns} columns")
            yield reader.line_num, row
    except csv.Error as error:
        raise ValueError(f"{file} line {reader.line_num} is no CSV: {error}") from error


def _lines(file: Path) -> Iterator[str]:
    """The lines of a text file in UTF-8, with or without the byte order mark that spreadsheets write."""
    if reason := _out_of_reach(file.parent, file.name):
        raise ValueError(f"{file} is not read: {reason}")
    try:
        with file.open(encoding="utf-8-sig") as handle:
            while line := handle.readline(MOST_TEXT + 1):
                if len(line) > MOST_TEXT:
                    raise ValueError(
                        f"{file} has a line of more than {MOST_TEXT} characters, expected one an image"
                    )
                yield line
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is no UTF-8 text: {error}") from error


def _read_text(file: Path) -> str:
    """A small text file in UTF-8, with or without a byte order mark."""
    if not file.is_file():
        raise ValueError(f"{file} is no file")
    try:
        with file.open(encoding="utf-8-sig") as handle:
            text = handle.read(MOST_TEXT + 1)
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is no UTF-8 text: {error}") from error
    if len(text) > MOST_TEXT:
        raise ValueError(f"{file} has more than {MOST_TEXT} characters, expected a caption")
    return text


def _sidecar_entries(folder: Path) -> tuple[list[_Entry], list[tuple[str, str]]]:
    """Entries from images and the .txt files beside them, and those of either that stand alone."""
    entries: list[_Entry] = []
    skipped: list[tuple[str, str]] = []
    captions = {str(Path(name).with_suffix("")): name for name in _files(folder, (".txt",))}
    images = _files(folder, IMAGE_SUFFIXES)
    for image in images:
        sidecar = captions.get(str(Path(image).with_suffix("")))
        if sidecar is None:
            skipped.append((image, "no caption: no .txt file beside it"))
            continue
        if reason := _out_of_reach(folder, image) or _out_of_reach(folder, sidecar):
            skipped.append((image, reason))
            continue
        try:
            caption = _read_text(folder / sidecar).strip()
        except (OSError, ValueError) as error:
            skipped.append((image, f"no caption: {error}"))
            continue
        if caption:
            entries.append(_Entry(image, caption, {}))
        else:
            skipped.append((image, f"no caption: {sidecar} is empty"))
    stems = {str(Path(image).with_suffix("")) for image in images}
    alone = (name for stem, name in captions.items() if stem not in stems)
    skipped.extend((name, "caption without an image") for name in alone)
    return entries, skipped


def _files(folder: Path, suffixes: tuple[str, ...]) -> list[str]:
    """Sorted POSIX paths, relative to the folder, of all files of these suffixes that are not hidden."""
    found = (p.relative_to(folder) for p in folder.rglob("*") if p.suffix.lower() in suffixes)
    return sorted(p.as_posix() for p in found if not any(part[0] == "." for part in p.parts))


def read_image(file: Path | io.BytesIO, size: int) -> np.ndarray[Any, Any]:
    """One image, in a file or in memory, as uint8 (size, size, 3).

    Raises:
        UNREADABLE: if there is none, or it is too large.
    """
    image = open_picture(file)
    with known_errors():
        return _squared(image, size)


def _squared(image: Image.Image, size: int) -> np.ndarray[Any, Any]:
    """An image on white, resized and padded."""
    image = _on_white(image)
    scale = size / max(image.size)
    width, height = (max(1, round(side * scale)) for side in image.size)
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.LANCZOS)
    # Resized before it is padded: the square around a long strip could be larger than the memory.
    square = Image.new("RGB", (size, size), "white")
    square.paste(image, ((size - width) // 2, (size - height) // 2))
    return np.asarray(square)


def _on_white(image: Image.Image) -> Image.Image:
    """An RGB image: transparent ones composited on white, others converted."""
    if image.mode == "F":
        raise ValueError(
            "its pixels are floating point, expected 8 or 16 bits: which is white is not said"
        )
    if image.mode == "RGB" and not image.has_transparency_data:
        return image
    whole = Image.new("RGB", image.size)
    rows = max(1, 1_000_000 // image.width)  # in strips: each conversion is another copy
    for top in range(0, image.height, rows):
        strip = image.crop((0, top, image.width, min(top + rows, image.height)))
        whole.paste(_strip_on_white(strip), (0, top))
    return whole


def _strip_on_white(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16") or image.mode == "I":
        # 16-bit grey: Pillow's own conversion would clip all above 255 to white.
        grey = np.asarray(image).astype(np.int64) // 257
        image = Image.fromarray(grey.clip(0, 255).astype(np.uint8))
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image).convert("RGB")


TRAIN, VALIDATION, TEST = "train", "validation", "test"
SPLITS = {
    TRAIN: ("train", "training"),
    VALIDATION: ("val", "valid", "validation", "dev"),
    TEST: ("test", "testing", "eval", "evaluation"),
}
"""Words that name a split, as the library datasets has them."""


def split_in(name: str) -> str | None:
    """The split that a name speaks of by a word of its own, as in "shapes-val_01", if any."""
    words = re.split(r"[^a-z]+", name.lower())
    found = (split for word in words for split, names in SPLITS.items() if word in names)
    return next(found, None)


def side_of(split: object) -> str:
    """Where an image belongs whose data names its split: "validation", "test" or, for all other names, "train"."""
    first = re.split(r"[^a-z]+", str(split or "").lower())[0]
    return split_in(first) or TRAIN


def is_held_out(name: str | None, position: int, caption: str, fraction: float) -> bool:
    """Whether an image of data that names no split is one of the ``fraction`` of validation images.

    Its file's name decides, so that all its captions are on one side; position and caption where it has none.
    """
    key = f"{position} {caption}" if name is None else name
    digest = hashlib.sha1(key.encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64 < fraction


def summary_of(skipped: Sequence[tuple[str, str]]) -> str:
    """How many files were skipped, and the first of them with their reasons."""
    first = "; ".join(f"{name} ({reason})" for name, reason in skipped[:NAMED])
    more = f"; and {len(skipped) - NAMED} more" if len(skipped) > NAMED else ""
    return f"skipped {len(skipped)} files: {first}{more}"

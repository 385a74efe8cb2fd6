"""Where captioned images come from, and the way from there to pixels on disk. A new source goes here.

A source is read once, in order, a round of images at a time: what is decoded is written, and memory does not grow
with the data. Rounds that are there are not read again, and several processes share them out.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
import warnings
import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from glob import glob
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from tqdm.auto import tqdm

from tokenizers_vq.files import read_json, write_text_atomically
from unicfg.processes import join_processes
from unicfg.training.data import (
    TEST,
    TRAIN,
    UNREADABLE,
    VALIDATION,
    find_entries,
    is_held_out,
    read_image,
    side_of,
    split_in,
    summary_of,
)
from unicfg.training.recipe import DataRecipe
from unicfg.training.shapes import Shapes
from unicfg.training.shards import INDEX, Shards, finish_shards, is_written, write_shard

ROUND, ROUND_BYTES = (
    2048,
    1 << 25,
)  # pixels in memory at once: of so many images, or fewer where they are large
LONGEST_CAPTION = 10_000  # characters
CAPTIONS_BYTES = 1 << 28  # of a round's file: more than captions of that length can take
PARTS = (TRAIN, VALIDATION)


@dataclass(frozen=True)
class Entry:
    """An image that has not been decoded yet.

    Attributes:
        name: to be told where it cannot be used.
        content: what its source makes pixels and caption of.
        split: as the data names it, or None.
        file: of the image, which may be there with several captions; None where it has none of its own.
    """

    name: str
    content: Any
    split: str | None = None
    file: str | None = None


class Source(Protocol):
    """Captioned images in a fixed order."""

    made_from: str
    """A hash of what the images are, as far as it can be known without reading them."""
    size: int
    """S, pixels a side."""
    count: int | None
    """Entries in all, or None where that is not known."""
    skipped: list[tuple[str, str]]
    """(name, reason) of what is no entry, though it could have been one."""

    def entries(self) -> Iterator[Entry]:
        """All images, none decoded, in the same order each time."""
        ...

    def read(self, entry: Entry) -> tuple[Tensor, str]:
        """uint8 (3, S, S) of one image, and its caption; raises one of ``UNREADABLE`` where it cannot be used."""
        ...


def open_source(recipe: DataRecipe) -> Source:
    """The source that a recipe names.

    Raises:
        ValueError: if it is not described well; names the key.
        FileNotFoundError: if it is not there.
        ImportError: if it needs a library that is not installed; names the extra.
    """
    if recipe.source == "shapes":
        return _Drawn(recipe)
    if not recipe.path:
        what = "the folder of the captioned images"
        if recipe.source == "datasets":
            what = "a folder, files as in 'data/*.parquet', or a repository of the hub"
        raise ValueError(f"data.path is empty, expected {what}")
    return _Folder(recipe) if recipe.source == "folder" else _Datasets(recipe)


class _Drawn:
    """Scenes with captions, drawn as they are asked for."""

    def __init__(self, recipe: DataRecipe) -> None:
        self.count: int | None = recipe.count
        self.size = recipe.image_size
        self.skipped: list[tuple[str, str]] = []
        self.shapes = Shapes(size=recipe.image_size, wrong=recipe.wrong, unrelated=recipe.unrelated)
        self.made_from = _hash(["shapes", repr(self.shapes), str(self.count)])

    def entries(self) -> Iterator[Entry]:
        return (Entry(str(i), i) for i in range(self.count or 0))

    def read(self, entry: Entry) -> tuple[Tensor, str]:
        image, caption, _ = self.shapes.draw(entry.content)
        return image, caption


class _Folder:
    """A folder of captioned images; ``data.read_folder`` says what it may be."""

    def __init__(self, recipe: DataRecipe) -> None:
        self.folder, self.size = Path(recipe.path), recipe.image_size
        if not self.folder.is_dir():
            raise FileNotFoundError(f"no folder at {self.folder}, expected captioned images")
        self.found, self.skipped = find_entries(self.folder)
        self.count: int | None = len(self.found)
        described = (
            f"{own.file}\0{own.caption}\0{own.attributes.get('split')}\0{_length(self.folder / own.file)}"
            for own in self.found
        )
        self.made_from = _hash(["folder", str(self.size), *described])

    def entries(self) -> Iterator[Entry]:
        named = any("split" in own.attributes for own in self.found)
        for own in self.found:
            split = str(own.attributes.get("split") or TRAIN) if named else None
            yield Entry(own.file, own, split, own.file)

    def read(self, entry: Entry) -> tuple[Tensor, str]:
        pixels = read_image(self.folder / entry.content.file, self.size)
        return _channels_first(pixels), entry.content.caption


class _Datasets:
    """What ``datasets`` can stream: imagefolder, parquet, webdataset and others, from files or from the hub."""

    def __init__(self, recipe: DataRecipe) -> None:
        try:
            import datasets
        except ImportError as error:
            raise ImportError(
                "data.source datasets needs the library datasets: pip install 'unicfg[data]'"
            ) from error
        self.recipe, self.size = recipe, recipe.image_size
        self.count: int | None = None
        self.skipped: list[tuple[str, str]] = []
        files = _local_files(recipe.path)
        # without a format the path is a repository of the hub
        options: dict[str, Any] = {"revision": recipe.revision or None}
        if recipe.format:
            if not files:
                raise FileNotFoundError(f"data.path is {recipe.path}, which names no file")
            # a folder is looked through for splits by the library, a pattern is not
            folder = Path(recipe.path).is_dir()
            options |= {"data_dir": recipe.path} if folder else {"data_files": _by_split(files)}
        self.splits = {}
        with self._naming_the_path():
            found = datasets.load_dataset(recipe.format or recipe.path, streaming=True, **options)
        for name, own in found.items():
            if side_of(name) == TEST:  # neither trained on nor looked at
                continue
            columns = own.column_names
            if columns is None:  # not known before a row is read
                with self._naming_the_path():
                    columns = list(next(iter(own), {}))
            for key in (recipe.image, recipe.caption.split(".")[0]):
                if key not in columns:
                    raise ValueError(
                        f"{recipe.path}: no column {key!r}, expected one of {', '.join(columns)}"
                    )
            self.splits[str(name)] = own.cast_column(recipe.image, datasets.Image(decode=False))
        about = [str(recipe.image_size), recipe.format, recipe.image, recipe.caption, *self.splits]
        # files may have moved; a repository is known by its name alone
        about += [f"{own.name}\0{_length(own)}\0{_text_of(own)}" for own in files]
        about += [] if files else [recipe.path, recipe.revision]
        self.made_from = _hash(["datasets", *about])

    def entries(self) -> Iterator[Entry]:
        for name, own in self.splits.items():
            split = name if len(self.splits) > 1 else None
            rows = enumerate(own)
            while True:
                with self._naming_the_path():
                    i, row = next(rows, (0, None))
                if row is None:
                    break
                yield Entry(f"{name} {row.get('__key__', i)}", row, split)

    @contextmanager
    def _naming_the_path(self) -> Iterator[None]:
        """Errors of the libraries that read archives and tables, with what they were reading."""
        try:
            yield
        except (tarfile.TarError, zlib.error, EOFError, ValueError) as error:
            raise ValueError(f"data.path {self.recipe.path}: {error}") from error

    def read(self, entry: Entry) -> tuple[Tensor, str]:
        recipe, row = self.recipe, entry.content
        caption = row
        for key in recipe.caption.split("."):
            if not isinstance(caption, dict) or key not in caption:
                raise ValueError(f"it has no {recipe.caption}")
            caption = caption[key]
        picture = row.get(recipe.image)
        if not isinstance(caption, str) or not isinstance(picture, dict):
            raise ValueError(
                f"{recipe.caption} is {caption!r:.80} and {recipe.image} {picture!r:.80}"
            )
        data = picture.get("bytes")
        if data is None:  # the picture is a file beside the metadata
            file = Path(str(picture.get("path")))
            if not file.resolve().is_relative_to(Path(recipe.path).resolve()):
                raise ValueError(f"{file} is outside of {recipe.path}")
            return _channels_first(read_image(file, recipe.image_size)), caption
        return _channels_first(read_image(io.BytesIO(data), recipe.image_size)), caption


def prepare_images(source: Source, folder: Path, validation: float, workers: int) -> None:
    """Decode all images of a source once, into shards of pixels in ``folder/train`` and ``folder/validation``.

    Rounds that an interrupted run has finished are not done again. Images that cannot be used are counted, and told
    in one warning. All processes take part.

    Args:
        source: of the images.
        folder: of the shards; the captions lie beside them, in a JSON file a round.
        validation: share of the images, where the source does not name its splits.
        workers: threads that decode, of each process.

    Raises:
        ValueError: if the folder holds images of another source, or no image at all could be used.
        OSError: if something cannot be written; finished rounds stay.
    """
    processes = join_processes()
    if all((folder / part / INDEX).exists() for part in PARTS):
        for part in PARTS:
            Shards(folder / part, (), source.made_from)
        return
    rounds = 0
    with (
        ThreadPoolExecutor(max(workers, 1)) as pool,
        tqdm(
            total=source.count,
            desc="reading images",
            unit="image",
            disable=not processes.is_main_process,
        ) as bar,
    ):
        most = max(1, min(ROUND, ROUND_BYTES // (3 * source.size**2)))
        for number, entries in enumerate(_rounds(source.entries(), most)):
            mine = number % processes.num_processes == processes.process_index
            if mine and not all(is_written(folder / p, number, source.made_from) for p in PARTS):
                _write_round(source, folder, number, number * most, entries, validation, pool)
            bar.update(len(entries))
            rounds = number + 1
    processes.wait_for_everyone()
    if processes.is_main_process:
        skipped = list(source.skipped)
        for number in range(rounds):
            skipped += _read_captions(folder, number)["skipped"]
        if skipped:
            warnings.warn(f"images: {summary_of(skipped)}", stacklevel=2)
        for part in PARTS:
            finish_shards(folder / part, rounds, source.made_from)
        if not sum(len(Shards(folder / part, ())) for part in PARTS):
            raise ValueError(f"no usable image, {summary_of(skipped)}")
    processes.wait_for_everyone()


def images_made_from(folder: Path) -> str | None:
    """Of which source the finished images in a folder are, by its hash; None where they are not all there."""
    if not all((folder / part / INDEX).exists() for part in PARTS):
        return None
    return Shards(folder / PARTS[0], ()).made_from


def read_captions(folder: Path, part: str) -> Iterator[list[str]]:
    """The captions of the images in ``folder/train`` or ``folder/validation``, a list for each shard."""
    for number in range(Shards(folder / part, ()).count):
        yield _read_captions(folder, number)[part]


def _read_captions(folder: Path, number: int) -> dict[str, Any]:
    return read_json(folder / _captions(number), CAPTIONS_BYTES)


def _rounds(entries: Iterable[Entry], most: int) -> Iterator[list[Entry]]:
    """The entries, so many at a time."""
    left = iter(entries)
    while some := list(islice(left, most)):
        yield some


def _write_round(
    source: Source,
    folder: Path,
    number: int,
    first: int,
    entries: list[Entry],
    validation: float,
    pool: ThreadPoolExecutor,
) -> None:
    """Decode a round, whose first entry has the position ``first``; write its captions, and then its two shards."""
    pixels: dict[str, list[Tensor]] = {part: [] for part in PARTS}
    captions: dict[str, list[Any]] = {part: [] for part in (*PARTS, "skipped")}

    def read(entry: Entry) -> tuple[Tensor, str] | str:
        try:
            image, caption = source.read(entry)
            return image, _checked(caption)
        except UNREADABLE as error:
            return f"{type(error).__name__}: {error}"

    for i, (entry, found) in enumerate(zip(entries, pool.map(read, entries), strict=True), first):
        if isinstance(found, str):
            captions["skipped"].append((entry.name, found))
            continue
        image, caption = found
        if entry.split is None:
            held_out = is_held_out(entry.file, i, caption, validation)
            part = VALIDATION if held_out else TRAIN
        else:
            part = side_of(entry.split)
            if part == TEST:  # neither trained on nor looked at
                continue
        pixels[part].append(image)
        captions[part].append(caption)
    text = json.dumps(captions, ensure_ascii=False)
    write_text_atomically(text + "\n", folder / _captions(number))
    none = torch.empty(0, 3, source.size, source.size, dtype=torch.uint8)
    for part, images in pixels.items():
        tensor = torch.stack(images) if images else none
        write_shard(folder / part, number, {"images": tensor}, source.made_from)


def _checked(caption: str) -> str:
    """A caption without white space around it.

    Raises:
        ValueError: if it is empty, too long, or no Unicode.
    """
    caption = caption.strip()
    if not 0 < len(caption) <= LONGEST_CAPTION:
        raise ValueError(
            f"the caption has {len(caption)} characters, expected 1 to {LONGEST_CAPTION}"
        )
    caption.encode()  # a lone surrogate is a ValueError
    return caption


def _captions(number: int) -> str:
    return f"captions-{number:05d}.json"


def _channels_first(pixels: Any) -> Tensor:
    """Tensor (3, S, S) of an array (S, S, 3)."""
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1).contiguous()


def _local_files(path: str) -> list[Path]:
    """Files that a folder holds or a pattern names, sorted."""
    if Path(path).is_dir():
        return sorted(own for own in Path(path).rglob("*") if own.is_file())
    return sorted(own for own in map(Path, glob(path, recursive=True)) if own.is_file())


def _by_split(files: list[Path]) -> dict[str, list[str]]:
    """Files by the split that their names say, as in ``val-00000.parquet``; all are one where no name says any."""
    named: dict[str, list[str]] = {}
    for file in files:
        split = split_in(file.name) or TRAIN
        named.setdefault(split, []).append(str(file))
    return named if len(named) > 1 else {TRAIN: [str(file) for file in files]}


def _text_of(file: Path) -> str:
    """The content of a file with captions, nothing of other files."""
    return file.read_text("utf-8", "replace") if file.stem == "metadata" else ""


def _length(file: Path) -> int:
    """Bytes of a file, -1 where there is none."""
    return file.stat().st_size if file.is_file() else -1


def _hash(parts: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode("utf-8", "surrogatepass") + b"\0")
    return digest.hexdigest()

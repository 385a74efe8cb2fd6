"""Rows of tensors on disk, in shards: written so that a stop costs one shard at most, read with bounded memory.

A folder of safetensors files ``00000.safetensors``, ``00001.safetensors`` and on, which hold the same tensors with
some rows each, and an index that is written when all of them are there. What made the rows (data, tokenizer) is written
into every file as a hash, so that those of another make are refused.
"""

from __future__ import annotations

import json
import os
import struct
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.utils.data import Dataset

from tokenizers_vq.files import (
    read_json,
    read_tensors,
    shortened,
    write_atomically,
    write_text_atomically,
)

INDEX = "shards.json"
MADE_FROM = "made_from"


def write_shard(folder: Path, number: int, tensors: dict[str, Tensor], made_from: str) -> None:
    """Write one shard, whole or not at all.

    Args:
        folder: of the shards.
        number: of this one, from 0 on.
        tensors: (N, ...) each, with the same N; 0 is allowed.
        made_from: hash of what the rows were made from.

    Raises:
        OSError: if it cannot be written.
    """
    write_atomically(tensors, _file(folder, number), {MADE_FROM: made_from})


def is_written(folder: Path, number: int, made_from: str, settings: str = "") -> bool:
    """Whether a shard is there.

    Args:
        folder: of the shards.
        number: of this one.
        made_from: what it must have been made from.
        settings: that are part of that hash, to be named where it is another.

    Raises:
        ValueError: if it is damaged, or was made from something else.
    """
    file = _file(folder, number)
    if not file.exists():
        return False
    _check_made_from(_Shard.open(file).made_from, made_from, file, settings)
    return True


def finish_shards(folder: Path, count: int, made_from: str) -> None:
    """Write the index, when all ``count`` shards are there.

    Raises:
        FileNotFoundError: if one is not.
        ValueError: if one is damaged, or has rows of another shape.
        OSError: if the index cannot be written.
    """
    shards = [_Shard.open(_file(folder, number)) for number in range(count)]
    for own in shards:
        if own.row_shapes != shards[0].row_shapes:
            raise ValueError(
                f"{own.file} has rows of {own.row_shapes}, the first shard of {shards[0].row_shapes}"
            )
    rows = [own.rows for own in shards]
    for leftover in folder.glob(".*.tmp"):  # of processes that were killed while they wrote
        leftover.unlink()
    index = {MADE_FROM: made_from, "rows": rows}
    write_text_atomically(json.dumps(index, indent=1) + "\n", folder / INDEX)


class Shards(Dataset[tuple[Tensor, ...]]):
    """Finished shards as one data set: a row is the tuple of its tensors, in the order of ``keys``.

    A row is read from its file when it is asked for, and nothing is kept: memory does not grow with the data.

    Args:
        folder: of the shards.
        keys: which of the tensors.
        made_from: what they must have been made from; None takes any.
        settings: that are part of that hash, to be named where it is another.

    Raises:
        FileNotFoundError: if there is no index: the shards were not finished.
        ValueError: if a file is damaged, or was made from something else.
    """

    def __init__(
        self, folder: Path, keys: Sequence[str], made_from: str | None = None, settings: str = ""
    ) -> None:
        index = read_json(folder / INDEX)
        self.folder, self.keys = folder, tuple(keys)
        self.made_from = str(index.get(MADE_FROM))
        if made_from is not None:
            _check_made_from(self.made_from, made_from, folder, settings)
        rows = index.get("rows")
        if not isinstance(rows, list):
            raise ValueError(f"{folder / INDEX}: rows is {rows!r}, expected a list")
        self._shards = [_Shard.open(_file(folder, number)) for number in range(len(rows))]
        for shard, expected in zip(self._shards, rows, strict=True):
            if shard.rows != expected:
                raise ValueError(f"{shard.file} has {shard.rows} rows, its index {expected}")
            _check_made_from(shard.made_from, self.made_from, shard.file)
            for key in self.keys:
                if key not in shard.tensors:
                    raise ValueError(f"{shard.file} holds {list(shard.tensors)}, expected {key!r}")
        self._starts = [0, *accumulate(rows)]

    def __len__(self) -> int:
        """Rows in all."""
        return self._starts[-1]

    @property
    def count(self) -> int:
        """Number of shards."""
        return len(self._shards)

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        """One row."""
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[Tensor, ...]]:
        """Several rows, in the order of ``indices``."""
        found: dict[int, tuple[Tensor, ...]] = {}
        by_shard: dict[int, list[int]] = {}
        for index in indices:
            if not 0 <= index < len(self):
                raise IndexError(f"index is {index}, expected 0 to {len(self) - 1}")
            by_shard.setdefault(bisect_right(self._starts, index) - 1, []).append(index)
        for number, wanted in by_shard.items():
            with open(self._shards[number].file, "rb", buffering=0) as handle:
                for index in wanted:
                    row = index - self._starts[number]
                    found[index] = tuple(
                        self._shards[number].tensors[key].read(handle.fileno(), row)
                        for key in self.keys
                    )
        return [found[index] for index in indices]

    def read(self, number: int) -> tuple[Tensor, ...]:
        """All rows of one shard (N, ...), their checksum verified.

        Raises:
            ValueError: if the file is damaged.
        """
        tensors, _ = read_tensors(self._shards[number].file)
        return tuple(tensors[key] for key in self.keys)

    def first(self, n: int) -> tuple[Tensor, ...]:
        """The first n rows (n, ...), or as many as there are."""
        rows = self.__getitems__(range(min(n, len(self))))
        return tuple(torch.stack(column) for column in zip(*rows, strict=True))


@dataclass(frozen=True)
class _Tensor:
    """Where the rows of a tensor lie in a file."""

    begin: int  # bytes from the start of the file
    bytes: int  # of a row
    dtype: torch.dtype
    shape: tuple[int, ...]  # of a row

    def read(self, handle: int, row: int) -> Tensor:
        # not mapped into memory: pages of a mapped file count as the process's own as long as they are there
        data = os.pread(handle, self.bytes, self.begin + row * self.bytes)
        if len(data) != self.bytes:
            raise ValueError(f"a shard ends in row {row}: it was cut off while it was read")
        return torch.frombuffer(bytearray(data), dtype=self.dtype).view(self.shape)


@dataclass(frozen=True)
class _Shard:
    """One file: its rows and where they lie."""

    file: Path
    rows: int
    made_from: str
    tensors: dict[str, _Tensor]

    @property
    def row_shapes(self) -> dict[str, tuple[int, ...]]:
        return {key: own.shape for key, own in sorted(self.tensors.items())}

    @classmethod
    def open(cls, file: Path) -> _Shard:
        if not file.is_file():
            raise FileNotFoundError(f"no shard at {file}")
        try:
            with safe_open(
                file, framework="pt"
            ) as handle:  # checks the header and the file's length
                metadata = handle.metadata() or {}
                shapes = {
                    key: tuple(handle.get_slice(key).get_shape()) for key in list(handle.keys())
                }
        except SafetensorError as error:
            raise ValueError(f"{file} is no whole safetensors file: {shortened(error)}") from error
        with open(file, "rb") as raw:
            (length,) = struct.unpack("<Q", raw.read(8))
            header = json.loads(raw.read(length))
        rows = {shape[0] if shape else -1 for shape in shapes.values()}
        if len(rows) != 1 or -1 in rows:
            raise ValueError(
                f"{file}: tensors have the shapes {shapes}, expected as many rows each"
            )
        tensors = {}
        for key, shape in shapes.items():
            dtype, (begin, end) = header[key]["dtype"], header[key]["data_offsets"]
            if dtype not in DTYPES:
                raise ValueError(f"{file}: {key} is {dtype}, expected one of {', '.join(DTYPES)}")
            row = (end - begin) // max(shape[0], 1)
            tensors[key] = _Tensor(8 + length + begin, row, DTYPES[dtype], shape[1:])
        return cls(file, rows.pop(), metadata.get(MADE_FROM, ""), tensors)


DTYPES = {"U8": torch.uint8, "I32": torch.int32, "I64": torch.int64, "F32": torch.float32}
"""What rows may be, by the names of safetensors."""


def _file(folder: Path, number: int) -> Path:
    return folder / f"{number:05d}.safetensors"


def _check_made_from(found: str, expected: str, where: Path, settings: str = "") -> None:
    if found != expected:
        otherwise = f", or not with {settings}" if settings else ""
        raise ValueError(
            f"{where} was made from other data or by another tokenizer{otherwise} (hash {found[:12] or 'none'}, "
            f"expected {expected[:12]}): remove the folder {where if where.is_dir() else where.parent} to make it anew"
        )

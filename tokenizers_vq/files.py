"""Files that are whole or refused: atomic writing, and strict and bounded reading of JSON and safetensors."""

from __future__ import annotations

import hashlib
import json
import operator
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tokenizers_vq.int8 import SCALE, from_int8, scale_shape

# written into every configuration; a reader refuses what it does not know
FORMAT_VERSION = 1
# of files that state none
UNSTATED_VERSION = 1
# key of the metadata of our safetensors files
CHECKSUM = "sha256"
# bytes; parsed they take up to 30 times as much memory
MOST_JSON = MOST_HEADER = 16 << 20
# objects and lists inside of one another; what walks through them may call itself for each
DEEPEST_JSON = 50
# dtypes by their names in safetensors
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
# what weights may be stored as: float32 and all that is exact in it
FLOATS = frozenset({"F32", "F16", "BF16"})


def check_format_version(values: Mapping[str, object]) -> None:
    """Refuse what another release has written.

    Args:
        values: of a configuration, with "format_version" or without.

    Raises:
        ValueError: if its version is not the one that this release reads.
    """
    version = values.get("format_version", UNSTATED_VERSION)
    if isinstance(version, bool) or version != FORMAT_VERSION:
        raise ValueError(
            f"format_version is {version}, expected {FORMAT_VERSION}: "
            "it was written by another release of unicfg"
        )


def check_counts(config: object, **most: int) -> None:
    """Refuse fields of a configuration that are no whole numbers from 1 to the most that is allowed.

    The bounds are far beyond what fits into a machine of today, and near enough for nothing to overflow. Whole numbers
    of other kinds, as numpy's, become ints, which JSON knows.

    Args:
        config: a dataclass.
        most: by field, the largest value.

    Raises:
        TypeError: if a field is no whole number.
        ValueError: if one is out of its range; names the field.
    """
    for name, largest in most.items():
        value = whole_number(getattr(config, name), name)
        if not 1 <= value <= largest:
            raise ValueError(f"{name} is {value}, expected at least 1 and at most {largest}")
        object.__setattr__(config, name, value)  # also of a frozen one


def whole_number(value: Any, name: str) -> int:
    """An int from a whole number of any kind.

    Raises:
        TypeError: if it is none, as True is; says ``name``.
    """
    if not isinstance(value, bool):
        with suppress(TypeError):
            return operator.index(value)
    raise TypeError(f"{name} is {value!r}, expected an int")


def replace_whole(file: Path, write: Callable[[Path], object], *, to_disk: bool = True) -> None:
    """Let a file be written beside its place, then move it there: it is there whole or not at all.

    Args:
        file: where; its folder is made if need be.
        write: is called with the path to write to.
        to_disk: wait until the file is on the disk, so that a power cut leaves no half of it either.

    Raises:
        OSError: if it cannot be written; what stood there before is untouched.
    """
    beside = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write(beside)
        if to_disk:
            _to_disk(beside)
        os.replace(beside, file)
        if to_disk:
            with suppress(
                OSError
            ):  # a folder cannot be synced everywhere: then the rename may be lost
                _to_disk(file.parent)
    except OSError as error:
        raise OSError(f"could not write {file}: {error}") from error
    finally:
        beside.unlink(missing_ok=True)


def _to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_atomically(tensors: dict[str, Tensor], file: Path, metadata: dict[str, str]) -> None:
    """Write a safetensors file that is there whole or not at all, with a checksum that :func:`read_tensors` verifies.

    Args:
        tensors: by name.
        file: where.
        metadata: of the file; the checksum is added to it.

    Raises:
        OSError: if it cannot be written, a full disk for one; what stood there before is untouched.
    """
    held = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}

    def write(beside: Path) -> None:
        try:
            save_file(held, beside, metadata | {CHECKSUM: _checksum(held, metadata)})
        except SafetensorError as error:
            raise OSError(str(error)) from error

    try:
        replace_whole(file, write)
    except OSError as error:
        size = sum(t.numel() * t.element_size() for t in held.values())
        raise OSError(
            f"{error} ({size / 1e6:.1f} MB). Free some disk space; what was saved before is whole"
        ) from error


def write_text_atomically(text: str, file: Path) -> None:
    """Write a text file that is there whole or not at all.

    Raises:
        OSError: if it cannot be written; what stood there before is untouched.
    """
    replace_whole(file, lambda beside: beside.write_text(text, "utf-8"))


def _checksum(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """A hash of names, dtypes, shapes and bytes of tensors on the CPU, and of all other metadata."""
    named = {name: text for name, text in metadata.items() if name != CHECKSUM}
    digest = hashlib.sha256(json.dumps(sorted(named.items())).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(
            tensor.reshape(-1).view(torch.uint8).numpy().data
        )  # the memory itself, no copy
    return digest.hexdigest()


def read_json(file: Path, most: int = MOST_JSON) -> dict[str, Any]:
    """A JSON object.

    Args:
        file: to read.
        most: bytes that it may have.

    Raises:
        FileNotFoundError: if there is no such file.
        OSError: if it cannot be read.
        ValueError: if it is too large, nested too deeply, or holds something else; names the file.
    """
    if not file.is_file():
        raise FileNotFoundError(f"no {file.name} in {file.parent}")
    text = read_bounded(file, most)
    try:
        values = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{file} is no JSON: {error}") from error
    except RecursionError:
        raise ValueError(_too_deep(file)) from None
    if not isinstance(values, dict):
        raise ValueError(f"{file} holds {type(values).__name__}, expected an object")
    level: list[Any] = [values]
    for _ in range(DEEPEST_JSON):
        inner = (part.values() if isinstance(part, dict) else part for part in level)
        level = [own for part in inner for own in part if isinstance(own, dict | list)]
    if level:
        raise ValueError(_too_deep(file))
    return values


def _too_deep(file: Path) -> str:
    return f"{file} is no JSON that can be read: it is nested too deeply, expected {DEEPEST_JSON} levels at most"


def read_bounded(file: Path, most: int) -> bytes:
    """The bytes of a file.

    Raises:
        OSError: if it cannot be read.
        ValueError: if there are more than ``most``.
    """
    with file.open("rb") as handle:
        content = handle.read(most + 1)
    if len(content) > most:
        raise ValueError(
            f"{file} has {file.stat().st_size} bytes, expected at most {most} of a file of this kind"
        )
    return content


class Stored(NamedTuple):
    """What the header of a safetensors file says of a tensor: its shape, and its dtype as in "F32"."""

    shape: tuple[int, ...]
    dtype: str


def read_tensors(
    file: Path, check: Callable[[Mapping[str, Stored]], None] | None = None
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a safetensors file.

    A checksum is verified where there is one: files of other tools and of older releases have none.

    Args:
        file: to read.
        check: is told what the file holds before a tensor is read, to refuse it.

    Raises:
        FileNotFoundError: if there is no such file.
        OSError: if it cannot be read.
        ValueError: if it is truncated or damaged; what ``check`` raises.
    """
    if not file.is_file():
        raise FileNotFoundError(f"no weights at {file}: expected a safetensors file")
    with file.open("rb") as start:
        length = int.from_bytes(start.read(8), "little")
    if length > MOST_HEADER:
        raise ValueError(
            f"{file} is no whole safetensors file: its header would have {length} bytes, "
            f"expected at most {MOST_HEADER}"
        )
    try:
        with safe_open(file, framework="pt") as handle:
            names = list(handle.keys())
            if check is not None:
                parts = {name: handle.get_slice(name) for name in names}
                check({k: Stored(tuple(v.get_shape()), v.get_dtype()) for k, v in parts.items()})
            metadata: dict[str, str] = handle.metadata() or {}
            tensors = {name: handle.get_tensor(name) for name in names}
    except SafetensorError as error:
        raise ValueError(f"{file} is no whole safetensors file: {shortened(error)}") from error
    if CHECKSUM in metadata and metadata[CHECKSUM] != _checksum(tensors, metadata):
        raise ValueError(
            f"{file} is damaged: its {CHECKSUM} is not the one that it was written with; take a whole copy"
        )
    return tensors, metadata


def load_tensors(file: Path, expected: Mapping[str, Tensor], owner: str) -> dict[str, Tensor]:
    """The tensors of a safetensors file that holds just what is expected.

    Names, shapes and dtypes are compared before anything is read. Half precision and float32 are taken for any floating
    point, and so are 8-bit integers with a scale for each row; float64, which is exact in nothing else, and other
    integers are taken for themselves. Numbers that are not finite are taken: samplers refuse what comes of them.

    Args:
        file: to read.
        expected: tensors of these names, shapes and kinds, on any device.
        owner: what they are for, in errors.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is damaged, or if names, shapes or dtypes differ.
    """
    scaled: set[str] = set()

    def check(stored: Mapping[str, Stored]) -> None:
        scaled.update(_scaled(stored, expected))
        _check_fits(stored, expected, scaled, file, owner)

    return from_int8(read_tensors(file, check)[0], scaled)


def _scaled(stored: Mapping[str, Stored], expected: Mapping[str, Tensor]) -> set[str]:
    """Names of the weights that are stored as integers with a scale."""
    return {
        name
        for name, wanted in expected.items()
        if wanted.is_floating_point()
        and name in stored
        and stored[name].dtype == "I8"
        and stored[name].shape
        and name + SCALE in stored
        and name + SCALE not in expected
    }


def _check_fits(
    stored: Mapping[str, Stored],
    expected: Mapping[str, Tensor],
    scaled: set[str],
    file: Path,
    owner: str,
) -> None:
    for name in scaled:
        shape, dtype = stored[name + SCALE]
        if dtype != "F32" or shape != scale_shape(stored[name].shape):
            raise ValueError(
                f"{file}: {name}{SCALE} is {dtype} of shape {shape}, expected F32 of shape "
                f"{scale_shape(stored[name].shape)}"
            )
    scales = {name + SCALE for name in scaled}
    stored = {name: own for name, own in stored.items() if name not in scales}
    missing = sorted(expected.keys() - stored.keys())
    unexpected = sorted(stored.keys() - expected.keys())
    if missing or unexpected:
        raise ValueError(
            f"{file} does not fit {owner}: missing keys {missing[:8]}, "
            f"unexpected keys {unexpected[:8]!s:.500} ({len(missing)} and {len(unexpected)} in all)"
        )
    for name, (shape, dtype) in stored.items():
        wanted = expected[name]
        if shape != wanted.shape:
            raise ValueError(
                f"{file}: {name} has shape {shape}, {owner} expects {tuple(wanted.shape)}"
            )
        kinds = {kind for kind, own in DTYPES.items() if own == wanted.dtype}
        if wanted.is_floating_point():
            kinds |= FLOATS
        if name in scaled:
            kinds.add("I8")
        if dtype not in kinds:
            raise ValueError(
                f"{file}: {name} is {dtype}, {owner} expects {' or '.join(sorted(kinds))}: "
                "another would change the numbers"
            )


def shortened(error: Exception, most: int = 500) -> str:
    """The text of an error, cut where a value of a hostile file would fill the screen."""
    text = str(error)
    return text if len(text) <= most else f"{text[:most]}..."

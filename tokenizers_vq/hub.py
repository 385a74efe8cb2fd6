"""Files that are whole or refused: atomic writing, strict loading, and the hub mixin built on both."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self

import dacite
import torch
from huggingface_hub import PyTorchModelHubMixin, snapshot_download
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from tokenizers_vq.cards import CARD, Facts, upload, write_card

FORMAT_VERSION = 1  # written into every config; a reader refuses what it does not know
CONFIG, WEIGHTS = "config.json", "model.safetensors"
CHECKSUM = "sha256"  # key of the metadata of our safetensors files
MOST_JSON = MOST_HEADER = 16 << 20  # bytes; parsed they take up to 30 times as much memory
FLOATS = {
    "F32",
    "F16",
    "BF16",
}  # what float32 weights may be stored as: each of them is exact in it


def check_format_version(version: object) -> None:
    """Refuse what another release has written.

    Raises:
        ValueError: if ``version`` is not the one this release reads.
    """
    if isinstance(version, bool) or version != FORMAT_VERSION:
        raise ValueError(
            f"format_version is {version}, expected {FORMAT_VERSION}: "
            "it was written by another release of unicfg"
        )


def check_counts(config: object, **most: int) -> None:
    """Refuse fields of a configuration that are no whole numbers from 1 to the most that is allowed.

    The bounds are far beyond what fits into a machine of today, and near enough for nothing to overflow.

    Args:
        config: a dataclass.
        most: by field, the largest value.

    Raises:
        TypeError: if a field is no int.
        ValueError: if one is out of its range; names the field.
    """
    for name, largest in most.items():
        value = getattr(config, name)
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} is {value!r}, expected an int")
        if not 1 <= value <= largest:
            raise ValueError(f"{name} is {value}, expected at least 1 and at most {largest}")


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
        _write_beside(file, write)
    except OSError as error:
        size = sum(t.numel() * t.element_size() for t in held.values())
        raise OSError(
            f"could not write {file} ({size / 1e6:.1f} MB): {error}. "
            "Free some disk space; what was saved before is whole"
        ) from error


def write_text_atomically(text: str, file: Path) -> None:
    """Write a text file that is there whole or not at all.

    Raises:
        OSError: if it cannot be written; what stood there before is untouched.
    """
    try:
        _write_beside(file, lambda beside: beside.write_text(text, "utf-8"))
    except OSError as error:
        raise OSError(f"could not write {file}: {error}") from error


def _write_beside(file: Path, write: Callable[[Path], object]) -> None:
    """Write beside a file's place, then move it there; neither a kill nor a power cut leaves half a file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    beside = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        write(beside)
        _to_disk(beside)
        os.replace(beside, file)
        with suppress(OSError):  # a folder cannot be synced everywhere: then the rename may be lost
            _to_disk(file.parent)
    finally:
        beside.unlink(missing_ok=True)


def _to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


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
        ValueError: if it is too large, or holds something else; names the file.
    """
    if not file.is_file():
        raise FileNotFoundError(f"no {file.name} in {file.parent}")
    text = read_bounded(file, most)
    try:
        values = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{file} is no JSON: {error}") from error
    except RecursionError:
        raise ValueError(f"{file} is no JSON that can be read: it is nested too deeply") from None
    if not isinstance(values, dict):
        raise ValueError(f"{file} holds {type(values).__name__}, expected an object")
    return values


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

    Names, shapes and dtypes are compared before anything is read. Half precision is taken for any floating point, since it
    is exact in float32; float64 and integers are not. Numbers that are not finite are taken: samplers refuse what comes of them.

    Args:
        file: to read.
        expected: tensors of these names, shapes and kinds, on any device.
        owner: what they are for, in errors.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is damaged, or if names, shapes or dtypes differ.
    """

    def check(stored: Mapping[str, Stored]) -> None:
        _check_fits(stored, expected, file, owner)

    return read_tensors(file, check)[0]


def _check_fits(
    stored: Mapping[str, Stored], expected: Mapping[str, Tensor], file: Path, owner: str
) -> None:
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
        kinds = FLOATS if wanted.is_floating_point() else {_DTYPES.get(wanted.dtype)}
        if dtype not in kinds:
            raise ValueError(
                f"{file}: {name} is {dtype}, {owner} expects {' or '.join(sorted(map(str, kinds)))}: "
                "another would change the numbers"
            )


# of buffers that are no floats
_DTYPES = {torch.int64: "I64", torch.int32: "I32", torch.uint8: "U8", torch.bool: "BOOL"}


def load_weights(model: nn.Module, file: Path) -> None:
    """Copy the tensors of a safetensors ``file`` into ``model``; every key must match.

    Half-precision files load into float32 models: the copy converts.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is truncated or damaged, or if keys, shapes or dtypes differ; names them.
    """
    tensors = load_tensors(file, model.state_dict(), type(model).__name__)
    model.load_state_dict(tensors, strict=True)


class StrictHubMixin(PyTorchModelHubMixin):
    """``save_pretrained``, ``from_pretrained``, ``push_to_hub`` with every key checked.

    The parent class loads with ``strict=False`` by default, so that a file of another model gives random weights
    without a word, and ignores keys of the configuration that it does not know. Here both are a ``ValueError``.
    """

    config_class: ClassVar[type[Any]]
    config: Any

    @classmethod
    def from_pretrained(cls, name: Path | str, *, revision: str | None = None) -> Self:  # type: ignore[override]
        """Load a local folder, or a repository on the Hugging Face hub, in eval mode on the CPU.

        Args:
            name: folder or repository with ``config.json`` and ``model.safetensors``.
            revision: branch, tag or commit of a repository.

        Raises:
            FileNotFoundError: if a file is missing.
            ValueError: if a file is damaged or belongs to another model.
        """
        folder = Path(name)
        if not folder.is_dir():
            files = [CONFIG, WEIGHTS]
            folder = Path(snapshot_download(str(name), revision=revision, allow_patterns=files))
        config = _read_config(cls.config_class, folder / CONFIG)
        # shapes cost nothing: what the file does not hold is not made room for
        with torch.device("meta"):
            shapes = cls(config)
        assert isinstance(shapes, nn.Module)
        tensors = load_tensors(folder / WEIGHTS, shapes.state_dict(), cls.__name__)
        model = cls(config)
        assert isinstance(model, nn.Module)
        model.load_state_dict(tensors, strict=True)
        model.eval()
        return model

    def save_pretrained(self, folder: Path | str, facts: Facts | None = None) -> Path:  # type: ignore[override]
        """Write configuration, weights and a card.

        Args:
            folder: made if need be.
            facts: for the card; None leaves one alone that is there.

        Raises:
            OSError: if it cannot be written.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_part(self, folder)
        if facts is not None or not (folder / CARD).exists():
            self._write_card(folder, folder.resolve().name, facts)
        return folder

    def push_to_hub(  # type: ignore[override]
        self,
        repo_id: str,
        facts: Facts,
        *,
        private: bool | None = None,
        token: str | None = None,
        commit_message: str = "Upload weights and card",
    ) -> str:
        """Send configuration, weights and a card to a repository of the Hugging Face hub.

        Args:
            repo_id: as in "someone/tokenizer"; made if need be.
            facts: for the card.
            private: of a new repository.
            token: of the hub; None takes the one that is logged in.
            commit_message: of the commit.

        Returns:
            the address of the commit.
        """

        def write(folder: Path) -> None:
            save_part(self, folder)
            self._write_card(folder, repo_id, facts)

        return upload(repo_id, write, private=private, token=token, commit_message=commit_message)

    def _write_card(self, folder: Path, name: str, facts: Facts | None) -> None:
        kind = type(self).__name__
        assert isinstance(self, nn.Module)
        count = sum(p.numel() for p in self.parameters()) / 1e6
        module = type(self).__module__.split(".")[0]
        code = f"from {module} import {kind}\n\nmodel = {kind}.from_pretrained({name!r})"
        about = f"A `{kind}` of unicfg, {count:.1f} M parameters."
        tags = self._hub_mixin_info.model_card_data.tags or []
        write_card(folder, name, about, code, facts, tags)


def _read_config(config_class: type[Any], file: Path) -> Any:
    """The configuration of a model.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if another release wrote it, a key is unknown, or a value is of another type or out of its range.
    """
    values = read_json(file)
    try:
        # first: another release may have other keys
        check_format_version(values.get("format_version", 1))
        kinds = {own.name: str(own.type) for own in fields(config_class)}
        for name, value in values.items():
            if kinds.get(name, "").startswith("tuple") and not isinstance(value, list):
                raise ValueError(f"{name} is {value!r:.100}, expected a list")
        values = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return dacite.from_dict(config_class, values, dacite.Config(strict=True))
    except (dacite.DaciteError, ValueError, TypeError) as error:
        raise ValueError(f"{file}: {shortened(error)}") from error


def shortened(error: Exception, most: int = 500) -> str:
    """The text of an error, cut where a value of a hostile file would fill the screen."""
    text = str(error)
    return text if len(text) <= most else f"{text[:most]}..."


def save_part(model: Any, folder: Path, dtype: torch.dtype | None = None) -> None:
    """Write configuration and weights of a model, each whole or not at all.

    Args:
        model: a module with a dataclass ``config``.
        folder: made if need be.
        dtype: of the floating-point weights on disk; None keeps them as they are.

    Raises:
        OSError: if it cannot be written.
        ValueError: if weights are no plain tensors, as quantized ones are.
    """
    for name, parameter in model.named_parameters():
        if is_traceable_wrapper_subclass(parameter):
            raise ValueError(
                f"{name} is a {type(parameter).__name__}, which is not saved: expected the model before quantize()"
            )
    state = {k: v.detach().cpu() for k, v in model.state_dict().items()}
    if dtype is not None:
        state = {k: v.to(dtype) if v.is_floating_point() else v for k, v in state.items()}
    write_text_atomically(json.dumps(asdict(model.config), indent=2) + "\n", folder / CONFIG)
    write_atomically(state, folder / WEIGHTS, {})

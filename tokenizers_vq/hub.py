"""Files that are whole or refused: atomic writing, strict loading, and the hub mixin built on both."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar, Self

import dacite
import torch
from huggingface_hub import PyTorchModelHubMixin, snapshot_download
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from tokenizers_vq.cards import CARD, Facts, upload, write_card

FORMAT_VERSION = 1  # written into every config; a reader refuses what it does not know
CONFIG, WEIGHTS = "config.json", "model.safetensors"


def check_format_version(version: object) -> None:
    """Refuse what another release has written.

    Raises:
        ValueError: if ``version`` is not the one this release reads.
    """
    if version != FORMAT_VERSION:
        raise ValueError(
            f"format_version is {version}, expected {FORMAT_VERSION}: "
            "the weights were written by another release of unicfg"
        )


def write_atomically(tensors: dict[str, Tensor], file: Path, metadata: dict[str, str]) -> None:
    """Write a safetensors file that is there whole or not at all.

    Raises:
        OSError: if it cannot be written, a full disk for one; what stood there before is untouched.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    beside = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        save_file({k: v.contiguous() for k, v in tensors.items()}, beside, metadata)
        with open(beside, "rb") as handle:
            os.fsync(handle.fileno())
        os.replace(beside, file)
    except (OSError, SafetensorError) as error:
        size = sum(t.numel() * t.element_size() for t in tensors.values())
        raise OSError(
            f"could not write {file} ({size / 1e6:.1f} MB): {error}. "
            "Free some disk space; what was saved before is whole"
        ) from error
    finally:
        beside.unlink(missing_ok=True)


def write_text_atomically(text: str, file: Path) -> None:
    """Write a text file that is there whole or not at all.

    Raises:
        OSError: if it cannot be written; what stood there before is untouched.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    beside = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        beside.write_text(text, "utf-8")
        os.replace(beside, file)
    except OSError as error:
        raise OSError(f"could not write {file}: {error}") from error
    finally:
        beside.unlink(missing_ok=True)


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it holds something else; names the file.
    """
    if not file.is_file():
        raise FileNotFoundError(f"no {file.name} in {file.parent}")
    try:
        values = json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is no JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{file} holds {type(values).__name__}, expected an object")
    return values


def load_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is truncated or damaged.
    """
    if not file.is_file():
        raise FileNotFoundError(f"no weights at {file}: expected a safetensors file")
    try:
        return load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file} is no whole safetensors file: {error}") from error


def load_weights(model: nn.Module, file: Path) -> None:
    """Copy the tensors of a safetensors ``file`` into ``model``; every key must match.

    Half-precision files load into float32 models: the copy converts.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is truncated, or if keys or shapes differ; names them.
    """
    tensors, expected = load_tensors(file), model.state_dict()
    missing = sorted(expected.keys() - tensors.keys())
    unexpected = sorted(tensors.keys() - expected.keys())
    if missing or unexpected:
        raise ValueError(
            f"{file} does not fit {type(model).__name__}: missing keys {missing[:8]}, "
            f"unexpected keys {unexpected[:8]} ({len(missing)} and {len(unexpected)} in all)"
        )
    for name, tensor in tensors.items():
        if tensor.shape != expected[name].shape:
            raise ValueError(
                f"{file}: {name} has shape {tuple(tensor.shape)}, "
                f"{type(model).__name__} expects {tuple(expected[name].shape)}"
            )
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
        values = read_json(folder / CONFIG)
        values = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        try:
            config = dacite.from_dict(cls.config_class, values, dacite.Config(strict=True))
        except (dacite.DaciteError, ValueError) as error:
            raise ValueError(f"{folder / CONFIG}: {error}") from error
        model = cls(config)
        assert isinstance(model, nn.Module)
        load_weights(model, folder / WEIGHTS)
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

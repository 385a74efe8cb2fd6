"""Models in folders and on the Hugging Face hub: configuration, weights and card, with every key checked."""

from __future__ import annotations

import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, ClassVar, Self

import dacite
import torch
from huggingface_hub import PyTorchModelHubMixin, snapshot_download
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from tokenizers_vq.cards import CARD, Facts, upload, write_card
from tokenizers_vq.files import (
    DTYPES,
    FLOATS,
    check_format_version,
    load_tensors,
    read_json,
    shortened,
    write_atomically,
    write_text_atomically,
)
from tokenizers_vq.int8 import to_int8

CONFIG, WEIGHTS = "config.json", "model.safetensors"


def load_weights(model: nn.Module, file: Path) -> None:
    """Copy the tensors of a safetensors ``file`` into ``model``; every key must match.

    Files in half precision or of 8-bit integers load into float32 models: the copy converts.

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
            model = cls(config)
        assert isinstance(model, nn.Module)
        expected = model.state_dict()
        tensors = load_tensors(folder / WEIGHTS, expected, cls.__name__)
        if expected.keys() >= dict(model.named_buffers()).keys():
            # to draw weights and then replace them would take longer than to read them
            own = {k: v.to(expected[k].dtype, copy=True) for k, v in tensors.items()}
            model.load_state_dict(own, strict=True, assign=True)
        else:  # some buffers are not in the file, but made with the model
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
        check_format_version(values)
        kinds = {own.name: str(own.type) for own in fields(config_class)}
        for name, value in values.items():
            if kinds.get(name, "").startswith("tuple") and not isinstance(value, list):
                raise ValueError(f"{name} is {value!r:.100}, expected a list")
        values = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return dacite.from_dict(config_class, values, dacite.Config(strict=True))
    except (dacite.DaciteError, ValueError, TypeError) as error:
        raise ValueError(f"{file}: {shortened(error)}") from error


def save_part(model: Any, folder: Path, dtype: torch.dtype | None = None) -> None:
    """Write configuration and weights of a model, each whole or not at all.

    Args:
        model: a module with a dataclass ``config``.
        folder: made if need be.
        dtype: of the floating-point weights on disk; None keeps them as they are, ``torch.int8`` stores matrices as
            integers with a scale for each row.

    Raises:
        OSError: if it cannot be written.
        ValueError: if weights are no plain tensors, as quantized ones are, do not fit into ``dtype``, or are of a dtype that
            is not read back.
    """
    for name, parameter in model.named_parameters():
        if is_traceable_wrapper_subclass(parameter):
            raise ValueError(
                f"{name} is a {type(parameter).__name__}, which is not saved: expected the model before quantize()"
            )
    read_back = [DTYPES[kind] for kind in sorted(FLOATS)]
    if dtype not in (None, torch.int8, *read_back):
        raise ValueError(f"dtype is {dtype}, expected None, torch.int8 or one of {read_back}")
    state = {k: v.detach().cpu() for k, v in model.state_dict().items()}
    if dtype == torch.int8:
        state = to_int8(state)
    elif dtype is not None:
        state = {k: v.to(dtype) if v.is_floating_point() else v for k, v in state.items()}
    for name, tensor in state.items():
        if tensor.is_floating_point() and tensor.dtype not in read_back:
            raise ValueError(
                f"{name} is {tensor.dtype}, expected one of {read_back}, which from_pretrained() reads"
            )
    write_text_atomically(json.dumps(asdict(model.config), indent=2) + "\n", folder / CONFIG)
    write_atomically(state, folder / WEIGHTS, {})

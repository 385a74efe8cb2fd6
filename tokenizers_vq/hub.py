"""Saving and loading that never returns random weights: the hub mixin with ``strict=True``, always."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from huggingface_hub import PyTorchModelHubMixin
from safetensors import SafetensorError
from safetensors.torch import load_file

FORMAT_VERSION = 1  # written into every config; a reader refuses what it does not know


def check_format_version(version: int) -> None:
    """Refuse a configuration written by a newer release.

    Raises:
        ValueError: if ``version`` is not the one this release reads.
    """
    if version != FORMAT_VERSION:
        raise ValueError(
            f"format_version is {version}, expected {FORMAT_VERSION}: "
            "the weights were written by another release of unicfg"
        )


def load_weights(model: torch.nn.Module, file: Path | str) -> None:
    """Copy the tensors of a safetensors ``file`` into ``model``; every key must match.

    Half-precision files load into float32 models: the copy converts.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is truncated, or if keys or shapes differ; names them.
    """
    if not Path(file).is_file():
        raise FileNotFoundError(f"no weights at {file}: expected a safetensors file")
    try:
        tensors = load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file} is no whole safetensors file: {error}") from error
    expected = model.state_dict()
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

    The parent class loads with ``strict=False`` by default and so returns random weights for a
    file of another model without a word; here that is a ``ValueError``.
    """

    @classmethod
    def _from_pretrained(cls, *, model_id: str, **options: Any) -> Any:
        """Build from the configuration, then load a local file, or one from the hub."""
        if not Path(model_id).is_dir():
            return super()._from_pretrained(model_id=model_id, **options)
        reserved = (
            "revision",
            "cache_dir",
            "force_download",
            "local_files_only",
            "token",
            "strict",
        )
        arguments = {k: v for k, v in options.items() if k not in reserved}
        device = arguments.pop("map_location", "cpu")
        model = cls(**arguments)
        file = str(Path(model_id) / "model.safetensors")
        return cls._load_as_safetensor(model, file, device, strict=True).eval()

    @classmethod
    def _load_as_safetensor(
        cls, model: Any, model_file: str, map_location: str, strict: bool
    ) -> Any:
        del strict  # there is no other way to load
        load_weights(model, model_file)
        return model.to(map_location)

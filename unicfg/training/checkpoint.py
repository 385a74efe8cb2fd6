"""Checkpoints: one safetensors file, written beside and renamed, so that a kill leaves the last whole one.

Nothing is pickled. A checkpoint holds the model, its moving average, the optimizers and the state of every
random generator; the learning rate and the order of the data are functions of the step.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from tokenizers_vq.hub import write_atomically

SUFFIX = ".safetensors"


def training_state(
    model: nn.Module, average: nn.Module, optimizers: Sequence[torch.optim.Optimizer]
) -> dict[str, Tensor]:
    """Everything that a training has learned, as a flat dict of tensors."""
    tensors = {f"model/{k}": v for k, v in model.state_dict().items()}
    tensors |= {f"average/{k}": v for k, v in average.state_dict().items()}
    for which, optimizer in enumerate(optimizers):
        for index, entries in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer {which}/{index}/{k}": v for k, v in entries.items()}
    tensors["random/cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["random/cuda"] = torch.cuda.get_rng_state()
    # average and model may share nothing, but tied weights would: safetensors refuses shared memory
    return {k: v.detach().cpu().clone() for k, v in tensors.items()}


def restore_training_state(
    tensors: dict[str, Tensor],
    model: nn.Module,
    average: nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
) -> None:
    """Undo :func:`training_state`.

    Raises:
        RuntimeError: if keys or shapes do not match the model.
    """
    model.load_state_dict(_under(tensors, "model/"))
    average.load_state_dict(_under(tensors, "average/"))
    for which, optimizer in enumerate(optimizers):
        state: dict[int, dict[str, Tensor]] = {}
        for key, tensor in _under(tensors, f"optimizer {which}/").items():
            index, name = key.split("/")
            state.setdefault(int(index), {})[name] = tensor
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": state, "param_groups": groups})
    torch.set_rng_state(tensors["random/cpu"])
    if torch.cuda.is_available() and "random/cuda" in tensors:
        torch.cuda.set_rng_state(tensors["random/cuda"])


def _under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


class Checkpoints:
    """The checkpoints of one training, newest last, in one folder.

    Args:
        folder: where they are.
        keep: how many to keep.
    """

    def __init__(self, folder: Path, keep: int = 2) -> None:
        self.folder = folder
        self.keep = keep

    def files(self) -> list[Path]:
        """Whole checkpoints, oldest first."""
        return sorted(self.folder.glob(f"step-*{SUFFIX}"))

    def save(self, step: int, tensors: dict[str, Tensor], settings: dict[str, Any]) -> Path:
        """Write the checkpoint of ``step``, then remove the ones beyond ``keep``.

        Raises:
            OSError: if it cannot be written.
        """
        for leftover in self.folder.glob(".step-*.tmp"):
            leftover.unlink()  # of a process that was killed while it wrote
        file = self.folder / f"step-{step:08d}{SUFFIX}"
        write_atomically(tensors, file, {"step": str(step), "settings": json.dumps(settings)})
        for old in self.files()[: -self.keep]:
            old.unlink()
        return file

    def load(self) -> tuple[int, dict[str, Tensor], dict[str, Any]] | None:
        """Step, tensors and settings of the newest readable checkpoint, or None if there is none.

        A file that cannot be read is passed over with a message, for the one before it.
        """
        for file in reversed(self.files()):
            try:
                with safe_open(file, framework="pt") as handle:
                    metadata = handle.metadata()
                    tensors = {key: handle.get_tensor(key) for key in list(handle.keys())}
                return int(metadata["step"]), tensors, json.loads(metadata["settings"])
            except (SafetensorError, OSError, KeyError, ValueError) as error:
                print(f"{file} is no whole checkpoint ({error}); trying the one before")
        return None

"""Checkpoints: one safetensors file, written beside and renamed, so that a kill leaves the last whole one.

Nothing is pickled. A checkpoint holds the model, its moving average and the optimizers, whole even where processes
had a share of them each; learning rate, order of the data and random numbers are functions of the step.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from tokenizers_vq.files import read_tensors, write_atomically

SUFFIX = ".safetensors"


def training_state(
    model: nn.Module,
    average: nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    *,
    keep: bool = True,
) -> dict[str, Tensor]:
    """Everything that a training has learned, as a flat dict of tensors on the CPU.

    All processes take part, where they have a share of the tensors each; those that do not ``keep`` them get none.
    """
    tensors = {f"model/{k}": v for k, v in model.state_dict().items()}
    tensors |= {f"average/{k}": v for k, v in average.state_dict().items()}
    for which, optimizer in enumerate(optimizers):
        for index, entries in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer {which}/{index}/{k}": v for k, v in entries.items()}
    whole = {}
    for name, tensor in tensors.items():
        own = gathered(tensor.detach())
        if keep:  # average and model may share nothing, but tied weights would: safetensors refuses shared memory
            whole[name] = own.cpu().clone()
    return whole


def gathered(tensor: Tensor) -> Tensor:
    """The whole of a tensor that processes may have a share of each; all of them take part."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _shared_out(tensor: Tensor, example: Tensor) -> Tensor:
    """Undo :func:`gathered`: this process's share, as it has one of ``example``."""
    if not isinstance(example, DTensor):
        return tensor
    return distribute_tensor(
        tensor.to(example.device), example.device_mesh, example.placements, src_data_rank=None
    )


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
    for name, module in (("model/", model), ("average/", average)):
        own = module.state_dict()
        found = _under(tensors, name)
        # keys that the module lacks are left for load_state_dict to name
        module.load_state_dict(
            {k: _shared_out(v, own[k]) if k in own else v for k, v in found.items()}
        )
    for which, optimizer in enumerate(optimizers):
        state: dict[int, dict[str, Tensor]] = {}
        parameters = [own for group in optimizer.param_groups for own in group["params"]]
        for key, tensor in _under(tensors, f"optimizer {which}/").items():
            index, name = key.split("/")
            of = parameters[int(index)]
            shared = tensor
            if tensor.shape == of.shape:
                shared = _shared_out(tensor, of)
                if of.ndim == 4 and not of.is_contiguous():
                    # channels last, as the parameter is, and as it was before the run was stopped
                    shared = shared.contiguous(memory_format=torch.channels_last)
            state.setdefault(int(index), {})[name] = shared
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": state, "param_groups": groups})


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
        for later in self.files():
            if later.name > file.name:  # it could not be read, or training would not be here
                later.unlink()
        write_atomically(tensors, file, {"step": str(step), "settings": json.dumps(settings)})
        for old in self.files()[: -self.keep]:
            old.unlink()
        return file

    def load(self) -> tuple[int, dict[str, Tensor], dict[str, Any]] | None:
        """Step, tensors and settings of the newest readable checkpoint, or None if there is none.

        A file that cannot be read is passed over with a message, for the one before it.
        """
        files = self.files()
        for file in reversed(files):
            try:
                tensors, metadata = read_tensors(file)
                step, settings = int(metadata["step"]), json.loads(metadata["settings"])
                if step < 0 or not isinstance(settings, dict):
                    raise ValueError(f"step is {step} and settings {settings!r:.100}")
                return step, tensors, settings
            except (OSError, KeyError, ValueError, RecursionError) as error:
                rest = "starting at step 0" if file == files[0] else "trying the one before"
                print(f"{file} is no whole checkpoint ({error}); {rest}")
        return None

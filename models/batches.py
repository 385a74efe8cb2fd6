"""Many prompts as batches that fit into memory: what can be split, and how much memory there is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from unicfg.guidance import Guidance
from unicfg.sampling import Branch


@dataclass(frozen=True)
class Jobs:
    """What differs from image to image."""

    prompts: Sequence[str]
    seeds: Sequence[int]
    guidance: Guidance | None
    branches: Mapping[str, Any] | None
    init_image: Image.Image | Tensor | None

    def check(self) -> None:
        """Refuse what has another number of entries than there are prompts.

        Raises:
            ValueError: names the branch, or ``init_image``.
        """
        count = len(self.prompts)
        for name, own in (self.branches or {}).items():
            if _is_list(own) and len(own) != count:
                raise ValueError(
                    f"the branch {name!r} is {own!r}, expected a text, {count} texts, a pipeline or a Branch"
                )
        image = self.init_image
        if isinstance(image, Tensor) and image.ndim == 4 and len(image) not in (1, count):
            raise ValueError(
                f"init_image has shape {tuple(image.shape)} for {count} prompts, expected one image, or one a prompt"
            )

    def can_be_split(self) -> bool:
        """Whether no tensor but the scale has an entry for each sample, which only its caller could split."""
        scale = None if self.guidance is None else self.guidance.scale
        rows = _holds_rows(scale) and not self._has_scale_each()
        return not rows and not any(
            isinstance(branch, Branch) and isinstance(branch.cond, Tensor) and branch.cond.ndim > 1
            for branch in (self.branches or {}).values()
        )

    def _has_scale_each(self) -> bool:
        """Whether the scale is a tensor (B,), which is split like the prompts."""
        scale = None if self.guidance is None else self.guidance.scale
        return isinstance(scale, Tensor) and scale.shape == (len(self.prompts),)

    def part(self, start: int, stop: int) -> Jobs:
        """The images from ``start`` up to ``stop``."""
        if (start, stop) == (0, len(self.prompts)):
            return self
        image = self.init_image
        if isinstance(image, Tensor) and image.ndim == 4 and len(image) == len(self.prompts):
            image = image[start:stop]
        branches = self.branches and {
            name: own[start:stop] if _is_list(own) else own for name, own in self.branches.items()
        }
        guidance = self.guidance
        if guidance is not None and self._has_scale_each():
            assert isinstance(guidance.scale, Tensor)
            guidance = replace(guidance, scale=guidance.scale[start:stop])
        return Jobs(self.prompts[start:stop], self.seeds[start:stop], guidance, branches, image)


class OutOfMemory(RuntimeError):
    """A batch that cannot be made smaller does not fit.

    Attributes:
        finished: the images before it (N, 3, H, W).
    """

    def __init__(self, count: int, finished: Sequence[Tensor]) -> None:
        self.finished = torch.cat(list(finished)) if finished else torch.empty(0)
        what = "one image does" if count == 1 else f"{count} images, which cannot be split, do"
        super().__init__(
            f"{what} not fit into memory: use fewer branches, a smaller batch or a device with more; the "
            f"{len(self.finished)} finished images are in the attribute finished of this error"
        )


def _is_list(own: object) -> bool:
    return isinstance(own, Sequence) and not isinstance(own, str)


def _holds_rows(value: Any) -> bool:
    """Whether a scale or the weights of branches hold a tensor with an entry a sample."""
    if isinstance(value, Tensor):
        return value.ndim > 0 and len(value) > 1
    if is_dataclass(value) and not isinstance(value, type):
        return any(_holds_rows(getattr(value, field.name)) for field in fields(value))
    if isinstance(value, Mapping):
        return any(map(_holds_rows, value.values()))
    if isinstance(value, (list, tuple)):
        return any(map(_holds_rows, value))
    if callable(value) and not isinstance(value, type):  # a schedule of one's own
        return any(_holds_rows(value(step / 8)) for step in range(9))
    return False


def free_memory(device: torch.device) -> int:
    """Bytes that can be had."""
    if device.type == "cuda":
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + held
    free = 2**31  # where the system does not say
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        (line,) = (line for line in lines if line.startswith("MemAvailable:"))
        free = int(line.split()[1]) * 1024
        # a container may have less than its machine
        group = Path("/sys/fs/cgroup")
        most, used = (group / f"memory.{name}" for name in ("max", "current"))
        return min(free, int(most.read_text()) - int(used.read_text()))
    except (OSError, ValueError):
        return free

"""Random numbers that belong to a sample, not to a batch: one seed a sample, no global state."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


def check_seeds(seeds: Sequence[int], batch: int) -> list[int]:
    """The seeds as a list of ints, one for each sample.

    Raises:
        ValueError: if their number is not the batch size, or one has more than 64 bits.
        TypeError: if they are no sequence, or one is no integer.
    """
    if batch < 1:
        raise ValueError(f"the batch has {batch} samples, expected at least one")
    if not isinstance(seeds, Iterable):
        raise TypeError(f"seeds is {seeds!r}, expected a sequence of ints, one a sample")
    seeds = list(seeds)
    if len(seeds) != batch:
        raise ValueError(
            f"seeds has {len(seeds)} entries for a batch of {batch}, expected one each"
        )
    return [_check_seed(seed) for seed in seeds]


def _check_seed(seed: object) -> int:
    try:
        number = operator.index(seed)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"seed is {seed!r}, expected an int") from None
    if isinstance(seed, bool):
        raise TypeError(f"seed is {seed!r}, expected an int")
    if not -(2**63) <= number < 2**64:
        raise ValueError(f"seed is {number}, expected a number of 64 bits")
    return number


def is_count(value: object) -> bool:
    """Whether it is an int of at least 1, numpy's included, and no bool."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        return False
    return operator.index(value) >= 1


def generators(seeds: Sequence[int]) -> list[torch.Generator]:
    """One generator a sample, on the CPU: what they give is the same on every device."""
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def normal(sources: Sequence[torch.Generator], shape: tuple[int, ...]) -> Tensor:
    """Standard normal numbers, float32 (B, *shape) on the CPU; row i is drawn from ``sources[i]``."""
    return torch.stack([torch.randn(shape, generator=source) for source in sources])


def uniform(sources: Sequence[torch.Generator], shape: tuple[int, ...]) -> Tensor:
    """Uniform numbers in [0, 1), float64 (B, *shape) on the CPU; row i is drawn from ``sources[i]``."""
    return torch.stack(
        [torch.rand(shape, generator=source, dtype=torch.float64) for source in sources]
    )

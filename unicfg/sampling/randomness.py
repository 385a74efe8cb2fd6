"""Random numbers that belong to a sample, not to a batch: one seed a sample, no global state."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def check_seeds(seeds: Sequence[int], batch: int) -> list[int]:
    """The seeds as a list of ints, one for each sample.

    Raises:
        ValueError: if their number is not the batch size.
        TypeError: if one is no integer.
    """
    seeds = list(seeds)
    if len(seeds) != batch:
        raise ValueError(
            f"seeds has {len(seeds)} entries for a batch of {batch}, expected one each"
        )
    for seed in seeds:
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise TypeError(f"seed is {seed!r}, expected an int")
    return seeds


def uniform_per_sample(seeds: Sequence[int], shape: tuple[int, ...]) -> Tensor:
    """Uniform numbers in [0, 1), float64 (B, *shape) on the CPU; row i depends on ``seeds[i]`` alone."""
    rows = [
        torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        for seed in seeds
    ]
    return torch.stack(rows)

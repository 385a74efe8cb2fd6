"""Random numbers that belong to a sample, not to a batch: one seed a sample, no global state."""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
from torch import Tensor


def check_seeds(seeds: Sequence[int], batch: int) -> list[int]:
    """The seeds as a list of ints, one for each sample.

    Raises:
        ValueError: if their number is not the batch size, or one has more than 64 bits.
        TypeError: if one is no integer.
    """
    if batch < 1:
        raise ValueError(f"the batch has {batch} samples, expected at least one")
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


def uniform_per_sample(seeds: Sequence[int], shape: tuple[int, ...]) -> Tensor:
    """Uniform numbers in [0, 1), float64 (B, *shape) on the CPU; row i depends on ``seeds[i]`` alone."""
    rows = [
        torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        for seed in seeds
    ]
    return torch.stack(rows)

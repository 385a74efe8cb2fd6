"""How far an estimate may be off: standard errors over images, and the refusal of sets that are too small.

The errors take images, or groups of them, as drawn independently. A group is a run of neighbouring rows, so that images
of one prompt that stand together are left out together.
"""

from __future__ import annotations

import torch
from torch import Tensor

from unicfg.evaluation.results import Estimate, TooFew


def require(measure: str, found: int, needed: int, of: str = "images") -> None:
    """Refuse a set that is too small.

    Args:
        measure: for which it is.
        found: how many there are.
        needed: at least so many.
        of: what is counted.

    Raises:
        TooFew: names all of them.
    """
    if found < needed:
        raise TooFew(f"{measure} has {found} {of}, expected at least {needed}")


def mean_over_images(measure: str, values: Tensor) -> Estimate:
    """The mean of one value an image (N,), and its standard error.

    Raises:
        TooFew: if there are less than 2: the error of one is unknown.
    """
    require(measure, len(values), 2)
    values = values.double()
    return Estimate(float(values.mean()), float(values.std() / len(values) ** 0.5), len(values))


def leave_out(n: int, groups: int) -> Tensor:
    """Which rows stay when each group of neighbours in turn is left out.

    All groups are of one size, for statistics that depend on the number of rows; the last n % groups rows are
    never left out.

    Args:
        n: number of rows.
        groups: G, 2 to n; n of them leave out one row each.

    Returns:
        bool (G, n).
    """
    size = n // groups
    kept = torch.ones(groups, n, dtype=torch.bool)
    for g, row in enumerate(kept):
        row[g * size : (g + 1) * size] = False
    return kept


def jackknife(replicates: Tensor, n: int, kept: int) -> float:
    """Standard error of a statistic of n rows from its values (G,) without each of G groups.

    Delete-a-group jackknife: sqrt(kept^2 / (n (n - kept) (G - 1)) * sum (value - mean)^2), where the groups make up
    all rows sqrt((G - 1) / G * sum (value - mean)^2). For a mean without one row at a time it is exactly s / sqrt(n)
    (Efron and Tibshirani 1993, "An Introduction to the Bootstrap", eq. 11.5; Shao and Wu 1989, "A General Theory for
    Jackknife Variance Estimation").

    Args:
        replicates: G values.
        n: rows of the whole set.
        kept: rows that each of the values is of.
    """
    away = replicates.double() - replicates.double().mean()
    factor = kept**2 / (n * (n - kept) * (len(replicates) - 1))
    return float((away.square().sum() * factor).sqrt())

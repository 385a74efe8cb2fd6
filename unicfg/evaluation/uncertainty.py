"""How far an estimate may be off: standard errors over images, and the refusal of sets that are too small.

The errors take images, or groups of them, as drawn independently. A group is a run of neighbouring rows, so that images
of one prompt that stand together are left out together.
"""

from __future__ import annotations

import torch
from torch import Tensor

from unicfg.evaluation.results import Estimate, TooFew

LEAST = 8  # images: of so many the error itself may be off by a quarter
LEAST_OF_SHARE = 16  # images: of so many the error of a share is up to 12 %


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
        TooFew: if there are less than 8.
    """
    require(measure, len(values), LEAST)
    values = values.double()
    return Estimate(float(values.mean()), float(values.std() / len(values) ** 0.5), len(values))


def share(measure: str, right: int, n: int) -> Estimate:
    """The share of images that have a property, right / n, and its standard error, which is never 0.

    The error is sqrt(p (1 - p) / n) with p = (right + 1) / (n + 2), Laplace's rule of succession: the mean of what p can
    be after these images, if before them all of [0, 1] was as likely (Laplace 1814, "Essai philosophique sur les
    probabilités"). With p = right / n, none or all of n images would have an error of 0. To take the error from a share
    that is drawn towards 1/2 is the way of Agresti and Coull 1998, "Approximate is better than 'exact' for interval
    estimation of binomial proportions", who add 2 of each kind for an interval of 95 % and move its centre too; the
    value here is not moved.

    Args:
        measure: for which it is.
        right: how many have the property, 0 to n.
        n: number of images.

    Raises:
        TooFew: if there are less than 16 images.
        ValueError: if ``right`` is not in 0 .. n.
    """
    require(measure, n, LEAST_OF_SHARE)
    if not 0 <= right <= n:
        raise ValueError(f"right is {right}, expected 0 to n = {n}")
    p = (right + 1) / (n + 2)
    return Estimate(right / n, (p * (1 - p) / n) ** 0.5, n)


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

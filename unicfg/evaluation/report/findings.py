"""What follows from the numbers of a study: best scales, fronts, equal strength, and what variants win back."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from unicfg.evaluation.report.lookups import (
    aim,
    base,
    cell_at,
    curve,
    drawn_families,
    lead,
    number,
    variants_of,
)
from unicfg.evaluation.results import MEASURES, CellResult, Estimate, Results


def best(cells: Sequence[CellResult], name: str) -> list[CellResult]:
    """The best cell by a measure, then all others that are within one standard error of the best, by scale.

    The standard error is the best cell's own, the one-standard-error rule of Breiman et al. (1984, section 3.4.3).

    Args:
        cells: of one curve; those without the number are left out.
        name: of a measure of which more or less is better.
    """
    sign = MEASURES[name].better
    own = [(sign * e.value, e.error, cell) for cell in cells if (e := number(cell, name))]
    if not own:
        return []
    top, error, first = max(own, key=lambda entry: entry[0])
    near = [cell for value, _, cell in own if cell is not first and top - value <= error]
    return [first, *near]


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Which points no other dominates, where more is better in both coordinates, by the first coordinate.

    One point dominates another if it is no worse in both and better in one.
    """
    free = [
        i
        for i, (x, y) in enumerate(points)
        if not any(a >= x and b >= y and (a, b) != (x, y) for a, b in points)
    ]
    return sorted(free, key=lambda i: points[i])


def recovered(value: float, good: float, bad: float) -> float:
    """Share of the way from ``good`` to ``bad`` that is made up for: 1 at ``good``, 0 at ``bad``, negative beyond.

    NaN where nothing was lost.
    """
    lost = abs(bad - good)
    return 1 - abs(value - good) / lost if lost > 0 else math.nan


def verdict(name: str, one: Estimate, other: Estimate, goal: Estimate | None) -> int:
    """1 if ``one`` is better than ``other`` by more than two combined standard errors, -1 if worse, else 0.

    Args:
        name: of the measure; where near the real images is better, the distances from ``goal`` are compared.
        one: not scaled.
        other: not scaled.
        goal: what real images give.
    """
    sign = MEASURES[name].better
    if sign == 0 and goal is None:
        return 0
    a, b = (
        sign * own.value if sign or goal is None else -abs(own.value - goal.value)
        for own in (one, other)
    )
    error = math.hypot(one.error, other.error)
    return 0 if not abs(a - b) > 2 * error else (1 if a > b else -1)


# --- equal strength ---------------------------------------------------------------------------------------------------


class Crossing(NamedTuple):
    """Where a curve has a strength: ``weight`` of the way from one cell to the next, in log strength."""

    before: CellResult
    after: CellResult
    weight: float

    def scale(self) -> float:
        """The scale there."""
        return self._between(self.before.cell.s, self.after.cell.s)

    def estimate(self, name: str) -> Estimate | None:
        """A measure there; the two cells' errors are taken as independent."""
        one, other = number(self.before, name), number(self.after, name)
        if one is None or other is None:
            return None
        error = math.hypot((1 - self.weight) * one.error, self.weight * other.error)
        return Estimate(self._between(one.value, other.value), error, min(one.n, other.n))

    def _between(self, one: float, other: float) -> float:
        return (1 - self.weight) * one + self.weight * other


def crossing(cells: Sequence[CellResult], strength: float) -> Crossing | None:
    """Where a curve first has a strength, by scale from s = 1 on, or None outside of what was measured.

    Cells of strength 0 have no logarithm and bound nothing.

    Args:
        cells: of one curve, by scale.
        strength: KL in nats an image, > 0.
    """
    own = [
        (e.value, cell)
        for cell in cells
        if cell.cell.s >= 1 and (e := number(cell, "strength")) and e.value > 0
    ]
    for (k, before), (k_next, after) in pairwise(own):
        if min(k, k_next) <= strength <= max(k, k_next):
            way = math.log(k_next / k)
            return Crossing(before, after, math.log(strength / k) / way if way else 0.0)
    return None


def common_strengths(results: Results, most: int = 5) -> list[float]:
    """Round strengths, 1 and 3 times powers of ten, that two families have (or the only one), at most ``most``."""
    curves = [curve(results, family) for family in drawn_families(results)]
    needed = min(2, len(curves))
    rounds = [digit * 10.0**power for power in range(-6, 7) for digit in (1, 3)]
    usable = [k for k in rounds if needed and sum(bool(crossing(c, k)) for c in curves) >= needed]
    if len(usable) <= most:
        return usable
    return [usable[round(i * (len(usable) - 1) / (most - 1))] for i in range(most)]


def density(progress: Sequence[float], kl: Sequence[float]) -> list[float]:
    """Share of all KL per unit of progress at each step; the mean over progress is 1.

    A step whose KL is NaN, as is the last of a denoiser that adds no noise there, has none of it.
    A step stands for the progress that is nearer to it than to its neighbours; the two outer ones reach out as far as
    they reach in, and all is rescaled to 1 in total, so that evenly spaced steps count alike.
    All is NaN where there is no KL, or where the progress of a step is not known.
    """
    total = sum(k for k in kl if math.isfinite(k))
    if len(progress) < 2 or not total > 0:
        return [math.nan] * len(progress)
    middles = [(a + b) / 2 for a, b in pairwise(progress)]
    edges = [2 * progress[0] - middles[0], *middles, 2 * progress[-1] - middles[-1]]
    reach = edges[-1] - edges[0]
    widths = [(b - a) / reach if reach > 0 else math.nan for a, b in pairwise(edges)]
    return [k / total / w if w > 0 else math.nan for k, w in zip(kl, widths, strict=True)]


def times_even(places: Sequence[Sequence[float]]) -> list[list[float]]:
    """KL by place as multiples of an even share; NaN, a place without a number, has no part in it."""
    known = [value for row in places for value in row if math.isfinite(value)]
    mean = sum(known) / len(known)
    return [[value / mean for value in row] for row in places]


# --- variants of guidance ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Help:
    """What a variant does for a family at a scale, against plain guidance at that scale.

    Attributes:
        family: for which.
        variant: of guidance.
        diversity: share of the diversity lost since s = 1 that is won back; NaN where none was lost.
        burn: share of the way from real images, see ``AIMS``, that is won back; NaN where none was lost.
        adherence: what is gained, in the unit that people see; negative where the variant costs some.
    """

    family: str
    variant: str
    diversity: float
    burn: float
    adherence: float


def helps(results: Results, s: float) -> list[Help]:
    """What each variant does for each family at one scale, where there is plain guidance to compare with."""
    adherence, diversity, burn = (lead(results, g) for g in ("adherence", "diversity", "burn"))
    found = []
    for family in drawn_families(results):
        one, high = (cell_at(results, family, base(results), at) for at in (1.0, s))
        for variant in variants_of(results, family):
            cell = cell_at(results, family, variant, s)
            if cell is None or high is None:
                continue
            found.append(
                Help(
                    family,
                    variant,
                    _won_back(cell, high, diversity, number(one, diversity) if diversity else None),
                    _won_back(
                        cell, high, burn, aim(results, burn) if burn else None, either_side=True
                    ),
                    _gain(cell, high, adherence),
                )
            )
    return found


def _won_back(
    cell: CellResult,
    plain: CellResult,
    name: str | None,
    good: Estimate | None,
    *,
    either_side: bool = False,
) -> float:
    """Where more is better, more than all may be won back; what can be missed on either side, only approached.

    NaN also where the loss is within two combined standard errors: a share of noise says nothing.
    """
    if name is None or good is None:
        return math.nan
    own, bad = number(cell, name), number(plain, name)
    if own is None or bad is None:
        return math.nan
    lost = good.value - bad.value
    if (abs(lost) if either_side else lost) <= 2 * math.hypot(bad.error, good.error):
        return math.nan
    if either_side:
        return recovered(own.value, good.value, bad.value)
    return (own.value - bad.value) / lost


def _gain(cell: CellResult, plain: CellResult, name: str | None) -> float:
    """In the unit that people see; better is positive."""
    if name is None:
        return math.nan
    own, bad = number(cell, name), number(plain, name)
    if own is None or bad is None:
        return math.nan
    about = MEASURES[name]
    return about.better * about.factor * (own.value - bad.value)

"""What a study has: its numbers, curves and traces, with None or NaN where there is none."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from unicfg.evaluation.results import MEASURES, CellResult, Estimate, Group, Results

PLAIN = "plain"
# what stands for a group where there is room for one measure only, before the order of MEASURES
LEADS: Mapping[Group, tuple[str, ...]] = {"burn": ("chroma",)}
# whose burn is aimed at: reconstructions first, for no image of a family can be better than its tokenizer
AIMS = ("reconstructions", "real images")


def number(result: CellResult | None, name: str) -> Estimate | None:
    """A measure of a cell, or None where there is no finite number."""
    return None if result is None else _finite(result.measures.get(name))


def values(cells: Sequence[CellResult], name: str) -> list[float]:
    """A measure of all cells that have it."""
    return [own.value for cell in cells if (own := number(cell, name))]


def shown(name: str, own: Estimate) -> Estimate:
    """The estimate in the unit that people see."""
    factor = MEASURES[name].factor
    return Estimate(own.value * factor, own.error * factor, own.n)


def heading(name: str) -> str:
    """Label and unit of a measure."""
    about = MEASURES[name]
    return f"{about.label}, {about.unit}" if about.unit else about.label


def scales_of(results: Results) -> list[float]:
    """All scales of a study that differ, the least first."""
    return sorted(set(results.settings["scales"]))


def base(results: Results) -> str:
    """The variant whose curves are drawn: plain guidance, or the first there is."""
    names = [result.cell.variant for result in results.cells if result.failure is None]
    return PLAIN if PLAIN in names or not names else names[0]


def drawn_families(results: Results) -> list[str]:
    """Families that have a cell with images, in the study's order."""
    there = {result.cell.family for result in results.cells if result.failure is None}
    return [family for family in results.settings["families"] if family in there]


def variants_of(results: Results, family: str) -> list[str]:
    """The other variants of guidance that a family has cells of."""
    return [
        variant
        for variant in results.settings["variants"]
        if variant != base(results) and results.of(family, variant)
    ]


def curve(results: Results, family: str) -> list[CellResult]:
    """A family's cells of the variant that is drawn, see :func:`base`, by scale."""
    return results.of(family, base(results))


def curves_of(results: Results) -> list[CellResult]:
    """The cells of all families' curves, family by family."""
    return [cell for family in drawn_families(results) for cell in curve(results, family)]


def cell_at(results: Results, family: str, variant: str, s: float) -> CellResult | None:
    """One cell that has images, or None."""
    return next((own for own in results.of(family, variant) if own.cell.s == s), None)


def measured(results: Results, group: Group) -> list[str]:
    """Measures of a group of which some cell has a number."""
    return [
        name
        for name, about in MEASURES.items()
        if about.group == group and values(results.cells, name)
    ]


def lead(results: Results, group: Group) -> str | None:
    """The measure that stands for its group, or None if there is no number in the group."""
    names = measured(results, group)
    return next((name for name in (*LEADS.get(group, ()), *names) if name in names), None)


def leads(results: Results, groups: Sequence[Group]) -> list[str]:
    """The measures that stand for groups, without the groups that have no number."""
    return [name for group in groups if (name := lead(results, group))]


def reference(results: Results, kind: str, name: str) -> Estimate | None:
    """A measure of real images or the like, or None where there is no finite number."""
    return _finite(results.reference.get(kind, {}).get(name))


def aim(results: Results, name: str) -> Estimate | None:
    """What real images give for a measure, best after the tokenizer, or None if it is not known."""
    held = (reference(results, kind, name) for kind in AIMS)
    return next((own for own in held if own is not None), None)


def traced(result: CellResult, name: str) -> list[float] | None:
    """One line of a cell's trace, None where no step has a number; a step without one is NaN."""
    line = _numbers(result.trace.get(name) or [])
    return line if any(map(math.isfinite, line)) and result.trace.get("progress") else None


def progress_of(result: CellResult) -> list[float]:
    """Progress at each step of a cell's trace; empty where there is no trace."""
    return _numbers(result.trace.get("progress") or [])


def places_of(result: CellResult) -> list[list[float]] | None:
    """KL by place, rows of columns, None where there is none at all; a place without a number is NaN."""
    rows = result.trace.get("places") or []
    width = max((len(row) for row in rows if row), default=0)
    held = [_numbers(row or [None] * width) for row in rows]
    return held if sum(v for row in held for v in row if math.isfinite(v)) > 0 else None


def _numbers(held: Sequence[float | None]) -> list[float]:
    """JSON has null for NaN."""
    return [math.nan if value is None else float(value) for value in held]


def _finite(own: Estimate | None) -> Estimate | None:
    return own if own is not None and math.isfinite(own.value) else None

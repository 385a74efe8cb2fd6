"""Variants of guidance against plain guidance: what they win back, as maps, in words, and in tables."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby

from unicfg.evaluation.report.comparisons import AIM_WORDS
from unicfg.evaluation.report.drawing import Drawing
from unicfg.evaluation.report.figures import help_matrix, mitigations
from unicfg.evaluation.report.findings import helps, verdict
from unicfg.evaluation.report.lookups import (
    aim,
    base,
    cell_at,
    drawn_families,
    heading,
    lead,
    leads,
    number,
    variants_of,
)
from unicfg.evaluation.report.markup import (
    Html,
    fold,
    join,
    paragraph,
    say_cell,
    table,
    text,
    title,
)
from unicfg.evaluation.results import MEASURES, CellResult, Group, Results


def against_plain(results: Results) -> list[Html | Drawing]:
    """Which variant helps which family at each scale; nothing where there is no other variant."""
    families = [family for family in drawn_families(results) if variants_of(results, family)]
    if not families:
        return []
    scales = sorted(
        {
            cell.cell.s
            for family in families
            for variant in variants_of(results, family)
            for cell in results.of(family, variant)
        }
    )
    matrices: list[Html | Drawing] = []
    for s in scales:
        matrix = help_matrix(results, s) if s != 1 else None
        matrices += [] if matrix is None else [matrix, _half_of_both(results, s)]
    marks = (
        "▲ better and ▼ worse than plain guidance at the same s by more than two combined standard errors; △ and ▽ the "
        "same against s = 1. Better for burn is nearer to its aim. Cells share prompts and seeds, which the errors do "
        "not use: they are on the safe side."
    )
    return [
        title("Which helps which"),
        _what_is_won(results),
        *matrices,
        title("Every variant"),
        *(own for family in families if (own := mitigations(results, family))),
        title("Every number"),
        paragraph(marks, "note"),
        *(
            fold(f"s = {s:g}", _numbers(results, families, s), "open" if s == scales[-1] else "")
            for s in scales
        ),
    ]


def _what_is_won(results: Results) -> Html:
    names = [lead(results, "diversity"), lead(results, "burn")]
    diversity, burn = (MEASURES[name].label if name else "not measured" for name in names)
    return paragraph(
        "Won back is 1 less the distance that is left, as a share of what plain guidance lost at that scale: 100 % is as "
        f"good as new, below 0 is worse than without. Lost diversity ({diversity}) counts from s = 1, lost burn "
        f"({burn}) from {AIM_WORDS}. A dash: not measured, or nothing lost by more than two standard errors.",
        "note",
    )


def _half_of_both(results: Results, s: float) -> Html:
    """Which variants win back half of what was lost, in diversity and in burn, at no more than 2 points."""
    lines = []
    for family, held in groupby(helps(results, s), key=lambda own: own.family):
        told = [own for own in held if math.isfinite(own.diversity) and math.isfinite(own.burn)]
        good = [
            own.variant
            for own in told
            if min(own.diversity, own.burn) >= 0.5 and own.adherence >= -2
        ]
        if told:
            lines.append(f"<b>{text(family)}</b>: {text(', '.join(good) or 'none')}")
    adherence = lead(results, "adherence")
    if not lines or adherence is None or MEASURES[adherence].unit != "%":
        return Html("")
    about = f"At s = {s:g}, half of both won back at no more than 2 points of adherence: "
    return paragraph(Html(f"{about}{'; '.join(lines)}."))


def _numbers(results: Results, families: Sequence[str], s: float) -> Html:
    """A table for each family: plain guidance at s = 1 and at s, then the variants at s."""
    groups: tuple[Group, ...] = ("adherence", "diversity", "burn", "strength", "cost")
    names, variant = leads(results, groups), base(results)
    parts = []
    for family in families:
        others = [cell_at(results, family, v, s) for v in variants_of(results, family)]
        if not any(others):
            continue
        one, high = (cell_at(results, family, variant, at) for at in (1.0, s))
        rows: list[list[object]] = []
        if s != 1 and one:
            rows.append([f"{variant}, s = 1", *(say_cell(one, name) for name in names)])
        rows.append([f"{variant}, s = {s:g}", *(say_cell(high, name) for name in names)])
        for cell in others:
            if cell is not None:
                marked = [_marked(results, cell, name, high, one) for name in names]
                rows.append([cell.cell.variant, *marked])
        parts += [title(family), table(["", *map(heading, names)], rows)]
    return join(parts)


def _marked(
    results: Results, cell: CellResult, name: str, high: CellResult | None, one: CellResult | None
) -> Html:
    """A number, and whether it is beyond doubt better than plain guidance there and at s = 1."""
    own, goal = number(cell, name), aim(results, name)
    marks = ""
    for other, signs in ((high, ("", "▲", "▼")), (one, ("", "△", "▽"))):
        than = number(other, name)
        if own is not None and than is not None:
            way = verdict(name, own, than, goal)
            kind = ("", "good", "bad")[way]
            marks += f' <span class="{kind}">{signs[way]}</span>' if way else ""
    return Html(say_cell(cell, name) + marks)

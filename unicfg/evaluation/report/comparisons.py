"""Families side by side in words and tables: at their best scale, at the same scale, and at the same strength."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from unicfg.evaluation.report.findings import best, common_strengths, crossing
from unicfg.evaluation.report.lookups import (
    AIMS,
    aim,
    base,
    cell_at,
    curve,
    drawn_families,
    heading,
    lead,
    leads,
    number,
    scales_of,
)
from unicfg.evaluation.report.markup import (
    Html,
    brief,
    join,
    paragraph,
    say,
    say_cell,
    table,
    text,
    title,
)
from unicfg.evaluation.results import MEASURES, CellResult, Estimate, Group, Results

MATCHED: tuple[Group, ...] = ("adherence", "diversity", "fidelity", "burn")
AIM_WORDS = " or, where not measured, ".join(AIMS)


def summary(results: Results) -> Html:
    """Each family at its best scale by adherence, and how far families are apart."""
    adherence, diversity, burn = (lead(results, g) for g in ("adherence", "diversity", "burn"))
    if adherence is None:
        return paragraph("No cell has a number for adherence, so there is no best scale.", "note")
    variant = base(results)
    head = ["family", "best s", f"{heading(adherence)}, at s = 1", "at best s"]
    head += ["strength there, nats an image"]
    head += [f"{heading(diversity)}, at s = 1", "at best s", "kept"] if diversity else []
    head += [f"{heading(burn)}, at best s", "aim"] if burn else []
    rows = []
    for family in drawn_families(results):
        near = best(curve(results, family), adherence)
        first = near[0] if near else None
        one = cell_at(results, family, variant, 1.0)
        row: list[object] = [family, _scales_said(near)]
        row += [say_cell(one, adherence), say_cell(first, adherence), say_cell(first, "strength")]
        if diversity:
            ends = [say_cell(cell, diversity) for cell in (one, first)]
            row += [*ends, _kept(one, first, diversity)]
        if burn:
            row += [say_cell(first, burn), say(burn, aim(results, burn), "not measured")]
        rows.append(row)
    about = (
        f"Best by {MEASURES[adherence].label}, {variant} guidance; in brackets the scales that are within one "
        "standard error of the best. Kept: diversity at the best s as a share of that at s = 1. Strength: KL from "
        "the guided to the ordinary conditional model, along the way that guided sampling takes. The aim is that of "
        f"{AIM_WORDS}.{among_captions(results, [adherence])}"
    )
    return join([table(head, rows), _apart(results, adherence), paragraph(about, "note")])


def among_captions(results: Results, names: Sequence[str]) -> str:
    """A sentence on how hard the caption measures are, or nothing where none is among ``names`` or it is not known."""
    count = results.settings.get("captions")
    if count is None or not any(name.startswith("caption_") for name in names):
        return ""
    return f" The right caption was looked for among {brief(count)} captions."


def equal_strength(results: Results) -> Html:
    """Each family's scale and leading measures where it has a round strength."""
    strengths, names = common_strengths(results), leads(results, MATCHED)
    if not strengths or not names:
        return paragraph(
            "No table at equal strength: too few scales above 1 have a strength that was measured.",
            "note",
        )
    head = ["strength, nats an image", "family", "s for it", *map(heading, names)]
    rows = [
        [
            f"{strength:g}",
            family,
            f"{at.scale():.2f}",
            *(say(name, at.estimate(name)) for name in names),
        ]
        for strength in strengths
        for family in drawn_families(results)
        if (at := crossing(curve(results, family), strength))
    ]
    about = (
        "Linear in log strength between the two scales around it, inside of what was measured only: a family "
        "that is not listed does not have that strength. Errors take the two cells as independent."
    )
    return join(
        [title("At the same strength"), table(head, rows, "names"), paragraph(about, "note")]
    )


def _apart(results: Results, name: str) -> Html:
    """How far families are apart at the same scale, and at the same strength."""
    variant, families = base(results), drawn_families(results)
    by_scale = [
        (f"s = {s:g}", {f: number(cell_at(results, f, variant, s), name) for f in families})
        for s in scales_of(results)
        if s > 1
    ]
    by_strength = [
        (f"{k:g} nats an image", {f: _estimate_at(results, f, k, name) for f in families})
        for k in common_strengths(results)
    ]
    lines = [_ends(by_scale, name), _ends(by_strength, name)]
    return Html(f"<ul>{''.join(lines)}</ul>" if any(lines) else "")


def _ends(places: Sequence[tuple[str, Mapping[str, Estimate | None]]], name: str) -> str:
    """The worst and the best family where most families are, at the strongest of such places."""
    known = [(where, {f: e for f, e in held.items() if e}) for where, held in places]
    where, own = max(reversed(known), key=lambda entry: len(entry[1]), default=("", {}))
    if len(own) < 2:
        return ""
    low, high = (pick(own, key=lambda f: own[f].value) for pick in (min, max))
    return (
        f"<li>At {where}: {text(heading(name))}, from {say(name, own[low])} ({text(low)}) "
        f"to {say(name, own[high])} ({text(high)}), {len(own)} families.</li>"
    )


def _estimate_at(results: Results, family: str, strength: float, name: str) -> Estimate | None:
    at = crossing(curve(results, family), strength)
    return None if at is None else at.estimate(name)


def _scales_said(near: Sequence[CellResult]) -> str:
    if not near:
        return "-"
    first, *others = (f"{own.cell.s:g}" for own in near)
    return first + (f" (or {', '.join(others)})" if others else "")


def _kept(one: CellResult | None, other: CellResult | None, name: str) -> str:
    before, after = number(one, name), number(other, name)
    if before is None or after is None or before.value <= 0:
        return "-"
    return f"{100 * after.value / before.value:.0f} %"

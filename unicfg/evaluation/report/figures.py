"""Figures of what came out: curves, fronts, variants of guidance, and which of them helps which family."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from unicfg.evaluation.report.drawing import (
    Drawing,
    add_legend,
    entitle,
    family_look,
    figure_png,
    not_a_formula,
    on_scale_axis,
    panels_of,
    scale_axis,
    strength_axis,
    symlog,
    variant_look,
)
from unicfg.evaluation.report.findings import Help, front, helps
from unicfg.evaluation.report.lookups import (
    aim,
    base,
    curves_of,
    drawn_families,
    heading,
    lead,
    leads,
    measured,
    number,
    reference,
    shown,
    values,
    variants_of,
)
from unicfg.evaluation.results import MEASURES, CellResult, Estimate, Group, Results, scale_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes

STYLES = (":", "--", "-.", (0, (1, 4)))  # of real images and the like


# --- curves -----------------------------------------------------------------------------------------------------------


def curves(results: Results, group: Group, over: Literal["s", "strength"]) -> Drawing | None:
    """A panel for each measure of a group, a line for each family, over the scale or over the strength.

    Returns:
        None if there is nothing to draw.
    """
    cells = [cell for cell in curves_of(results) if over == "s" or number(cell, "strength")]
    names = [name for name in measured(results, group) if values(cells, name)]
    if not names:
        return None
    figure, panels = panels_of(len(names))
    for axes, name in zip(panels, names, strict=True):
        for family in drawn_families(results):
            own = [cell for cell in cells if cell.cell.family == family and number(cell, name)]
            if own:
                _curve(axes, results, own, name, over)
        _reference_lines(axes, results, name)
        if over == "s":
            scale_axis(axes, results)
        else:
            strength_axis(axes, cells)
        entitle(axes, heading(name))
        if name == "strength":
            symlog(axes.set_yscale, values(cells, name))
            axes.set_ylim(bottom=0)
    add_legend(figure, panels)
    what = "the scale s" if over == "s" else "strength, KL(guided || cond)"
    return Drawing(
        f"{group}-over-{over}",
        f"{group} over {what}; bars are standard errors.",
        figure_png(figure),
        [
            *(_cell_row(cell, name, e) for name in names for cell, e in _having(cells, name)),
            *(
                _row(name, mark, kind, "", math.nan, math.nan)
                for name in names
                for kind in results.reference
                if (mark := reference(results, kind, name))
            ),
        ],
    )


def _curve(axes: Axes, results: Results, cells: Sequence[CellResult], name: str, over: str) -> None:
    """One family; on the axis of strength, scales below 1 go another way and are dashed and hollow."""
    family = cells[0].cell.family
    look = family_look(results, family)
    parts = [(cells, look | {"label": family})]
    if over == "strength":
        ahead = [cell for cell in cells if cell.cell.s >= 1]
        parts = [(ahead, look | {"label": family})]
        if any(cell.cell.s < 1 for cell in cells):
            hollow = look | {"linestyle": "--", "markerfacecolor": "white"}
            parts.append(([cell for cell in cells if cell.cell.s <= 1], hollow))
    for own, style in parts:
        x = on_scale_axis(results, own) if over == "s" else values(own, "strength")
        seen = [shown(name, e) for _, e in _having(own, name)]
        y, bars = [e.value for e in seen], [e.error for e in seen]
        axes.errorbar(x, y, bars, capsize=2, elinewidth=0.8, linewidth=1.4, **style)


def _reference_lines(axes: Axes, results: Results, name: str) -> None:
    for i, kind in enumerate(results.reference):
        mark = reference(results, kind, name)
        if mark is not None:
            y, style = shown(name, mark).value, STYLES[i % len(STYLES)]
            axes.axhline(y, color="0.45", linestyle=style, linewidth=1, label=kind)


def _having(cells: Sequence[CellResult], name: str) -> list[tuple[CellResult, Estimate]]:
    """The cells that have a number, with it."""
    return [(cell, own) for cell in cells if (own := number(cell, name))]


def _cell_row(cell: CellResult, name: str, own: Estimate) -> dict[str, object]:
    strength, (family, variant) = number(cell, "strength"), (cell.cell.family, cell.cell.variant)
    known = strength.value if strength else math.nan
    return _row(name, own, family, variant, cell.cell.s, known)


def _row(
    name: str, own: Estimate, family: str, variant: str, s: float, strength: float
) -> dict[str, object]:
    seen = shown(name, own)
    return {
        "measure": name,
        "unit": MEASURES[name].unit,
        "family": family,
        "variant": variant,
        "s": s,
        "strength": strength,
        "value": seen.value,
        "error": seen.error,
        "n": seen.n,
    }


# --- trade-offs -------------------------------------------------------------------------------------------------------


def pareto(results: Results, group: Group) -> Drawing | None:
    """A group's leading measure against adherence, a point for each scale, and the front of all points."""
    x, y = lead(results, "adherence"), lead(results, group)
    if x is None or y is None:
        return None
    cells, points = _points(curves_of(results), x, y)
    if not cells:
        return None
    ahead = MEASURES[x].better, MEASURES[y].better
    on = set(front([(ahead[0] * a, ahead[1] * b) for a, b in points]))
    figure, (axes,) = panels_of(1, 5.3, 4.2)
    for family in drawn_families(results):
        look = family_look(results, family)
        own = [p for p, cell in zip(points, cells, strict=True) if cell.cell.family == family]
        if own:
            axes.plot(*zip(*own, strict=True), linewidth=0.8, alpha=0.7, label=family, **look)
    for point, cell in zip(points, cells, strict=True):
        _name_point(axes, point, f"{cell.cell.s:g}", family_look(results, cell.cell.family))
    line = sorted(points[i] for i in on)
    axes.plot(
        *zip(*line, strict=True), color="0.6", linewidth=5, alpha=0.4, zorder=0, label="front"
    )
    axes.set_xlabel(heading(x), fontsize=8)
    axes.set_ylabel(heading(y), fontsize=8)
    if ahead[0] < 0:
        axes.invert_xaxis()
    if ahead[1] < 0:
        axes.invert_yaxis()
    add_legend(figure, [axes])
    rows = [
        {"family": cell.cell.family, "s": cell.cell.s, x: a, y: b, "on the front": i in on}
        for i, ((a, b), cell) in enumerate(zip(points, cells, strict=True))
    ]
    about = "Points are scales; better is up and to the right; the grey line joins what no point beats in both."
    return Drawing(f"pareto-{group}", about, figure_png(figure), rows, half=True)


def _points(
    cells: Sequence[CellResult], x: str, y: str
) -> tuple[list[CellResult], list[tuple[float, float]]]:
    """The cells that have both numbers, and both as people see them."""
    own = [
        (cell, (shown(x, a).value, shown(y, b).value))
        for cell in cells
        if (a := number(cell, x)) and (b := number(cell, y))
    ]
    return [cell for cell, _ in own], [point for _, point in own]


def _name_point(axes: Axes, point: tuple[float, float], text: str, look: Mapping[str, Any]) -> None:
    place: Any = {"xytext": (4, 4), "textcoords": "offset points", "fontsize": 7}
    axes.annotate(text, point, color=look["color"], **place)


# --- variants of guidance ---------------------------------------------------------------------------------------------


def mitigations(results: Results, family: str) -> Drawing | None:
    """A family's variants of guidance: leading measures over s, and diversity against adherence."""
    variants = variants_of(results, family)
    names = leads(results, ("adherence", "diversity", "burn"))
    if not variants or not names:
        return None
    x, y = lead(results, "adherence"), lead(results, "diversity")
    figure, panels = panels_of(len(names) + (x is not None and y is not None))
    rows: list[Mapping[str, object]] = []
    for i, variant in enumerate([base(results), *variants]):
        cells, look = results.of(family, variant), variant_look(i)
        for axes, name in zip(panels, names, strict=False):
            own = _having(cells, name)
            rows += [_cell_row(cell, name, e) for cell, e in own]
            places = on_scale_axis(results, [cell for cell, _ in own])
            seen = [shown(name, e).value for _, e in own]
            axes.plot(places, seen, label=not_a_formula(variant), **look)
        if x and y and (points := _points(cells, x, y)[1]):
            panels[-1].plot(*zip(*points, strict=True), **look)
    for axes, name in zip(panels, names, strict=False):
        goal = aim(results, name) if MEASURES[name].better == 0 else None
        if goal is not None:
            axes.axhline(shown(name, goal).value, color="0.45", linestyle=":", label="aim")
        scale_axis(axes, results)
        entitle(axes, heading(name))
    if x and y:
        panels[-1].set_xlabel(heading(x), fontsize=8)
        entitle(panels[-1], heading(y))
    add_legend(figure, panels)
    about = f"{family}: variants of guidance."
    return Drawing(f"mitigations-{family}", about, figure_png(figure), rows)


def help_matrix(results: Results, s: float) -> Drawing | None:
    """Which variant helps which family at one scale: three maps, families by variants."""
    found = helps(results, s)
    if not found:
        return None
    families = [f for f in drawn_families(results) if any(own.family == f for own in found)]
    variants = [v for v in results.settings["variants"] if any(own.variant == v for own in found)]
    figure, panels = panels_of(3, 1.4 + 0.5 * len(families), 1.2 + 0.3 * len(variants))
    won = {"diversity": "lost diversity won back, %", "burn": "burn won back, %"}
    for axes, (key, title) in zip(panels, won.items(), strict=False):
        _map(axes, [[100 * v for v in row] for row in _by_place(found, key, families, variants)])
        entitle(axes, title)
    gained = _by_place(found, "adherence", families, variants)
    top = max((abs(v) for row in gained for v in row if math.isfinite(v)), default=0) or 1.0
    _map(panels[2], gained, limit=top, digits=1)
    entitle(panels[2], f"adherence gained{_points_or_unit(lead(results, 'adherence'))}")
    for axes in panels:
        axes.set_xticks(range(len(families)), families, rotation=30, ha="right")
        axes.set_yticks(range(len(variants)), [""] * len(variants))
        axes.grid(False)
    panels[0].set_yticks(range(len(variants)), [not_a_formula(v) for v in variants])
    rows = [
        {
            "family": own.family,
            "variant": own.variant,
            "s": s,
            "diversity won back": own.diversity,
            "burn won back": own.burn,
            "adherence gained": own.adherence,
        }
        for own in found
    ]
    about = f"Against plain guidance at s = {s:g}."
    return Drawing(f"helps-s{scale_text(s)}", about, figure_png(figure), rows)


def _by_place(
    found: Sequence[Help], key: str, families: Sequence[str], variants: Sequence[str]
) -> list[list[float]]:
    """Variants as rows, families as columns."""
    held = {(own.variant, own.family): getattr(own, key) for own in found}
    return [[held.get((v, f), math.nan) for f in families] for v in variants]


def _map(axes: Axes, table: list[list[float]], limit: float = 100, digits: int = 0) -> None:
    axes.imshow(table, cmap="PuOr_r", vmin=-limit, vmax=limit, aspect="auto")
    for i, row in enumerate(table):
        for j, value in enumerate(row):
            dark = math.isfinite(value) and abs(value) > 0.65 * limit
            look: Any = {"color": "white" if dark else "black", "fontsize": 8}
            axes.text(j, i, _rounded(value, digits), ha="center", va="center", **look)


def _rounded(value: float, digits: int) -> str:
    """Without a minus before 0."""
    return f"{round(value, digits) + 0.0:.{digits}f}" if math.isfinite(value) else "-"


def _points_or_unit(name: str | None) -> str:
    """What a difference of a measure is in, after a comma."""
    unit = MEASURES[name].unit if name else ""
    return f", {'points' if unit == '%' else unit}" if unit else ""

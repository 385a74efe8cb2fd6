"""The figures of a study, each with the numbers that it shows: curves, fronts, and where guidance matters."""

from __future__ import annotations

import csv
import io
import math
import textwrap
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from unicfg.evaluation.results import MEASURES, CellResult, Estimate, Group, Results, scale_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PLAIN = "plain"
# Okabe and Ito's colours, which people with any colour vision tell apart
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vP*"
STYLES = (":", "--", "-.", (0, (1, 4)))
# what stands for a group where there is room for one measure only, before the order of MEASURES
LEADS: Mapping[Group, tuple[str, ...]] = {"burn": ("chroma",)}
# whose burn is aimed at: reconstructions first, for no image of a family can be better than its tokenizer
AIMS = ("reconstructions", "real images")
TRACES = {
    "scale": "scale s in effect",
    "distance": "||guided - cond||",
    "kl": "KL(guided || cond), nats",
    "entropy": "entropy, nats",
    "cosine": "cosine of cond and uncond",
    "saturation": "saturation",
    "changed": "chance of another token",
}


@dataclass(frozen=True)
class Drawing:
    """A figure and its numbers.

    Attributes:
        name: of its files, without suffix.
        about: what it shows, for people.
        png: the picture.
        rows: what it shows, as a table; all rows have the same keys.
    """

    name: str
    about: str
    png: bytes
    rows: Sequence[Mapping[str, object]]


# --- numbers ----------------------------------------------------------------------------------------------------------


def number(result: CellResult | None, name: str) -> Estimate | None:
    """A measure of a cell, or None where there is no finite number."""
    own = None if result is None else result.measures.get(name)
    return own if own is not None and math.isfinite(own.value) else None


def shown(name: str, own: Estimate) -> Estimate:
    """The estimate in the unit that people see."""
    factor = MEASURES[name].factor
    return Estimate(own.value * factor, own.error * factor, own.n)


def heading(name: str) -> str:
    """Label and unit of a measure."""
    about = MEASURES[name]
    return f"{about.label}, {about.unit}" if about.unit else about.label


def base(results: Results) -> str:
    """The variant whose curves are drawn: plain guidance, or the first there is."""
    names = [result.cell.variant for result in results.cells if result.failure is None]
    return PLAIN if PLAIN in names or not names else names[0]


def drawn_families(results: Results) -> list[str]:
    """Families that have a cell with images, in the study's order."""
    there = {result.cell.family for result in results.cells if result.failure is None}
    return [family for family in results.settings["families"] if family in there]


def cell_at(results: Results, family: str, variant: str, s: float) -> CellResult | None:
    """One cell that has images, or None."""
    return next((own for own in results.of(family, variant) if own.cell.s == s), None)


def measured(results: Results, group: Group) -> list[str]:
    """Measures of a group of which some cell has a number."""
    return [
        name
        for name, about in MEASURES.items()
        if about.group == group and any(number(result, name) for result in results.cells)
    ]


def lead(results: Results, group: Group) -> str | None:
    """The measure that stands for its group, or None if there is no number in the group."""
    names = measured(results, group)
    return next((name for name in (*LEADS.get(group, ()), *names) if name in names), None)


def aim(results: Results, name: str) -> Estimate | None:
    """What real images give for a measure, best after the tokenizer, or None if it is not known."""
    held = (results.reference.get(kind, {}).get(name) for kind in AIMS)
    return next((own for own in held if own is not None and math.isfinite(own.value)), None)


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
    curves = [results.of(family, base(results)) for family in drawn_families(results)]
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
    """
    total = sum(k for k in kl if math.isfinite(k))
    if len(progress) < 2 or not total > 0:
        return [math.nan] * len(progress)
    middles = [(a + b) / 2 for a, b in pairwise(progress)]
    edges = [2 * progress[0] - middles[0], *middles, 2 * progress[-1] - middles[-1]]
    widths = [(b - a) / (edges[-1] - edges[0]) for a, b in pairwise(edges)]
    return [k / total / w if w > 0 else math.nan for k, w in zip(kl, widths, strict=True)]


def traced(result: CellResult, name: str) -> list[float] | None:
    """One line of a cell's trace, None where no step has a number; a step without one is NaN."""
    held = result.trace.get(name) or []
    values = [math.nan if value is None else float(value) for value in held]
    return values if any(map(math.isfinite, values)) and result.trace.get("progress") else None


# --- drawing ----------------------------------------------------------------------------------------------------------


def curves(results: Results, group: Group, over: Literal["s", "strength"]) -> Drawing | None:
    """A panel for each measure of a group, a line for each family, over the scale or over the strength.

    Returns:
        None if there is nothing to draw.
    """
    cells = [
        cell
        for family in drawn_families(results)
        for cell in results.of(family, base(results))
        if over == "s" or number(cell, "strength")
    ]
    names = [n for n in measured(results, group) if any(number(cell, n) for cell in cells)]
    if not names:
        return None
    figure, panels = _panels(len(names))
    for axes, name in zip(panels, names, strict=True):
        for family in drawn_families(results):
            own = [cell for cell in cells if cell.cell.family == family and number(cell, name)]
            _curve(axes, own, name, over, results)
        for kind, style in zip(results.reference, STYLES * 9, strict=False):
            mark = results.reference[kind].get(name)
            if mark is not None and math.isfinite(mark.value):
                y = shown(name, mark).value
                axes.axhline(y, color="0.45", linestyle=style, linewidth=1, label=kind)
        _scale_axis(axes, results, cells, over)
        _title(axes, heading(name))
        if name == "strength":
            _symlog(axes.set_yscale, [e.value for c in cells if (e := number(c, name))])
            axes.set_ylim(bottom=0)
    _legend(figure, panels)
    what = "the scale s" if over == "s" else "strength, KL(guided || cond)"
    return Drawing(
        f"{group}-over-{over}",
        f"{group} over {what}; bars are standard errors.",
        _png(figure),
        [
            *(_row(cell, name) for name in names for cell in cells if number(cell, name)),
            *_reference_rows(results, names),
        ],
    )


def pareto(results: Results, group: Group) -> Drawing | None:
    """A group's leading measure against adherence, a point for each scale, and the front of all points."""
    x, y = lead(results, "adherence"), lead(results, group)
    cells = [
        cell
        for family in drawn_families(results)
        for cell in results.of(family, base(results))
        if x and y and number(cell, x) and number(cell, y)
    ]
    if not cells or x is None or y is None:
        return None
    best_of = set(front([(_merit(cell, x), _merit(cell, y)) for cell in cells]))
    figure, (axes,) = _panels(1, 5.3, 4.2)
    points = [_point(cell, x, y) for cell in cells]
    for family in drawn_families(results):
        own = [p for p, cell in zip(points, cells, strict=True) if cell.cell.family == family]
        if own:
            look = _look(results, family)
            axes.plot(*zip(*own, strict=True), linewidth=0.8, alpha=0.7, label=family, **look)
    for (a, b), cell in zip(points, cells, strict=True):
        place: Any = {"xytext": (4, 4), "textcoords": "offset points", "fontsize": 7}
        colour = _look(results, cell.cell.family)["color"]
        axes.annotate(f"{cell.cell.s:g}", (a, b), color=colour, **place)
    line = sorted(points[i] for i in best_of)
    axes.plot(
        *zip(*line, strict=True), color="0.6", linewidth=5, alpha=0.4, zorder=0, label="front"
    )
    axes.set_xlabel(heading(x), fontsize=8)
    axes.set_ylabel(heading(y), fontsize=8)
    if MEASURES[y].better < 0:
        axes.invert_yaxis()
    if MEASURES[x].better < 0:
        axes.invert_xaxis()
    _legend(figure, [axes])
    rows = [
        {"family": cell.cell.family, "s": cell.cell.s, x: a, y: b, "on the front": i in best_of}
        for i, ((a, b), cell) in enumerate(zip(points, cells, strict=True))
    ]
    about = "Points are scales; better is up and to the right; the grey line joins what no point beats in both."
    return Drawing(f"pareto-{group}", about, _png(figure), rows)


def variants_of(results: Results, family: str) -> list[str]:
    """The other variants of guidance that a family has cells of."""
    return [
        variant
        for variant in results.settings["variants"]
        if variant != base(results) and results.of(family, variant)
    ]


def mitigations(results: Results, family: str) -> Drawing | None:
    """A family's variants of guidance: leading measures over s, and diversity against adherence."""
    variants = variants_of(results, family)
    groups: tuple[Group, ...] = ("adherence", "diversity", "burn")
    names = [name for group in groups if (name := lead(results, group))]
    if not variants or not names:
        return None
    x, y = lead(results, "adherence"), lead(results, "diversity")
    figure, panels = _panels(len(names) + (x is not None and y is not None))
    rows: list[Mapping[str, object]] = []
    for i, variant in enumerate([base(results), *variants]):
        cells = results.of(family, variant)
        look = _variant_look(i)
        for axes, name in zip(panels, names, strict=False):
            own = [cell for cell in cells if number(cell, name)]
            rows += [_row(cell, name) for cell in own]
            values = [shown(name, e) for cell in own if (e := number(cell, name))]
            places = [_scales(results).index(cell.cell.s) for cell in own]
            axes.plot(places, [e.value for e in values], label=_plain_text(variant), **look)
        both = [c for c in cells if x and y and number(c, x) and number(c, y)]
        if both and x and y:
            panels[-1].plot(*zip(*(_point(c, x, y) for c in both), strict=True), **look)
            panels[-1].set_xlabel(heading(x), fontsize=8)
            _title(panels[-1], heading(y))
    for axes, name in zip(panels, names, strict=False):
        goal = aim(results, name) if MEASURES[name].better == 0 else None
        if goal is not None:
            axes.axhline(shown(name, goal).value, color="0.45", linestyle=":", label="aim")
        _scale_axis(axes, results, [], "s")
        _title(axes, heading(name))
    _legend(figure, panels)
    return Drawing(f"mitigations-{family}", f"{family}: variants of guidance.", _png(figure), rows)


@dataclass(frozen=True)
class Help:
    """What a variant does for a family at a scale, against plain guidance at that scale.

    Attributes:
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
                    _won_back(cell, high, burn, aim(results, burn) if burn else None),
                    _gain(cell, high, adherence),
                )
            )
    return found


def _won_back(
    cell: CellResult, plain: CellResult, name: str | None, good: Estimate | None
) -> float:
    """NaN also where the loss is within two combined standard errors: a share of noise says nothing."""
    if name is None or good is None:
        return math.nan
    own, bad = number(cell, name), number(plain, name)
    if own is None or bad is None:
        return math.nan
    if abs(bad.value - good.value) <= 2 * math.hypot(bad.error, good.error):
        return math.nan
    return recovered(own.value, good.value, bad.value)


def _gain(cell: CellResult, plain: CellResult, name: str | None) -> float:
    """In the unit that people see; better is positive."""
    own, bad = (None if name is None else number(held, name) for held in (cell, plain))
    if name is None or own is None or bad is None:
        return math.nan
    about = MEASURES[name]
    return about.better * about.factor * (own.value - bad.value)


def help_matrix(results: Results, s: float) -> Drawing | None:
    """Which variant helps which family at one scale: three maps, families by variants."""
    found = helps(results, s)
    if not found:
        return None
    families = [f for f in drawn_families(results) if any(own.family == f for own in found)]
    variants = [v for v in results.settings["variants"] if any(own.variant == v for own in found)]
    adherence = lead(results, "adherence")
    unit = MEASURES[adherence].unit if adherence else ""
    titles = {
        "diversity": "lost diversity won back, %",
        "burn": "burn won back, %",
        "adherence": f"adherence gained{', ' + ('points' if unit == '%' else unit) if unit else ''}",
    }
    height = 1.2 + 0.3 * len(variants)
    figure, panels = _panels(3, 1.4 + 0.5 * len(families), height)
    for axes, (key, title) in zip(panels, titles.items(), strict=True):
        factor = 1 if key == "adherence" else 100
        table = [[math.nan] * len(families) for _ in variants]
        for own in found:
            value = factor * getattr(own, key)
            table[variants.index(own.variant)][families.index(own.family)] = value
        limit = max((abs(v) for row in table for v in row if math.isfinite(v)), default=1.0) or 1.0
        limit = limit if key == "adherence" else 100
        axes.imshow(table, cmap="PuOr_r", vmin=-limit, vmax=limit, aspect="auto")
        for i, row in enumerate(table):
            for j, value in enumerate(row):
                mark = _rounded(value, 1 if key == "adherence" else 0)
                dark = math.isfinite(value) and abs(value) > 0.65 * limit
                colour = "white" if dark else "black"
                axes.text(j, i, mark, ha="center", va="center", fontsize=8, color=colour)
        _title(axes, title)
        axes.set_xticks(range(len(families)), families, rotation=30, ha="right")
        names = [_plain_text(v) for v in variants] if axes is panels[0] else [""] * len(variants)
        axes.set_yticks(range(len(variants)), names)
        axes.grid(False)
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
    return Drawing(
        f"helps-s{scale_text(s)}", f"Against plain guidance at s = {s:g}.", _png(figure), rows
    )


def _rounded(value: float, digits: int) -> str:
    """Without a minus before 0."""
    return f"{round(value, digits) + 0.0:.{digits}f}" if math.isfinite(value) else "-"


def trajectory(results: Results, family: str) -> Drawing | None:
    """What guidance does on the way from the first step to the last, a line for each scale."""
    cells = results.of(family, base(results))
    names = [name for name in TRACES if any(traced(cell, name) for cell in cells)]
    if not names:
        return None
    figure, panels = _panels(len(names))
    for axes, name in zip(panels, names, strict=True):
        for i, cell in enumerate(cells):
            values = traced(cell, name)
            if values is not None:
                colour = _shade(i, len(cells))
                x = cell.trace["progress"]
                axes.plot(x, values, color=colour, linewidth=1.3, label=f"s = {cell.cell.s:g}")
        axes.set_xlabel("progress", fontsize=8)
        _title(axes, TRACES[name])
    _legend(figure, panels)
    rows = [
        {"family": family, "s": cell.cell.s, "progress": at}
        | {name: (traced(cell, name) or {i: math.nan})[i] for name in names}
        for cell in cells
        for i, at in enumerate(cell.trace.get("progress") or [])
    ]
    about = f"{family}: means over the images at each step, a line for each scale."
    return Drawing(f"trajectory-{family}", about, _png(figure), rows)


def when(results: Results) -> Drawing | None:
    """Where in progress the KL between guided and cond is spent: a panel for each scale, a line for each family."""
    shares = {
        (family, cell.cell.s): density(cell.trace["progress"], kl)
        for family in drawn_families(results)
        for cell in results.of(family, base(results))
        if (kl := traced(cell, "kl"))
    }
    own = {key: values for key, values in shares.items() if any(map(math.isfinite, values))}
    scales = sorted({s for _, s in own})
    if not scales:
        return None
    figure, panels = _panels(len(scales))
    rows: list[Mapping[str, object]] = []
    for axes, s in zip(panels, scales, strict=True):
        axes.axhline(1, color="0.6", linestyle=":", linewidth=1)
        for family in drawn_families(results):
            if (family, s) not in own:
                continue
            cell = cell_at(results, family, base(results), s)
            assert cell is not None
            x, y = cell.trace["progress"], own[family, s]
            colour = _look(results, family)["color"]
            axes.plot(x, y, color=colour, linewidth=1.4, label=family)
            rows += [
                {"family": family, "s": s, "progress": a, "share of KL per unit progress": b}
                for a, b in zip(x, y, strict=True)
            ]
        axes.set_ylim(bottom=0)
        axes.set_xlabel("progress", fontsize=8)
        _title(axes, f"s = {s:g}")
    _legend(figure, panels)
    about = "Share of KL(guided || cond) per unit of progress; 1 is an even spread."
    return Drawing("when", about, _png(figure), rows)


def places(results: Results) -> Drawing | None:
    """Maps of KL by place of the image, a row for each family, a column for each scale."""
    own: dict[tuple[str, float], Any] = {}
    for family in drawn_families(results):
        for cell in results.of(family, base(results)):
            held = cell.trace.get("places")
            if held and sum(map(sum, held)) > 0:
                own[family, cell.cell.s] = held
    if not own:
        return None
    families = [f for f in drawn_families(results) if any(key[0] == f for key in own)]
    scales = sorted({s for _, s in own})
    figure = _figure(1.35 * len(scales) + 1.4, 1.4 * len(families) + 0.4)
    grid = figure.subplots(len(families), len(scales), squeeze=False)
    shares = {key: _times_even(held) for key, held in own.items()}
    top = max(value for held in shares.values() for row in held for value in row)
    image = None
    for i, family in enumerate(families):
        for j, s in enumerate(scales):
            axes = grid[i][j]
            axes.set_xticks([])
            axes.set_yticks([])
            axes.grid(False)
            if i == 0:
                _title(axes, f"s = {s:g}")
            if j == 0:
                axes.set_ylabel(family)
            if (family, s) in shares:
                image = axes.imshow(shares[family, s], cmap="magma", vmin=0, vmax=top)
            else:
                axes.set_frame_on(False)
    if image is not None:
        figure.colorbar(image, ax=grid, label="times an even share", shrink=0.8)
    rows = [
        {"family": family, "s": s, "row": i, "column": j, "kl": value}
        for (family, s), held in own.items()
        for i, line in enumerate(held)
        for j, value in enumerate(line)
    ]
    about = "KL(guided || cond) by place of the image, against an even spread over its places."
    return Drawing("places", about, _png(figure), rows)


def csv_text(rows: Iterable[Mapping[str, object]]) -> str:
    """Rows as CSV, with the keys of the first as header; what is not finite is left empty."""
    rows = list(rows)
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: _csv_value(value) for key, value in row.items()} for row in rows)
    return out.getvalue()


def _csv_value(value: object) -> object:
    return "" if isinstance(value, float) and not math.isfinite(value) else value


def _row(cell: CellResult, name: str) -> dict[str, object]:
    own, strength = number(cell, name), number(cell, "strength")
    assert own is not None
    value = shown(name, own)
    return {
        "measure": name,
        "unit": MEASURES[name].unit,
        "family": cell.cell.family,
        "variant": cell.cell.variant,
        "s": cell.cell.s,
        "strength": strength.value if strength else math.nan,
        "value": value.value,
        "error": value.error,
        "n": value.n,
    }


def _reference_rows(results: Results, names: Sequence[str]) -> list[dict[str, object]]:
    """Of real images and the like: no scale, no strength."""
    return [
        {
            "measure": name,
            "unit": MEASURES[name].unit,
            "family": kind,
            "variant": "",
            "s": math.nan,
            "strength": math.nan,
            "value": shown(name, own).value,
            "error": shown(name, own).error,
            "n": own.n,
        }
        for name in names
        for kind, held in results.reference.items()
        for own in [held.get(name)]
        if own is not None
    ]


def _merit(cell: CellResult, name: str) -> float:
    own = number(cell, name)
    assert own is not None
    return MEASURES[name].better * own.value


def _point(cell: CellResult, x: str, y: str) -> tuple[float, float]:
    a, b = number(cell, x), number(cell, y)
    assert a is not None and b is not None
    return shown(x, a).value, shown(y, b).value


def _times_even(held: Sequence[Sequence[float]]) -> list[list[float]]:
    mean = sum(map(sum, held)) / sum(map(len, held))
    return [[value / mean for value in row] for row in held]


def _scales(results: Results) -> list[float]:
    return sorted(set(results.settings["scales"]))


def _curve(axes: Axes, cells: Sequence[CellResult], name: str, over: str, results: Results) -> None:
    """One family; on the axis of strength, scales below 1 go another way and are dashed and hollow."""
    if not cells:
        return
    look = _look(results, cells[0].cell.family)
    parts: list[tuple[Sequence[CellResult], dict[str, Any]]]
    parts = [(cells, {"label": cells[0].cell.family})]
    if over == "strength":
        low = [cell for cell in cells if cell.cell.s <= 1]
        parts = [([cell for cell in cells if cell.cell.s >= 1], parts[0][1])]
        if any(cell.cell.s < 1 for cell in low):
            parts.append((low, {"linestyle": "--", "markerfacecolor": "white"}))
    for own, more in parts:
        values = [shown(name, e) for cell in own if (e := number(cell, name))]
        x = [
            _scales(results).index(cell.cell.s)
            if over == "s"
            else (number(cell, "strength") or Estimate(0, 0, 0)).value
            for cell in own
        ]
        bars: dict[str, Any] = {"capsize": 2, "elinewidth": 0.8, "linewidth": 1.4}
        axes.errorbar(
            x, [e.value for e in values], [e.error for e in values], **bars, **look, **more
        )


def _scale_axis(
    axes: Axes, results: Results, cells: Sequence[CellResult], over: Literal["s", "strength"]
) -> None:
    if over == "s":
        scales = _scales(results)
        axes.set_xticks(range(len(scales)), [f"{s:g}" for s in scales])
        axes.set_xlabel("scale s", fontsize=8)
    else:
        _symlog(axes.set_xscale, [e.value for c in cells if (e := number(c, "strength"))])
        axes.set_xlim(
            left=0,
            right=2 * max((e.value for c in cells if (e := number(c, "strength"))), default=1) or 1,
        )
        axes.set_xlabel("KL(guided || cond), nats an image", fontsize=8)


def _symlog(set_scale: Any, values: Sequence[float]) -> None:
    """Logarithmic, with room for the 0 of s = 1: linear below the least number above 0."""
    least = min((value for value in values if value > 0), default=1.0)
    set_scale("symlog", linthresh=10 ** math.floor(math.log10(least)), linscale=0.5)


def _title(axes: Axes, text: str) -> None:
    axes.set_title(textwrap.fill(text, 36), fontsize=9, loc="left")


def _look(results: Results, family: str) -> dict[str, Any]:
    i = list(results.settings["families"]).index(family)
    return {
        "color": COLOURS[i % len(COLOURS)],
        "marker": MARKERS[i % len(MARKERS)],
        "markersize": 4.5,
    }


def _variant_look(i: int) -> dict[str, Any]:
    """Black for the variant that the others are compared with."""
    from matplotlib import colormaps

    if i == 0:
        return {"color": "black", "marker": "o", "markersize": 4, "linewidth": 2}
    colour = colormaps["tab20"]((i - 1) % 20)
    return {"color": colour, "marker": MARKERS[i % len(MARKERS)], "markersize": 5, "linewidth": 1}


def _shade(i: int, of: int) -> Any:
    from matplotlib import colormaps

    return colormaps["viridis"](0.92 * i / max(1, of - 1))


def _plain_text(label: str) -> str:
    """Not read as a formula by matplotlib."""
    return label.replace("$", r"\$")


def _figure(width: float, height: float) -> Figure:
    """A figure of its own, without pyplot, which keeps a global list of all figures.

    Raises:
        ImportError: if matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("figures need matplotlib: pip install 'unicfg[eval]'") from error
    return Figure(figsize=(width, height), layout="constrained")


def _panels(count: int, width: float = 0, height: float = 2.6) -> tuple[Figure, list[Axes]]:
    """Panels in rows of three, or of four where that leaves no more than one place empty.

    Args:
        count: of panels.
        width: of one, in inches; 0 fills a row of them.
        height: of one, in inches.
    """
    columns = min(count, 4 if count % 4 in (0, 3) and count > 3 else 3)
    rows = -(-count // columns)
    width = width or (11.7 / columns if columns > 2 else 4.2)
    figure = _figure(width * columns, height * rows + 0.3)
    found = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in found[:count]:
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
    for axes in found[count:]:
        axes.remove()
    return figure, found[:count]


def _legend(figure: Figure, panels: Sequence[Axes]) -> None:
    """One for all panels, below them."""
    named: dict[str, Any] = {}
    for axes in panels:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            named.setdefault(label, handle)
    if named:
        # lines with error bars are families, which come before the lines of real images
        labels = sorted(named, key=lambda label: not isinstance(named[label], tuple))
        handles = [named[label] for label in labels]
        columns = min(len(named), max(2, int(figure.get_figwidth() / 1.3)))
        place: Any = {"loc": "outside lower center", "fontsize": 8, "frameon": False}
        figure.legend(handles, labels, ncols=columns, **place)


def _png(figure: Figure) -> bytes:
    out = io.BytesIO()
    with warnings.catch_warnings():
        # names of variants are a user's, and may have letters that the font has not
        warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)
        figure.savefig(out, format="png", dpi=110)
    return out.getvalue()

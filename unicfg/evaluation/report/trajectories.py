"""Figures of the way from the first step to the last: over progress, and by place of the image."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from unicfg.evaluation.report.drawing import (
    Drawing,
    add_legend,
    blank_figure,
    entitle,
    family_look,
    figure_png,
    panels_of,
    shade,
)
from unicfg.evaluation.report.findings import density, times_even
from unicfg.evaluation.report.lookups import (
    curve,
    curves_of,
    places_of,
    progress_of,
    traced,
)
from unicfg.evaluation.results import Results

TRACES = {
    "scale": "scale s in effect",
    "distance": "||guided - cond||",
    "kl": "KL(guided || cond), nats",
    "entropy": "entropy, nats",
    "cosine": "cosine of cond and uncond",
    "saturation": "saturation",
    "changed": "chance of another token",
}


def trajectory(results: Results, family: str) -> Drawing | None:
    """What guidance does on the way from the first step to the last, a line for each scale."""
    cells = curve(results, family)
    names = [name for name in TRACES if any(traced(cell, name) for cell in cells)]
    if not names:
        return None
    figure, panels = panels_of(len(names))
    for axes, name in zip(panels, names, strict=True):
        for i, cell in enumerate(cells):
            line = traced(cell, name)
            if line is not None:
                look: Any = {"color": shade(i, len(cells)), "linewidth": 1.3}
                axes.plot(progress_of(cell), line, label=f"s = {cell.cell.s:g}", **look)
        axes.set_xlabel("progress", fontsize=8)
        entitle(axes, TRACES[name])
    add_legend(figure, panels)
    rows = [
        {"family": family, "s": cell.cell.s, "progress": at}
        | {name: line[i] if (line := traced(cell, name)) else math.nan for name in names}
        for cell in cells
        for i, at in enumerate(progress_of(cell))
    ]
    about = f"{family}: means over the images at each step, a line for each scale."
    return Drawing(f"trajectory-{family}", about, figure_png(figure), rows)


def when(results: Results) -> Drawing | None:
    """Where in progress the KL between guided and cond is spent: a panel for each scale, a line for each family."""
    lines = {
        (cell.cell.family, cell.cell.s): (progress_of(cell), shares)
        for cell in curves_of(results)
        if (kl := traced(cell, "kl"))
        for shares in [density(progress_of(cell), kl)]
        if any(map(math.isfinite, shares))
    }
    scales = sorted({s for _, s in lines})
    if not scales:
        return None
    figure, panels = panels_of(len(scales))
    rows: list[Mapping[str, object]] = []
    for axes, at in zip(panels, scales, strict=True):
        axes.axhline(1, color="0.6", linestyle=":", linewidth=1)
        for (family, s), (progress, shares) in lines.items():
            if s != at:
                continue
            colour = family_look(results, family)["color"]
            axes.plot(progress, shares, color=colour, linewidth=1.4, label=family)
            rows += [
                {"family": family, "s": s, "progress": a, "share of KL per unit progress": b}
                for a, b in zip(progress, shares, strict=True)
            ]
        axes.set_ylim(bottom=0)
        axes.set_xlabel("progress", fontsize=8)
        entitle(axes, f"s = {at:g}")
    add_legend(figure, panels)
    about = "Share of KL(guided || cond) per unit of progress; 1 is an even spread."
    return Drawing("when", about, figure_png(figure), rows)


def places(results: Results) -> Drawing | None:
    """Maps of KL by place of the image, a row for each family, a column for each scale."""
    own = {
        (cell.cell.family, cell.cell.s): held
        for cell in curves_of(results)
        if (held := places_of(cell))
    }
    if not own:
        return None
    rows = [
        {"family": family, "s": s, "row": i, "column": j, "kl": value}
        for (family, s), held in own.items()
        for i, line in enumerate(held)
        for j, value in enumerate(line)
    ]
    about = "KL(guided || cond) by place of the image, against an even spread over its places."
    return Drawing("places", about, _maps({key: times_even(m) for key, m in own.items()}), rows)


def _maps(shares: Mapping[tuple[str, float], list[list[float]]]) -> bytes:
    """Families as rows, scales as columns, one scale of colours for all."""
    families = list(dict.fromkeys(family for family, _ in shares))
    scales = sorted({s for _, s in shares})
    figure = blank_figure(1.35 * len(scales) + 1.4, 1.4 * len(families) + 0.4)
    panels = figure.subplots(len(families), len(scales), squeeze=False)
    top = max(v for held in shares.values() for row in held for v in row if math.isfinite(v))
    image: Any = None
    for i, family in enumerate(families):
        panels[i][0].set_ylabel(family)
        for j, s in enumerate(scales):
            axes = panels[i][j]
            axes.set_xticks([])
            axes.set_yticks([])
            if (family, s) in shares:
                image = axes.imshow(shares[family, s], cmap="magma", vmin=0, vmax=top)
            else:
                axes.set_frame_on(False)
    for axes, s in zip(panels[0], scales, strict=True):
        entitle(axes, f"s = {s:g}")
    figure.colorbar(image, ax=panels, label="times an even share", shrink=0.8)
    return figure_png(figure)

"""What all figures share: a picture with its numbers, its panels, axes, colours and legend, and its files."""

from __future__ import annotations

import csv
import io
import math
import textwrap
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers_vq.files import replace_whole, write_text_atomically
from unicfg.evaluation.report.lookups import scales_of, values
from unicfg.evaluation.results import CellResult, Results

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which people with any colour vision tell apart
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vP*"


@dataclass(frozen=True)
class Drawing:
    """A figure and its numbers.

    Attributes:
        name: of its files, without suffix.
        about: what it shows, for people.
        png: the picture.
        rows: what it shows, as a table; all rows have the same keys.
        half: whether it stands beside another on the page.
    """

    name: str
    about: str
    png: bytes
    rows: Sequence[Mapping[str, object]]
    half: bool = False

    def save(self, folder: Path) -> None:
        """Write the picture and its numbers, each whole or not at all.

        Args:
            folder: made if need be.

        Raises:
            OSError: if they cannot be written; what stood there before is untouched.
        """
        write_text_atomically(csv_text(self.rows), folder / f"{self.name}.csv")
        replace_whole(folder / f"{self.name}.png", lambda beside: beside.write_bytes(self.png))


# --- files ------------------------------------------------------------------------------------------------------------


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


def figure_png(figure: Figure) -> bytes:
    """A figure as PNG."""
    out = io.BytesIO()
    with warnings.catch_warnings():
        # names of variants are a user's, and may have letters that the font has not
        warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)
        figure.savefig(out, format="png", dpi=110)
    return out.getvalue()


# --- panels -----------------------------------------------------------------------------------------------------------


def blank_figure(width: float, height: float) -> Figure:
    """A figure of its own, without pyplot, which keeps a global list of all figures.

    Args:
        width: in inches.
        height: in inches.

    Raises:
        ImportError: if matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("figures need matplotlib: pip install 'unicfg[eval]'") from error
    return Figure(figsize=(width, height), layout="constrained")


def panels_of(count: int, width: float = 0, height: float = 2.6) -> tuple[Figure, list[Axes]]:
    """Panels in rows of three, or of four where that leaves no more than one place empty.

    Args:
        count: of panels.
        width: of one, in inches; 0 fills a row of them.
        height: of one, in inches.

    Raises:
        ImportError: if matplotlib is missing.
    """
    columns = min(count, 4 if count % 4 in (0, 3) and count > 3 else 3)
    rows = -(-count // columns)
    width = width or (11.7 / columns if columns > 2 else 4.2)
    figure = blank_figure(width * columns, height * rows + 0.3)
    found = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in found[:count]:
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
    for axes in found[count:]:
        axes.remove()
    return figure, found[:count]


def entitle(axes: Axes, text: str) -> None:
    """A panel's title, wrapped."""
    axes.set_title(textwrap.fill(text, 36), fontsize=9, loc="left")


def add_legend(figure: Figure, panels: Sequence[Axes]) -> None:
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


# --- axes -------------------------------------------------------------------------------------------------------------


def scale_axis(axes: Axes, results: Results) -> None:
    """Scales side by side, not to scale."""
    scales = scales_of(results)
    axes.set_xticks(range(len(scales)), [f"{s:g}" for s in scales])
    axes.set_xlabel("scale s", fontsize=8)


def on_scale_axis(results: Results, cells: Sequence[CellResult]) -> list[float]:
    """Where cells stand on :func:`scale_axis`."""
    scales = scales_of(results)
    return [scales.index(cell.cell.s) for cell in cells]


def strength_axis(axes: Axes, cells: Sequence[CellResult]) -> None:
    """Logarithmic, with room at the right end."""
    strengths = values(cells, "strength")
    symlog(axes.set_xscale, strengths)
    axes.set_xlim(left=0, right=2 * max(strengths, default=1) or 1)
    axes.set_xlabel("KL(guided || cond), nats an image", fontsize=8)


def symlog(set_scale: Any, held: Sequence[float]) -> None:
    """Logarithmic, with room for the 0 of s = 1: linear below the least number above 0.

    Args:
        set_scale: ``set_xscale`` or ``set_yscale`` of the axes.
        held: the numbers that are drawn.
    """
    least = min((value for value in held if value > 0), default=1.0)
    set_scale("symlog", linthresh=10 ** math.floor(math.log10(least)), linscale=0.5)


# --- looks ------------------------------------------------------------------------------------------------------------


def family_look(results: Results, family: str) -> dict[str, Any]:
    """A family's colour and marker, the same in every figure."""
    i = list(results.settings["families"]).index(family)
    return {
        "color": COLOURS[i % len(COLOURS)],
        "marker": MARKERS[i % len(MARKERS)],
        "markersize": 4.5,
    }


def variant_look(i: int) -> dict[str, Any]:
    """Black for the variant that the others are compared with, the one with i = 0."""
    from matplotlib import colormaps

    if i == 0:
        return {"color": "black", "marker": "o", "markersize": 4, "linewidth": 2}
    colour = colormaps["tab20"]((i - 1) % 20)
    return {"color": colour, "marker": MARKERS[i % len(MARKERS)], "markersize": 5, "linewidth": 1}


def shade(i: int, of: int) -> Any:
    """The colour of one of many lines in order."""
    from matplotlib import colormaps

    return colormaps["viridis"](0.92 * i / max(1, of - 1))


def not_a_formula(label: str) -> str:
    """A label that matplotlib does not read as a formula."""
    return label.replace("$", r"\$")

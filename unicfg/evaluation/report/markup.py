"""HTML out of texts, tables, numbers and figures; what is not ``Html`` yet is escaped."""

from __future__ import annotations

import base64
import html
import math
from collections.abc import Iterable, Mapping, Sequence

from unicfg.evaluation.report.drawing import Drawing
from unicfg.evaluation.report.lookups import number, shown
from unicfg.evaluation.results import MEASURES, CellResult, Estimate


class Html(str):
    """Text that is HTML already; all other text is escaped where it enters the page."""


def text(held: object) -> Html:
    """Anything as HTML."""
    return held if isinstance(held, Html) else Html(html.escape(str(held)))


def table(head: Sequence[object], rows: Iterable[Sequence[object]], kind: str = "") -> Html:
    """A table that scrolls where it is wider than the page.

    Args:
        head: of the columns.
        rows: below it.
        kind: class of the table: "words" for texts, "names" where the second column is text.
    """
    cells = "".join(f"<th>{text(own)}</th>" for own in head)
    lines = [f"<tr>{''.join(f'<td>{text(own)}</td>' for own in row)}</tr>" for row in rows]
    body = f"<thead><tr>{cells}</tr></thead><tbody>{''.join(lines)}</tbody>"
    return Html(f'<div class="wide"><table class="{kind}">{body}</table></div>')


def paragraph(words: object, kind: str = "") -> Html:
    """A paragraph; of the kind "note" it is small."""
    return Html(f'<p class="{kind}">{text(words)}</p>')


def title(words: object) -> Html:
    """A title inside of a section."""
    return Html(f"<h3>{text(words)}</h3>")


def join(parts: Iterable[object]) -> Html:
    """One after the other."""
    return Html("\n".join(text(part) for part in parts))


def fold(summary: str, inside: Html, opened: str = "") -> Html:
    """What is seen after a click on its summary, or at once where ``opened`` is "open"."""
    return Html(f"<details {opened}><summary>{text(summary)}</summary>{inside}</details>")


def png_source(png: bytes) -> str:
    """A picture as the address of itself."""
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


def embed(drawing: Drawing) -> Html:
    """A figure with what it shows and where its files are."""
    about, name = text(drawing.about), text(drawing.name)
    kind = "drawn half" if drawing.half else "drawn"
    where = f"figures/{name}.png, figures/{name}.csv"
    return Html(
        f'<figure class="{kind}"><img src="{png_source(drawing.png)}" alt="{about}">'
        f"<figcaption>{about} <i>{where}</i></figcaption></figure>"
    )


def say(name: str, own: Estimate | None, why: str = "no number") -> Html:
    """A number with its standard error, or a dash that tells why there is none."""
    if own is None:
        return Html(f'<abbr title="{html.escape(why)}">-</abbr>')
    digits = MEASURES[name].digits
    value = shown(name, own)
    error = f" <small>± {value.error:.{digits}f}</small>" if math.isfinite(value.error) else ""
    return Html(f"{value.value:.{digits}f}{error}")


def say_cell(cell: CellResult | None, name: str) -> Html:
    """A cell's number, see :func:`say`."""
    if cell is None:
        return say(name, None, "no such cell, or it failed")
    return say(name, number(cell, name), cell.missing.get(name, "not measured"))


def brief(held: object) -> str:
    """A setting in a table."""
    if isinstance(held, Mapping):
        return ", ".join(f"{key} = {brief(own)}" for key, own in held.items())
    if isinstance(held, (list, tuple)):
        return ", ".join(brief(own) for own in held)
    return f"{held:,}" if isinstance(held, int) and not isinstance(held, bool) else str(held)


def some(held: Sequence[object], most: int = 4) -> str:
    """The first few of many, and how many more there are."""
    more = f", and {len(held) - most} more" if len(held) > most else ""
    return "; ".join(str(own) for own in held[:most]) + more

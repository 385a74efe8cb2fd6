"""A study as one page that needs no network: what was done, what came out, pictures, and every setting."""

from __future__ import annotations

import base64
import html
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from itertools import groupby
from pathlib import Path
from string import Template
from typing import Any

from PIL import Image

from tokenizers_vq.hub import write_text_atomically
from unicfg.evaluation import figures
from unicfg.evaluation.figures import Drawing, heading, lead, number, shown
from unicfg.evaluation.results import (
    COLUMNS,
    MEASURES,
    Cell,
    CellResult,
    Estimate,
    Group,
    Results,
    plain,
    scale_text,
)
from unicfg.pictures import grid

PROMPTS = 6  # rows of the image grids
STEPS, MOMENTS = 2, 8  # rows and columns of the pictures of the way
BUDGET = 9_000_000  # bytes of raw pixels in all image grids: keeps the page below 15 MB
BIG, SMALL = 96, 64  # screen pixels a side of one image, and of one on its way
GROUPS: tuple[Group, ...] = ("adherence", "diversity", "fidelity", "burn", "strength", "cost")
MATCHED: tuple[Group, ...] = ("adherence", "diversity", "fidelity", "burn")
NETWORK = ("network", "parameters", "sampler", "weights", "device")


class Html(str):
    """Text that is HTML already; all other text is escaped where it enters the page."""


def write_report(folder: Path | str) -> Path:
    """Write a study's page, its tables, and the figures with their numbers.

    ``report.html`` holds all its pictures and asks no network for anything. ``results.jsonl`` has a line for each cell,
    ``results.csv`` the same without the traces, and ``figures/`` a PNG and a CSV of each figure.

    Args:
        folder: of a study, finished or not, see :mod:`unicfg.evaluation.results`.

    Returns:
        the page's file.

    Raises:
        FileNotFoundError: if there is no study.
        ImportError: if matplotlib is missing.
        OSError: if a file cannot be written.
    """
    results = Results.load(folder)
    sections: dict[str, Sequence[Html | Drawing]] = {
        "what was done": [_done(results)],
        "summary": [_summary(results)],
        "images": _images(results),
        "over the scale": _curves(results, "s"),
        "at equal strength": [*_curves(results, "strength"), _equal_strength(results)],
        "trade-offs": _tradeoffs(results),
        "mitigations": _mitigations(results),
        "on the way": _way(results),
        "what is missing": [_missing(results)],
        "settings": [_settings(results)],
    }
    for parts in sections.values():
        for part in parts:
            if isinstance(part, Drawing):
                _save(part, results.folder / "figures")
    lines = [_line(result) for result in results.cells]
    text = "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines)
    write_text_atomically(text, results.folder / "results.jsonl")
    write_text_atomically(_flat(lines), results.folder / "results.csv")
    page = results.folder / "report.html"
    template = Template((files("unicfg.evaluation") / "report.html").read_text("utf-8"))
    title = html.escape(_title(results))
    write_text_atomically(template.substitute(title=title, body=_body(title, sections)), page)
    return page


# --- files ------------------------------------------------------------------------------------------------------------


def _save(drawing: Drawing, folder: Path) -> None:
    write_text_atomically(figures.csv_text(drawing.rows), folder / f"{drawing.name}.csv")
    (folder / f"{drawing.name}.png").write_bytes(drawing.png)


def _line(result: CellResult) -> dict[str, Any]:
    """A cell as it is kept, and its measures by name beside it."""
    flat: dict[str, Any] = {}
    for name, own in plain(result.measures).items():
        flat |= {name: own["value"], f"{name}_error": own["error"], f"{name}_n": own["n"]}
    return flat | result.to_json()


def _flat(lines: Sequence[Mapping[str, Any]]) -> str:
    """CSV of what is one number or text a cell."""
    first = ["family", "variant", "s", "failure", "made_with"]
    nested = {"measures", "missing", "trace"}
    names = dict.fromkeys(first) | dict.fromkeys(k for line in lines for k in line)
    keys = [name for name in names if name not in nested]
    rows = [{key: line.get(key) for key in keys} for line in lines]
    return figures.csv_text(rows or [dict.fromkeys(first)])


# --- HTML -------------------------------------------------------------------------------------------------------------


def _text(held: object) -> Html:
    return held if isinstance(held, Html) else Html(html.escape(str(held)))


def _table(head: Sequence[object], rows: Iterable[Sequence[object]], kind: str = "") -> Html:
    """Cells are escaped unless they are ``Html``."""
    cells = "".join(f"<th>{_text(own)}</th>" for own in head)
    lines = [f"<tr>{''.join(f'<td>{_text(own)}</td>' for own in row)}</tr>" for row in rows]
    body = f"<thead><tr>{cells}</tr></thead><tbody>{''.join(lines)}</tbody>"
    return Html(f'<div class="wide"><table class="{kind}">{body}</table></div>')


def _paragraph(words: object, kind: str = "") -> Html:
    return Html(f'<p class="{kind}">{_text(words)}</p>')


def _join(parts: Iterable[object]) -> Html:
    return Html("\n".join(_text(part) for part in parts))


def _folded(summary: str, inside: Html, opened: str = "") -> Html:
    return Html(f"<details {opened}><summary>{_text(summary)}</summary>{inside}</details>")


def _source(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


def _drawn(drawing: Drawing) -> Html:
    about, name = _text(drawing.about), _text(drawing.name)
    kind = "drawn half" if drawing.name.startswith(("images-", "pareto-")) else "drawn"
    files = f"figures/{name}.png, figures/{name}.csv"
    return Html(
        f'<figure class="{kind}"><img src="{_source(drawing.png)}" alt="{about}">'
        f"<figcaption>{about} <i>{files}</i></figcaption></figure>"
    )


def _body(title: str, sections: Mapping[str, Sequence[Html | Drawing]]) -> str:
    held = {name: parts for name, parts in sections.items() if parts}
    links = "".join(f'<a href="#{name.replace(" ", "-")}">{name}</a> ' for name in held)
    pages = [
        f'<section id="{name.replace(" ", "-")}"><h2>{name.capitalize()}</h2>'
        + "\n".join(_drawn(part) if isinstance(part, Drawing) else part for part in parts)
        + "</section>"
        for name, parts in held.items()
    ]
    return f"<h1>{title}</h1>\n<nav>{links}</nav>\n" + "\n".join(pages)


def _say(name: str, own: Estimate | None, why: str = "no number") -> Html:
    """A number with its standard error, or a dash that tells why there is none."""
    if own is None:
        return Html(f'<abbr title="{html.escape(why)}">-</abbr>')
    digits = MEASURES[name].digits
    value = shown(name, own)
    error = f" <small>± {value.error:.{digits}f}</small>" if math.isfinite(value.error) else ""
    return Html(f"{value.value:.{digits}f}{error}")


def _said(cell: CellResult | None, name: str) -> Html:
    if cell is None:
        return _say(name, None, "no such cell, or it failed")
    return _say(name, number(cell, name), cell.missing.get(name, "not measured"))


def _brief(held: object) -> str:
    """A setting in a table."""
    if isinstance(held, Mapping):
        return ", ".join(f"{key} = {_brief(own)}" for key, own in held.items())
    if isinstance(held, (list, tuple)):
        return ", ".join(_brief(own) for own in held)
    return f"{held:,}" if isinstance(held, int) and not isinstance(held, bool) else str(held)


# --- what was done ----------------------------------------------------------------------------------------------------


def _title(results: Results) -> str:
    weights = results.settings.get("weights")
    of = f" of {weights}" if isinstance(weights, str) else ""
    return f"How guidance acts on {', '.join(results.settings['families'])}{of}"


def _done(results: Results) -> Html:
    held = results.settings
    prompts, study = held["prompts"], held.get("study") or {}
    there = sum(result.failure is None for result in results.cells)
    facts = [
        ("prompts", f"{len(prompts)}: {_some(prompts)}"),
        ("images for adherence and fidelity", held.get("n")),
        ("prompts that leave something open", _some(list(held.get("open_prompts") or []))),
        ("images of each of these", study.get("draws")),
        ("seed of the first image", study.get("seed")),
        ("features", study.get("features")),
        ("families", ", ".join(held["families"])),
        ("scales", ", ".join(f"{s:g}" for s in held["scales"])),
        ("cells", f"{there} with images, {len(results.cells) - there} failed"),
        ("weights", held.get("weights")),
        ("versions", _brief(held["versions"]) if held.get("versions") else None),
        ("date", held.get("date")),
    ]
    known = [(Html(f"<b>{what}</b>"), fact) for what, fact in facts if fact not in (None, "")]
    parts = [
        _paragraph(
            "A model gives an output with and without its prompt; guidance goes s times the way from the second to the "
            "first. s = 1 is the model as it is, more is guided. The same prompts were drawn from the same seeds in every "
            "cell, and the images measured."
        ),
        _table((), known, "words"),
        _networks(held.get("families_settings") or {}),
        _variants(held["variants"]),
    ]
    if held.get("command"):
        parts.append(Html(f"<p>To repeat it:</p><pre>{_text(held['command'])}</pre>"))
    return _join(parts)


def _some(prompts: Sequence[object], most: int = 4) -> str:
    more = f", and {len(prompts) - most} more" if len(prompts) > most else ""
    return "; ".join(str(prompt) for prompt in prompts[:most]) + more


def _variants(variants: Mapping[str, object]) -> Html:
    """How each is written, where a study says so."""
    if len(variants) < 2:
        return Html("")
    keys = ("scale", "mitigations")
    rows = [
        [name, *(how.get(key, "") for key in keys)] if isinstance(how, Mapping) else [name, how, ""]
        for name, how in variants.items()
    ]
    return _table(["variant of guidance", *keys], rows, "words")


def _networks(families: Mapping[str, Mapping[str, Any]]) -> Html:
    keys = [key for key in NETWORK if any(key in own for own in families.values())]
    if not keys:
        return Html("")
    rows = [
        [family, *(_brief(own.get(key, "")) for key in keys)] for family, own in families.items()
    ]
    return _table(["family", *(key.replace("_", " ") for key in keys)], rows, "words")


# --- summary and equal strength ---------------------------------------------------------------------------------------


def _summary(results: Results) -> Html:
    adherence, diversity, burn = (lead(results, g) for g in ("adherence", "diversity", "burn"))
    if adherence is None:
        return _paragraph("No cell has a number for adherence, so there is no best scale.", "note")
    variant = figures.base(results)
    head = ["family", "best s", f"{heading(adherence)}, at s = 1", "at best s"]
    head += ["strength there, nats an image"]
    head += [f"{heading(diversity)}, at s = 1", "at best s", "kept"] if diversity else []
    head += [f"{heading(burn)}, at best s", "real images"] if burn else []
    rows = []
    for family in figures.drawn_families(results):
        near = figures.best(results.of(family, variant), adherence)
        first = near[0] if near else None
        one = figures.cell_at(results, family, variant, 1.0)
        row: list[object] = [family, _scales_said(near)]
        row += [_said(one, adherence), _said(first, adherence), _said(first, "strength")]
        if diversity:
            row += [_said(one, diversity), _said(first, diversity), _kept(one, first, diversity)]
        if burn:
            row += [_said(first, burn), _say(burn, figures.aim(results, burn), "not measured")]
        rows.append(row)
    return _join(
        [
            _table(head, rows),
            _short(results, adherence),
            _paragraph(
                f"Best by {MEASURES[adherence].label}, {variant} guidance; in brackets the scales that are within one "
                "standard error of the best. Kept: diversity at the best s as a share of that at s = 1. Strength: KL from "
                "the guided to the ordinary conditional model, along the way that guided sampling takes. Real images: "
                f"{' or, where not measured, '.join(figures.AIMS)}.",
                "note",
            ),
        ]
    )


def _short(results: Results, name: str) -> Html:
    """How far families are apart at the same scale, and at the same strength."""
    variant = figures.base(results)
    families = figures.drawn_families(results)
    scales = [s for s in sorted(set(results.settings["scales"])) if s > 1]
    at_scale = [
        (f"s = {s:g}", {f: figures.cell_at(results, f, variant, s) for f in families})
        for s in scales
    ]
    by_scale = [
        (where, {f: e for f, cell in held.items() if (e := number(cell, name))})
        for where, held in at_scale
    ]
    by_strength = [
        (
            f"{k:g} nats an image",
            {f: e for f in families if (e := _estimate_at(results, f, k, name))},
        )
        for k in figures.common_strengths(results)
    ]
    lines = []
    for held in (by_scale, by_strength):
        # where most families are, the strongest of such places
        where, own = max(reversed(held), key=lambda entry: len(entry[1]), default=("", {}))
        if len(own) > 1:
            low, high = (pick(own, key=lambda f: own[f].value) for pick in (min, max))
            lines.append(
                f"<li>At {where}: {_text(heading(name))}, from {_say(name, own[low])} ({_text(low)}) "
                f"to {_say(name, own[high])} ({_text(high)}), {len(own)} families.</li>"
            )
    return Html(f"<ul>{''.join(lines)}</ul>" if lines else "")


def _estimate_at(results: Results, family: str, strength: float, name: str) -> Estimate | None:
    at = figures.crossing(results.of(family, figures.base(results)), strength)
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


def _equal_strength(results: Results) -> Html:
    variant, strengths = figures.base(results), figures.common_strengths(results)
    names = [name for group in MATCHED if (name := lead(results, group))]
    if not strengths or not names:
        return _paragraph(
            "No table at equal strength: too few scales above 1 have a strength that was measured.",
            "note",
        )
    rows: list[list[object]] = []
    for strength in strengths:
        for family in figures.drawn_families(results):
            at = figures.crossing(results.of(family, variant), strength)
            if at is not None:
                numbers = [_say(name, at.estimate(name)) for name in names]
                rows.append([f"{strength:g}", family, f"{at.scale():.2f}", *numbers])
    return _join(
        [
            Html("<h3>At the same strength</h3>"),
            _table(
                ["strength, nats an image", "family", "s for it", *map(heading, names)],
                rows,
                "names",
            ),
            _paragraph(
                "Linear in log strength between the two scales around it, inside of what was measured only: a family "
                "that is not listed does not have that strength. Errors take the two cells as independent.",
                "note",
            ),
        ]
    )


def _curves(results: Results, over: Any) -> list[Html | Drawing]:
    groups = GROUPS if over == "s" else MATCHED
    drawings = [own for group in groups if (own := figures.curves(results, group, over))]
    if not drawings:
        return []
    about = (
        "Scales stand side by side, not to scale. Grey lines: the same measure of real images, of their reconstructions, "
        "and of what is known to be bad."
        if over == "s"
        else "The same scale is a weak push in one family and a strong one in another; here the axis is how far the guided "
        "model is from the ordinary one. s = 1 has strength 0 and stands at the left end: the axis is logarithmic except "
        "for its first part, from 0 to the first tick. Cells whose strength is not known are left out. Scales below 1 push the other way: hollow, dashed."
    )
    return [_paragraph(about, "note"), *drawings]


def _tradeoffs(results: Results) -> list[Html | Drawing]:
    pairs: tuple[Group, ...] = ("diversity", "fidelity")
    return [own for group in pairs if (own := figures.pareto(results, group))]


# --- mitigations ------------------------------------------------------------------------------------------------------


def _mitigations(results: Results) -> list[Html | Drawing]:
    families = [f for f in figures.drawn_families(results) if figures.variants_of(results, f)]
    if not families:
        return []
    scales = sorted(
        {
            cell.cell.s
            for family in families
            for variant in figures.variants_of(results, family)
            for cell in results.of(family, variant)
        }
    )
    matrices: list[Html | Drawing] = []
    for s in scales:
        matrix = figures.help_matrix(results, s) if s != 1 else None
        matrices += [] if matrix is None else [matrix, _half_of_both(results, s)]
    diversity, burn = lead(results, "diversity"), lead(results, "burn")
    about = _paragraph(
        "Won back is 1 less the distance that is left, as a share of what plain guidance lost at that scale: 100 % is as "
        "good as new, below 0 is worse than without. Lost diversity "
        f"({MEASURES[diversity].label if diversity else 'not measured'}) counts from s = 1, lost burn "
        f"({MEASURES[burn].label if burn else 'not measured'}) from {' or, where not measured, '.join(figures.AIMS)}. "
        "A dash: not measured, or nothing lost by more than two standard errors.",
        "note",
    )
    tables = [
        _folded(
            f"s = {s:g}", _scale_tables(results, families, s), "open" if s == scales[-1] else ""
        )
        for s in scales
    ]
    legend = _paragraph(
        "▲ better and ▼ worse than plain guidance at the same s by more than two combined standard errors; △ and ▽ the "
        "same against s = 1. Better for burn is nearer to real images.",
        "note",
    )
    drawings = [own for family in families if (own := figures.mitigations(results, family))]
    return [
        Html("<h3>Which helps which</h3>"),
        about,
        *matrices,
        Html("<h3>Every variant</h3>"),
        *drawings,
        Html("<h3>Every number</h3>"),
        legend,
        *tables,
    ]


def _half_of_both(results: Results, s: float) -> Html:
    """Which variants win back half of what was lost, in diversity and in burn, at no more than 2 points."""
    lines = []
    for family, held in groupby(figures.helps(results, s), key=lambda own: own.family):
        told = [own for own in held if math.isfinite(own.diversity) and math.isfinite(own.burn)]
        good = [
            own.variant
            for own in told
            if min(own.diversity, own.burn) >= 0.5 and own.adherence >= -2
        ]
        if told:
            lines.append(f"<b>{_text(family)}</b>: {_text(', '.join(good) or 'none')}")
    if not lines or MEASURES[lead(results, "adherence") or "kid"].unit != "%":
        return Html("")
    about = f"At s = {s:g}, half of both won back at no more than 2 points of adherence: "
    return _paragraph(Html(f"{about}{'; '.join(lines)}."))


def _scale_tables(results: Results, families: Sequence[str], s: float) -> Html:
    groups: tuple[Group, ...] = ("adherence", "diversity", "burn", "strength", "cost")
    names = [name for group in groups if (name := lead(results, group))]
    variant = figures.base(results)
    parts = []
    for family in families:
        one, high = (figures.cell_at(results, family, variant, at) for at in (1.0, s))
        rows: list[list[object]] = []
        if s != 1 and one:
            rows.append([f"{variant}, s = 1", *(_said(one, name) for name in names)])
        rows.append([f"{variant}, s = {s:g}", *(_said(high, name) for name in names)])
        others = [
            figures.cell_at(results, family, v, s) for v in figures.variants_of(results, family)
        ]
        for cell in others:
            if cell is not None:
                marked = [_marked(results, cell, name, high, one) for name in names]
                rows.append([cell.cell.variant, *marked])
        if any(others):
            parts += [Html(f"<h3>{_text(family)}</h3>"), _table(["", *map(heading, names)], rows)]
    return _join(parts)


def _marked(
    results: Results, cell: CellResult, name: str, high: CellResult | None, one: CellResult | None
) -> Html:
    """A number, and whether it is beyond doubt better than plain guidance there and at s = 1."""
    own, goal = number(cell, name), figures.aim(results, name)
    marks = ""
    for other, signs in ((high, ("", "▲", "▼")), (one, ("", "△", "▽"))):
        than = number(other, name)
        if own is not None and than is not None:
            way = figures.verdict(name, own, than, goal)
            kind = ("", "good", "bad")[way]
            marks += f' <span class="{kind}">{signs[way]}</span>' if way else ""
    return Html(_said(cell, name) + marks)


# --- images -----------------------------------------------------------------------------------------------------------


def _images(results: Results) -> list[Html | Drawing]:
    chosen, columns = _chosen(results), _columns(results)
    cells = [own for own in results.cells if own.failure is None]
    most = _most(results)
    strips = {}
    for own in cells:
        images = _cut(results.folder / own.cell.folder / "images.png", columns, chosen)
        if images:
            strips[own.cell] = [_shrunk(image, most) for image in images]
    if not strips:
        return []
    labels = [results.settings["prompts"][i] for i in chosen]
    sources = {
        cell: _source(_png(_sheet([[image] for image in images])))
        for cell, images in strips.items()
    }
    contacts = [
        _contact(results, family, strips, labels)
        for family in figures.drawn_families(results)
        if any(cell.family == family for cell in strips)
    ]
    about = (
        "The same prompts and seeds in every column; move the slider to change s. "
        "All images are in cells/FAMILY/VARIANT-sSCALE/images.png."
    )
    viewer = _viewer(results, sources, BIG * len(chosen), labels)
    return [_paragraph(about, "note"), viewer, *(own for own in contacts if own)]


def _chosen(results: Results) -> list[int]:
    """The first images of prompts that differ."""
    first: dict[str, int] = {}
    for i, prompt in enumerate(results.settings["prompts"]):
        first.setdefault(prompt, i)
    return list(first.values())[:PROMPTS]


def _cut(file: Path, columns: int, chosen: Sequence[int]) -> list[Image.Image]:
    """Images out of ``images.png``; none if it is not there or damaged, fewer if it has fewer."""
    sheet = _open(file)
    if sheet is None:
        return []
    side = sheet.width // columns
    boxes = [(i % columns * side, i // columns * side) for i in chosen]
    return [sheet.crop((x, y, x + side, y + side)) for x, y in boxes if y + side <= sheet.height]


def _columns(results: Results) -> int:
    """Of ``images.png``, which has an image for each prompt."""
    return min(COLUMNS, len(results.settings["prompts"]))


def _open(file: Path) -> Image.Image | None:
    try:
        with Image.open(file) as image:
            return image.convert("RGB")
    except OSError:
        return None


def _most(results: Results) -> int:
    """Pixels a side of an image on the page: each cell has prompts in two grids, and some on their way."""
    cells = sum(own.failure is None for own in results.cells)
    return _largest(cells * (2 * PROMPTS + STEPS * MOMENTS))


def _largest(pictures: int) -> int:
    """Pixels a side with which that many pictures keep to the budget, even if none can be compressed."""
    return max(16, math.isqrt(BUDGET // (3 * max(1, pictures))))


def _shrunk(image: Image.Image, most: int) -> Image.Image:
    if image.width <= most:
        return image
    return image.resize((most, most), Image.Resampling.LANCZOS)


def _sheet(rows: Sequence[Sequence[Image.Image]]) -> Image.Image:
    """Images of one size in rows and columns, without gaps."""
    side = rows[0][0].width
    sheet = Image.new("RGB", (side * len(rows[0]), side * len(rows)))
    for i, row in enumerate(rows):
        for j, image in enumerate(row):
            sheet.paste(image, (j * side, i * side))
    return sheet


def _png(image: Image.Image) -> bytes:
    out = io.BytesIO()
    image.save(out, "PNG", optimize=True)
    return out.getvalue()


def _contact(
    results: Results,
    family: str,
    strips: Mapping[Cell, Sequence[Image.Image]],
    labels: Sequence[str],
) -> Drawing | None:
    """A family's prompts as rows and its scales as columns, for paper."""
    own = [r.cell for r in results.of(family, figures.base(results)) if r.cell in strips]
    if not own:
        return None
    rows = [[strips[cell][i] for cell in own if i < len(strips[cell])] for i in range(len(labels))]
    names = [f"s = {cell.s:g}" for cell in own]
    sheet = grid(rows, row_labels=labels, column_labels=names, cell=64)
    about = f"{family}: prompts as rows, scales as columns."
    table = [
        {"prompt": label, "s": cell.s, "file": f"{cell.folder}/images.png", "image": i}
        for label, i in zip(labels, _chosen(results), strict=True)
        for cell in own
    ]
    return Drawing(f"images-{family}", about, _png(sheet), table)


def _viewer(
    results: Results, sources: Mapping[Cell, str], height: int, labels: Sequence[str] = ()
) -> Html:
    """Columns for families, of which a slider shows one scale and a list one variant.

    Args:
        results: tells why a cell has no picture.
        sources: of the pictures.
        height: of each on the screen, in pixels.
        labels: of the rows.
    """
    families = list(dict.fromkeys(cell.family for cell in sources))
    variants = [v for v in results.settings["variants"] if any(c.variant == v for c in sources)]
    scales = sorted({cell.s for cell in sources})
    first = scales.index(1.0) if 1.0 in scales else 0
    start = (figures.base(results), scales[first])
    columns = []
    for family in families:
        items = [
            _item(results, Cell(family, variant, s), sources, height, hidden=(variant, s) != start)
            for variant in variants
            for s in scales
        ]
        columns.append(f'<div class="column"><b>{_text(family)}</b>{"".join(items)}</div>')
    if labels:
        lines = "".join(f'<li style="height:{BIG}px">{_text(label)}</li>' for label in labels)
        columns.insert(0, f'<div class="column"><b>prompt</b><ol>{lines}</ol></div>')
    options = "".join(f'<option value="{_text(v)}">{_text(v)}</option>' for v in variants)
    choice = f'<label>variant <select autocomplete="off">{options}</select></label>'
    values = " ".join(map(scale_text, scales))
    return Html(
        f'<div class="viewer"><div class="bar"><label>scale <input type="range" min="0" max="{len(scales) - 1}" '
        f'value="{first}" step="1" autocomplete="off" data-scales="{values}"></label>'
        f"<output>s = {scales[first]:g}</output>{choice if len(variants) > 1 else ''}</div>"
        f'<div class="columns">{"".join(columns)}</div></div>'
    )


def _item(
    results: Results, cell: Cell, sources: Mapping[Cell, str], height: int, *, hidden: bool
) -> str:
    """One cell's picture, or why there is none."""
    where = f'data-s="{scale_text(cell.s)}" data-variant="{_text(cell.variant)}"{" hidden" if hidden else ""}'
    if cell in sources:
        return f'<img class="pixels" {where} height="{height}" src="{sources[cell]}" alt="{_text(cell)}">'
    failed = next((own.failure for own in results.cells if own.cell == cell), None)
    return f'<p class="none" {where}>{_text(failed or "no images")}</p>'


# --- on the way -------------------------------------------------------------------------------------------------------


def _way(results: Results) -> list[Html | Drawing]:
    families = figures.drawn_families(results)
    drawings = [figures.when(results), figures.places(results)]
    drawings += [figures.trajectory(results, family) for family in families]
    steps = _steps(results)
    held: list[Html | Drawing] = [own for own in drawings if own]
    if not held and not steps:
        return []
    about = (
        "Progress is 0 at the first step and 1 at the last: tokens drawn, tokens unmasked or denoising steps. "
        "Numbers are means over the images, along the way that guided sampling takes."
    )
    return [_paragraph(about, "note"), *held, *steps]


def _steps(results: Results) -> list[Html | Drawing]:
    """Rows are prompts, columns are moments, and a slider changes the scale of all families."""
    most, rows, sources = _most(results), 1, {}
    for family in figures.drawn_families(results):
        for own in results.of(family, figures.base(results)):
            tiles = _tiles(results.folder / own.cell.folder, _columns(results))
            if tiles:
                rows = len(tiles)
                small = [[_shrunk(image, most) for image in row] for row in tiles]
                sources[own.cell] = _source(_png(_sheet(small)))
    if not sources:
        return []
    words = "A row is one image, from the first step at the left to the last. All are in steps.png of each cell."
    return [
        Html("<h3>Images on their way</h3>"),
        _paragraph(words, "note"),
        _viewer(results, sources, SMALL * rows),
    ]


def _tiles(folder: Path, columns: int) -> list[list[Image.Image]]:
    """The first images of ``steps.png``, as large as those of ``images.png``, at moments evenly spaced from the first to the last; none if it is not there."""
    images, sheet = _open(folder / "images.png"), _open(folder / "steps.png")
    if images is None or sheet is None:
        return []
    side = images.width // columns
    last = sheet.width // side - 1
    count = min(MOMENTS, last + 1)
    places = [j * last // max(1, count - 1) * side for j in range(count)]
    rows = [i * side for i in range(min(STEPS, sheet.height // side))]
    return [[sheet.crop((x, y, x + side, y + side)) for x in places] for y in rows]


# --- what is missing, settings ----------------------------------------------------------------------------------------


def _missing(results: Results) -> Html:
    held = results.settings
    there = {result.cell for result in results.cells}
    absent = [
        str(cell)
        for family in held["families"]
        for variant, how in held["variants"].items()
        for s in (how.get("scales") if isinstance(how, Mapping) else None) or held["scales"]
        for cell in [Cell(family, variant, s)]
        if cell not in there
    ]
    failed = [(str(own.cell), own.failure) for own in results.cells if own.failure is not None]
    reasons: dict[tuple[str, str], list[str]] = {}
    for result in results.cells:
        for name, why in result.missing.items():
            reasons.setdefault((name, why), []).append(str(result.cell))
    parts = []
    if failed:
        parts += [
            Html("<h3>Cells that failed</h3>"),
            _table(["cell", "reason"], failed, "words"),
        ]
    if reasons:
        rows = [
            (MEASURES[name].label if name in MEASURES else name, why, _some(cells, 6))
            for (name, why), cells in reasons.items()
        ]
        parts += [
            Html("<h3>Numbers that are missing</h3>"),
            _table(["measure", "reason", "cells"], rows, "words"),
        ]
    if absent:
        everything = len(absent) + len(there)
        words = f"{len(absent)} of {everything} combinations were not drawn (not every variant suits every family)"
        parts.append(_folded(words, _paragraph(", ".join(absent))))
    return _join(parts) if parts else _paragraph("Nothing: every cell has every number.")


def _settings(results: Results) -> Html:
    text = json.dumps(dict(results.settings), indent=2, ensure_ascii=False)
    where = "results.jsonl has a line for each cell, results.csv the same without the way, figures/ a PNG and a CSV of each figure."
    return _join([_paragraph(where), _folded("every setting", Html(f"<pre>{_text(text)}</pre>"))])

"""Pictures on the page: cut out of the sheets of a study, in grids for paper and with a slider for the screen."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image

from unicfg.evaluation.report.drawing import Drawing
from unicfg.evaluation.report.lookups import base, curve, curves_of, drawn_families
from unicfg.evaluation.report.markup import Html, paragraph, png_source, text, title
from unicfg.evaluation.results import COLUMNS, Cell, Results, scale_text
from unicfg.pictures import grid

PROMPTS = 6  # rows of the image grids
STEPS, MOMENTS = 2, 8  # rows and columns of the pictures of the way
BUDGET = 9_000_000  # bytes of raw pixels in all image grids: keeps the page below 15 MB
BIG, SMALL = 96, 64  # screen pixels a side of one image, and of one on its way


def images_of(results: Results) -> list[Html | Drawing]:
    """The first prompts that differ, for every cell: with a slider, and a grid for each family."""
    chosen, columns, most = _chosen(results), _columns(results), _side_on_page(results)
    strips = {
        own.cell: [shrunk(image, most) for image in images]
        for own in results.cells
        if own.failure is None
        and (images := cut(results.folder / own.cell.folder / "images.png", columns, chosen))
    }
    if not strips:
        return []
    labels = [results.settings["prompts"][i] for i in chosen]
    sources = {cell: _source([[image] for image in images]) for cell, images in strips.items()}
    contacts = [_contact(results, family, strips, chosen) for family in drawn_families(results)]
    about = (
        "The same prompts and seeds in every column; move the slider to change s. "
        "All images are in cells/FAMILY/VARIANT-sSCALE/images.png."
    )
    viewer = _viewer(results, sources, BIG * len(chosen), labels)
    return [paragraph(about, "note"), viewer, *(own for own in contacts if own)]


def steps_of(results: Results) -> list[Html | Drawing]:
    """Rows are prompts, columns are moments, and a slider changes the scale of all families."""
    most, columns = _side_on_page(results), _columns(results)
    sheets = {
        own.cell: [[shrunk(image, most) for image in row] for row in rows]
        for own in curves_of(results)
        if (rows := moments(results.folder / own.cell.folder, columns))
    }
    if not sheets:
        return []
    about = "A row is one image, from the first step at the left to the last. All are in steps.png of each cell."
    sources = {cell: _source(rows) for cell, rows in sheets.items()}
    height = SMALL * max(map(len, sheets.values()))
    return [
        title("Images on their way"),
        paragraph(about, "note"),
        _viewer(results, sources, height),
    ]


# --- sheets -----------------------------------------------------------------------------------------------------------


def cut(file: Path, columns: int, chosen: Sequence[int]) -> list[Image.Image]:
    """Images out of ``images.png``; none if it is not there or damaged, fewer if it has fewer.

    Args:
        file: the sheet.
        columns: of it.
        chosen: which, counted row by row.
    """
    sheet = _open(file)
    if sheet is None or sheet.width < columns:
        return []
    side = sheet.width // columns
    boxes = [(i % columns * side, i // columns * side) for i in chosen]
    return [sheet.crop((x, y, x + side, y + side)) for x, y in boxes if y + side <= sheet.height]


def moments(folder: Path, columns: int) -> list[list[Image.Image]]:
    """The first images of ``steps.png`` at moments evenly spaced from the first to the last; none if it is not there.

    Args:
        folder: of a cell; its ``images.png`` tells how large an image is.
        columns: of ``images.png``.
    """
    images, sheet = _open(folder / "images.png"), _open(folder / "steps.png")
    if images is None or sheet is None or images.width < columns:
        return []
    side = images.width // columns
    last = sheet.width // side - 1
    count = min(MOMENTS, last + 1)
    places = [j * last // max(1, count - 1) * side for j in range(count)]
    rows = [i * side for i in range(min(STEPS, sheet.height // side))]
    return [[sheet.crop((x, y, x + side, y + side)) for x in places] for y in rows]


def sheet_of(rows: Sequence[Sequence[Image.Image]]) -> Image.Image:
    """Images of one size in rows and columns, without gaps."""
    side = rows[0][0].width
    sheet = Image.new("RGB", (side * len(rows[0]), side * len(rows)))
    for i, row in enumerate(rows):
        for j, image in enumerate(row):
            sheet.paste(image, (j * side, i * side))
    return sheet


def largest_side(pictures: int) -> int:
    """Pixels a side with which that many pictures keep to the budget, even if none can be compressed."""
    return max(16, math.isqrt(BUDGET // (3 * max(1, pictures))))


def shrunk(image: Image.Image, most: int) -> Image.Image:
    """A square image of at most so many pixels a side."""
    if image.width <= most:
        return image
    return image.resize((most, most), Image.Resampling.LANCZOS)


def _open(file: Path) -> Image.Image | None:
    try:
        with Image.open(file) as image:
            return image.convert("RGB")
    except OSError:
        return None


def _png(image: Image.Image) -> bytes:
    out = io.BytesIO()
    image.save(out, "PNG", optimize=True)
    return out.getvalue()


def _source(rows: Sequence[Sequence[Image.Image]]) -> str:
    return png_source(_png(sheet_of(rows)))


def _chosen(results: Results) -> list[int]:
    """The first images of prompts that differ."""
    first: dict[str, int] = {}
    for i, prompt in enumerate(results.settings["prompts"]):
        first.setdefault(prompt, i)
    return list(first.values())[:PROMPTS]


def _columns(results: Results) -> int:
    """Of ``images.png``, which has an image for each prompt."""
    return min(COLUMNS, len(results.settings["prompts"]) or COLUMNS)


def _side_on_page(results: Results) -> int:
    """Pixels a side of an image on the page: each cell has prompts in two grids, and some on their way."""
    cells = sum(own.failure is None for own in results.cells)
    return largest_side(cells * (2 * PROMPTS + STEPS * MOMENTS))


# --- on paper ---------------------------------------------------------------------------------------------------------


def _contact(
    results: Results,
    family: str,
    strips: Mapping[Cell, Sequence[Image.Image]],
    chosen: Sequence[int],
) -> Drawing | None:
    """A family's prompts as rows and its scales as columns."""
    own = [result.cell for result in curve(results, family) if result.cell in strips]
    if not own:
        return None
    labels = [results.settings["prompts"][i] for i in chosen]
    rows = [[strips[cell][i] for cell in own if i < len(strips[cell])] for i in range(len(labels))]
    sheet = grid(
        rows, row_labels=labels, column_labels=[f"s = {cell.s:g}" for cell in own], cell=64
    )
    numbers = [
        {"prompt": label, "s": cell.s, "file": f"{cell.folder}/images.png", "image": i}
        for label, i in zip(labels, chosen, strict=True)
        for cell in own
    ]
    about = f"{family}: prompts as rows, scales as columns."
    return Drawing(f"images-{family}", about, _png(sheet), numbers, half=True)


# --- on the screen ----------------------------------------------------------------------------------------------------


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
    start = (base(results), scales[first])
    columns = []
    for family in families:
        items = [
            _item(results, Cell(family, variant, s), sources, height, hidden=(variant, s) != start)
            for variant in variants
            for s in scales
        ]
        columns.append(f'<div class="column"><b>{text(family)}</b>{"".join(items)}</div>')
    if labels:
        lines = "".join(f'<li style="height:{BIG}px">{text(label)}</li>' for label in labels)
        columns.insert(0, f'<div class="column"><b>prompt</b><ol>{lines}</ol></div>')
    options = "".join(f'<option value="{text(v)}">{text(v)}</option>' for v in variants)
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
    where = f'data-s="{scale_text(cell.s)}" data-variant="{text(cell.variant)}"{" hidden" if hidden else ""}'
    if cell in sources:
        return f'<img class="pixels" {where} height="{height}" src="{sources[cell]}" alt="{text(cell)}">'
    failed = next((own.failure for own in results.cells if own.cell == cell), None)
    return f'<p class="none" {where}>{text(failed or "no images")}</p>'

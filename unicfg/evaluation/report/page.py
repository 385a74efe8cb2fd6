"""A study as one page that needs no network: what was done, what came out, pictures, and every setting."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any, Literal

from tokenizers_vq.files import write_text_atomically
from unicfg.evaluation.report.comparisons import MATCHED, among_captions, equal_strength, summary
from unicfg.evaluation.report.digest import digest
from unicfg.evaluation.report.drawing import Drawing, csv_text
from unicfg.evaluation.report.figures import curves, pareto
from unicfg.evaluation.report.images import images_of, steps_of
from unicfg.evaluation.report.lookups import drawn_families, measured
from unicfg.evaluation.report.markup import (
    Html,
    brief,
    embed,
    fold,
    join,
    paragraph,
    some,
    table,
    text,
    title,
)
from unicfg.evaluation.report.trajectories import places, trajectory, when
from unicfg.evaluation.report.variants import against_plain
from unicfg.evaluation.results import MEASURES, Cell, CellResult, Group, Results, plain

NETWORK = ("network", "parameters", "sampler", "weights", "device")


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
        "summary": [summary(results)],
        "images": images_of(results),
        "over the scale": _curves(results, "s"),
        "at equal strength": [*_curves(results, "strength"), equal_strength(results)],
        "trade-offs": _tradeoffs(results),
        "mitigations": against_plain(results),
        "on the way": _way(results),
        "what is missing": [_missing(results)],
        "settings": [_settings(results)],
    }
    for parts in sections.values():
        for part in parts:
            if isinstance(part, Drawing):
                part.save(results.folder / "figures")
    lines = [_line(result) for result in results.cells]
    jsonl = "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines)
    write_text_atomically(jsonl, results.folder / "results.jsonl")
    write_text_atomically(_flat(lines), results.folder / "results.csv")
    write_text_atomically(digest(results), results.folder / "digest.md")
    page = results.folder / "report.html"
    write_text_atomically(_page(_headline(results), sections), page)
    return page


def _page(headline: str, sections: Mapping[str, Sequence[Html | Drawing]]) -> str:
    held = {name: parts for name, parts in sections.items() if parts}
    links = "".join(f'<a href="#{name.replace(" ", "-")}">{name}</a> ' for name in held)
    pages = [
        f'<section id="{name.replace(" ", "-")}"><h2>{name.capitalize()}</h2>'
        + "\n".join(embed(part) if isinstance(part, Drawing) else part for part in parts)
        + "</section>"
        for name, parts in held.items()
    ]
    body = f"<h1>{text(headline)}</h1>\n<nav>{links}</nav>\n" + "\n".join(pages)
    template = files("unicfg.evaluation.report") / "page.html"
    return Template(template.read_text("utf-8")).substitute(title=text(headline), body=body)


# --- tables of all cells ----------------------------------------------------------------------------------------------


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
    return csv_text(rows or [dict.fromkeys(first)])


# --- what was done ----------------------------------------------------------------------------------------------------


def _headline(results: Results) -> str:
    weights = results.settings.get("weights")
    of = f" of {weights}" if isinstance(weights, str) else ""
    return f"How guidance acts on {', '.join(results.settings['families'])}{of}"


def _done(results: Results) -> Html:
    held = results.settings
    prompts, study = held["prompts"], held.get("study") or {}
    there = sum(result.failure is None for result in results.cells)
    facts = [
        ("prompts", f"{len(prompts)}: {some(prompts)}"),
        ("images for adherence and fidelity", held.get("n")),
        ("prompts that leave something open", some(list(held.get("open_prompts") or []))),
        ("images of each of these", study.get("draws")),
        ("seed of the first image", study.get("seed")),
        ("features", study.get("features")),
        ("families", ", ".join(held["families"])),
        ("scales", ", ".join(f"{s:g}" for s in held["scales"])),
        ("cells", f"{there} with images, {len(results.cells) - there} failed"),
        ("weights", held.get("weights")),
        ("versions", brief(held["versions"]) if held.get("versions") else None),
        ("date", held.get("date")),
    ]
    known = [(Html(f"<b>{what}</b>"), fact) for what, fact in facts if fact not in (None, "")]
    parts = [
        paragraph(
            "A model gives an output with and without its prompt; guidance goes s times the way from the second to the "
            "first. s = 1 is the model as it is, more is guided. The same prompts were drawn from the same seeds in every "
            "cell, and the images measured."
        ),
        table((), known, "words"),
        _networks(held.get("families_settings") or {}),
        _variants(held["variants"]),
    ]
    if held.get("command"):
        parts.append(Html(f"<p>To repeat it:</p><pre>{text(held['command'])}</pre>"))
    return join(parts)


def _variants(variants: Mapping[str, object]) -> Html:
    """How each is written, where a study says so."""
    if len(variants) < 2:
        return Html("")
    columns = {
        "variant of guidance": list(variants),
        "scale": [_said(how, "scale") for how in variants.values()],
        "mitigations": [_said(how, "mitigations") for how in variants.values()],
        "sampler": [_call(_said(how, "sampler")) for how in variants.values()],
        "branches": [_runs(_said(how, "branches")) for how in variants.values()],
    }
    # what no variant has is left out, but for what every study had from the first
    rare = ("sampler", "branches")
    shown = {head: own for head, own in columns.items() if head not in rare or any(own)}
    return table(list(shown), list(zip(*shown.values(), strict=True)), "words")


def _said(how: object, key: str) -> Any:
    """What a variant says under a key; one that is a text alone says its scale."""
    if isinstance(how, Mapping):
        return how.get(key, "")
    return how if key == "scale" else ""


def _runs(branches: object) -> str:
    """What runs in each branch, in words; "" where there are no more than two."""
    if not isinstance(branches, Mapping):
        return ""
    own = {
        name: " ".join(f"{kind} {value}" for kind, value in what.items())
        if isinstance(what, Mapping)
        else repr(what)
        for name, what in branches.items()
    }
    return ", ".join(f"{name}: {what}" for name, what in own.items())


def _call(options: object) -> str:
    """Options of a sampler as they stand in a call; "" where there are none."""
    if not isinstance(options, Mapping):
        return ""
    return ", ".join(f"{name}={value!r}" for name, value in options.items())


def _networks(families: Mapping[str, Mapping[str, Any]]) -> Html:
    keys = [key for key in NETWORK if any(key in own for own in families.values())]
    if not keys:
        return Html("")
    rows = [
        [family, *(brief(own.get(key, "")) for key in keys)] for family, own in families.items()
    ]
    return table(["family", *keys], rows, "words")


# --- figures ----------------------------------------------------------------------------------------------------------


def _curves(results: Results, over: Literal["s", "strength"]) -> list[Html | Drawing]:
    groups: tuple[Group, ...] = (*MATCHED, "strength", "cost") if over == "s" else MATCHED
    drawings = [own for group in groups if (own := curves(results, group, over))]
    if not drawings:
        return []
    about = (
        "Scales stand side by side, not to scale. Grey lines: the same measure of real images, of their reconstructions, "
        "and of what is known to be bad."
        if over == "s"
        else "The same scale is a weak push in one family and a strong one in another; here the axis is how far the guided "
        "model is from the ordinary one. s = 1 has strength 0 and stands at the left end: the axis is logarithmic except "
        "for its first part, from 0 to the first tick. Cells whose strength is not known are left out. Scales below 1 push "
        "the other way: hollow, dashed. The strength of latents (diffusion, flow, hybrid) is that of ancestral steps on "
        "the sampler's own noise levels, down to a noise of a tenth of the data: compare tokens with latents by order of "
        "magnitude, and curves within a family exactly."
    )
    about += among_captions(results, measured(results, "adherence"))
    return [paragraph(about, "note"), *drawings]


def _tradeoffs(results: Results) -> list[Html | Drawing]:
    pairs: tuple[Group, ...] = ("diversity", "fidelity")
    return [own for group in pairs if (own := pareto(results, group))]


def _way(results: Results) -> list[Html | Drawing]:
    drawings = [when(results), places(results)]
    drawings += [trajectory(results, family) for family in drawn_families(results)]
    held = [*(own for own in drawings if own), *steps_of(results)]
    if not held:
        return []
    about = (
        "Progress is 0 at the first step and 1 at the last: tokens drawn, tokens unmasked or denoising steps. "
        "Numbers are means over the images, along the way that guided sampling takes."
    )
    return [paragraph(about, "note"), *held]


# --- what is missing, settings ----------------------------------------------------------------------------------------


def _missing(results: Results) -> Html:
    failed = [(str(own.cell), own.failure) for own in results.cells if own.failure is not None]
    reasons: dict[tuple[str, str], list[str]] = {}
    for result in results.cells:
        for name, why in result.missing.items():
            reasons.setdefault((name, why), []).append(str(result.cell))
    rows = [
        (MEASURES[name].label if name in MEASURES else name, why, some(cells, 6))
        for (name, why), cells in reasons.items()
    ]
    absent = _not_drawn(results)
    parts: list[Html] = []
    if failed:
        parts += [title("Cells that failed"), table(["cell", "reason"], failed, "words")]
    if rows:
        head = ["measure", "reason", "cells"]
        parts += [title("Numbers that are missing"), table(head, rows, "words")]
    if absent:
        everything = len(absent) + len({own.cell for own in results.cells})
        words = f"{len(absent)} of {everything} combinations were not drawn (not every variant suits every family)"
        parts.append(fold(words, paragraph(", ".join(absent))))
    return join(parts) if parts else paragraph("Nothing: every cell has every number.")


def _not_drawn(results: Results) -> list[str]:
    """Cells that the settings ask for and that are not there."""
    held, there = results.settings, {result.cell for result in results.cells}
    asked = [
        Cell(family, variant, s)
        for family in held["families"]
        for variant, how in held["variants"].items()
        for s in (how.get("scales") if isinstance(how, Mapping) else None) or held["scales"]
    ]
    return [str(cell) for cell in asked if cell not in there]


def _settings(results: Results) -> Html:
    held = json.dumps(dict(results.settings), indent=2, ensure_ascii=False)
    where = "results.jsonl has a line for each cell, results.csv the same without the way, figures/ a PNG and a CSV of each figure."
    return join([paragraph(where), fold("every setting", Html(f"<pre>{text(held)}</pre>"))])

"""The numbers that matter most, as Markdown to quote: every family over s, and every variant beside plain guidance."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from unicfg.evaluation.report.findings import helps
from unicfg.evaluation.report.lookups import (
    base,
    cell_at,
    curve,
    drawn_families,
    heading,
    lead,
    number,
    reference,
    scales_of,
    shown,
    variants_of,
)
from unicfg.evaluation.results import MEASURES, CellResult, Estimate, Group, Results

# leading measures first, then these
GROUPS: tuple[Group, ...] = ("adherence", "diversity", "burn", "fidelity", "strength")
REFERENCES = ("real images", "reconstructions", "shuffled captions")


def digest(results: Results) -> str:
    """Two tables in Markdown under a heading, with the command that made them.

    Args:
        results: of a study, finished or not.
    """
    names = [name for group in GROUPS if (name := lead(results, group))]
    n, command = results.settings.get("n"), results.settings.get("command")
    draws = results.settings.get("study", {}).get("draws")
    prompts = results.settings.get("open_prompts", [])
    opened = f", diversity by {draws} images of each of {len(prompts)} prompts" if draws else ""
    made = f" Made by `{command}`." if command else ""
    lines = [
        f"# Digest of {results.folder.name}",
        "",
        f"Estimates +- standard errors, {n} images per cell{opened}.{made}",
        "",
        *_table(["family", "s", *map(heading, names)], _over_scales(results, names)),
    ]
    variants = list(_of_variants(results, names[:3]))
    if variants:
        won = ["diversity won back, %", "burn won back, %"]
        head = ["family", "s", "variant", *map(heading, names[:3]), *won]
        lines += ["", *_table(head, variants)]
    return "\n".join(lines) + "\n"


def _over_scales(results: Results, names: Sequence[str]) -> Iterable[list[str]]:
    for kind in REFERENCES:
        if results.reference.get(kind):
            yield [kind, "", *(_say(name, reference(results, kind, name)) for name in names)]
    for family in drawn_families(results):
        for cell in curve(results, family):
            yield [family, f"{cell.cell.s:g}", *_numbers(cell, names)]


def _of_variants(results: Results, names: Sequence[str]) -> Iterable[list[str]]:
    for s in scales_of(results):
        won = {(own.family, own.variant): own for own in helps(results, s)}
        for family in drawn_families(results):
            own = [v for v in variants_of(results, family) if (family, v) in won]
            plain = cell_at(results, family, base(results), s)
            if own and plain is not None:
                yield [family, f"{s:g}", base(results), *_numbers(plain, names), "", ""]
            for variant in own:
                cell, help_ = cell_at(results, family, variant, s), won[family, variant]
                if cell is not None:
                    shares = (help_.diversity, help_.burn)
                    yield [family, f"{s:g}", variant, *_numbers(cell, names), *map(_share, shares)]


def _numbers(cell: CellResult, names: Sequence[str]) -> list[str]:
    return [_say(name, number(cell, name)) for name in names]


def _say(name: str, own: Estimate | None) -> str:
    if own is None:
        return "-"
    digits, seen = MEASURES[name].digits, shown(name, own)
    error = f" +- {seen.error:.{digits}f}" if math.isfinite(seen.error) else ""
    return f"{seen.value:.{digits}f}{error}"


def _share(value: float) -> str:
    return f"{100 * value:.0f}" if math.isfinite(value) else "-"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [_line(head), "|" + "---|" * len(head), *map(_line, rows)]


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

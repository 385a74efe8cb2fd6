"""What a sampling of each family costs, and what guidance adds to it.

    python benchmarks/families.py --out benchmarks/results

Networks of equal width with random weights: 6 layers, a prefix of 16 condition tokens, default steps; 8 x 8 tokens or
latents, and 16 x 16 for the two families that decode token by token, eager and compiled. The cases run in turn, round
after round, in one process; the table gives ratios of medians. Milliseconds depend on the machine: read the ratios.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
from timing import Case, machine, measure

from models import (
    HybridTransformer,
    HybridTransformerConfig,
    LatentDenoiser,
    LatentDenoiserConfig,
    MaskedTransformer,
    TokenTransformer,
    TokenTransformerConfig,
)
from models.pipeline import REVEAL, SOLVERS, STEPS
from unicfg import (
    ConditionDropout,
    Guidance,
    sample_autoregressive,
    sample_diffusion,
    sample_hybrid,
    sample_masked,
)

SCALE, PREFIX, VOCABULARY = 3.0, 16, 512
COMPILED, GUIDED = ", compiled", ", guided"
SEQUENTIAL = ("ar", "hybrid")  # one token after another, in a step that can be compiled


def networks(width: int, grid: int) -> dict[str, nn.Module]:
    """One of each family."""
    body = (grid, VOCABULARY, PREFIX, width, 6, width // (32 if width < 384 else 64))
    return {
        "ar": TokenTransformer(TokenTransformerConfig(*body)),
        "masked": MaskedTransformer(TokenTransformerConfig(*body)),
        "diffusion": LatentDenoiser(LatentDenoiserConfig(*body)),
        "flow": LatentDenoiser(LatentDenoiserConfig(*body, path="straight", space="flow")),
        "hybrid": HybridTransformer(HybridTransformerConfig(*body)),
    }


def cases(
    width: int, batch: int, grid: int, families: Sequence[str], ways: Sequence[bool]
) -> dict[str, Case]:
    """Families without and with guidance, and those that can be compiled in each of the ``ways``: eager, compiled."""
    cond = torch.randint(1, VOCABULARY, (batch, PREFIX))
    result: dict[str, Case] = {}
    every = networks(width, grid)
    for family, compile in itertools.product(families, ways):
        if compile and family not in SEQUENTIAL:
            continue
        model = ConditionDropout(every[family], torch.zeros(PREFIX, dtype=torch.long)).eval()

        def sample(
            s: float,
            model: ConditionDropout = model,
            family: str = family,
            compile: bool = compile,
        ) -> torch.Tensor:
            options: dict[str, Any] = {"guidance": Guidance(s), "seeds": range(batch)}
            if family in SEQUENTIAL:
                options["compile"] = compile
            if family == "ar":
                return sample_autoregressive(model, cond, **options)
            options["steps"] = STEPS[family]
            if family == "masked":
                return sample_masked(model, cond, reveal=REVEAL, **options)
            sampler = sample_hybrid if family == "hybrid" else sample_diffusion
            return sampler(model, cond, solver=SOLVERS[family], **options)

        name = f"{family}{COMPILED if compile else ''}"
        result[name] = lambda sample=sample: sample(1.0)
        result[f"{name}{GUIDED}"] = lambda sample=sample: sample(SCALE)
    return result


def table(seconds: dict[str, list[float]], title: str, tokens: int) -> list[str]:
    """Markdown: milliseconds a sampling, the cost of guidance, and the time against ar done in the same way."""
    middle = {name: statistics.median(values) for name, values in seconds.items()}
    lines = [
        f"{title}:",
        "",
        "| family | steps | ms, s = 1 | ms, s = 3 (range) | guidance costs | s = 3 against ar |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for name in (name for name in seconds if GUIDED not in name):
        guided = f"{name}{GUIDED}"
        low, high = min(seconds[guided]), max(seconds[guided])
        family = name.removesuffix(COMPILED)
        beside = f"ar{COMPILED if COMPILED in name else ''}{GUIDED}"
        lines.append(
            f"| {name} | {STEPS.get(family, tokens)} | {1000 * middle[name]:.0f} "
            f"| {1000 * middle[guided]:.0f} ({1000 * low:.0f} to {1000 * high:.0f}) "
            f"| {middle[guided] / middle[name]:.2f}x | {middle[guided] / middle[beside]:.2f}x |"
        )
    return [*lines, ""]


def main() -> None:
    """Measure, print, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--widths", type=int, nargs="+", default=[128, 256])
    parser.add_argument("--batches", type=int, nargs="+", default=[1])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="folder for families.md and families.json")
    options = parser.parse_args()
    torch.manual_seed(0)
    command = (
        f"python benchmarks/families.py --widths {' '.join(map(str, options.widths))} "
        f"--batches {' '.join(map(str, options.batches))} --rounds {options.rounds}"
    )
    lines = [
        "# Families side by side",
        "",
        f"{date.today()}, {machine()}, torch {torch.__version__}",
    ]
    lines += ["", f"    {command}", ""]
    results = {}
    every = tuple(networks(32, 2))
    settings = [(width, 8, every, (False,)) for width in options.widths]
    settings.append((384, 16, SEQUENTIAL, (False, True)))
    for (width, grid, families, ways), batch in itertools.product(settings, options.batches):
        title = f"Width {width}, {grid} x {grid} tokens, batch {batch}"
        seconds = measure(cases(width, batch, grid, families, ways), options.rounds)
        results[title] = seconds
        lines += table(seconds, title, grid * grid)
    print("\n".join(lines))
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "families.md").write_text("\n".join(lines))
        record = {"machine": machine(), "command": command, "seconds": results}
        (options.out / "families.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()

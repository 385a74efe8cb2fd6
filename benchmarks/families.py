"""What a sampling of each family costs, and what guidance adds to it.

    python benchmarks/families.py --rounds 7 --out benchmarks/results

Networks of equal width with random weights: 8 x 8 tokens or latents, 6 layers, a prefix of 16 condition tokens, default
steps. The cases run in turn, round after round, in one process; the table gives ratios of medians. Milliseconds depend
on the machine: read the ratios.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from datetime import date
from pathlib import Path

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


def networks(width: int) -> dict[str, nn.Module]:
    """One of each family."""
    body = (8, VOCABULARY, PREFIX, width, 6, width // 32)
    return {
        "ar": TokenTransformer(TokenTransformerConfig(*body)),
        "masked": MaskedTransformer(TokenTransformerConfig(*body)),
        "diffusion": LatentDenoiser(LatentDenoiserConfig(*body)),
        "flow": LatentDenoiser(LatentDenoiserConfig(*body, path="straight", space="flow")),
        "hybrid": HybridTransformer(HybridTransformerConfig(*body)),
    }


def cases(width: int, batch: int) -> dict[str, Case]:
    """Every family without and with guidance."""
    cond = torch.randint(1, VOCABULARY, (batch, PREFIX))
    result: dict[str, Case] = {}
    for family, network in networks(width).items():
        model = ConditionDropout(network, torch.zeros(PREFIX, dtype=torch.long)).eval()

        def sample(s: float, model: ConditionDropout = model, family: str = family) -> torch.Tensor:
            options = {"guidance": Guidance(s), "seeds": range(batch)}
            if family == "ar":
                return sample_autoregressive(model, cond, **options)
            options["steps"] = STEPS[family]
            if family == "masked":
                return sample_masked(model, cond, reveal=REVEAL, **options)
            sampler = sample_hybrid if family == "hybrid" else sample_diffusion
            return sampler(model, cond, solver=SOLVERS[family], **options)

        result[family] = lambda sample=sample: sample(1.0)
        result[f"{family}, guided"] = lambda sample=sample: sample(SCALE)
    return result


def table(seconds: dict[str, list[float]], width: int, batch: int) -> list[str]:
    """Markdown: milliseconds a sampling, the cost of guidance, and the time against ar."""
    middle = {name: statistics.median(values) for name, values in seconds.items()}
    lines = [
        f"Width {width}, batch {batch}:",
        "",
        "| family | steps | ms, s = 1 | ms, s = 3 (range) | guidance costs | s = 3 against ar |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for family in (name for name in seconds if "guided" not in name):
        guided = f"{family}, guided"
        low, high = min(seconds[guided]), max(seconds[guided])
        lines.append(
            f"| {family} | {STEPS.get(family, 64)} | {1000 * middle[family]:.0f} "
            f"| {1000 * middle[guided]:.0f} ({1000 * low:.0f} to {1000 * high:.0f}) "
            f"| {middle[guided] / middle[family]:.2f}x | {middle[guided] / middle['ar, guided']:.2f}x |"
        )
    return [*lines, ""]


def main() -> None:
    """Measure, print, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--widths", type=int, nargs="+", default=[128, 256])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
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
    for width in options.widths:
        for batch in options.batches:
            seconds = measure(cases(width, batch), options.rounds)
            results[f"width {width}, batch {batch}"] = seconds
            lines += table(seconds, width, batch)
    print("\n".join(lines))
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "families.md").write_text("\n".join(lines))
        record = {"machine": machine(), "command": command, "seconds": results}
        (options.out / "families.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""What a guided step of the shipped models takes, and how many images a second they draw.

    python benchmarks/shipped.py --rounds 2 --out benchmarks/results

The shapes weights at s = 3 with the default steps, without the decoding of tokens to pixels: `ar` and `hybrid` take a step a
token, the others a step for all of them. On a GPU the first four run in bfloat16.
"""

from __future__ import annotations

import torch
from timing import Case, Group, command_line, device
from torch import Tensor

from models import TextToImage
from models.pipeline import REVEAL, STEPS
from unicfg import (
    Guidance,
    sample_autoregressive,
    sample_diffusion,
    sample_hybrid,
    sample_masked,
)

SCALE = 3.0
PROMPT = "a large red circle above a small blue square on a white background"
SEQUENTIAL = ("ar", "hybrid")


def case(family: str, batch: int, compile: bool) -> tuple[Case, int]:
    """A sampling, and its steps."""
    pipe = TextToImage.from_pretrained("shapes", family).to(device())
    if device().type == "cuda" and family != "hybrid":  # whose head is in float32
        pipe.model.to(torch.bfloat16)
    model, cond = pipe.model, pipe.encode_prompts([PROMPT]).repeat(batch, 1)
    shared = {"guidance": Guidance(SCALE), "seeds": range(batch)}

    def sample() -> Tensor:
        if family == "ar":
            return sample_autoregressive(model, cond, compile=compile, **shared)
        if family == "masked":
            return sample_masked(model, cond, steps=STEPS[family], reveal=REVEAL, **shared)
        if family == "hybrid":
            return sample_hybrid(model, cond, steps=STEPS[family], compile=compile, **shared)
        return sample_diffusion(model, cond, steps=STEPS[family], **shared)

    return sample, model.model.num_tokens if family in SEQUENTIAL else STEPS[family]


def group(batch: int) -> Group:
    """All families at a batch size."""
    cases, steps = {}, {}
    # the compiler of a CPU gains nothing at many rows, and takes minutes
    ways = (False, True) if batch == 1 or device().type == "cuda" else (False,)
    for family in ("ar", "masked", "diffusion", "flow", "hybrid"):
        for compile in ways if family in SEQUENTIAL else (False,):
            name = f"unicfg, {family}" + (", compiled" if compile else "")
            cases[name], steps[name] = case(family, batch, compile)
    return Group(f"Batch {batch}", cases, ("image", batch), steps=steps)


def main() -> None:
    """Measure, print, and write the table."""
    command_line(
        "shipped", "Guided samplings of the shapes weights", group, (1, 64, 256), ("torch",)
    )


if __name__ == "__main__":
    main()

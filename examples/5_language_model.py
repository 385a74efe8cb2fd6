"""Context-aware decoding with a GPT-2: how far does it believe what it reads, against what it remembers?

    python examples/5_language_model.py --out out/language_model.png

A small GPT-2 learns facts by heart ("what colour is the door?") and to read notes that say otherwise, which it believes
in six cases of ten. Guided from the bare question to the question with its note, it believes the note ever more (Shi et al.,
arXiv 2305.14739, equation 3; their alpha is s - 1).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from unicfg import Guidance
from unicfg.integrations.transformers import guided_generate

THINGS, COLOURS = 12, 16
NOTE, QUESTION = THINGS + COLOURS, THINGS + COLOURS + 1  # tokens: things, colours, these two
BELIEVED = 0.6


def memory() -> Tensor:
    """The colour that each thing is known to have (THINGS,)."""
    return THINGS + torch.arange(THINGS) * 5 % COLOURS


def examples(count: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """Notes, questions and answers.

    Returns:
        ids [NOTE, thing, colour, QUESTION, thing, answer] (count, 6), and the colours that the notes name (count,).
    """
    things = torch.randint(THINGS, (count,), generator=random)
    known = memory()[things]
    # another colour than the one that is known
    noted = (
        THINGS + (known - THINGS + torch.randint(1, COLOURS, (count,), generator=random)) % COLOURS
    )
    believed = torch.rand(count, generator=random) < BELIEVED
    answer = torch.where(believed, noted, known)
    note, question = torch.full((count,), NOTE), torch.full((count,), QUESTION)
    return torch.stack([note, things, noted, question, things, answer], dim=1), noted


def train(steps: int, seed: int = 0) -> GPT2LMHeadModel:
    """A GPT-2 that answers questions with a note, and bare ones from memory."""
    torch.manual_seed(seed)
    random = torch.Generator().manual_seed(seed)
    config = GPT2Config(
        vocab_size=QUESTION + 1,
        n_positions=8,
        n_embd=64,
        n_layer=2,
        n_head=4,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = GPT2LMHeadModel(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        ids, _ = examples(128, random)
        bare = torch.cat([ids[:, 3:5], memory()[ids[:, 1]][:, None]], dim=1)
        loss = torch.zeros(())
        for rows in (ids, bare):
            logits = model(input_ids=rows[:, :-1]).logits[:, -1]
            loss = loss + torch.nn.functional.cross_entropy(logits, rows[:, -1])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def believes(model: GPT2LMHeadModel, scales: Sequence[float], count: int = 400) -> list[float]:
    """The share of answers that are what the note says, at each scale."""
    ids, noted = examples(count, torch.Generator().manual_seed(1))
    shares = []
    for s in scales:
        out = model.generate(
            ids[:, :5],
            custom_generate=guided_generate,
            uncond_ids=ids[:, 3:5],  # the question without the note
            guidance=Guidance(s),
            seeds=range(count),
            do_sample=True,
            max_new_tokens=1,
        )
        shares.append(float((out[:, -1] == noted).float().mean()))
    return shares


def plot(scales: Sequence[float], shares: Sequence[float], file: Path) -> None:
    """Shares by scale as a PNG."""
    from matplotlib.figure import Figure

    axes = (figure := Figure(figsize=(5, 3.2), layout="constrained")).subplots()
    axes.plot(scales, shares, marker="o")
    axes.axhline(BELIEVED, color="grey", linestyle=":", label="share of the notes that were true")
    axes.set(xlabel="s", ylabel="answers that believe the note", ylim=(-0.03, 1.03))
    axes.legend(frameon=False)
    figure.savefig(file, dpi=120)


def main() -> None:
    """Train, ask, print and plot."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--out", type=Path, default=Path("out/language_model.png"))
    options = parser.parse_args()
    scales = [0.0, 0.5, 0.8, 1.0, 1.2, 1.5, 2.0, 3.0]
    shares = believes(train(options.steps), scales)
    for s, share in zip(scales, shares, strict=True):
        print(f"s = {s:<4} believes the note in {100 * share:.0f} % of the answers")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    plot(scales, shares, options.out)
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()

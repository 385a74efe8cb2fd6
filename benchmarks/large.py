"""Guided decoding at the size of LlamaGen-XL: 36 layers of width 1280, 120 condition tokens, 576 tokens, batch 1, bfloat16.

    python benchmarks/large.py --rounds 3 --out benchmarks/results

For a GPU; random weights. A step cannot take less than reading the weights and the cache does, which is the ceiling in the
table: `share of the ceiling` is of the rate at which the same run reads memory.
"""

from __future__ import annotations

import torch
import transformers
from timing import Case, Group, command_line, device
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from models import TokenTransformer, TokenTransformerConfig
from unicfg import ConditionDropout, Guidance, sample_autoregressive

VOCABULARY, WIDTH, LAYERS, HEADS, INNER = 16384, 1280, 36, 20, 3456
PREFIX, SIDE, SCALE = 120, 24, 3.0
TOKENS = SIDE**2
PLAIN, OURS = "unicfg, s = 1, compiled", "unicfg, guided, compiled"
EAGER = "unicfg, guided"
THEIRS = "transformers generate(guidance_scale=3)"


def our_cases(batch: int, model: TokenTransformer) -> dict[str, Case]:
    """Without and with guidance in the recorded step, and guided as it is."""
    null = torch.zeros(PREFIX, dtype=torch.long, device=device())
    wrapped = ConditionDropout(model, null).eval()
    cond = torch.randint(1, VOCABULARY, (batch, PREFIX), device=device())

    def sample(scale: float, compile: bool) -> Tensor:
        return sample_autoregressive(
            wrapped, cond, guidance=Guidance(scale), seeds=range(batch), compile=compile
        )

    return {
        PLAIN: lambda: sample(1.0, True),
        OURS: lambda: sample(SCALE, True),
        EAGER: lambda: sample(SCALE, False),
    }


def transformers_case(batch: int) -> dict[str, Case]:
    """A Llama of the same size, which runs a forward pass for each branch."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        max_position_embeddings=PREFIX + TOKENS,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(config).eval().to(device(), torch.bfloat16)
    cond = torch.randint(1, VOCABULARY, (batch, PREFIX), device=device())
    null = torch.zeros_like(cond)

    def guided() -> Tensor:
        return model.generate(
            cond,
            guidance_scale=SCALE,
            negative_prompt_ids=null,
            attention_mask=torch.ones_like(cond),
            max_new_tokens=TOKENS,
            min_new_tokens=TOKENS,
            do_sample=True,
            top_k=0,
            pad_token_id=0,
        )

    return {THEIRS: guided}


def group(batch: int) -> Group:
    """All cases of a batch size."""
    config = TokenTransformerConfig(
        codebook_size=VOCABULARY,
        grid=SIDE,
        condition_vocabulary=VOCABULARY,
        condition_length=PREFIX,
        width=WIDTH,
        depth=LAYERS,
        heads=HEADS,
    )
    model = TokenTransformer(config).eval().to(device(), torch.bfloat16)
    cases = our_cases(batch, model) | transformers_case(batch)
    ratios = (
        (f"guided, compiled, against `{THEIRS}`", OURS, THEIRS, "-"),
        ("guided, against unguided, both compiled", OURS, PLAIN, "-"),
        ("guided, compiled against as it is", OURS, EAGER, "-"),
    )
    weights = sum(p.nbytes for p in model.body.blocks.parameters()) + model.head.weight.nbytes
    # a step reads the weights once and, on average, half of the image's part of the cache
    row = 2 * LAYERS * WIDTH * 2 * (PREFIX + TOKENS / 2)
    rows = {PLAIN: batch, OURS: 2 * batch, EAGER: 2 * batch}
    read = {name: TOKENS * (weights + row * count) for name, count in rows.items()}
    return Group(f"Batch {batch}", cases, ("step", TOKENS), ratios, read)


def main() -> None:
    """Measure, print, and write the table."""
    transformers.logging.set_verbosity_error()
    title = "Guided decoding at the size of LlamaGen-XL, bfloat16"
    command_line("large", title, group, (1,), ("torch", "transformers"))


if __name__ == "__main__":
    main()

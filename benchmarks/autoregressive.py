"""Guided autoregressive decoding beside transformers, x-transformers, and a loop written for nothing else.

    python benchmarks/autoregressive.py --rounds 5 --out benchmarks/results

Models of the same size with random weights: vocabulary 1,024, width 384, 6 layers, 6 heads, SwiGLU inner 1,024, a prefix
of 16 condition tokens, then 256 tokens at scale 3 and temperature 1 with no top-k.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from timing import Case, Group, command_line, device
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, LogitsProcessor

from models import TokenTransformer, TokenTransformerConfig
from unicfg import ConditionDropout, Guidance, sample_autoregressive
from unicfg.guidance import schedules
from unicfg.integrations.transformers import guided_generate

VOCABULARY, WIDTH, LAYERS, HEADS, INNER = 1024, 384, 6, 6, 1024
PREFIX, TOKENS, SCALE = 16, 256, 3.0
OURS, COMPILED = "unicfg, guided", "unicfg, guided, compiled"
PLAIN, PLAIN_COMPILED = "unicfg, s = 1", "unicfg, s = 1, compiled"
LATE = "unicfg, guided from 60 % on"
THEIRS = "transformers generate(guidance_scale=3)"
OURS_THERE = "transformers generate(custom_generate=guided_generate)"
BATCHED, MINIMAL = (
    "transformers, both branches in one batch",
    "a minimal loop, compiled, guided",
)


def our_model() -> TokenTransformer:
    """With random weights."""
    config = TokenTransformerConfig(
        codebook_size=VOCABULARY,
        grid=16,
        condition_vocabulary=VOCABULARY,
        condition_length=PREFIX,
        width=WIDTH,
        depth=LAYERS,
        heads=HEADS,
    )
    return TokenTransformer(config).eval().to(device())


def our_cases(batch: int, model: TokenTransformer) -> dict[str, Case]:
    """Without and with guidance, eager and compiled, and guided for the last 40 % of the tokens only."""
    null = torch.zeros(PREFIX, dtype=torch.long, device=device())
    wrapped = ConditionDropout(model, null).eval()
    cond = torch.randint(1, VOCABULARY, (batch, PREFIX), device=device())

    def sample(scale: Any, compile: bool = False) -> Tensor:
        return sample_autoregressive(
            wrapped, cond, guidance=Guidance(scale), seeds=range(batch), compile=compile
        )

    return {
        PLAIN: lambda: sample(1.0),
        OURS: lambda: sample(SCALE),
        LATE: lambda: sample(schedules.interval(SCALE, 0.6, 1.0)),
        PLAIN_COMPILED: lambda: sample(1.0, True),
        COMPILED: lambda: sample(SCALE, True),
    }


class InOneBatch(LogitsProcessor):  # type: ignore[misc]
    """Guidance for rows [cond; uncond], and the same noise for both, so that the likeliest token is a draw."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """The guided logits with Gumbel noise, twice."""
        cond, uncond = scores.chunk(2)
        guided = torch.lerp(uncond, cond, SCALE)
        drawn = guided - torch.empty_like(guided).exponential_().log()
        return torch.cat([drawn, drawn])


def transformers_cases(batch: int) -> dict[str, Case]:
    """A Llama of the same size: unguided, with ``guidance_scale``, with ours in its place, with both branches in one batch."""
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
    model = LlamaForCausalLM(config).eval().to(device())
    cond = torch.randint(1, VOCABULARY, (batch, PREFIX), device=device())
    null = torch.zeros_like(cond)
    options = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "pad_token_id": 0}
    drawing = options | {"do_sample": True, "top_k": 0, "attention_mask": torch.ones_like(cond)}
    both = torch.cat([cond, null])

    def guided() -> Tensor:
        return model.generate(cond, guidance_scale=SCALE, negative_prompt_ids=null, **drawing)

    def in_one_batch() -> Tensor:
        return model.generate(
            both,
            do_sample=False,
            logits_processor=[InOneBatch()],
            attention_mask=torch.ones_like(both),
            **options,
        )

    def guided_by_us() -> Tensor:
        return model.generate(
            cond,
            custom_generate=guided_generate,
            guidance=Guidance(SCALE),
            uncond_ids=null,
            uncond_attention_mask=torch.ones_like(null),  # 0 is a token here, not padding
            **drawing,
        )

    return {
        "transformers generate, s = 1": lambda: model.generate(cond, **drawing),
        THEIRS: guided,
        OURS_THERE: guided_by_us,
        BATCHED: in_one_batch,
    }


def x_transformers_case(batch: int) -> dict[str, Case]:
    """A decoder of the same size, in a loop over its cache with both branches in one batch; it has no guidance."""
    from x_transformers import Decoder, TransformerWrapper

    layers = Decoder(
        dim=WIDTH,
        depth=LAYERS,
        heads=HEADS,
        attn_dim_head=WIDTH // HEADS,
        ff_swish=True,
        ff_glu=True,
        ff_mult=INNER / WIDTH,
        ff_no_bias=True,
        use_rmsnorm=True,
        rotary_pos_emb=True,
        attn_flash=True,
    )
    model = TransformerWrapper(
        num_tokens=VOCABULARY, max_seq_len=PREFIX + TOKENS, attn_layers=layers
    )
    model = model.eval().to(device())
    ids = torch.randint(1, VOCABULARY, (2 * batch, PREFIX), device=device())

    @torch.no_grad()
    def loop() -> Tensor:
        seen, cache = ids, None
        for _ in range(TOKENS):
            logits, cache = model(seen, cache=cache, return_intermediates=True)
            cond, uncond = logits[:, -1].chunk(2)
            token = torch.lerp(uncond, cond, SCALE).softmax(-1).multinomial(1)
            seen = torch.cat([seen, torch.cat([token, token])], dim=1)
        return seen

    return {"x-transformers, both branches in one batch": loop}


def minimal_case(model: TokenTransformer) -> dict[str, Case]:
    """The least that can be written for one prompt: one compiled function, no checks, no options."""
    body = model.body
    sizes = (2, HEADS, PREFIX + TOKENS, WIDTH // HEADS)
    keys, values = ([torch.zeros(sizes) for _ in range(LAYERS)] for _ in range(2))

    def step(ids: Tensor, place: Tensor, keys: list[Tensor], values: list[Tensor]) -> Tensor:
        x = model.embedding(ids)[:, None] + body.positions().index_select(0, place[None])
        slot = (place + PREFIX)[None]
        hidden = torch.arange(PREFIX + TOKENS) > slot
        for block, key, value in zip(body.blocks, keys, values, strict=True):
            q, k, v = block.qkv(block.norm1(x)).view(2, 3, HEADS, 1, WIDTH // HEADS).unbind(1)
            key.index_copy_(2, slot, k)
            value.index_copy_(2, slot, v)
            scores = (q @ key.transpose(-1, -2)) * (WIDTH // HEADS) ** -0.5
            mixed = scores.masked_fill(hidden, -torch.inf).softmax(-1) @ value
            x = x + block.out(mixed.transpose(1, 2).reshape(2, 1, WIDTH))
            weight, up = block.gate_up(block.norm2(x)).chunk(2, dim=-1)
            x = x + block.down(F.silu(weight) * up)
        cond, uncond = model.head(body.norm(x[:, 0])).chunk(2)
        return torch.lerp(uncond, cond, SCALE).softmax(-1)

    unguarded = torch.compiler.skip_guard_on_all_nn_modules_unsafe
    fast = torch.compile(
        step,
        dynamic=False,
        fullgraph=True,
        options={"max_autotune": True, "guard_filter_fn": unguarded},
    )
    cond = torch.randint(1, VOCABULARY, (2, PREFIX))

    @torch.no_grad()
    def loop() -> Tensor:
        with torch._inductor.config.patch(freezing=True, autotune_num_choices_displayed=0):
            for layer, (key, value) in enumerate(model.body.encode_condition(cond).layers):
                keys[layer][:, :, :PREFIX] = key
                values[layer][:, :, :PREFIX] = value
            ids, drawn = torch.zeros(2, dtype=torch.long), []
            for place in range(TOKENS):
                ids = fast(ids, torch.tensor(place), keys, values).multinomial(1)[0].expand(2)
                ids = ids.clone()
                drawn.append(ids[:1])
            return torch.cat(drawn)

    return {MINIMAL: loop}


def group(batch: int) -> Group:
    """All cases of a batch size."""
    model = our_model()
    cases = our_cases(batch, model)
    cases |= transformers_cases(batch) | x_transformers_case(batch)
    ratios = [
        (f"guided, against `{THEIRS}`", OURS, THEIRS, "2.2" if batch == 1 else "2"),
        (f"guided, against `{BATCHED}`", OURS, BATCHED, "1.6"),
        ("guided from 60 % on, against unguided", LATE, PLAIN, "at least 0.80"),
        ("guided, against unguided", OURS, PLAIN, "-"),
    ]
    ratios.append((f"`guided_generate`, against `{THEIRS}`", OURS_THERE, THEIRS, "1.5"))
    wanted = "5" if batch == 1 else "2.4"
    ratios += [
        (f"guided, compiled, against `{THEIRS}`", COMPILED, THEIRS, wanted),
        ("guided, against unguided, both compiled", COMPILED, PLAIN_COMPILED, "at least 0.80"),
    ]
    if batch == 1 and device().type == "cpu":
        cases |= minimal_case(model)
        name = f"guided, compiled, against `{MINIMAL}`"
        ratios.append((name, COMPILED, MINIMAL, "at least 0.87"))
    weights = sum(p.nbytes for p in model.body.blocks.parameters()) + model.head.weight.nbytes
    # a step reads the weights once and, on average, half of the cache
    row = 2 * LAYERS * WIDTH * 4 * (PREFIX + TOKENS / 2)
    read = {
        name: TOKENS * (weights + row * batch * (1 if name in (PLAIN, PLAIN_COMPILED) else 2))
        for name in cases
        if name.startswith("unicfg") and name != LATE
    }
    return Group(f"Batch {batch}", cases, ("step", TOKENS), tuple(ratios), read)


def main() -> None:
    """Measure, print, and write the table."""
    transformers.logging.set_verbosity_error()
    command_line(
        "autoregressive",
        "Guided autoregressive decoding",
        group,
        (1, 8, 16),
        ("torch", "transformers", "x-transformers"),
    )


if __name__ == "__main__":
    main()

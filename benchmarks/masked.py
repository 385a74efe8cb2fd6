"""Guided masked generation beside aMUSEd (diffusers) and muse-maskgit-pytorch.

    python benchmarks/masked.py --rounds 5 --out benchmarks/results

Random weights: vocabulary 1,024, width 384, 6 layers, 6 heads, 16 condition tokens and 256 image tokens, 12 steps at scale
3, in the order of confidence as the others have it, and in a fixed one. aMUSEd is a U-ViT: here with as many transformer
layers and no residual blocks. muse-maskgit-pytorch attends to its text by a second attention in each layer; it is measured
where it is installed, and wants a torchvision of torch's own build:

    pip install --no-deps muse-maskgit-pytorch==0.3.5 beartype ema-pytorch memory-efficient-attention-pytorch sentencepiece
"""

from __future__ import annotations

import importlib.util
import sys
from types import SimpleNamespace
from unittest.mock import MagicMock

import torch
from diffusers import AmusedScheduler, UVit2DModel
from timing import Case, Group, command_line, device
from torch import Tensor

from models import MaskedTransformer, TokenTransformerConfig
from unicfg import ConditionDropout, Guidance, sample_masked
from unicfg.guidance import schedules
from unicfg.sampling.masked import Reveal, masked_share

VOCABULARY, WIDTH, LAYERS, HEADS = 1024, 384, 6, 6
PREFIX, SIDE, STEPS, SCALE = 16, 16, 12, 3.0
OURS, PLAIN, LATE = "unicfg, guided", "unicfg, s = 1", "unicfg, guided from 60 % on"
FIXED = "unicfg, guided, fixed order"
AMUSED, MUSE = "aMUSEd, guided", "muse-maskgit-pytorch, guided"


def our_cases(batch: int) -> dict[str, Case]:
    """Without and with guidance, guided for the last 40 % only, and in the order that the pipeline has unless told otherwise."""
    config = TokenTransformerConfig(
        codebook_size=VOCABULARY,
        grid=SIDE,
        condition_vocabulary=VOCABULARY,
        condition_length=PREFIX,
        width=WIDTH,
        depth=LAYERS,
        heads=HEADS,
    )
    null = torch.zeros(PREFIX, dtype=torch.long)
    model = ConditionDropout(MaskedTransformer(config), null).eval().to(device())
    cond = torch.randint(1, VOCABULARY, (batch, PREFIX), device=device())

    def sample(scale: object, reveal: Reveal = "cosine") -> Tensor:
        return sample_masked(
            model,
            cond,
            guidance=Guidance(scale),  # type: ignore[arg-type]
            seeds=range(batch),
            steps=STEPS,
            reveal=reveal,
        )

    return {
        PLAIN: lambda: sample(1.0),
        OURS: lambda: sample(SCALE),
        FIXED: lambda: sample(SCALE, "halton"),
        LATE: lambda: sample(schedules.interval(SCALE, 0.6, 1.0)),
    }


def amused_case(batch: int) -> dict[str, Case]:
    """The loop of ``AmusedPipeline`` without its text encoder and its decoder."""
    model = UVit2DModel(
        hidden_size=WIDTH,
        cond_embed_dim=WIDTH,
        micro_cond_encode_dim=64,
        micro_cond_embed_dim=64 * 5,
        encoder_hidden_size=WIDTH,
        vocab_size=VOCABULARY + 1,
        codebook_size=VOCABULARY,
        in_channels=WIDTH,
        block_out_channels=WIDTH,
        num_res_blocks=0,
        block_num_heads=HEADS,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        intermediate_size=1024,
        sample_size=SIDE,
    )
    model = model.eval().to(device())
    text = torch.randn(2 * batch, PREFIX, WIDTH, device=device())
    pooled = torch.randn(2 * batch, WIDTH, device=device())
    micro = torch.full((2 * batch, 5), 256.0, device=device())

    @torch.no_grad()
    def loop() -> Tensor:
        scheduler = AmusedScheduler(mask_token_id=VOCABULARY)
        scheduler.set_timesteps(STEPS, device=device())
        ids = torch.full((batch, SIDE, SIDE), VOCABULARY, device=device())
        for timestep in scheduler.timesteps:
            out = model(
                torch.cat([ids] * 2),
                micro_conds=micro,
                pooled_text_emb=pooled,
                encoder_hidden_states=text,
            )
            uncond, cond = out.chunk(2)
            ids = scheduler.step(torch.lerp(uncond, cond, SCALE), timestep, ids).prev_sample
        return ids

    return {AMUSED: loop}


def muse_case(batch: int) -> dict[str, Case]:
    """``MaskGit.generate`` up to the tokens, with made-up text embeddings."""
    if importlib.util.find_spec("muse_maskgit_pytorch") is None:
        print("muse-maskgit-pytorch is not installed: it is left out")
        return {}
    if "torchvision" not in sys.modules and importlib.util.find_spec("torchvision") is None:
        # it serves the reading of image files, of which there are none here
        names = (
            "torchvision",
            *(f"torchvision.{part}" for part in ("transforms", "datasets", "utils")),
        )
        sys.modules |= {name: MagicMock(__spec__=None) for name in names}
    from muse_maskgit_pytorch import muse_maskgit_pytorch as muse
    from muse_maskgit_pytorch import t5
    from transformers import T5Config

    t5.T5_CONFIGS["none"] = {"config": T5Config(d_model=WIDTH)}
    transformer = muse.MaskGitTransformer(
        num_tokens=VOCABULARY,
        seq_len=SIDE**2,
        dim=WIDTH,
        depth=LAYERS,
        dim_head=WIDTH // HEADS,
        heads=HEADS,
        ff_mult=4,
        t5_name="none",
        flash=True,
    )
    text = torch.randn(batch, PREFIX, WIDTH, device=device())
    transformer.encode_text = lambda texts: text
    model = muse.MaskGit.__new__(muse.MaskGit)
    torch.nn.Module.__init__(model)
    # what generate() looks at; the constructor would ask for an image autoencoder
    model.transformer, model.token_critic, model.image_size = transformer, None, SIDE
    model.vae = SimpleNamespace(
        get_encoded_fmap_size=lambda size: size, decode_from_ids=lambda ids: ids
    )
    model.mask_id, model.noise_schedule = transformer.mask_id, muse.cosine_schedule
    model.self_cond, model.resize_image_for_cond_image = False, False
    model.to(device())

    def generate() -> Tensor:
        return model.generate([""] * batch, timesteps=STEPS, cond_scale=SCALE)

    return {MUSE: generate}


def group(batch: int) -> Group:
    """All cases of a batch size."""
    cases = our_cases(batch) | amused_case(batch) | muse_case(batch)
    ratios = (
        (f"guided, against {AMUSED}", OURS, AMUSED, "1.5"),
        *([(f"guided, against {MUSE}", OURS, MUSE, "1.7")] if MUSE in cases else []),
        (f"guided in a fixed order, against {AMUSED}", FIXED, AMUSED, "-"),
        *(
            [(f"guided in a fixed order, against {MUSE}", FIXED, MUSE, "-")]
            if MUSE in cases
            else []
        ),
        ("guided, against unguided", OURS, PLAIN, "-"),
        ("guided from 60 % on, against unguided", LATE, PLAIN, "-"),
    )
    # of the matrices; attention adds a few percent. Of the last block and the head only tokens that can be drawn are wanted
    rest = WIDTH**2 + 3 * WIDTH * 1024
    a_token = 2 * ((LAYERS - 1) * (3 * WIDTH**2 + rest) + 3 * WIDTH**2)
    drawn = 2 * (rest + WIDTH * VOCABULARY)
    asked = sum(masked_share("cosine", step / STEPS) for step in range(STEPS))
    operations = {
        name: SIDE**2 * batch * branches * (STEPS * a_token + times * drawn)
        for name, branches, times in ((PLAIN, 1, asked), (OURS, 2, asked), (FIXED, 2, 1))
    }
    return Group(f"Batch {batch}", cases, ("image", batch), ratios, operations=operations)


def main() -> None:
    """Measure, print, and write the table."""
    packages = ["torch", "diffusers"]
    if importlib.util.find_spec("muse_maskgit_pytorch") is not None:
        packages.append("muse-maskgit-pytorch")
    command_line("masked", "Guided masked generation", group, (1, 8), packages)


if __name__ == "__main__":
    main()

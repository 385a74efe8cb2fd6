"""Guided latent diffusion beside diffusers' DiTPipeline.

    python benchmarks/diffusion.py --rounds 5 --out benchmarks/results

Random weights: latents of 4 x 16 x 16 in patches of 2, width 384, 6 layers, 6 heads, a class as condition, 20 steps of DDIM
at scale 3. The pipeline decodes with an autoencoder of one small layer, which takes a few percent of its time.
"""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from timing import Case, Group, command_line, device
from torch import Tensor

from models import LatentDenoiser, LatentDenoiserConfig
from unicfg import ConditionDropout, Guidance, sample_diffusion
from unicfg.guidance import schedules

WIDTH, LAYERS, HEADS = 384, 6, 6
CHANNELS, SIDE, PATCH, STEPS, SCALE, CLASSES = 4, 16, 2, 20, 3.0, 1000
OURS, PLAIN, LATE = "unicfg, guided", "unicfg, s = 1", "unicfg, guided for 40 % of the steps"
PIPELINE, LOOP = "DiTPipeline, guided", "its model in a plain loop, guided"


def our_cases(batch: int) -> dict[str, Case]:
    """Without and with guidance, and guided for the middle 40 % only."""
    config = LatentDenoiserConfig(
        grid=SIDE,
        latent_channels=CHANNELS,
        patch=PATCH,
        condition_vocabulary=CLASSES + 1,
        condition_length=1,
        width=WIDTH,
        depth=LAYERS,
        heads=HEADS,
        space="eps",
    )
    null = torch.tensor([CLASSES])
    model = ConditionDropout(LatentDenoiser(config), null).eval().to(device())
    cond = torch.randint(CLASSES, (batch, 1), device=device())

    def sample(scale: object) -> Tensor:
        return sample_diffusion(
            model,
            cond,
            guidance=Guidance(scale),  # type: ignore[arg-type]
            seeds=range(batch),
            steps=STEPS,
        )

    return {
        PLAIN: lambda: sample(1.0),
        OURS: lambda: sample(SCALE),
        LATE: lambda: sample(schedules.interval(SCALE, 0.3, 0.7)),
    }


def diffusers_cases(batch: int) -> dict[str, Case]:
    """The pipeline, and what its loop would be without all around it."""
    model = DiTTransformer2DModel(
        num_attention_heads=HEADS,
        attention_head_dim=WIDTH // HEADS,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_layers=LAYERS,
        sample_size=SIDE,
        patch_size=PATCH,
        num_embeds_ada_norm=CLASSES,
    )
    decoder = AutoencoderKL(latent_channels=CHANNELS, block_out_channels=(32,))
    pipe = DiTPipeline(model.eval(), decoder.eval(), DDIMScheduler()).to(device())
    pipe.set_progress_bar_config(disable=True)
    classes = torch.randint(CLASSES, (batch,), device=device())
    labels = torch.cat([classes, torch.full_like(classes, CLASSES)])

    @torch.no_grad()
    def loop() -> Tensor:
        scheduler = DDIMScheduler()
        scheduler.set_timesteps(STEPS, device=device())
        x = torch.randn(batch, CHANNELS, SIDE, SIDE, device=device())
        for timestep in scheduler.timesteps:
            times = timestep.to(device()).expand(2 * batch)
            out = model(torch.cat([x, x]), timestep=times, class_labels=labels).sample
            cond, uncond = out.chunk(2)
            x = scheduler.step(torch.lerp(uncond, cond, SCALE), timestep, x).prev_sample
        return x

    def run() -> object:
        options = {"num_inference_steps": STEPS, "output_type": "pt"}
        return pipe(classes.tolist(), guidance_scale=SCALE, **options)

    return {PIPELINE: run, LOOP: loop}


def group(batch: int) -> Group:
    """All cases of a batch size."""
    cases = our_cases(batch) | diffusers_cases(batch)
    ratios = (
        (f"guided, against {PIPELINE}", OURS, PIPELINE, "1.5"),
        (f"guided, against {LOOP}", OURS, LOOP, "-"),
        ("guided, against unguided", OURS, PLAIN, "-"),
        ("guided for 40 % of the steps, against unguided", LATE, PLAIN, "-"),
    )
    a_token = 2 * (LAYERS * (4 * WIDTH**2 + 3 * WIDTH * 1024) + 2 * WIDTH * CHANNELS * PATCH**2)
    tokens = STEPS * (SIDE // PATCH) ** 2 * batch
    operations = {PLAIN: 1.0 * tokens * a_token, OURS: 2.0 * tokens * a_token}
    return Group(f"Batch {batch}", cases, ("image", batch), ratios, operations=operations)


def main() -> None:
    """Measure, print, and write the table."""
    command_line("diffusion", "Guided latent diffusion", group, (1, 8), ("torch", "diffusers"))


if __name__ == "__main__":
    main()

"""A classic pipeline of diffusers with adaptive projected guidance, in the middle of the sampling only.

    python examples/6_diffusers_pipeline.py --out out/diffusers.png
    python examples/6_diffusers_pipeline.py --model stable-diffusion-v1-5/stable-diffusion-v1-5 --prompt "a cat" --scale 10

Without ``--model`` a tiny Stable Diffusion with random weights is built here: its picture shows nothing, but it takes
the same way as a real one, offline and in seconds. Outside of the interval the U-Net runs the rows of the prompt alone,
half of what the pipeline itself would run; the count is printed.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from unicfg import Guidance
from unicfg.guidance import mitigations, schedules
from unicfg.integrations.diffusers import guided_pipeline


def tiny_pipeline() -> StableDiffusionPipeline:
    """A Stable Diffusion of random weights and a tokenizer of single letters: pictures of 16 x 16."""
    torch.manual_seed(0)
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocab = {word: index for index, word in enumerate(words)}
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=4,
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 8),
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
    )
    text = CLIPTextConfig(
        vocab_size=len(vocab),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=16,
        bos_token_id=vocab["<|startoftext|>"],
        eos_token_id=vocab["<|endoftext|>"],
        pad_token_id=vocab["<|endoftext|>"],
    )
    return StableDiffusionPipeline(
        vae=vae.eval(),
        text_encoder=CLIPTextModel(text).eval(),
        tokenizer=CLIPTokenizer(vocab=vocab, merges=[], model_max_length=16),
        unet=unet.eval(),
        scheduler=DDIMScheduler(clip_sample=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def draw(
    pipe: StableDiffusionPipeline, prompt: str, scale: float, steps: int, seed: int = 0
) -> tuple[Image.Image, int]:
    """A picture of the prompt, and the number of rows that the U-Net ran."""
    rows: list[int] = []

    def count(module: torch.nn.Module, inputs: tuple[Any, ...], result: Any) -> None:
        rows.append(len(result[0]))

    guidance = Guidance(schedules.interval(scale, 0.2, 0.8), [mitigations.apg(threshold=7.5)])
    guided = guided_pipeline(pipe, guidance)
    hook = pipe.unet.register_forward_hook(count)
    try:
        images = guided(
            prompt, num_inference_steps=steps, generator=torch.Generator().manual_seed(seed)
        ).images
    finally:
        hook.remove()
    return images[0], sum(rows)


def main() -> None:
    """Build or load a pipeline, and draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="of Stable Diffusion, a name or a folder; tiny if left out")
    parser.add_argument("--prompt", default="a cat")
    parser.add_argument("--scale", type=float, default=7.5)
    parser.add_argument("--steps", type=int, default=11)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out/diffusers.png"))
    args = parser.parse_args()
    pipe = (
        StableDiffusionPipeline.from_pretrained(args.model)
        if args.model is not None
        else tiny_pipeline()
    )
    image, rows = draw(pipe, args.prompt, args.scale, args.steps, args.seed)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    image.save(args.out)
    print(f"{args.out}: the U-Net ran {rows} rows, {2 * args.steps} without the interval")


if __name__ == "__main__":
    main()

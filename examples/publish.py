r"""Turn a finished run into weights that can be shipped: 8-bit integers, the recipe, and a card with numbers.

    python examples/publish.py runs/emoji models/weights/emoji --card examples/recipes/emoji.md \
        --recipe examples/recipes/emoji.yaml

The card begins with the given text (data, licences, limits). The losses in it are read from the run's own logs; the
tokenizer is measured as it is shipped, and the last losses are there once more as they are with the shipped weights.
"""

from __future__ import annotations

import argparse
import json
import shutil
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models import TextToImage
from models.folders import held_families
from tokenizers_vq import to_float
from unicfg.training.encode import encode_batches
from unicfg.training.families import training_data, training_loss
from unicfg.training.recipe import Recipe, load_recipe
from unicfg.training.shards import Shards
from unicfg.training.sources import read_captions
from unicfg.training.trainer import evaluate_tokenizer, validation_losses


def read_log(file: Path, key: str) -> list[dict[str, Any]]:
    """The lines of a metrics file that hold ``key``."""
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    return [line for line in lines if key in line]


def shipped_loss(pipe: TextToImage, recipe: Recipe, images: Tensor, captions: list[str]) -> float:
    """The loss of a pipeline's weights on uint8 images (N, 3, H, W) with captions, with the noise of the logs."""
    codes = encode_batches(pipe.tokenizer, images, 0, torch.Generator())
    data = codes["ids"].long() if training_data(pipe.family) == "ids" else codes["latents"]
    loss = training_loss(recipe.model, pipe.network)
    cond = pipe.encode_prompts(captions)
    return validation_losses(pipe.model, loss, data, cond)["validation_loss"]


def summary(
    run: Path,
    pipes: list[TextToImage],
    shipped: dict[str, float],
    held_out: int,
    numbers: dict[str, float],
) -> str:
    """Parameters, what the tokenizer does to held-out images, and the losses in the logs and as shipped."""
    lines = [
        "## Numbers",
        "",
        f"Tokenizer: {_millions(pipes[0].tokenizer)} parameters; on {held_out} validation images "
        f"PSNR {numbers['psnr']:.2f} dB, codebook usage {100 * numbers['codebook_usage']:.1f} %, perplexity "
        f"{numbers['codebook_perplexity']:.0f}.",
        "",
        "Losses of the moving average on validation images, in float32: nats a token for ar, nats a masked token for "
        "masked, squared error for the others. Losses of different families cannot be compared.",
        "",
        "| family | parameters | step | with caption | null condition | with caption, as shipped |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for pipe in pipes:
        reports = read_log(run / f"logs/{pipe.family}/metrics.jsonl", "validation_loss")
        for line, own in (
            (reports[(len(reports) - 1) // 2], ""),
            (reports[-1], f"{shipped[pipe.family]:.3f}"),
        ):
            lines.append(
                f"| {pipe.family} | {_millions(pipe.network)} | {line['step']} "
                f"| {line['validation_loss']:.3f} | {line['validation_loss_uncond']:.3f} | {own} |"
            )
    return "\n".join(lines) + "\n"


def _millions(module: nn.Module) -> str:
    return f"{sum(p.numel() for p in module.parameters()) / 1e6:.2f} M"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="folder that unicfg train wrote")
    parser.add_argument("out", type=Path, help="folder to ship")
    parser.add_argument("--card", type=Path, required=True, help="beginning of the card")
    parser.add_argument(
        "--recipe", type=Path, required=True, help="YAML file of the run, kept beside the weights"
    )
    parser.add_argument(
        "--tokenizer-recipe", type=Path, help="that of the tokenizer, where another run trained it"
    )
    parser.add_argument("--reconstruction", type=Path, help="picture of held-out images to write")
    options = parser.parse_args()

    if options.out.exists() and any(options.out.iterdir()):
        held_families(options.out)  # what is replaced is a pipeline, or this raises
    # all is read before anything is written, and the old folder goes only when the new one is whole
    pipes = [
        TextToImage.from_pretrained(options.run, family) for family in held_families(options.run)
    ]
    card = options.card.read_text()
    recipes = {"recipe.yaml": options.recipe, "tokenizer-recipe.yaml": options.tokenizer_recipe}
    recipes = {name: file for name, file in recipes.items() if file is not None}
    for file in recipes.values():
        load_recipe(file)  # one that cannot be read is not shipped
    trained_by = {pipe.family: load_recipe(options.recipe, pipe.family) for pipe in pipes}
    (held_out,) = Shards(options.run / "images" / "validation", ("images",)).first(512)
    captions = list(chain(*read_captions(options.run / "images", "validation")))[: len(held_out)]
    beside = options.out.with_name(options.out.name + ".new")
    shutil.rmtree(beside, ignore_errors=True)
    for pipe in pipes:
        pipe.save_pretrained(beside, dtype=torch.int8)
    losses = {}
    for family, recipe in trained_by.items():
        shipped = TextToImage.from_pretrained(beside, family)
        losses[family] = shipped_loss(shipped, recipe, held_out, captions)
    numbers, picture = evaluate_tokenizer(shipped.tokenizer, to_float(held_out))
    (beside / "README.md").write_text(
        f"{card}\n{summary(options.run, pipes, losses, len(held_out), numbers)}"
    )
    for name, file in recipes.items():
        shutil.copy(file, beside / name)
    shutil.rmtree(options.out, ignore_errors=True)
    beside.rename(options.out)
    if options.reconstruction is not None:
        options.reconstruction.parent.mkdir(parents=True, exist_ok=True)
        picture.save(options.reconstruction)
    size = sum(f.stat().st_size for f in options.out.rglob("*") if f.is_file())
    print(f"{size / 1e6:.1f} MB in {options.out}; tokenizer on {len(held_out)} images: {numbers}")


if __name__ == "__main__":
    main()

"""Turn a finished run into weights that can be shipped: half precision, the recipe, and a card with numbers.

    python examples/publish.py runs/emoji models/weights/emoji --card examples/recipes/emoji.md

The card begins with the given text (data, licences, limits); the tables of losses and of the tokenizer are read from
the run's own logs.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import torch

from models import TextToImage
from tokenizers_vq import to_float
from unicfg.training.recipe import load_recipe
from unicfg.training.trainer import evaluate_tokenizer, load_data


def read_log(file: Path, key: str) -> list[dict[str, Any]]:
    """The lines of a metrics file that hold ``key``."""
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    return [line for line in lines if key in line]


def summary(run: Path) -> str:
    """What the logs say: parameters, steps, losses, reconstruction."""
    pipe = TextToImage.from_pretrained(run)
    counts = [sum(p.numel() for p in m.parameters()) for m in (pipe.tokenizer, pipe.network)]
    tokenizer = read_log(run / "logs/tokenizer/metrics.jsonl", "psnr")[-1]
    lines = [
        "## Numbers",
        "",
        f"Tokenizer: {counts[0] / 1e6:.2f} M parameters, {tokenizer['step']} steps; on the validation images "
        f"PSNR {tokenizer['psnr']:.2f} dB, codebook usage {100 * tokenizer['codebook_usage']:.1f} %, perplexity "
        f"{tokenizer['codebook_perplexity']:.0f}.",
        "",
        f"Model (ar): {counts[1] / 1e6:.2f} M parameters. Cross-entropy in nats a token:",
        "",
        "| step | training, last batch | validation, with caption | validation, null condition |",
        "|--:|--:|--:|--:|",
    ]
    losses = {
        line["step"]: line["loss"] for line in read_log(run / "logs/ar/metrics.jsonl", "loss")
    }
    for line in read_log(run / "logs/ar/metrics.jsonl", "validation_loss"):
        lines.append(
            f"| {line['step']} | {losses.get(line['step'], float('nan')):.2f} "
            f"| {line['validation_loss']:.2f} | {line['validation_loss_uncond']:.2f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="folder that unicfg train wrote")
    parser.add_argument("out", type=Path, help="folder to ship")
    parser.add_argument("--card", type=Path, required=True, help="beginning of the card")
    parser.add_argument("--recipe", type=Path, help="YAML file of the run, kept beside the weights")
    parser.add_argument("--reconstruction", type=Path, help="picture of held-out images to write")
    options = parser.parse_args()

    pipe = TextToImage.from_pretrained(options.run)
    shutil.rmtree(options.out, ignore_errors=True)
    pipe.save_pretrained(options.out, dtype=torch.float16)
    (options.out / "README.md").write_text(options.card.read_text() + "\n" + summary(options.run))
    if options.recipe is not None:
        shutil.copy(options.recipe, options.out / "recipe.yaml")
    if options.reconstruction is not None and options.recipe is not None:
        recipe = load_recipe(options.recipe)
        _, held_out = load_data(recipe.data).split(recipe.data.validation)
        shipped = TextToImage.from_pretrained(options.out)
        numbers, picture = evaluate_tokenizer(shipped.tokenizer, to_float(held_out.images[:512]))
        options.reconstruction.parent.mkdir(parents=True, exist_ok=True)
        picture.save(options.reconstruction)
        print(f"{min(len(held_out), 512)} held-out images, half precision: {numbers}")
    size = sum(f.stat().st_size for f in options.out.rglob("*") if f.is_file())
    print(f"{size / 1e6:.1f} MB in {options.out}")


if __name__ == "__main__":
    main()

"""What int8 weights change: the distribution of the next token, the attributes that are right, memory and time.

    python benchmarks/int8.py --out benchmarks/results

The divergence is KL(float || int8) in nats a token, on the tokens of drawn scenes with their true captions, for the
conditional distribution and for the guided one. Images are of the same seeds in both.
"""

from __future__ import annotations

import argparse
import json
import statistics
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch
from attributes import BATCH, SCENES_SEED, grade
from timing import machine, measure
from torch import Tensor
from tqdm.auto import tqdm

from models import TextToImage
from models.quantized import stored
from tokenizers_vq import to_float
from tokenizers_vq.files import write_text_atomically
from unicfg import Guidance, guide
from unicfg.training.data import ImageSet
from unicfg.training.shapes import make_shapes

FAMILIES = ("ar", "masked", "diffusion", "flow", "hybrid")


@torch.no_grad()
def guided_logits(pipe: TextToImage, scenes: ImageSet, scale: float) -> Tensor:
    """Of every token of the scenes, with those before it known; for masked, with every second one known."""
    cond = pipe.encode_prompts(scenes.captions)
    ids = pipe.tokenizer.encode(to_float(scenes.images)).flatten(1)
    if pipe.family == "masked":
        ids = ids.clone()
        ids[:, ::2] = pipe.network.mask_token
    null = pipe.model.null_condition.expand_as(cond)
    return guide(pipe.network(ids, cond), pipe.network(ids, null), scale)


def divergence(pipe: TextToImage, small: TextToImage, scenes: ImageSet, scale: float) -> float:
    """KL(float || int8), mean over scenes and tokens."""
    p, q = (guided_logits(own, scenes, scale).log_softmax(-1) for own in (pipe, small))
    return float((p.exp() * (p - q)).sum(-1).mean())


def held(pipe: TextToImage) -> int:
    """Bytes of the network's weights."""
    return sum(part.nbytes for p in pipe.network.parameters() for part in stored(p))


def draw(pipe: TextToImage, scenes: ImageSet, scale: float, compile: bool = False) -> Tensor:
    """Images of the scenes' captions, seed i for scene i."""
    options: dict[str, Any] = {"compile": True} if compile else {}
    return pipe.sample(
        scenes.captions,
        seeds=range(len(scenes)),
        guidance=Guidance(scale),
        batch_size=BATCH,
        **options,
    )


def measured(family: str, options: argparse.Namespace) -> dict[str, Any]:
    """All numbers of one family."""
    scenes = make_shapes(options.n, seed=SCENES_SEED, wrong=0.0)
    pipe = TextToImage.from_pretrained(options.weights, family)
    small = pipe.quantize()
    result: dict[str, Any] = {"bytes": [held(pipe), held(small)]}
    if family in ("ar", "masked"):
        few = scenes.select(range(min(64, len(scenes))))
        result["kl"] = {s: divergence(pipe, small, few, s) for s in (1.0, options.scale)}
    for name, own in (("float", pipe), ("int8", small)):
        accuracy = grade(draw(own, scenes, options.scale), scenes)
        result[name] = (accuracy.mean, accuracy.standard_error)
    one = scenes.select(range(1))
    cases = {
        name: partial(draw, own, one, options.scale)
        for name, own in (("float", pipe), ("int8", small))
    }
    if family == "ar":
        cases |= {
            f"{name}, compiled": partial(draw, own, one, options.scale, True)
            for name, own in (("float", pipe), ("int8", small))
        }
    result["seconds"] = measure(cases, options.rounds)
    return result


def table(results: dict[str, Any], command: str) -> str:
    """Markdown, a row a family."""
    n, scale = results["settings"]["n"], results["settings"]["scale"]
    lines = [
        "# int8 weights",
        "",
        f"KL(float || int8) in nats a token on 64 scenes, unguided and at s = {scale:g}; attributes right in percent at s = {scale:g}, "
        f"{n} images, mean +- standard error; time of int8 against float at batch 1, median of {results['settings']['rounds']} "
        f"rounds in turn. {results['machine']}.",
        f"`{command}`.",
        "",
        f"| family | weights, MB | KL, s = 1 | KL, s = {scale:g} | attributes, float | int8 | time |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for family, own in results["families"].items():
        middle = {name: statistics.median(values) for name, values in own["seconds"].items()}
        time = f"{middle['int8'] / middle['float']:.2f}x"
        if "int8, compiled" in middle:
            ratio = middle["int8, compiled"] / middle["float, compiled"]
            time += f", compiled {ratio:.2f}x"
        kl = [f"{own['kl'][s]:.4f}" if "kl" in own else "-" for s in (1.0, scale)]
        marks = [
            f"{100 * own[name][0]:.1f} +- {100 * own[name][1]:.1f}" for name in ("float", "int8")
        ]
        size = " to ".join(f"{count / 1e6:.1f}" for count in own["bytes"])
        lines.append(f"| {family} | {size} | {' | '.join([*kl, *marks])} | {time} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", default="shapes")
    parser.add_argument("-n", type=int, default=256, help="images a cell")
    parser.add_argument("--scale", type=float, default=2.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    warnings.filterwarnings("ignore", module="torch")
    results: dict[str, Any] = {
        "settings": {name: getattr(options, name) for name in ("weights", "n", "scale", "rounds")},
        "machine": machine(),
        "families": {
            family: measured(family, options) for family in tqdm(FAMILIES, desc="families")
        },
    }
    command = (
        f"python benchmarks/int8.py --weights {options.weights} -n {options.n} --scale {options.scale:g} "
        f"--rounds {options.rounds}"
    )
    file = options.out / "int8.json"
    write_text_atomically(json.dumps(results, indent=1) + "\n", file)
    write_text_atomically(table(results, command), file.with_suffix(".md"))
    print(table(results, command))


if __name__ == "__main__":
    main()

"""What each mitigation saves at a scale that is too high, for every family: adherence, diversity, saturation.

    python benchmarks/mitigations.py --weights shapes --scale 15 --out benchmarks/results

Adherence: attributes of full captions that are right (see attributes.py). Diversity: entropy, in bits, of the attributes
that short prompts leave open, read back from the pixels, mean over attributes and prompts. Saturation: mean of the
largest less the smallest colour channel, in percent. What plain guidance lost is its distance from the entropy at scale
1, and from the saturation of the tokenizer's reconstructions of the true images; a mitigation recovers the share of it
by which it is nearer. Finished cells are kept: an interrupted run goes on.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from attributes import BATCH, SCENES_SEED, fingerprint, grade
from torch import Tensor
from tqdm.auto import tqdm

from models import TextToImage
from models.folders import held_families
from tokenizers_vq import to_float
from tokenizers_vq.files import write_text_atomically
from unicfg import Guidance
from unicfg.evaluation.attributes import Reading, read_scenes
from unicfg.guidance import mitigations as m
from unicfg.guidance import schedules
from unicfg.training.data import ImageSet
from unicfg.training.shapes import make_shapes

# what each leaves open, of background, shape, colour and size of the object that stands out most
OPEN = {
    "a red shape": ("background", "shape", "size"),
    "a blue shape": ("background", "shape", "size"),
    "a circle": ("background", "colour", "size"),
    "a star": ("background", "colour", "size"),
}
LOGITS: dict[str, tuple[Any, ...]] = {
    "temperature_matching": (m.temperature_matching(),),
    "kl_trust_region(1)": (m.kl_trust_region(1.0),),
    "kl_trust_region(0.3)": (m.kl_trust_region(0.3),),
    "project_logits": (m.project_logits(),),
    "kl_scale": (m.kl_scale(),),
    "plausibility": (m.plausibility(),),
    "top_k_of_cond(8)": (m.top_k_of_cond(8),),
}
DENOISERS: dict[str, tuple[Any, ...]] = {
    "static_threshold(2)": (m.static_threshold(2.0),),
    "dynamic_threshold(limit=2)": (m.dynamic_threshold(limit=2.0),),
    "rescale(0.7)": (m.rescale(0.7),),
    "rescale(1)": (m.rescale(1.0),),
    "norm_clamp": (m.norm_clamp(),),
    "apg(eta=0)": (m.apg(),),
    "cfg_zero_star": (m.cfg_zero_star(),),
    "tcfg": (m.tcfg(),),
    "magnitude_aware": (m.magnitude_aware(),),
    "magnitude_aware(5)": (m.magnitude_aware(5.0),),
    "mimic_scale(3)": (m.mimic_scale(3.0),),
    "tcfg + mimic_scale(3)": (m.tcfg(), m.mimic_scale(3.0)),
    "tcfg + magnitude_aware": (m.tcfg(), m.magnitude_aware()),
}
GRIDS = {"frequency_decoupled": (m.frequency_decoupled(),)}  # needs more than one token


def cells(family: str, scale: float) -> dict[str, Guidance]:
    """The rows of a family: scale 1, plain guidance, each mitigation, and the schedule that is compared with them."""
    kinds = LOGITS if family in ("ar", "masked") else DENOISERS
    kinds = kinds | (GRIDS if family in ("diffusion", "flow") else {})
    rows = {"s = 1": Guidance(1.0), f"s = {scale:g}": Guidance(scale)}
    rows |= {name: Guidance(scale, methods) for name, methods in kinds.items()}
    return rows | {
        "interval 0.3 to 1": Guidance(schedules.interval(scale, 0.3, 1.0)),
        f"linear from {scale:g} to 1": Guidance(schedules.linear(scale, 1.0)),
    }


def measure(
    pipe: TextToImage, scenes: ImageSet, draws: int, guidance: Guidance
) -> dict[str, float]:
    """One cell."""
    images = draw(pipe, scenes.captions, guidance)
    accuracy = grade(images, scenes)
    entropies = [
        entropy([_attribute(reading, name) for reading in readings])
        for prompt, names in OPEN.items()
        for readings in [read_scenes(draw(pipe, [prompt] * draws, guidance))]
        for name in names
    ]
    return {
        "accuracy": accuracy.mean,
        "standard_error": accuracy.standard_error,
        "diversity": sum(entropies) / len(entropies),
        "saturation": saturation(images),
    }


def saturation(images: Tensor) -> float:
    """Of images in [-1, 1], in percent."""
    return float((images.amax(1) - images.amin(1)).mean()) * 50


def draw(pipe: TextToImage, prompts: list[str], guidance: Guidance) -> Tensor:
    """Images of the prompts, seed i for prompt i."""
    return torch.cat(
        [
            pipe.sample(
                prompts[start : start + BATCH],
                seeds=list(range(start, min(start + BATCH, len(prompts)))),
                guidance=guidance,
            )
            for start in range(0, len(prompts), BATCH)
        ]
    )


def _attribute(reading: Reading, name: str) -> object:
    if name == "background":
        return reading.background
    return getattr(reading.objects[0], name) if reading.objects else None


def entropy(values: list[object]) -> float:
    """Of the values' frequencies, in bits."""
    shares = torch.tensor(list(Counter(values).values()), dtype=torch.float64) / len(values)
    return float(-(shares * shares.log2()).sum())


def recovered(cell: dict[str, float], good: float, bad: dict[str, float], key: str) -> float:
    """Share of the distance from ``good`` to plain guidance that a mitigation makes up for."""
    lost = abs(bad[key] - good)
    return 1 - abs(cell[key] - good) / lost if lost > 0 else 0.0


def table(results: dict[str, Any], families: list[str], command: str) -> str:
    """One table a family, and which mitigation does what the others do not."""
    settings = results["settings"]
    scale = f"s = {settings['scale']:g}"
    lines = [
        f"# Mitigations at {scale}",
        "",
        f"Attributes right in percent, mean of {settings['n']} images +- its standard error; entropy of open attributes in",
        f"bits, {settings['draws']} images for each of {len(OPEN)} prompts; mean colour saturation in percent. In brackets:",
        "the share of what plain guidance lost that is recovered, against the entropy at s = 1 and the saturation of",
        f"reconstructions of the true images, {results['true saturation']:.2f}. `{command}`.",
    ]
    for family in families:
        own = results["families"][family]
        high = own[scale]
        good = {"diversity": own["s = 1"]["diversity"], "saturation": results["true saturation"]}
        lines += [
            "",
            f"## {family}",
            "",
            "| | attributes right | diversity | saturation |",
            "|---|--:|--:|--:|",
        ]
        for name in own["order"]:
            cell = own[name]
            marks = [f"{100 * cell['accuracy']:.1f} +- {100 * cell['standard_error']:.1f}"]
            for key in ("diversity", "saturation"):
                share = recovered(cell, good[key], high, key)
                shown = "" if name in ("s = 1", scale) else f" ({100 * share:.0f} %)"
                marks.append(f"{cell[key]:.2f}{shown}")
            lines.append(f"| {name} | " + " | ".join(marks) + " |")
        best = [
            name
            for name in own["order"]
            if name not in ("s = 1", scale)
            and min(recovered(own[name], good[key], high, key) for key in good) >= 0.5
            and own[name]["accuracy"] >= high["accuracy"] - 0.02
        ]
        lines += ["", f"Half of both, at no more than 2 points: {', '.join(best) or 'none'}."]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", default="shapes")
    parser.add_argument("--families", nargs="+", help="all that the weights hold by default")
    parser.add_argument("--scale", type=float, default=15.0)
    parser.add_argument("-n", type=int, default=128, help="images a cell for adherence")
    parser.add_argument("--draws", type=int, default=32, help="images a cell and open prompt")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    scenes = make_shapes(options.n, seed=SCENES_SEED, wrong=0.0)
    families = options.families or held_families(options.weights)
    settings = {name: getattr(options, name) for name in ("weights", "n", "draws", "scale")}
    file = options.out / f"{Path(options.weights).name}-mitigations.json"
    results: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    if results.get("settings") != settings:
        results = {"settings": settings, "families": {}}
    pipes = {family: TextToImage.from_pretrained(options.weights, family) for family in families}
    tokenizer, images = next(iter(pipes.values())).tokenizer, to_float(scenes.images)
    results["true saturation"] = saturation(tokenizer.decode(tokenizer.encode(images)))
    jobs = [
        (family, name, guidance)
        for family in families
        for name, guidance in cells(family, options.scale).items()
    ]
    with tqdm(jobs, desc="drawing and reading", unit="cell") as bar:
        for family, name, guidance in bar:
            bar.set_postfix_str(f"{family} {name}")
            made_with = fingerprint(pipes[family])
            own = results["families"].get(family, {})
            if own.get("made_with") != made_with:
                own = {"made_with": made_with}
            own["order"] = list(cells(family, options.scale))
            results["families"][family] = own
            if name not in own:
                own[name] = measure(pipes[family], scenes, options.draws, guidance)
                write_text_atomically(json.dumps(results, indent=1) + "\n", file)
    command = (
        f"python benchmarks/mitigations.py --weights {options.weights} --scale {options.scale:g}"
    )
    command += f" -n {options.n} --draws {options.draws}"
    held = [family for family in held_families(options.weights) if family in results["families"]]
    text = table(results, held, command)
    write_text_atomically(text, file.with_suffix(".md"))
    print(text)


if __name__ == "__main__":
    main()

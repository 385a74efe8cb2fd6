"""How much of a prompt each family draws, at every scale, read back from the pixels.

    python benchmarks/attributes.py --weights shapes --scales 0 1 1.5 2 3 5 8 15 -n 256 --out benchmarks/results

Prompts are the exact captions of images that no model was trained on (most captions of one object occur in training, with
other images); scenes and seeds are the same for every family
and scale. Each finished cell is written at once, so an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import hashlib
import inspect
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from models import TextToImage
from models.folders import held_families
from tokenizers_vq import VQTokenizer, to_float
from tokenizers_vq.files import write_text_atomically
from unicfg import Guidance
from unicfg.evaluation import accuracy, attributes
from unicfg.evaluation.accuracy import Accuracy, attribute_accuracy, scene_of
from unicfg.evaluation.attributes import read_scenes
from unicfg.pictures import check_picture_name
from unicfg.training.data import ImageSet
from unicfg.training.shapes import make_shapes

SCENES_SEED = 77  # training draws its scenes from seed 0
BATCH = 64


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", default="shapes")
    parser.add_argument("--families", nargs="+", help="all that the weights hold by default")
    parser.add_argument("--scales", nargs="+", type=float, default=[0, 1, 1.5, 2, 3, 5, 8, 15])
    parser.add_argument("-n", type=int, default=256, help="images a scale and family")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--plot", type=Path, help="a picture of the curves (needs matplotlib)")
    options = parser.parse_args()
    if options.plot is not None:
        check_plot(options.plot)
    if len({f"{scale:g}" for scale in options.scales}) != len(options.scales):
        parser.error(f"--scales is {options.scales}, expected none twice")
    scenes = make_shapes(options.n, seed=SCENES_SEED, wrong=0.0)
    families = options.families or held_families(options.weights)
    settings = {"weights": options.weights, "n": options.n, "scenes_seed": SCENES_SEED}
    file = options.out / f"{Path(options.weights).name}-attributes.json"
    results = load(file, settings)
    pipes = {family: TextToImage.from_pretrained(options.weights, family) for family in families}
    fingerprints = {family: fingerprint(pipe) for family, pipe in pipes.items()}
    results["limits"] = limits(next(iter(pipes.values())).tokenizer, scenes)
    jobs = [(family, scale) for family in families for scale in options.scales]
    with tqdm(jobs, desc="drawing and reading", unit="cell") as bar:
        for family, scale in bar:
            bar.set_postfix(family=family, s=scale)
            made_with = fingerprints[family]
            cells = results["families"].get(family, {})
            if cells.get("made_with") != made_with:
                cells = {"sampler": pipes[family].defaults(), "made_with": made_with}
                results["families"][family] = cells
            if f"{scale:g}" not in cells:
                cells[f"{scale:g}"] = as_dict(measure(pipes[family], scenes, scale))
                write_text_atomically(json.dumps(results, indent=1) + "\n", file)
    chosen = f" --families {' '.join(options.families)}" if options.families else ""
    command = (
        f"python benchmarks/attributes.py --weights {options.weights}{chosen} -n {options.n} --scales "
        + " ".join(f"{scale:g}" for scale in options.scales)
    )
    write_text_atomically(
        table(results, families, options.scales, command), file.with_suffix(".md")
    )
    print(table(results, families, options.scales, command))
    if options.plot is not None:
        plot(results, families, options.scales, options.plot)


def load(file: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """What an interrupted run with the same settings has left, or a new start."""
    if file.exists():
        held: dict[str, Any] = json.loads(file.read_text())
        if held["settings"] == settings:
            return held
    return {"settings": settings, "families": {}}


def fingerprint(pipe: TextToImage) -> str:
    """A hash of weights, sampler and reader: cells that were made with others are not kept."""
    digest = hashlib.sha256(json.dumps(pipe.defaults(), sort_keys=True).encode())
    digest.update(pipe.digest().encode())
    for part in (attributes, accuracy):
        digest.update(inspect.getsource(part).encode())
    return digest.hexdigest()[:16]


def check_plot(file: Path) -> None:
    """Find out before the work whether a picture of its results can be made.

    Raises:
        ModuleNotFoundError: if there is no matplotlib.
        ValueError: if the file's suffix is no picture format.
    """
    import matplotlib  # noqa: F401

    check_picture_name(file)


def measure(pipe: TextToImage, scenes: ImageSet, scale: float) -> Accuracy:
    """Draw all captions, seed i for scene i, and read the images."""
    images = []
    for start in range(0, len(scenes), BATCH):
        captions = scenes.captions[start : start + BATCH]
        seeds = range(start, start + len(captions))
        images.append(pipe.sample(captions, seeds=list(seeds), guidance=Guidance(scale)))
    return grade(torch.cat(images), scenes)


def grade(images: torch.Tensor, scenes: ImageSet) -> Accuracy:
    """Read images and compare them with the truth."""
    truth = [scene_of(own) for own in scenes.attributes]
    return attribute_accuracy(read_scenes(images), truth)


def limits(tokenizer: VQTokenizer, scenes: ImageSet) -> dict[str, Any]:
    """What the reader makes of the true images, and of what the tokenizer leaves of them."""
    images = to_float(scenes.images)
    return {
        "true images": as_dict(grade(images, scenes)),
        "reconstructions": as_dict(grade(tokenizer.decode(tokenizer.encode(images)), scenes)),
    }


def as_dict(result: Accuracy) -> dict[str, Any]:
    """For the JSON file."""
    return {
        "mean": result.mean,
        "standard_error": result.standard_error,
        "exact": result.exact,
        "by_kind": result.by_kind,
    }


def table(
    results: dict[str, Any], families: Sequence[str], scales: Sequence[float], command: str
) -> str:
    """Markdown: accuracy by family and scale, then by kind at the best scale."""
    lines = [
        "# Attributes that are right",
        "",
        f"Percent of attributes, mean over {results['settings']['n']} images +- its standard error; `{command}`.",
        "",
        "| family | " + " | ".join(f"s = {s:g}" for s in scales) + " | best - (s = 1) |",
        "|---|" + "--:|" * (len(scales) + 1),
    ]
    best: dict[str, str] = {}
    for family in families:
        cells = results["families"][family]
        best[family] = max((f"{s:g}" for s in scales), key=lambda s: cells[s]["mean"])
        row = [
            f"{100 * cells[f'{s:g}']['mean']:.1f} +- {100 * cells[f'{s:g}']['standard_error']:.1f}"
            for s in scales
        ]
        gain = cells[best[family]]["mean"] - cells.get("1", cells[best[family]])["mean"]
        lines.append(f"| {family} | " + " | ".join(row) + f" | {100 * gain:.1f} |")
    kinds = list(results["limits"]["true images"]["by_kind"])
    lines += [
        "",
        "At each family's best scale, and for the true images and the tokenizer's reconstructions of them:",
        "",
        "| | " + " | ".join(kinds) + " | all attributes | whole scene |",
        "|---|" + "--:|" * (len(kinds) + 2),
    ]
    rows = {
        f"{family}, s = {best[family]}": results["families"][family][best[family]]
        for family in families
    }
    for name, cell in (rows | results["limits"]).items():
        values = [*(cell["by_kind"][kind] for kind in kinds), cell["mean"], cell["exact"]]
        lines.append(f"| {name} | " + " | ".join(f"{100 * value:.1f}" for value in values) + " |")
    return "\n".join(lines) + "\n"


def plot(
    results: dict[str, Any], families: Sequence[str], scales: Sequence[float], file: Path
) -> None:
    """One curve a family, with standard errors."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    places = range(len(scales))
    for family in families:
        cells = [results["families"][family][f"{s:g}"] for s in scales]
        means, errors = ([100 * cell[key] for cell in cells] for key in ("mean", "standard_error"))
        axes.errorbar(places, means, errors, marker="o", markersize=4, capsize=3, label=family)
    axes.axhline(100 * results["limits"]["reconstructions"]["mean"], color="0.6", linestyle=":")
    axes.set_xticks(places, [f"{s:g}" for s in scales])
    axes.set(xlabel="scale s", ylabel="attributes right, %", ylim=(20, 101))
    axes.grid(alpha=0.3)
    axes.legend()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=150)


if __name__ == "__main__":
    main()

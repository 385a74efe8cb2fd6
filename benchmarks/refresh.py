"""What it saves to take the direction of guidance from an earlier step, and what it costs in quality.

    python benchmarks/refresh.py --out benchmarks/results --plot docs/pictures/shapes-refresh.png

`refresh=k` runs the unconditional branch in every k-th step only. Attributes right on the shapes prompts (see attributes.py)
at scale 3, and the time of a sampling, measured in turn with that of k = 1.
"""

from __future__ import annotations

import argparse
import json
import statistics
from functools import partial
from pathlib import Path
from typing import Any

import torch
from attributes import BATCH, SCENES_SEED, grade
from timing import machine, measure
from tqdm.auto import tqdm

from models import TextToImage
from tokenizers_vq.files import write_text_atomically
from unicfg import Guidance
from unicfg.training.data import ImageSet
from unicfg.training.shapes import make_shapes

FAMILIES = ("masked", "diffusion", "flow")


def draw(pipe: TextToImage, scenes: ImageSet, scale: float, refresh: int) -> torch.Tensor:
    """Images of the scenes' captions, seed i for scene i."""
    return pipe.sample(
        scenes.captions,
        seeds=range(len(scenes)),
        guidance=Guidance(scale),
        refresh=refresh,
        batch_size=BATCH,
    )


def table(results: dict[str, Any], command: str) -> str:
    """Markdown: accuracy and time for each family and k."""
    settings = results["settings"]
    every = settings["refresh"]
    lines = [
        "# Guidance with a direction that is not refreshed in every step",
        "",
        f"Attributes right in percent at s = {settings['scale']:g}, mean of {settings['n']} images +- its standard error, and in",
        f"brackets the time against refresh=1, median of {settings['rounds']} rounds in turn at batch {settings['batch']}. {results['machine']}.",
        f"`{command}`.",
        "",
        "| family | s = 1 | " + " | ".join(f"refresh={k}" for k in every) + " |",
        "|---" * (len(every) + 2) + "|",
    ]
    for family, cells in results["families"].items():
        base = statistics.median(cells["seconds"]["1"])
        marks = []
        for k in ("unguided", *map(str, every)):
            cell = cells["accuracy"][k]
            ratio = statistics.median(cells["seconds"][k]) / base
            marks.append(f"{100 * cell[0]:.1f} +- {100 * cell[1]:.1f} ({ratio:.2f})")
        lines.append(f"| {family} | " + " | ".join(marks) + " |")
    return "\n".join(lines) + "\n"


def plot(results: dict[str, Any], file: Path) -> None:
    """Accuracy over time, one curve a family."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    for family, cells in results["families"].items():
        base = statistics.median(cells["seconds"]["1"])
        keys = [str(k) for k in results["settings"]["refresh"]]
        times = [statistics.median(cells["seconds"][k]) / base for k in keys]
        means, errors = ([100 * cells["accuracy"][k][i] for k in keys] for i in (0, 1))
        axes.errorbar(times, means, errors, marker="o", markersize=4, capsize=3, label=family)
        for k, x, y in zip(keys, times, means, strict=True):
            axes.annotate(f"k = {k}", (x, y), fontsize=7, xytext=(3, 3), textcoords="offset points")
    axes.set(xlabel="time against k = 1", ylabel="attributes right, %")
    axes.grid(alpha=0.3)
    axes.legend()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=130)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", default="shapes")
    parser.add_argument("-n", type=int, default=256, help="images a cell")
    parser.add_argument("--scale", type=float, default=3.0)
    parser.add_argument("--refresh", type=int, nargs="+", default=[1, 2, 3, 4, 6, 8])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=8, help="of the timing")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--plot", type=Path, help="a picture of the curves")
    options = parser.parse_args()
    if 1 not in options.refresh:
        parser.error(f"--refresh is {options.refresh}, expected 1 among them, to compare with")
    scenes = make_shapes(options.n, seed=SCENES_SEED, wrong=0.0)
    few = scenes.select(range(options.batch))
    names = ("weights", "n", "scale", "refresh", "rounds", "batch")
    results: dict[str, Any] = {
        "settings": {name: getattr(options, name) for name in names},
        "machine": machine(),
        "families": {},
    }
    jobs = {"unguided": (1.0, 1)} | {str(k): (options.scale, k) for k in options.refresh}
    with tqdm(total=len(FAMILIES) * len(jobs), desc="drawing and reading", unit="cell") as bar:
        for family in FAMILIES:
            pipe, accuracy = TextToImage.from_pretrained(options.weights, family), {}
            for name, (scale, k) in jobs.items():
                result = grade(draw(pipe, scenes, scale, k), scenes)
                accuracy[name] = (result.mean, result.standard_error)
                bar.update()
            cases = {name: partial(draw, pipe, few, *own) for name, own in jobs.items()}
            seconds = measure(cases, options.rounds)
            results["families"][family] = {"accuracy": accuracy, "seconds": seconds}
    command = f"python benchmarks/refresh.py -n {options.n} --scale {options.scale:g}"
    command += f" --rounds {options.rounds}"
    file = options.out / f"{Path(options.weights).name}-refresh.json"
    write_text_atomically(json.dumps(results, indent=1) + "\n", file)
    write_text_atomically(table(results, command), file.with_suffix(".md"))
    print(table(results, command))
    if options.plot is not None:
        plot(results, options.plot)


if __name__ == "__main__":
    main()

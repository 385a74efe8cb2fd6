"""Compare families: tokens guided by logits, latents by velocities, the same prompts, scales and seeds for all.

    python examples/3_compare.py --out out/compare

Draws the shipped weights. ``grid.png`` has one prompt, a row a family, a column a scale; ``plot.png`` how much of all
prompts is drawn, read back from the pixels, with standard errors. All families gain from s = 1 to 2 and part beyond:
logits (``ar``, ``masked``) fall apart at scales that predictions (``diffusion``, ``flow``, ``hybrid``) bear. Equal s is
not equal strength: ``docs/comparing.md`` has a common unit, and ``unicfg compare --data shapes`` a study with all measures.
"""

import argparse
from pathlib import Path

from PIL import Image

from models import TextToImage
from models.folders import held_families
from tokenizers_vq import to_images
from unicfg import Guidance
from unicfg.evaluation.accuracy import Accuracy, attribute_accuracy, scene_of
from unicfg.evaluation.attributes import read_scenes
from unicfg.pictures import grid, save_picture
from unicfg.training.data import ImageSet
from unicfg.training.shapes import make_shapes

WEIGHTS = "shapes"
SCENES_SEED = 77  # not that of the training images


def measure(pipe: TextToImage, scenes: ImageSet, s: float) -> tuple[Image.Image, Accuracy]:
    """What the first prompt draws, and how much of each prompt is in its picture; seed i for prompt i."""
    images = pipe.sample(scenes.captions, seeds=range(len(scenes)), guidance=Guidance(s))
    asked = [scene_of(own) for own in scenes.attributes]
    return to_images(images[:1])[0], attribute_accuracy(read_scenes(images), asked)


def plot(results: dict[str, list[Accuracy]], scales: list[float], file: Path) -> None:
    """A curve a family, mean and standard error over the prompts."""
    from matplotlib.figure import Figure

    axes = (figure := Figure(figsize=(6.4, 4), layout="constrained")).subplots()
    for family, cells in results.items():
        means = [100 * cell.mean for cell in cells]
        errors = [100 * cell.standard_error for cell in cells]
        axes.errorbar(range(len(scales)), means, errors, marker="o", capsize=3, label=family)
    axes.set_xticks(range(len(scales)), [f"{s:g}" for s in scales])
    axes.set(xlabel="s", ylabel="attributes of the prompt that are drawn, %")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(file, dpi=120)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--families", nargs="+", default=held_families(WEIGHTS))
    parser.add_argument("--scales", nargs="+", type=float, default=[0, 1, 2, 4, 8, 15])
    parser.add_argument("-n", type=int, default=32, help="prompts, at least 2")
    parser.add_argument("--out", type=Path, default=Path("out/compare"))
    options = parser.parse_args()
    if options.n < 2:
        parser.error(f"-n is {options.n}, expected at least 2")
    scenes = make_shapes(options.n, seed=SCENES_SEED, wrong=0.0)
    rows, results = [], {}
    for family in options.families:
        pipe = TextToImage.from_pretrained(WEIGHTS, family)
        drawn = [measure(pipe, scenes, s) for s in options.scales]
        rows.append([picture for picture, _ in drawn])
        results[family] = [accuracy for _, accuracy in drawn]
        cells = zip(options.scales, results[family], strict=True)
        text = [
            f"s = {s:g}: {100 * c.mean:.0f} +- {100 * c.standard_error:.0f} %" for s, c in cells
        ]
        print(f"{family:>9}  " + "   ".join(text), flush=True)
    labels = [f"{family}: {scenes.captions[0]}" for family in options.families]
    picture = grid(rows, row_labels=labels, column_labels=[f"s = {s:g}" for s in options.scales])
    save_picture(picture, options.out / "grid.png")
    plot(results, options.scales, options.out / "plot.png")
    print(f"one prompt in {options.out / 'grid.png'}, all of them in {options.out / 'plot.png'}")


if __name__ == "__main__":
    main()

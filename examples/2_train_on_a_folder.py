"""Train on a folder of your own captioned images: image tokenizer, text tokens and a guided model, then draw.

    python examples/2_train_on_a_folder.py --out out/faces
    python examples/2_train_on_a_folder.py --out out/mine --images FOLDER --prompts "a cat" "a dog"

FOLDER holds pictures, which are made 32 pixels wide here, and a ``metadata.jsonl``, a line a picture: {"file_name": "0001.png", "text": "a cat"}. Without
``--images`` such a folder is drawn first: simple faces, one caption in four taken from another face, as captions found
in the wild are. In ``samples.png`` each row is a prompt and each column a seed: at s = 0 the prompt is ignored, at s = 1
it is followed most of the time, at s = 3 nearly always. A run that was stopped goes on where it was, by the same command.
"""

import argparse
import itertools
import json
import random
from dataclasses import replace
from pathlib import Path

from PIL import Image, ImageDraw

from models import TextToImage
from unicfg import Guidance
from unicfg.pictures import grid, save_picture
from unicfg.training import recipe
from unicfg.training.sources import read_captions
from unicfg.training.trainer import train

COLOURS = {"red": "#e5484d", "green": "#46a758", "blue": "#5b8def", "yellow": "#f7ce46"}
MOUTHS = {  # arcs: left, top, right and bottom in radii from the centre, and two angles
    "happy": ((-0.45, 0.1, 0.45, 0.7), 20, 160),
    "sad": ((-0.45, 0.35, 0.45, 0.95), 200, 340),
    "surprised": ((-0.22, 0.2, 0.22, 0.75), 0, 360),
}
EXTRAS = ("", " with a hat", " in sunglasses")
SIDE = 96  # pixels of the pictures that are drawn
SCALES, SEEDS = (0.0, 1.0, 3.0), (0, 1, 2)


def draw_face(mood: str, colour: str, extra: str, chance: random.Random) -> Image.Image:
    """One face, a little elsewhere each time."""
    image = Image.new("RGB", (SIDE, SIDE), "white")
    pen = ImageDraw.Draw(image)
    x, y, r = 48 + chance.uniform(-5, 5), 52 + chance.uniform(-5, 5), chance.uniform(30, 36)

    def box(left: float, top: float, right: float, bottom: float) -> tuple[float, ...]:
        return x + left * r, y + top * r, x + right * r, y + bottom * r

    pen.circle((x, y), r, COLOURS[colour])
    for side in (-0.4, 0.4):
        size = 0.36 if extra == " in sunglasses" else 0.14
        pen.circle((x + side * r, y - 0.25 * r), size * r, "black")
    place, start, end = MOUTHS[mood]
    pen.arc(box(*place), start, end, "black", 6)
    if extra == " with a hat":
        pen.rectangle(box(-0.55, -1.35, 0.55, -0.6), "black")
        pen.rectangle(box(-1.0, -0.75, 1.0, -0.57), "black")
    return image


def draw_folder(folder: Path, count: int) -> None:
    """Faces with their captions, as a user's folder holds them."""
    folder.mkdir(parents=True, exist_ok=True)
    chance = random.Random(0)
    kinds = [*itertools.product(MOUTHS, COLOURS, EXTRAS)]
    lines = []
    for i in range(count):
        drawn, other = chance.choice(kinds), chance.choice(kinds)
        draw_face(*drawn, chance).save(folder / f"{i:04d}.png")
        mood, colour, extra = other if chance.random() < 0.25 else drawn
        text = f"a {mood} {colour} face{extra}"
        lines.append(json.dumps({"file_name": f"{i:04d}.png", "text": text}) + "\n")
    (folder / "metadata.jsonl").write_text("".join(lines))


def make_recipe(images: Path, out: Path, steps: int) -> recipe.Recipe:
    """All of a training; ``unicfg train`` reads the same from a YAML file."""

    def train_for(steps: int) -> recipe.Optimization:
        quick = recipe.Optimization(batch_size=32, learning_rate=2e-3, warmup=50, ema=0.99)
        return replace(quick, steps=steps, checkpoint_every=100)

    return recipe.Recipe(
        out=str(out),
        data=recipe.DataRecipe(path=str(images), image_size=32, workers=0),
        tokenizer=recipe.TokenizerRecipe(
            factor=4, width=32, depth=1, training=train_for(steps // 2)
        ),
        text=recipe.TextRecipe(vocabulary=512, length=12),
        model=recipe.ModelRecipe("flow", width=96, depth=4, patch=2, training=train_for(steps)),
    )


def draw(pipe: TextToImage, prompts: list[str]) -> Image.Image:
    """A row a prompt; for each scale the same seeds."""
    columns = []
    for s, seed in itertools.product(SCALES, SEEDS):
        columns.append(pipe(prompts, guidance=Guidance(s), seeds=[seed] * len(prompts)))
    rows = list(zip(*columns, strict=True))
    labels = [f"s = {s:g}" for s in SCALES for _ in SEEDS]
    return grid(rows, row_labels=prompts, column_labels=labels, cell=96)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=Path, help="folder of captioned images")
    parser.add_argument("--count", type=int, default=800, help="of faces, where there is no folder")
    parser.add_argument(
        "--steps", type=int, default=1600, help="of the model, twice the tokenizer's"
    )
    parser.add_argument("--prompts", nargs="+", help="to draw; captions of held-out images if none")
    parser.add_argument("--out", type=Path, default=Path("out/faces"))
    options = parser.parse_args()
    images = options.images or options.out / "faces"
    if options.images is None:
        draw_folder(images, options.count)
    run = options.out / "run"
    pipe = train(make_recipe(images, run, options.steps), resume=True)
    assert pipe is not None
    held_out = (caption for some in read_captions(run / "images", "validation") for caption in some)
    picture = draw(pipe, options.prompts or [*dict.fromkeys(held_out)][:5])
    save_picture(picture, options.out / "samples.png")
    print(f"the model is in {run}, what it draws in {options.out / 'samples.png'}")


if __name__ == "__main__":
    main()

"""Guide away from a weaker model instead of from no prompt: autoguidance for latents, contrastive decoding for tokens.

    python examples/4_weak_model.py --out out/weak_model

Both are the same sum, ``branches.weak``: c + (s - 1) (c - w), where w is what a weaker model says of the same prompt
(Karras et al., arXiv 2406.02507; O'Brien and Lewis, arXiv 2309.09117). Here it is the model itself with one layer left out.
It prints, for either way of guidance at each scale, how much of the prompts is drawn and how many pictures are clean:
each thing in them a whole shape in a colour of the training set, whatever the prompt says. The verdicts compare the two
picture by picture, on equal prompts and seeds. ``weak_model.png`` shows one prompt.

What to expect: w knows the prompt, too, so the difference points away from w's mistakes and not towards the prompt. A weaker
model helps where the strong one makes the same mistakes, only less; captions that were wrong in training mislead both.
"""

import argparse
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from models import TextToImage
from models.perturb import skip_layers
from tokenizers_vq import to_images
from unicfg import Branch, Guidance
from unicfg.evaluation.accuracy import attribute_accuracy, scene_of
from unicfg.evaluation.attributes import Reading, read_scenes
from unicfg.guidance import branches
from unicfg.pictures import grid, save_picture
from unicfg.training.data import ImageSet
from unicfg.training.shapes import make_shapes

SCENES_SEED = 77  # not that of the training images
WEAK_ALONE = Guidance(branches.weights(cond=0.0, weak=1.0))


class Drawn(NamedTuple):
    """N pictures, of which the first is kept: the share of each prompt that is drawn, and whether each is clean."""

    picture: Image.Image
    right: Tensor
    clean: Tensor


def is_clean(reading: Reading) -> bool:
    """Whether everything in a picture could be named."""
    things = [part for seen in reading.objects for part in (seen.shape, seen.colour, seen.size)]
    return bool(things) and None not in (reading.background, *things)


def draw(pipe: TextToImage, worse: torch.nn.Module, scenes: ImageSet, guidance: Guidance) -> Drawn:
    """All prompts, seed i for prompt i."""
    named = {"weak": Branch(model=worse)} if "weak" in guidance.branch_names else None
    images = pipe.sample(
        scenes.captions, seeds=range(len(scenes)), guidance=guidance, branches=named
    )
    readings = read_scenes(images)
    right = attribute_accuracy(readings, [scene_of(own) for own in scenes.attributes]).per_image
    clean = torch.tensor([float(is_clean(reading)) for reading in readings])
    return Drawn(to_images(images[:1])[0], right, clean)


def shown(values: Tensor) -> str:
    """Mean and its standard error in percent."""
    return f"{100 * values.mean():.0f} +- {100 * values.std() / len(values) ** 0.5:.0f}"


def verdict(difference: Tensor) -> str:
    """A mean difference in points with its standard error, and what it says."""
    error = difference.std() / len(difference) ** 0.5
    told = bool(difference.mean().abs() > 2 * error)
    word = ("better" if difference.mean() > 0 else "worse") if told else "no difference to be told"
    return f"{100 * difference.mean():+.0f} +- {100 * error:.0f} ({word})"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--families", nargs="+", default=["flow", "ar"])
    parser.add_argument("--scales", nargs="+", type=float, default=[1, 1.5, 2, 3])
    parser.add_argument("--layer", type=int, default=3, help="that the weaker model lacks")
    parser.add_argument("-n", type=int, default=64, help="prompts, at least 2")
    parser.add_argument("--out", type=Path, default=Path("out/weak_model"))
    options = parser.parse_args()
    if options.n < 2:
        parser.error(f"-n is {options.n}, expected at least 2")
    scenes = make_shapes(options.n, seed=SCENES_SEED, wrong=0.0)
    rows, labels = [], []
    for family in options.families:
        pipe = TextToImage.from_pretrained("shapes", family)
        worse = skip_layers(pipe.network, [options.layer])
        alone = draw(pipe, worse, scenes, WEAK_ALONE)
        print(
            f"{family}: the weaker model alone draws {shown(alone.right)} % of the prompts, "
            f"{shown(alone.clean)} % of its pictures are clean"
        )
        pairs = []
        for s in options.scales:
            plain = draw(pipe, worse, scenes, Guidance(s))
            weak = draw(pipe, worse, scenes, Guidance(branches.weak(s)))
            pairs.append((plain, weak))
            for what, one, other in (
                ("of the prompts drawn", plain.right, weak.right),
                ("of the pictures clean", plain.clean, weak.clean),
            ):
                print(
                    f"  s = {s:<4g} {what}: {shown(one)} % away from no prompt, {shown(other)} % away "
                    f"from the weaker model, {verdict(other - one)}",
                    flush=True,
                )
        rows += [[pair[i].picture for pair in pairs] for i in (0, 1)]
        labels += [f"{family}, away from {what}" for what in ("no prompt", "a weaker model")]
    print(f"the picture is of “{scenes.captions[0]}”")
    picture = grid(rows, row_labels=labels, column_labels=[f"s = {s:g}" for s in options.scales])
    print(save_picture(picture, options.out / "weak_model.png"))


if __name__ == "__main__":
    main()

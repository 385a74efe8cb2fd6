"""Does guidance help a model to compose what it has only seen apart?

    python benchmarks/composition.py --data data/emoji --weights emoji --out benchmarks/results

The folder, made by examples/prepare_emoji.py, holds pictures of concepts in several styles. Of some concepts one style was
held out of training ("val_pair"): a tiger was seen, and the 3d style was seen, but no tiger in 3d style. Such pairs are
drawn, and as many seen ones ("train"), and each drawing is held against all real pictures by the features of an image
network: is the nearest one of the right concept, and is it the very picture of the pair? The style is read from the
colours. What the same judge says of the true pictures bounds what can be seen.
A model that was trained on the parts of captions, too (--parts of that script), can be guided by them: --by parts draws
the tiger and the 3d style as two conditions that are added (composable AND, Liu et al., arXiv 2206.01714), --by late the
whole caption at first and the style alone after LATE (prompt editing). Of a model that was not, both ask for what it never
learned.
Seeds are the same for every family and scale. Each finished cell is written at once, so an interrupted run goes on where it
stopped.
"""

from __future__ import annotations

import argparse
import hashlib
import inspect
import json
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from attributes import BATCH, check_plot, load
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm

from models import TextToImage
from models.folders import held_families
from tokenizers_vq import VQTokenizer, to_float
from tokenizers_vq.files import write_text_atomically
from tokenizers_vq.images import to_images
from unicfg import Guidance
from unicfg.evaluation import captions, features
from unicfg.evaluation.captions import CaptionScorer
from unicfg.evaluation.features import Features, extract, find_features
from unicfg.evaluation.uncertainty import LEAST_OF_SHARE, share
from unicfg.guidance import branches
from unicfg.guidance.schedules import interval
from unicfg.pictures import LINE, check_picture_name, grid, save_picture
from unicfg.training.data import ImageSet, read_folder

SPLITS = {
    "val_pair": "Unseen pairs of a seen concept and a seen style",
    "train": "Seen pairs",
    "val_concept": "Unseen concepts in seen styles",
}
MEASURES = {
    "concept": "concept of the nearest picture",
    "concept_5": "concept among the nearest 5",
    "style": "style",
    "pair": "nearest is the pair itself",
}
NEAREST = 5
Cells = dict[str, dict[str, dict[str, Any]]]
"""What was measured by split, family and scale."""
# what a family's name has behind it in the table, and its line in the plot
BY = {"whole": "", "parts": ", by parts", "late": ", the style late"}
LINES = {"whole": "-", "parts": "--", "late": ":"}
LATE = 0.65  # progress after which, "late", the style is the only condition
GRID_COLUMNS, GRID_ROWS, GRID_CELL = 8, 4, 128


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", default="data/emoji", help="made by examples/prepare_emoji.py")
    parser.add_argument("--weights", default="emoji")
    parser.add_argument("--families", nargs="+", help="all that the weights hold by default")
    parser.add_argument("--scales", nargs="+", type=float, default=[0, 1, 1.5, 2, 3, 5, 8, 15])
    parser.add_argument("--split", nargs="+", choices=SPLITS, default=["val_pair", "train"])
    parser.add_argument(
        "--by", nargs="+", choices=BY, default=["whole"], help="how they are asked for"
    )
    parser.add_argument("-n", type=int, default=216, help="prompts a split, or all that there are")
    parser.add_argument("--features", default="lite0", help="that tell concepts")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--plot", type=Path, help="a picture of the curves (needs matplotlib)")
    parser.add_argument("--grid", type=Path, help="a picture of the first 32 unseen pairs, drawn")
    parser.add_argument("--grid-family", default="flow")
    parser.add_argument("--grid-by", choices=BY, default="whole")
    parser.add_argument("--grid-scale", type=float, default=3.0)
    options = parser.parse_args(arguments)
    if len({f"{scale:g}" for scale in options.scales}) != len(options.scales):
        parser.error(f"--scales is {options.scales}, expected none twice")
    if options.plot is not None:
        check_plot(options.plot)
    held = held_families(options.weights)
    if options.grid is not None:
        if options.grid_family not in held:
            parser.error(f"--grid-family is {options.grid_family!r}, expected one of {held}")
        check_picture_name(options.grid)
    families = options.families or held
    pipes = {family: TextToImage.from_pretrained(options.weights, family) for family in families}
    tokenizer = next(iter(pipes.values())).tokenizer
    data = of_pairs(read_folder(options.data, tokenizer.config.image_size))
    if not all({"split", "concept", "style"} <= own.keys() for own in data.attributes):
        parser.error(
            f"--data is {options.data}, whose metadata lack split, concept or style: expected what "
            "examples/prepare_emoji.py makes"
        )
    asked = {split: asked_for(data, split, options.n) for split in SPLITS}
    for split in options.split:
        if len(asked[split]) < LEAST_OF_SHARE:
            found = f"{split} has {len(asked[split])} prompts"
            parser.error(f"{found}, expected {LEAST_OF_SHARE} or more")
    judge = Judge.fit(data, find_features(options.features), tokenizer, without=asked["train"])
    fingerprints = {family: fingerprint(pipe, data) for family, pipe in pipes.items()}
    settings = {name: getattr(options, name) for name in ("weights", "data", "n", "features")}
    file = options.out / f"{Path(options.weights).name}-composition.json"
    results = load(file, settings)
    for split in options.split:
        own = references(judge, tokenizer, data, asked[split])
        results.setdefault("references", {})[split] = own
    cells: Cells = {}
    jobs = [
        (split, family, by, scale)
        for split in options.split
        for family in families
        for by in options.by
        for scale in options.scales
    ]
    with tqdm(jobs, desc="drawing and judging", unit="cell") as bar:
        for split, family, by, scale in bar:
            row = family + BY[by]
            bar.set_postfix(split=split, family=row, s=scale)
            own = results["families"].get(row, {})
            if own.get("made_with") != fingerprints[family]:
                own = {"sampler": pipes[family].defaults(), "made_with": fingerprints[family]}
                results["families"][row] = own
            finished = own.setdefault(split, {})
            if f"{scale:g}" not in finished:
                prompts = prompts_for(data, asked[split], by)
                finished[f"{scale:g}"] = measure(pipes[family], judge, prompts, asked[split], scale)
                write_text_atomically(json.dumps(results, indent=1) + "\n", file)
            by_row = cells.setdefault(split, {})
            by_row.setdefault(row, {})[f"{scale:g}"] = finished[f"{scale:g}"]
    command = f"python benchmarks/composition.py --data {options.data} --weights {options.weights}"
    command += f" --split {' '.join(options.split)} -n {options.n} --features {options.features}"
    if options.families:
        command += f" --families {' '.join(options.families)}"
    if options.by != ["whole"]:
        command += f" --by {' '.join(options.by)}"
    command += " --scales " + " ".join(f"{scale:g}" for scale in options.scales)
    page = table(cells, results["references"], command)
    write_text_atomically(page, file.with_suffix(".md"))
    print(page)
    if options.plot is not None:
        plot(cells, options.plot)
    if options.grid is not None:
        pipe = TextToImage.from_pretrained(options.weights, options.grid_family)
        save_picture(drawn_pairs(pipe, data, options.grid_scale, options.grid_by), options.grid)


def of_pairs(data: ImageSet) -> ImageSet:
    """Every picture once, with the caption of its pair: --parts of examples/prepare_emoji.py names it several times."""
    whole = [i for i, own in enumerate(data.attributes) if own.get("caption_of", "pair") == "pair"]
    first = {
        json.dumps([data.captions[i], data.attributes[i]], sort_keys=True): i for i in whole[::-1]
    }
    return data.select(sorted(first.values()))


def asked_for(data: ImageSet, split: str, n: int) -> Tensor:
    """Which pictures' captions are drawn: up to n of a split, in an order that n does not change."""
    own = torch.tensor([i for i, a in enumerate(data.attributes) if a["split"] == split]).long()
    return own[torch.randperm(len(own), generator=torch.Generator().manual_seed(0))][:n]


def colours(images: Tensor) -> Tensor:
    """What tells the styles apart, as each has a palette: roots of the shares of 8 x 8 x 8 colours (n, 512)."""
    red, green, blue = ((images + 1) * 4).long().clamp(0, 7).flatten(2).unbind(1)
    places = (red * 8 + green) * 8 + blue
    counts = torch.stack([own.bincount(minlength=512) for own in places])
    return (counts.double() / places.shape[1]).sqrt()


@torch.no_grad()
def reconstructions(tokenizer: VQTokenizer, images: Tensor) -> Tensor:
    """What the tokenizer leaves of images."""
    return torch.cat([tokenizer.decode(tokenizer.encode(part)) for part in images.split(BATCH)])


@dataclass(frozen=True, eq=False)
class Judge:
    """Sees what a picture shows, by the real pictures of the folder.

    The nearest ones in features tell the concept. Of the style they say little, as they are of one concept in several
    styles: it is read from the colours, by a ridge regression.

    Attributes:
        features: of images.
        mean: of the real pictures' features (F,).
        real: these features about their mean, of norm 1 (M, F).
        concepts: of the real pictures, as numbers (M,).
        styles: likewise.
        reader: colours to styles.
    """

    features: Features
    mean: Tensor
    real: Tensor
    concepts: Tensor
    styles: Tensor
    reader: CaptionScorer

    @classmethod
    def fit(
        cls, data: ImageSet, features: Features, tokenizer: VQTokenizer, without: Tensor
    ) -> Judge:
        """Learn styles from the pictures that were trained on and their reconstructions, none of them from ``without``."""
        images = to_float(data.images)
        rows = extract(features, images)
        concepts, styles = (
            captions.distinct([own[name] for own in data.attributes])[1]
            for name in ("concept", "style")
        )
        learned = torch.tensor([own["split"] == "train" for own in data.attributes])
        learned[without] = False
        shown = torch.cat([images[learned], reconstructions(tokenizer, images[learned])])
        reader = CaptionScorer.fit(colours(shown), F.one_hot(styles[learned]).double().repeat(2, 1))
        mean = rows.mean(0)
        return cls(features, mean, F.normalize(rows - mean), concepts, styles, reader)

    def see(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The cosine of each image to each real picture (n, M), and the style that is read (n,)."""
        cosines = F.normalize(extract(self.features, images) - self.mean) @ self.real.T
        return cosines, self.reader.predict(colours(images)).argmax(1)

    def grade(
        self, seen: tuple[Tensor, Tensor], asked: Tensor, *, left_out: bool = False
    ) -> dict[str, Any]:
        """Share of images that show what was asked for, and its standard error, by measure.

        Args:
            seen: of the images.
            asked: which real picture each should be like (n,).
            left_out: whether that picture itself is not looked for, so that it cannot be found.
        """
        cosines, styles = seen
        if left_out:
            itself = F.one_hot(asked, len(self.real)).bool()
            cosines = cosines.masked_fill(itself, -torch.inf)
        nearest = cosines.topk(NEAREST).indices
        concept = self.concepts[nearest] == self.concepts[asked, None]
        right = {
            "concept": concept[:, 0],
            "concept_5": concept.any(1),
            "style": styles == self.styles[asked],
        }
        if not left_out:
            right["pair"] = nearest[:, 0] == asked
        shares = {name: share(name, int(own.sum()), len(own)) for name, own in right.items()}
        return {
            name: {"mean": own.value, "standard_error": own.error} for name, own in shares.items()
        }


def fingerprint(pipe: TextToImage, data: ImageSet) -> str:
    """A hash of weights, sampler, pictures and judge: cells that were made with others are not kept."""
    known = [pipe.defaults(), pipe.digest(), data.captions, data.attributes, NEAREST, LATE]
    digest = hashlib.sha256(json.dumps(known, sort_keys=True).encode())
    digest.update(data.images.numpy().tobytes())
    for part in (features, captions, asked_for, colours, Judge, Prompts, prompts_for):
        digest.update(inspect.getsource(part).encode())
    return digest.hexdigest()[:16]


@dataclass(frozen=True)
class Prompts:
    """What is drawn: captions, or concepts or captions with a style each as a second condition.

    Attributes:
        texts: a prompt each.
        styles: the second condition, if there is one.
        change: None: both conditions all the time; else the first one up to this progress, the second one after it.
    """

    texts: list[str]
    styles: list[str] | None = None
    change: float | None = None

    def draw(self, pipe: TextToImage, scale: float) -> Tensor:
        """One image a prompt, of seed i for prompt i; every condition has the scale."""
        options: dict[str, Any] = {"seeds": range(len(self.texts)), "batch_size": BATCH}
        if self.styles is None:
            return pipe.sample(self.texts, guidance=Guidance(scale), **options)
        if self.change is None:
            weights = branches.composed(cond=scale, style=scale)
        else:
            first = interval(scale, 0.0, self.change, outside=0.0)
            then = interval(0.0, 0.0, self.change, outside=scale)
            weights = branches.composed(cond=first, style=then)
        options["branches"] = {"style": self.styles}
        return pipe.sample(self.texts, guidance=Guidance(weights), **options)


def prompts_for(data: ImageSet, asked: Tensor, by: str) -> Prompts:
    """The captions of the pictures asked for, by "parts" and "late" with the words of concept and style as in training."""
    about = [data.attributes[i] for i in asked]
    whole = [data.captions[i] for i in asked]
    styles = [f"emoji in {own['style']} style" for own in about]
    if by == "parts":
        return Prompts([own["concept"] for own in about], styles)
    return Prompts(whole) if by == "whole" else Prompts(whole, styles, change=LATE)


def measure(
    pipe: TextToImage, judge: Judge, prompts: Prompts, asked: Tensor, scale: float
) -> dict[str, Any]:
    """Draw all prompts and grade them; "shuffled" is by the prompt before, which is chance."""
    seen = judge.see(prompts.draw(pipe, scale))
    return judge.grade(seen, asked) | {"shuffled": judge.grade(seen, asked.roll(1))}


def references(
    judge: Judge, tokenizer: VQTokenizer, data: ImageSet, asked: Tensor
) -> dict[str, Any]:
    """What the judge makes of the true pictures, and of what the tokenizer leaves of them."""
    true = to_float(data.images[asked])
    left = reconstructions(tokenizer, true)
    return {
        "true pictures, each among the others": judge.grade(judge.see(true), asked, left_out=True),
        "reconstructions of the true pictures": judge.grade(judge.see(left), asked),
    }


def shown(share: dict[str, float] | None) -> str:
    """A share in percent."""
    if share is None:
        return "-"
    return f"{100 * share['mean']:.1f} +- {100 * share['standard_error']:.1f}"


def table(cells: Cells, references: dict[str, Any], command: str) -> str:
    """Markdown: by split, every measure by family and scale, then what bounds it from above and below."""
    lines = [
        "# Composing what was seen apart",
        "",
        f"Percent of the drawings +- its standard error; `{command}`. The best scale is that of the same drawings.",
    ]
    for split, families in cells.items():
        scales = list(next(iter(families.values())))
        lines += [
            "",
            f"## {SPLITS[split]} ({split})",
            "",
            "| | family | " + " | ".join(f"s = {s}" for s in scales) + " | best - (s = 1) |",
            "|---|---|" + "--:|" * (len(scales) + 1),
        ]
        for measure, label in MEASURES.items():
            for family, by_scale in families.items():
                means = {s: cell[measure]["mean"] for s, cell in by_scale.items()}
                # two conditions at 1 are guided already
                plain = "1" in means and not family.endswith(BY["parts"])
                gain = f"{100 * (max(means.values()) - means['1']):.1f}" if plain else "-"
                row = " | ".join(shown(cell[measure]) for cell in by_scale.values())
                lines.append(f"| {label} | {family} | {row} | {gain} |")
        bounds = dict(references[split])
        for family, by_scale in families.items():
            best = max(scales, key=lambda s: by_scale[s]["concept"]["mean"])
            bounds[f"{family}, s = {best}, by another prompt"] = by_scale[best]["shuffled"]
        lines += ["", "| | " + " | ".join(MEASURES.values()) + " |"]
        lines += ["|---|" + "--:|" * len(MEASURES)]
        for name, own in bounds.items():
            lines.append(f"| {name} | " + " | ".join(shown(own.get(m)) for m in MEASURES) + " |")
    return "\n".join(lines) + "\n"


def plot(cells: Cells, file: Path) -> None:
    """A row a split, a panel a measure, a colour a family; a kind of line by how it was asked."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3 * len(MEASURES) + 2, 3 * len(cells)), layout="constrained")
    rows = figure.subplots(len(cells), len(MEASURES), sharex=True, sharey=True, squeeze=False)
    for panels, (split, families) in zip(rows, cells.items(), strict=True):
        names = list(dict.fromkeys(asked_how(name)[0] for name in families))
        for axes, (measure, label) in zip(panels, MEASURES.items(), strict=True):
            for name, by_scale in families.items():
                own = [cell[measure] for cell in by_scale.values()]
                means, errors = ([100 * c[key] for c in own] for key in ("mean", "standard_error"))
                family, by = asked_how(name)
                style = {"color": f"C{names.index(family)}", "ls": LINES[by]}
                axes.errorbar(list(by_scale), means, errors, label=name, **style)
            axes.set(title=label, ylim=(0, 101))
            axes.grid(alpha=0.3)
        panels[0].set_ylabel(f"{split}: drawings, %")
    for axes in rows[-1]:
        axes.set_xlabel("scale s")
    figure.legend(*rows[0][0].get_legend_handles_labels(), loc="outside right center")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=100)


def asked_how(name: str) -> tuple[str, str]:
    """Family and key of ``BY`` that a row's name is made of."""
    for by, suffix in BY.items():
        if suffix and name.endswith(suffix):
            return name.removesuffix(suffix), by
    return name, "whole"


def drawn_pairs(pipe: TextToImage, data: ImageSet, scale: float, by: str) -> Image.Image:
    """The first unseen pairs, seed i for prompt i, each with its caption below it."""
    asked = asked_for(data, "val_pair", GRID_COLUMNS * GRID_ROWS)
    images = to_images(prompts_for(data, asked, by).draw(pipe, scale))
    texts = [data.captions[i] for i in asked]
    cells = [captioned(image, text) for image, text in zip(images, texts, strict=True)]
    rows = [cells[i : i + GRID_COLUMNS] for i in range(0, len(cells), GRID_COLUMNS)]
    return grid(rows, cell=cells[0].width)


def captioned(image: Image.Image, caption: str) -> Image.Image:
    """The picture, enlarged to a whole multiple of its pixels, above two lines of text, on a white square."""
    size = image.width * max(1, GRID_CELL // image.width)
    below = 2 * LINE + 4
    cell = Image.new("RGB", (size + below, size + below), "white")
    cell.paste(image.resize((size, size), Image.Resampling.NEAREST), (below // 2, 0))
    text = "\n".join(textwrap.wrap(caption, cell.width // 6)[:2])
    ImageDraw.Draw(cell).multiline_text(
        (cell.width / 2, size), text, "black", ImageFont.load_default(11), "ma", align="center"
    )
    return cell


if __name__ == "__main__":
    main()

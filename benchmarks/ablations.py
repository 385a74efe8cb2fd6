"""What the choices of a training with condition dropout do to guidance, one training for each choice.

    python benchmarks/ablations.py --out benchmarks/results --plot docs/pictures/shapes-ablations.png

Each variant differs from the base in one thing: the dropout rate, a null condition that is not learned, the length of the
text prefix, or the quantizer of the image tokenizer. All train on the same scenes. Finished trainings and measured cells
are kept in --work, and an interrupted run goes on; --only takes some of the variants, so that several processes can share
the work, each variant by one of them at a time. The tables are made from all that is there.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from attributes import SCENES_SEED, as_dict, check_plot, fingerprint, grade, load, measure
from filelock import FileLock
from timing import machine
from torch import nn
from tqdm.auto import tqdm

from models import TextToImage, TextTokenizer
from models.folders import find_weights
from models.labels import PromptEncoder
from tokenizers_vq import VQTokenizer, VQTokenizerConfig, to_float
from tokenizers_vq.files import write_text_atomically
from tokenizers_vq.hub import WEIGHTS, save_part
from unicfg.training import trainer
from unicfg.training.data import ImageSet
from unicfg.training.families import make_network
from unicfg.training.recipe import FAMILIES, ModelRecipe, Recipe, load_recipe
from unicfg.training.shapes import make_shapes
from unicfg.training.shards import Shards

RECIPE = Path(__file__).parents[1] / "examples/recipes/shapes.yaml"
SCALES = (0.0, 1.0, 1.5, 2.0, 3.0, 5.0, 8.0)
SHIPPED = "shapes"  # its tokenizer is the base's
BASE, FIXED_NULL, LEARNED_CODEBOOK = "base", "fixed-null", "vq"
DROPOUT = {
    f"dropout-{rate:g}": {"model": {"condition_dropout": rate}} for rate in (0.0, 0.05, 0.2, 0.5)
}
# sections of the recipe and what each variant has there; the null condition is fixed in the network
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    BASE: {},
    **DROPOUT,
    FIXED_NULL: {},
    "prefix-8": {"text": {"length": 8}},
    "prefix-32": {"text": {"length": 32}},
    LEARNED_CODEBOOK: {"tokenizer": {"quantizer": "vq"}},
}


def recipe_of(variant: str, family: str, steps: int, work: Path) -> Recipe:
    """The recipe of the shapes weights, shorter, with the variant's change."""
    recipe = load_recipe(RECIPE, family)
    training, own = recipe.model.training, recipe.model.training.steps
    # the average reaches back over as large a share of the training as it does in the recipe
    ema = 1 - (1 - training.ema) * own / steps
    training = replace(training, steps=steps, ema=max(ema, 0.0), sample_every=steps)
    # short trainings see few pictures twice: further encodings of a picture would only cost time
    model = replace(recipe.model, training=training, crops=1, shift=0)
    recipe = replace(recipe, out=str(work / variant), model=model)
    for section, values in VARIANTS[variant].items():
        recipe = replace(recipe, **{section: replace(getattr(recipe, section), **values)})
    return recipe


def network_with_fixed_null(
    recipe: ModelRecipe, tokenizer: VQTokenizerConfig, text: PromptEncoder
) -> nn.Module:
    """The network that the library makes, with the null condition's embedding at zero for good.

    The positions of the prefix are added to it as to any other, and are trained with all prompts.
    """
    network = make_network(recipe, tokenizer, text)
    (null,) = text.null_condition.unique().tolist()
    embedding: Any = network.body.prefix.embedding  # type: ignore[union-attr]
    embedding.padding_idx = null  # torch's name for a row that gets no gradient
    with torch.no_grad():
        embedding.weight[null] = 0  # which weight decay and moving average leave as it is
    return network


def train(variant: str, family: str, steps: int, work: Path) -> TextToImage:
    """Train one family of a variant; what is finished of it, or of its like, is taken as it is."""
    recipe, base = (recipe_of(own, family, steps, work) for own in (variant, BASE))
    out, shared = Path(recipe.out), work / "shared"
    same_codes = (recipe.tokenizer, recipe.text) == (base.tokenizer, base.text)
    out.mkdir(parents=True, exist_ok=True)
    for part in ("images", "codes") if same_codes else ("images",):
        (shared / part).mkdir(parents=True, exist_ok=True)
        if not (out / part).is_symlink():
            (out / part).symlink_to(Path("..") / shared.name / part)
    if recipe.tokenizer == base.tokenizer and not (out / "tokenizer" / WEIGHTS).exists():
        shipped = VQTokenizer.from_pretrained(find_weights(SHIPPED) / "tokenizer")
        save_part(shipped, out / "tokenizer")
    with FileLock(shared / ".lock"):  # one process makes what several share, the others wait
        trainer.train(recipe, resume=True, until="codes" if same_codes else "images")
    # a recipe has no word for a fixed null, and the trainer makes its network itself
    make = network_with_fixed_null if variant == FIXED_NULL else make_network
    with patch.object(trainer, "make_network", make):
        pipe = trainer.train(recipe, resume=True)
    assert pipe is not None
    return pipe


def run(
    variant: str,
    family: str,
    settings: dict[str, Any],
    scenes: ImageSet,
    work: Path,
) -> None:
    """Train, and measure what is not in the variant's file yet."""
    file = work / f"{variant}.json"
    pipe = train(variant, family, settings["steps"], work)
    results, made_with = load(file, settings), fingerprint(pipe)
    cells = results["families"].get(family, {})
    if cells.get("made_with") != made_with:
        cells = {
            "made_with": made_with,
            "machine": machine(),
            "losses": final_losses(work / variant / "logs" / family / "metrics.jsonl"),
            "tokens": pipe.text.length + int(pipe.network.body.num_tokens),
            "captions_cut": share_cut(pipe.text, scenes.captions),
            "accuracy": {},
        }
        results["families"][family] = cells
    if variant in (BASE, LEARNED_CODEBOOK) and "tokenizer" not in results:
        results["tokenizer"] = measure_tokenizer(pipe.tokenizer, work / variant / "images", scenes)
    for scale in SCALES:
        if f"{scale:g}" not in cells["accuracy"]:
            cells["accuracy"][f"{scale:g}"] = as_dict(measure(pipe, scenes, scale))
            write_text_atomically(json.dumps(results, indent=1) + "\n", file)


def final_losses(log: Path) -> dict[str, float]:
    """The last validation losses of a training, with and without the condition."""
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    last = next(line for line in reversed(lines) if "validation_loss" in line)
    return {"cond": last["validation_loss"], "uncond": last["validation_loss_uncond"]}


def share_cut(text: PromptEncoder, captions: Sequence[str]) -> float:
    """The share of captions with more tokens than the prefix."""
    assert isinstance(text, TextTokenizer)
    encodings = text.bpe.encode_batch(list(captions))
    return sum(len(own.ids) > text.length for own in encodings) / len(encodings)


def measure_tokenizer(tokenizer: VQTokenizer, images: Path, scenes: ImageSet) -> dict[str, Any]:
    """On the validation images, and what the reader makes of reconstructed scenes."""
    held_out = Shards(images / "validation", ("images",))
    values, _ = trainer.evaluate_tokenizer(tokenizer, to_float(held_out.first(len(held_out))[0]))
    reconstructed = grade(tokenizer.decode(tokenizer.encode(to_float(scenes.images))), scenes)
    sizes = {"codes": tokenizer.codebook_size, "channels": tokenizer.latent_channels}
    return sizes | values | {"reconstructions": as_dict(reconstructed)}


def collect(work: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """What all processes have measured with these settings, by variant."""
    held = {name: load(work / f"{name}.json", settings) for name in VARIANTS}
    return {name: own for name, own in held.items() if own["families"]}


def rows_by_family(results: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """For each family the variants whose cells are all there."""
    scales = {f"{scale:g}" for scale in SCALES}
    rows: dict[str, dict[str, Any]] = {}
    for family in FAMILIES:
        for name, variant in results["variants"].items():
            own = variant["families"].get(family)
            if own and scales <= own["accuracy"].keys():
                rows.setdefault(family, {})[name] = own
    return rows


def page(results: dict[str, Any]) -> str:
    """Markdown: accuracy by family, variant and scale, then losses and tokenizers."""
    settings, variants = results["settings"], results["variants"]
    rows = rows_by_family(results)
    machines = sorted({cell["machine"] for own in rows.values() for cell in own.values()})
    base = load_recipe(RECIPE)
    commands = []
    for family, own in rows.items():
        command = f"python benchmarks/ablations.py --families {family} -n {settings['n']} --steps {settings['steps']}"
        if own.keys() != VARIANTS.keys():
            command += f" --only {' '.join(own)}"
        commands.append(f"`{command}`")
    lines = [
        "# Ablations of condition dropout",
        "",
        f"{'; '.join(machines)}. {', '.join(commands)}.",
        "",
        f"Each variant is a training of its own, {settings['steps']} steps of {base.model.training.batch_size} samples, and "
        "differs from `base` in what its name says;",
        f"base has condition dropout {base.model.condition_dropout:g}, a learned null condition, a prefix of "
        f"{base.text.length} tokens and the quantizer {base.tokenizer.quantizer}.",
        f"Percent of attributes right, mean of {settings['n']} images +- its standard error; the best of a row is bold.",
        "",
    ]
    for family, own in rows.items():
        lines += [
            f"## {family}",
            "",
            "| variant | " + " | ".join(f"s = {scale:g}" for scale in SCALES) + " |",
            "|---|" + "--:|" * len(SCALES),
        ]
        for name, row in own.items():
            cells = [row["accuracy"][f"{scale:g}"] for scale in SCALES]
            best = max(cells, key=lambda cell: cell["mean"])
            shown = [f"{100 * c['mean']:.1f} +- {100 * c['standard_error']:.1f}" for c in cells]
            shown[cells.index(best)] = f"**{shown[cells.index(best)]}**"
            lines.append(f"| {name} | " + " | ".join(shown) + " |")
        lines.append("")
    lines += [
        "## Validation losses",
        "",
        f"At the end of training. Tokens a sample are those of prefix and image. `{LEARNED_CODEBOOK}` predicts other tokens",
        "and latents than the rest, so its losses stand for themselves.",
        "",
        "| family | variant | with the condition | without | tokens a sample | prompts cut, % |",
        "|---|---|--:|--:|--:|--:|",
    ]
    for family, own in rows.items():
        for name, row in own.items():
            losses = f"{row['losses']['cond']:.4f} | {row['losses']['uncond']:.4f}"
            cut = f"{100 * row['captions_cut']:.1f}"
            lines.append(f"| {family} | {name} | {losses} | {row['tokens']} | {cut} |")
    lines += [
        "",
        "## Tokenizers",
        "",
        "PSNR, usage and perplexity of the codebook on the validation images; attributes read from reconstructions of the",
        "scenes of the prompts.",
        "",
        "| variant | codes | channels | PSNR, dB | codes used, % | perplexity | attributes right, % |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for name, values in variants.items():
        if "tokenizer" in values:
            t = values["tokenizer"]
            right = (100 * t["reconstructions"][key] for key in ("mean", "standard_error"))
            lines.append(
                f"| {name} | {t['codes']} | {t['channels']} | {t['psnr']:.2f} | {100 * t['codebook_usage']:.1f} "
                f"| {t['codebook_perplexity']:.0f} | {' +- '.join(f'{value:.1f}' for value in right)} |"
            )
    return "\n".join(lines) + "\n"


def plot(results: dict[str, Any], file: Path) -> None:
    """Accuracy against s, a curve for each dropout rate and a panel for each family."""
    from matplotlib.figure import Figure

    families, places = rows_by_family(results), range(len(SCALES))
    rates = {own["model"]["condition_dropout"]: name for name, own in DROPOUT.items()}
    rates[load_recipe(RECIPE).model.condition_dropout] = BASE
    figure = Figure(figsize=(5.5 * len(families), 3.6), layout="constrained")
    panels = figure.subplots(1, len(families), squeeze=False)[0]
    for axes, (family, rows) in zip(panels, families.items(), strict=True):
        for place, (rate, name) in enumerate(sorted(rates.items())):
            if name not in rows:
                continue
            row = [rows[name]["accuracy"][f"{scale:g}"] for scale in SCALES]
            means, errors = ([100 * c[key] for c in row] for key in ("mean", "standard_error"))
            axes.errorbar(
                places,
                means,
                errors,
                color=f"C{place}",  # the same in every panel
                marker="o",
                markersize=4,
                capsize=3,
                label=f"{rate:g}",
            )
        axes.set_xticks(places, [f"{scale:g}" for scale in SCALES])
        axes.set(title=family, xlabel="scale s", ylabel="attributes right, %")
        axes.grid(alpha=0.3)
        axes.legend(title="condition dropout")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=130)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=["flow", "ar"])
    parser.add_argument("--only", nargs="+", choices=VARIANTS, help="variants to run; all if none")
    parser.add_argument("-n", type=int, default=256, help="images a cell")
    parser.add_argument("--steps", type=int, default=2500, help="of each training")
    parser.add_argument("--work", type=Path, default=Path("out/ablations"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--plot", type=Path, help="a picture of the rates (needs matplotlib)")
    options = parser.parse_args()
    if options.plot is not None:
        check_plot(options.plot)
    options.work.mkdir(parents=True, exist_ok=True)
    scenes = make_shapes(options.n, seed=SCENES_SEED, wrong=0.0)
    settings = {"n": options.n, "steps": options.steps, "scenes_seed": SCENES_SEED}
    jobs = [(variant, own) for variant in options.only or VARIANTS for own in options.families]
    with tqdm(jobs, desc="training and reading", unit="training") as bar:
        for variant, family in bar:
            bar.set_postfix_str(f"{variant}, {family}")
            with FileLock(options.work / f".{variant}.lock"):  # its families share a folder
                run(variant, family, settings, scenes, options.work)
    results = {"settings": settings, "variants": collect(options.work, settings)}
    write_text_atomically(json.dumps(results, indent=1) + "\n", options.out / "ablations.json")
    write_text_atomically(page(results), options.out / "ablations.md")
    print(page(results))
    if options.plot is not None:
        plot(results, options.plot)


if __name__ == "__main__":
    main()

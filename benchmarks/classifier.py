"""Classifier guidance, the older road, beside classifier-free guidance: what each costs, and what it buys.

    python benchmarks/classifier.py --out benchmarks/results --plot docs/pictures/shapes-classifier.png

A prompt is a text, so its classifier is a network that spells captions: log p(caption | what it sees) is the sum over the
caption's tokens. Two are trained on the data of the shapes weights: one on latents at every noise level, for
`ClassifierDenoiser` around the diffusion model, and one on the first n image tokens, for `ClassifierTokens` (FUDGE)
around the autoregressive one. Both models only ever see the null condition. Finished trainings are kept in --work, and an
interrupted one goes on.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from attributes import SCENES_SEED, grade
from timing import machine
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from tqdm.auto import tqdm

from models import TextToImage
from models.blocks import TimeEmbedding
from models.pipeline import SOLVERS, STEPS
from tokenizers_vq import to_float
from tokenizers_vq.files import write_text_atomically
from unicfg import Guidance, sample_autoregressive, sample_diffusion
from unicfg.guidance.spaces import convert
from unicfg.sampling.classifier import ClassifierDenoiser, ClassifierTokens
from unicfg.training.data import ImageSet
from unicfg.training.dropout import Part
from unicfg.training.families import step_generator
from unicfg.training.losses import stratified
from unicfg.training.optimize import fit
from unicfg.training.recipe import Optimization
from unicfg.training.shapes import make_shapes

SCALES = {
    "classifier-free": (1.0, 2.0, 3.0, 5.0, 8.0),
    "classifier": (1.0, 2.0, 3.0, 5.0, 8.0),
}
BATCH = TRAINING_BATCH = 32
CANDIDATES = 16  # of 1000 tokens; what FUDGE judges at each step
LEVELS = (0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)


class Captioner(nn.Module):
    """log p(caption | image so far): a small transformer that reads an image and spells its caption.

    Args:
        inputs: image tokens as (R, n, D), from latents or ids.
        places: L.
        vocabulary: of the captions.
        length: T.
        width: D.
        depth: layers.
    """

    def __init__(
        self,
        inputs: nn.Module,
        places: int,
        vocabulary: int,
        length: int,
        width: int = 128,
        depth: int = 4,
    ) -> None:
        super().__init__()
        self.inputs, self.length = inputs, length
        self.position = nn.Parameter(0.02 * torch.randn(places + length, width))
        self.start = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.caption = nn.Embedding(vocabulary, width)
        self.time = TimeEmbedding(width)
        layer = nn.TransformerEncoderLayer(
            width, 4, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.outputs = nn.Linear(width, vocabulary)

    def forward(self, seen: Tensor, cond: Tensor, t: Tensor) -> Tensor:
        """(R,) for what is seen, captions (R, T) and noise times (R,), 0 where there is no noise."""
        image = self.inputs(seen)
        n = image.shape[1]
        before = torch.cat([self.start.expand(len(cond), 1, -1), self.caption(cond[:, :-1])], dim=1)
        places = torch.cat([self.position[:n], self.position[-self.length :]])
        x = torch.cat([image, before], dim=1) + places + self.time(t)[:, None]
        # the image sees all of itself, the caption the image and its own beginning
        total = n + self.length
        hidden = torch.ones(total, total, dtype=torch.bool, device=x.device).triu(1)
        hidden[:n, :n] = False
        spelled = self.outputs(self.blocks(x, mask=hidden)[:, n:])
        log_p: Tensor = spelled.log_softmax(-1).gather(-1, cond[..., None])
        return log_p.sum((1, 2))


class Latents(nn.Module):
    """Latents (R, C, h, w) as tokens."""

    def __init__(self, channels: int, width: int = 128) -> None:
        super().__init__()
        self.linear = nn.Linear(channels, width)

    def forward(self, x: Tensor) -> Tensor:
        """(R, L, D)."""
        out: Tensor = self.linear(x.flatten(2).transpose(1, 2))
        return out


def train_on_latents(
    pipe: TextToImage, codes: TensorDataset, steps: int, folder: Path
) -> nn.Module:
    """The noise-conditional classifier."""
    path, channels = pipe.network.path, pipe.tokenizer.latent_channels  # type: ignore[union-attr]
    latents = codes.tensors[1]
    model = Captioner(
        Latents(channels), latents[0, 0].numel(), pipe.text.vocabulary, pipe.text.length
    )

    def loss(module: nn.Module, batch: list[Tensor], step: int, part: Part) -> Tensor:
        generator = step_generator(0, step)
        _, clean, cond = batch
        t = stratified(len(clean), generator)
        alpha, sigma = path.coefficients(t.view(-1, 1, 1, 1))
        noisy = alpha * clean + sigma * torch.randn(clean.shape, generator=generator)
        out: Tensor = -module(noisy, cond, t).mean() / cond.shape[1]
        return out

    return _fit(model, codes, loss, steps, folder)


def train_on_prefixes(
    pipe: TextToImage, codes: TensorDataset, steps: int, folder: Path
) -> nn.Module:
    """The classifier of the first n tokens."""
    ids = codes.tensors[0]
    table = nn.Embedding(pipe.tokenizer.codebook_size, 128)
    model = Captioner(table, ids.shape[1], pipe.text.vocabulary, pipe.text.length)

    def loss(module: nn.Module, batch: list[Tensor], step: int, part: Part) -> Tensor:
        tokens, _, cond = batch
        n = int(torch.randint(1, tokens.shape[1] + 1, (), generator=step_generator(0, step)))
        out: Tensor = -module(tokens[:, :n], cond, torch.zeros(len(cond))).mean() / cond.shape[1]
        return out

    return _fit(model, codes, loss, steps, folder)


def _fit(
    model: nn.Module, codes: TensorDataset, loss: Callable[..., Tensor], steps: int, folder: Path
) -> nn.Module:
    settings = Optimization(
        steps=steps,
        batch_size=TRAINING_BATCH,
        learning_rate=1e-3,
        weight_decay=0.01,
        precision="float32",
    )
    return fit(model, codes, loss, settings, folder, resume=True, tracker=False)


def encode(pipe: TextToImage, count: int) -> TensorDataset:
    """Ids, latents and captions of scenes as the shapes recipe draws them."""
    data = make_shapes(count, wrong=0.15, unrelated=0.15)
    ids, latents = [], []
    for images in tqdm(data.images.split(64), desc="encoding images"):
        pixels = to_float(images)
        ids.append(pipe.tokenizer.encode(pixels).flatten(1))
        latents.append(pipe.tokenizer.encode_latents(pixels))
    return TensorDataset(torch.cat(ids), torch.cat(latents), pipe.text.encode(data.captions))


@dataclass
class Road:
    """One way of guiding one model: how it draws, and what its classifier says of what was drawn."""

    draw: Callable[[list[str], list[int], float], Tensor]
    images: Callable[[Tensor], Tensor]
    judge: Callable[[Tensor, Tensor], Tensor]


def roads(pipes: dict[str, TextToImage], judges: dict[str, nn.Module]) -> dict[str, Road]:
    """Both roads, for both models."""
    made: dict[str, Road] = {}
    for family, pipe in pipes.items():
        judge, null = judges[family], pipe.model.null_condition
        diffusion = family == "diffusion"
        by_classifier: Any = (
            ClassifierDenoiser(pipe.model, judge)
            if diffusion
            else ClassifierTokens(pipe.model, _of_prefix(judge), candidates=CANDIDATES)
        )
        for name, model in (("classifier-free", pipe.model), ("classifier", by_classifier)):
            made[f"{family}, {name}"] = Road(
                _drawer(pipe, model, null, diffusion), _decoder(pipe, diffusion), _at_end(judge)
            )
    return made


def _of_prefix(judge: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    def log_prob(ids: Tensor, cond: Tensor) -> Tensor:
        out: Tensor = judge(ids, cond, torch.zeros(len(ids)))
        return out

    return log_prob


def _at_end(judge: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    @torch.no_grad()
    def log_prob(drawn: Tensor, cond: Tensor) -> Tensor:
        out: Tensor = judge(drawn, cond, torch.zeros(len(drawn)))
        return out

    return log_prob


def _drawer(
    pipe: TextToImage, model: Any, null: Any, diffusion: bool
) -> Callable[[list[str], list[int], float], Tensor]:
    def draw(prompts: list[str], seeds: list[int], s: float) -> Tensor:
        cond, guidance = pipe.encode_prompts(prompts), Guidance(s)
        if not diffusion:
            return sample_autoregressive(model, cond, uncond=null, guidance=guidance, seeds=seeds)
        return sample_diffusion(
            model,
            cond,
            uncond=null,
            guidance=guidance,
            seeds=seeds,
            steps=STEPS["diffusion"],
            solver=SOLVERS["diffusion"],  # type: ignore[arg-type]
            shape=pipe.network.latent_shape,  # type: ignore[union-attr]
        )

    return draw


def _decoder(pipe: TextToImage, diffusion: bool) -> Callable[[Tensor], Tensor]:
    if diffusion:
        return pipe.tokenizer.decode_latents
    side = pipe.network.config.grid
    return lambda ids: pipe.tokenizer.decode(ids.unflatten(1, (side, side)))


def measure(road: Road, pipe: TextToImage, scenes: ImageSet, s: float) -> dict[str, float]:
    """One cell."""
    drawn = []
    began = time.perf_counter()
    for start in range(0, len(scenes), BATCH):
        captions = scenes.captions[start : start + BATCH]
        drawn.append(road.draw(captions, list(range(start, start + len(captions))), s))
    seconds = time.perf_counter() - began
    samples = torch.cat(drawn)
    accuracy = grade(road.images(samples), scenes)
    said = road.judge(samples, pipe.encode_prompts(scenes.captions))
    return {
        "accuracy": accuracy.mean,
        "standard_error": accuracy.standard_error,
        "log_prob": float(said.mean()),
        "milliseconds_an_image": 1000 * seconds / len(scenes),
    }


def directions(pipe: TextToImage, judge: nn.Module, scenes: ImageSet) -> list[dict[str, float]]:
    """How far either road moves eps at s = 1, by noise level, on noisy true images, and whether to the same side."""
    network: Any = pipe.network
    clean = pipe.tokenizer.encode_latents(to_float(scenes.images))
    cond = pipe.encode_prompts(scenes.captions)
    null = pipe.model.null_condition.expand_as(cond)  # type: ignore[union-attr, operator]
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    by_classifier = ClassifierDenoiser(pipe.model, judge)  # type: ignore[arg-type]
    rows = []
    for level in LEVELS:
        t = torch.full((len(clean),), level)
        alpha, sigma = network.path.coefficients(torch.tensor(level, dtype=torch.float64))
        x = (alpha * clean + sigma * noise).float()

        def eps(
            model: Any,
            given: Tensor,
            x: Tensor = x,
            t: Tensor = t,
            level: tuple[Tensor, Tensor] = (alpha, sigma),
        ) -> Tensor:
            with torch.no_grad():
                return convert(model(x, given, t), x, *level, network.space, "eps").flatten(1)

        plain = eps(network, null)
        free, classified = eps(network, cond) - plain, eps(by_classifier, cond) - plain
        row: dict[str, float] = {"t": level}
        for name, own in (("classifier-free", free), ("classifier", classified)):
            norms = own.norm(dim=1)
            row[name] = float(norms.mean())
            row[f"{name}, spread"] = float(norms.std())
        row["cosine"] = float(torch.cosine_similarity(free, classified).mean())
        rows.append(row)
    return rows


def time_in_turn(made: dict[str, Road], prompts: list[str], rounds: int) -> dict[str, list[float]]:
    """Milliseconds an image at s = 3 for each road, in turn, so that they meet the same machine."""
    seconds: dict[str, list[float]] = {name: [] for name in made}
    for turn in range(rounds + 1):
        for name, road in made.items():
            began = time.perf_counter()
            road.draw(prompts, list(range(len(prompts))), 3.0)
            if turn:  # the first is to warm up
                seconds[name].append(1000 * (time.perf_counter() - began) / len(prompts))
    return seconds


def table(results: dict[str, Any], command: str) -> str:
    """Markdown."""
    cells, times = results["cells"], results["milliseconds"]
    lines = [
        "# Classifier guidance and classifier-free guidance",
        "",
        f"{results['machine']}",
        "",
        f"`{command}`. Attributes right in percent, mean of {results['settings']['n']} images +- its standard error. The",
        "classifier's own opinion is log p(caption | image), in nats, mean over the images that were drawn; of the true",
        "images it is "
        + " and ".join(f"{value:.1f} ({f})" for f, value in results["true"].items())
        + ".",
        "",
    ]
    for family in results["true"]:
        lines += [
            f"## {family}",
            "",
            "| road | s | attributes right | the classifier's opinion |",
            "|---|--:|--:|--:|",
        ]
        for name, own in cells.items():
            if not name.startswith(family):
                continue
            for s, cell in own.items():
                accuracy = f"{100 * cell['accuracy']:.1f} +- {100 * cell['standard_error']:.1f}"
                lines.append(
                    f"| {name.split(', ')[1]} | {s} | {accuracy} | {cell['log_prob']:.1f} |"
                )
        lines.append("")
    lines += [
        "## What it costs",
        "",
        f"Milliseconds an image at s = 3, batch {BATCH}, median of {results['settings']['rounds']} rounds in turn and their",
        "range. The second training is that of the classifier.",
        "",
        "| | ms an image | range | against classifier-free | parameters of the classifier, of the model | images of its training |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for name, values in times.items():
        family = name.split(", ")[0]
        ratio = statistics.median(values) / statistics.median(times[f"{family}, classifier-free"])
        extra = results["training"][family] if name.endswith(", classifier") else None
        marks = "- | -"
        if extra:
            marks = f"{extra['parameters']:,}, {extra['network']:,} | {extra['images']:,}"
        lines.append(
            f"| {name} | {statistics.median(values):.1f} | {min(values):.1f} to {max(values):.1f} | {ratio:.2f}x | {marks} |"
        )
    lines += [
        "",
        "## The direction, by noise level",
        "",
        "Norm of what either road adds to eps at s = 1, on noisy true images, mean and standard deviation over the images;",
        "t = 1 is pure noise. The cosine is between the two.",
        "",
        "| t | classifier-free | classifier | cosine |",
        "|--:|--:|--:|--:|",
    ]
    for row in results["directions"]:
        marks = [
            f"{row[name]:.2f} ({row[f'{name}, spread']:.2f})"
            for name in ("classifier-free", "classifier")
        ]
        lines.append(f"| {row['t']:g} | " + " | ".join(marks) + f" | {row['cosine']:.2f} |")
    return "\n".join(lines) + "\n"


def plot(results: dict[str, Any], file: Path) -> None:
    """Accuracy over scale for both models, and the norm of the direction by noise level."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.6), layout="constrained")
    *curves, norms = figure.subplots(1, 3)
    for axes, family in zip(curves, results["true"], strict=True):
        for name in ("classifier-free", "classifier"):
            own = results["cells"][f"{family}, {name}"]
            axes.errorbar(
                [float(s) for s in own],
                [100 * cell["accuracy"] for cell in own.values()],
                [100 * cell["standard_error"] for cell in own.values()],
                marker="o",
                markersize=4,
                capsize=3,
                label=name,
            )
        axes.set(title=family, xlabel="scale s", ylabel="attributes right, %", ylim=(20, 101))
    rows = results["directions"]
    for name in ("classifier-free", "classifier"):
        norms.errorbar(
            [row["t"] for row in rows],
            [row[name] for row in rows],
            [row[f"{name}, spread"] for row in rows],
            marker="o",
            markersize=4,
            capsize=3,
            label=name,
        )
    norms.set(title="norm of the direction in eps", xlabel="noise time t", yscale="log")
    for axes in (*curves, norms):
        axes.grid(alpha=0.3)
        axes.legend()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=130)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", default="shapes")
    parser.add_argument("-n", type=int, default=128, help="images a cell")
    parser.add_argument("--steps", type=int, default=5000, help="of either training")
    parser.add_argument("--count", type=int, default=40000, help="scenes to train on")
    parser.add_argument("--rounds", type=int, default=5, help="of timing")
    parser.add_argument("--work", type=Path, default=Path("runs/classifier"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--plot", type=Path, help="a picture of the curves (needs matplotlib)")
    parser.add_argument("--train-only", choices=("diffusion", "ar"), help="stop after one training")
    options = parser.parse_args()
    pipes = {f: TextToImage.from_pretrained(options.weights, f) for f in ("diffusion", "ar")}
    codes = encode(pipes["ar"], options.count)
    trainings = {"diffusion": train_on_latents, "ar": train_on_prefixes}
    judges: dict[str, nn.Module] = {}
    training = {}
    for family, train in trainings.items():
        if options.train_only not in (None, family):
            continue
        judges[family] = train(pipes[family], codes, options.steps, options.work / family)
        training[family] = {
            "parameters": sum(p.numel() for p in judges[family].parameters()),
            "network": sum(p.numel() for p in pipes[family].network.parameters()),
            "images": options.steps * TRAINING_BATCH,
        }
    if options.train_only:
        return
    scenes = make_shapes(options.n, seed=SCENES_SEED, wrong=0.0)
    made = roads(pipes, judges)
    results: dict[str, Any] = {
        "settings": {name: getattr(options, name) for name in ("weights", "n", "steps", "rounds")},
        "machine": machine(),
        "training": training,
        "cells": {name: {} for name in made},
    }
    pixels, cond = to_float(scenes.images), pipes["ar"].encode_prompts(scenes.captions)
    clean = {
        "diffusion": pipes["ar"].tokenizer.encode_latents(pixels),
        "ar": pipes["ar"].tokenizer.encode(pixels).flatten(1),
    }
    results["true"] = {f: float(_at_end(judges[f])(clean[f], cond).mean()) for f in pipes}
    jobs = [(name, s) for name in made for s in SCALES[name.split(", ")[1]]]
    with tqdm(jobs, desc="drawing and reading", unit="cell") as bar:
        for name, s in bar:
            bar.set_postfix_str(f"{name} {s:g}")
            cell = measure(made[name], pipes[name.split(", ")[0]], scenes, s)
            results["cells"][name][f"{s:g}"] = cell
    results["directions"] = directions(pipes["diffusion"], judges["diffusion"], scenes)
    results["milliseconds"] = time_in_turn(made, scenes.captions[:BATCH], options.rounds)
    command = f"python benchmarks/classifier.py -n {options.n} --steps {options.steps}"
    file = options.out / f"{Path(options.weights).name}-classifier.json"
    write_text_atomically(json.dumps(results, indent=1) + "\n", file)
    write_text_atomically(table(results, command), file.with_suffix(".md"))
    print(table(results, command))
    if options.plot is not None:
        plot(results, options.plot)


if __name__ == "__main__":
    main()

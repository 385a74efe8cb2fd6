"""One prompt, every family, every scale, the same seeds: a picture, and all it takes to make it again."""

from __future__ import annotations

import html
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from models import TextToImage
from models.folders import held_families
from tokenizers_vq.files import read_json, write_text_atomically
from unicfg.evaluation.provenance import settings_of, versions
from unicfg.evaluation.results import scale_text
from unicfg.guidance import Guidance
from unicfg.pictures import grid, save_picture


def check_folder(out: Path) -> None:
    """Refuse a folder that a comparison would spoil.

    Raises:
        ValueError: if it holds images of ``unicfg generate``.
    """
    held = out / "settings.json"
    if held.is_file() and "prompt" not in read_json(held):
        raise ValueError(f"{out} holds images of unicfg generate, expected another folder")


@dataclass(frozen=True)
class Comparison:
    """What was drawn.

    Attributes:
        prompt: the text.
        weights: name or folder of the pipelines.
        families: one row each.
        scales: one column each.
        seeds: the same in every cell.
        settings: for each family, how it was sampled and with what network.
        images: by (family, scale), one image a seed.
    """

    prompt: str
    weights: str
    families: tuple[str, ...]
    scales: tuple[float, ...]
    seeds: tuple[int, ...]
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)
    images: dict[tuple[str, float], list[Image.Image]] = field(default_factory=dict)

    def picture(self) -> Image.Image:
        """Families (and seeds, if there are several) as rows, scales as columns."""
        rows, labels = [], []
        for family in self.families:
            for k, seed in enumerate(self.seeds):
                rows.append([self.images[family, scale][k] for scale in self.scales])
                labels.append(family if len(self.seeds) == 1 else f"{family} (seed {seed})")
        columns = [f"s = {scale:g}" for scale in self.scales]
        return grid(rows, row_labels=labels, column_labels=columns)

    def save(self, out: Path | str) -> Path:
        """Write the picture to ``out``; where that has no suffix, a folder with all there is.

        The folder gets ``compare.png``, ``index.html``, ``settings.json`` and every single image.

        Returns:
            the picture's file.

        Raises:
            OSError: if it cannot be written.
            ValueError: if the folder holds drawn images of another kind.
        """
        out = Path(out)
        if out.suffix and not out.is_dir():
            return save_picture(self.picture(), out)
        files = {}
        check_folder(out)
        for (family, scale), images in self.images.items():
            for seed, image in zip(self.seeds, images, strict=True):
                file = f"images/{family}-s{scale_text(scale)}-seed{seed}.png"
                save_picture(image, out / file)
                files[file] = {"family": family, "scale": scale, "seed": seed}
        settings = {
            "prompt": self.prompt,
            "weights": self.weights,
            "scales": self.scales,
            "seeds": self.seeds,
            "families": self.settings,
            "images": files,
            "versions": versions(),
        }
        write_text_atomically(json.dumps(settings, indent=2) + "\n", out / "settings.json")
        write_text_atomically(self._page(), out / "index.html")
        return save_picture(self.picture(), out / "compare.png")

    def _page(self) -> str:
        heads = "".join(f"<th>s = {scale:g}</th>" for scale in self.scales)
        rows = []
        for family in self.families:
            for seed in self.seeds:
                cells = "".join(
                    f'<td><img src="images/{family}-s{scale_text(scale)}-seed{seed}.png" alt="{family}, s = {scale:g}"></td>'
                    for scale in self.scales
                )
                rows.append(f"<tr><th>{family}<br>seed {seed}</th>{cells}</tr>")
        title = html.escape(self.prompt)
        return (
            f'<!doctype html><meta charset="utf-8"><title>{title}</title>'
            "<style>body{font-family:sans-serif}img{width:128px;image-rendering:pixelated}</style>"
            f"<h1>{title}</h1><table><tr><th></th>{heads}</tr>{''.join(rows)}</table>"
            '<p><a href="settings.json">every setting</a></p>\n'
        )


def compare(
    prompt: str,
    *,
    weights: Path | str = "shapes",
    families: Sequence[str] | None = None,
    scales: Sequence[float],
    seeds: Sequence[int] = (0,),
    progress: Callable[[str, float], None] | None = None,
) -> Comparison:
    """Draw one prompt with several families at several scales, from the same seeds.

    Args:
        prompt: the text.
        weights: shipped weights, a folder, or a hub repository that holds all the families.
        families: rows; None is all that the weights hold.
        scales: columns.
        seeds: images a cell.
        progress: called with family and scale after each cell.

    Raises:
        FileNotFoundError: if there are no such weights.
        ValueError: if they do not hold a family, or a scale is not finite.
    """
    guidances = {scale: Guidance(scale) for scale in scales}  # refused before weights are read
    families = held_families(weights) if families is None else families
    for name, values in (("families", families), ("scales", scales), ("seeds", seeds)):
        if len(values) == 0 or len(set(values)) != len(values):
            raise ValueError(f"{name} is {list(values)}, expected at least one, and none twice")
    # every family is loaded before the first image is drawn, so that a missing one costs nothing
    pipes = {family: TextToImage.from_pretrained(weights, family) for family in families}
    result = Comparison(prompt, str(weights), tuple(families), tuple(scales), tuple(seeds))
    for family, pipe in pipes.items():
        result.settings[family] = settings_of(pipe)
        for scale, guidance in guidances.items():
            result.images[family, scale] = pipe(
                [prompt] * len(seeds), seeds=list(seeds), guidance=guidance
            )
            if progress is not None:
                progress(family, scale)
    return result

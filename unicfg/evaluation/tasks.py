"""What a study asks families to draw, and the real images that it holds the drawings against."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from unicfg.evaluation.accuracy import scene_of
from unicfg.evaluation.diversity import OPEN
from unicfg.evaluation.prompts import read_prompts
from unicfg.training.data import ImageSet, read_folder
from unicfg.training.shapes import Scene, make_shapes, random_scene, render, vague_captions

SHAPES = "shapes"
SCENES_SEED = 77  # training draws its scenes from seed 0
OTHERS_SEED = 78  # of the real images that everything is compared with
MOST_SCENES = 100_000  # looked through for those that an open prompt describes
T = TypeVar("T")
OPEN_PROMPTS = 4  # of data in which nothing says what a prompt leaves open
HELD_OUT = 0.1  # of a folder that does not name its split


@dataclass(frozen=True)
class Task:
    """Prompts, and what is known about them.

    Attributes:
        prompts: one an image (N,).
        open_prompts: that are drawn many times, to see what differs.
        leaves_open: which attributes some of these leave open; {} where attributes cannot be read.
        scenes: what each prompt asks for (N,); () where attributes cannot be read.
        real: images that prompts belong to, uint8 (M, 3, H, W); None where there are none.
        captions: of ``real`` (M,).
        others: other real images, that everything is held against, ``real`` included; None where there are none.
        opened: real images of the open prompts in turn, equally many; None where there are none.
        examples: real images with captions, to learn from what captions look like; None where there are none, or where
            attributes say it better.
    """

    prompts: tuple[str, ...]
    open_prompts: tuple[str, ...]
    leaves_open: Mapping[str, Sequence[str]]
    scenes: tuple[Scene, ...] = ()
    real: Tensor | None = None
    captions: tuple[str, ...] = ()
    others: Tensor | None = None
    opened: Tensor | None = None
    examples: ImageSet | None = None


def read_task(
    data: str,
    n: int,
    size: int,
    *,
    draws: int = 0,
    open_prompts: Sequence[str] = (),
    validation: float = HELD_OUT,
) -> Task:
    """The task of a study.

    Args:
        data: "shapes", for scenes whose attributes can be read back; a folder of captioned images, see
            :func:`unicfg.training.data.read_folder`, of which the held-out ones are asked for; or a text file with
            one prompt a line.
        n: images a cell; where there are fewer prompts, each comes several times, with other seeds.
        size: pixels a side of the real images.
        draws: images of each open prompt.
        open_prompts: to be drawn many times; none takes those that suit the data.
        validation: share of a folder that does not name its splits; the one of the training, or images that were trained on
            are asked for.

    Raises:
        FileNotFoundError: if there is no such folder or file.
        ValueError: if it holds no prompts.
    """
    if data == SHAPES:
        return _shapes(n, size, draws, open_prompts)
    if Path(data).is_dir():
        return _folder(Path(data), n, size, open_prompts, validation)
    if Path(data).is_file():
        prompts = read_prompts(Path(data))
        return Task(_spread(prompts, n), tuple(open_prompts) or _few(prompts), {})
    raise FileNotFoundError(
        f"data is {data!r}, expected 'shapes', a folder of captioned images, or a text file with one prompt a line"
    )


def _shapes(n: int, size: int, draws: int, open_prompts: Sequence[str]) -> Task:
    asked = make_shapes(n, size=size, seed=SCENES_SEED, wrong=0.0)
    scenes = tuple(scene_of(own) for own in asked.attributes)
    # the same scenes once more, each a little elsewhere
    again = [
        render(scene, size, np.random.default_rng((OTHERS_SEED, i)))
        for i, scene in enumerate(scenes)
    ]
    chosen = tuple(open_prompts) or tuple(OPEN)
    return Task(
        tuple(asked.captions),
        chosen,
        {prompt: OPEN[prompt] for prompt in chosen if prompt in OPEN},
        scenes,
        asked.images,
        tuple(asked.captions),
        torch.stack(again),
        _scenes_of(chosen, size, draws),
    )


def _scenes_of(prompts: Sequence[str], size: int, draws: int) -> Tensor | None:
    """Scenes for which each prompt is true, ``draws`` a prompt; None where one is no prompt of the shapes."""
    found: dict[str, list[Tensor]] = {prompt: [] for prompt in prompts}
    for i in range(MOST_SCENES):
        if all(len(own) >= draws for own in found.values()):
            return (
                torch.stack([image for own in found.values() for image in own]) if draws else None
            )
        rng = np.random.default_rng((OTHERS_SEED + 1, i))
        scene = random_scene(rng, two_objects=0.0)
        true = vague_captions(scene)
        for prompt, own in found.items():  # in their order: each draws from rng
            if prompt in true and len(own) < draws:
                own.append(render(scene, size, rng))
    return None


def _folder(
    folder: Path, n: int, size: int, open_prompts: Sequence[str], validation: float
) -> Task:
    seen, held_out = read_folder(folder, size).split(validation)
    if len(held_out) == 0 or len(seen) == 0:
        raise ValueError(
            f"{folder} has {len(seen)} images to learn from and {len(held_out)} held out, expected some of both"
        )
    places = _spread(range(len(held_out)), n)
    asked = held_out.select(list(dict.fromkeys(places)))
    shuffled = torch.randperm(len(seen), generator=torch.Generator().manual_seed(0))
    return Task(
        tuple(held_out.captions[i] for i in places),
        tuple(open_prompts) or _few(held_out.captions),
        {},
        real=asked.images,
        captions=tuple(asked.captions),
        others=seen.images[shuffled[: len(asked)]],
        examples=seen,
    )


def _few(prompts: Sequence[str]) -> tuple[str, ...]:
    """Some of the prompts, none twice."""
    distinct = list(dict.fromkeys(prompts))
    return _spread(distinct, min(OPEN_PROMPTS, len(distinct)))


def _spread(items: Sequence[T], n: int) -> tuple[T, ...]:
    """Evenly spaced items, n of them; where there are fewer, each several times in a row."""
    return tuple(items[i * len(items) // n] for i in range(n))

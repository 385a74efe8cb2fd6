"""What a study asks families to draw, and the real images that it holds the drawings against."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from unicfg.evaluation.accuracy import scene_of
from unicfg.evaluation.diversity import OPEN
from unicfg.evaluation.prompts import read_prompts
from unicfg.training.data import ImageSet, read_folder
from unicfg.training.shapes import Scene, make_shapes

SHAPES = "shapes"
SCENES_SEED = 77  # training draws its scenes from seed 0
OTHERS_SEED = 78  # the real images that the real images are compared with
T = TypeVar("T")
OPEN_PROMPTS = 4  # of data in which nothing says what a prompt leaves open
HELD_OUT = 0.1  # of a folder that does not name its split


@dataclass(frozen=True)
class Task:
    """Prompts, and what is known about them.

    Attributes:
        prompts: one an image (N,).
        open_prompts: that are drawn many times, to see what differs.
        leaves_open: which attributes each of these leaves open; {} where attributes cannot be read.
        scenes: what each prompt asks for (N,); () where attributes cannot be read.
        real: the images that the prompts belong to, uint8 (N, 3, H, W); None where there are none.
        others: as many real images of other prompts; None where there are none.
        examples: real images with captions, to learn from what captions look like; None where there are none, or where
            attributes say it better.
    """

    prompts: tuple[str, ...]
    open_prompts: tuple[str, ...]
    leaves_open: Mapping[str, Sequence[str]]
    scenes: tuple[Scene, ...] = ()
    real: Tensor | None = None
    others: Tensor | None = None
    examples: ImageSet | None = None


def read_task(data: str, n: int, size: int, open_prompts: Sequence[str] = ()) -> Task:
    """The task of a study.

    Args:
        data: "shapes", for scenes whose attributes can be read back; a folder of captioned images, see
            :func:`unicfg.training.data.read_folder`, of which the held-out ones are asked for; or a text file with
            one prompt a line.
        n: images a cell; where there are fewer prompts, they come again, with other seeds.
        size: pixels a side of the real images.
        open_prompts: to be drawn many times; none takes those that suit the data.

    Raises:
        FileNotFoundError: if there is no such folder or file.
        ValueError: if it holds no prompts.
    """
    if data == SHAPES:
        return _shapes(n, size, open_prompts)
    if Path(data).is_dir():
        return _folder(Path(data), n, size, open_prompts)
    if Path(data).is_file():
        prompts = read_prompts(Path(data))
        return Task(
            _repeated(prompts, n), tuple(open_prompts) or _spread(prompts, OPEN_PROMPTS), {}
        )
    raise FileNotFoundError(
        f"data is {data!r}, expected 'shapes', a folder of captioned images, or a text file with one prompt a line"
    )


def _shapes(n: int, size: int, open_prompts: Sequence[str]) -> Task:
    scenes = make_shapes(n, size=size, seed=SCENES_SEED, wrong=0.0)
    chosen = tuple(open_prompts) or tuple(OPEN)
    return Task(
        tuple(scenes.captions),
        chosen,
        {prompt: OPEN[prompt] for prompt in chosen} if set(chosen) <= set(OPEN) else {},
        tuple(scene_of(own) for own in scenes.attributes),
        scenes.images,
        make_shapes(n, size=size, seed=OTHERS_SEED, wrong=0.0).images,
    )


def _folder(folder: Path, n: int, size: int, open_prompts: Sequence[str]) -> Task:
    seen, held_out = read_folder(folder, size).split(HELD_OUT)
    if len(held_out) == 0 or len(seen) == 0:
        raise ValueError(
            f"{folder} has {len(seen)} images to learn from and {len(held_out)} held out, expected some of both"
        )
    places = _repeated(list(range(len(held_out))), n)
    prompts = [held_out.captions[i] for i in places]
    # seen images stand for what more real images would look like; order is that of the folder
    shuffled = torch.randperm(len(seen), generator=torch.Generator().manual_seed(0))
    return Task(
        tuple(prompts),
        tuple(open_prompts) or _spread(held_out.captions, OPEN_PROMPTS),
        {},
        real=held_out.images[list(dict.fromkeys(places))],
        others=seen.images[shuffled[:n]],
        examples=seen,
    )


def _spread(items: Sequence[str], count: int) -> tuple[str, ...]:
    """Evenly spaced, none twice."""
    distinct = list(dict.fromkeys(items))
    count = min(count, len(distinct))
    return tuple(distinct[i * len(distinct) // count] for i in range(count))


def _repeated(items: Sequence[T], n: int) -> tuple[T, ...]:
    """Evenly spaced items, n of them, or all again and again."""
    if n <= len(items):
        return tuple(items[i * len(items) // n] for i in range(n))
    return tuple(items[i % len(items)] for i in range(n))

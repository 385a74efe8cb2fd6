"""Shapes: drawn scenes of one or two coloured objects, with captions and the truth about every pixel's cause.

A set that needs no download and whose right answer is known: what a caption asks for can be read back from an
image. A share of the captions is vague, wrong or of another scene, as in data found in the wild: without these a
model would have no reason to need guidance.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from unicfg.training.data import ImageSet

Shape = Literal["circle", "square", "triangle", "star"]
Colour = Literal["red", "green", "blue", "yellow", "orange", "purple", "cyan", "pink"]
Background = Literal["white", "grey", "black", "beige"]
Size = Literal["small", "large"]
Relation = Literal["above", "below", "left of", "right of"]
CaptionKind = Literal["exact", "vague", "wrong", "unrelated"]
RGB = tuple[int, int, int]

SHAPES: tuple[Shape, ...] = ("circle", "square", "triangle", "star")
# Any two of the twelve colours below are at least 90 apart (Euclidean, 0..255 a channel).
COLOURS: Mapping[Colour, RGB] = {
    "red": (215, 25, 30),
    "green": (30, 155, 55),
    "blue": (35, 65, 225),
    "yellow": (250, 228, 40),
    "orange": (248, 132, 15),
    "purple": (122, 25, 165),
    "cyan": (40, 205, 225),
    "pink": (255, 105, 185),
}
BACKGROUNDS: Mapping[Background, RGB] = {
    "white": (255, 255, 255),
    "grey": (128, 128, 128),
    "black": (0, 0, 0),
    "beige": (222, 202, 165),
}
SIZES: Mapping[Size, float] = {"small": 0.23, "large": 0.40}  # diameter as a share of the side
# Direction from the second object to the first, y downwards.
RELATIONS: Mapping[Relation, tuple[int, int]] = {
    "above": (0, -1),
    "below": (0, 1),
    "left of": (-1, 0),
    "right of": (1, 0),
}

SUPERSAMPLING = 4  # drawn so many times larger, then averaged
SIZE_JITTER = 0.04  # share of the diameter
POSITION_JITTER = 0.08  # share of the side
MARGIN = 0.015  # share of the side kept free at each border and on both sides of the middle line

T = TypeVar("T")


@dataclass(frozen=True)
class Thing:
    """One object of a scene.

    Raises:
        ValueError: if a value is none of the public constants.
    """

    shape: Shape
    colour: Colour
    size: Size

    def __post_init__(self) -> None:
        """Check the values."""
        _check("shape", self.shape, SHAPES)
        _check("colour", self.colour, COLOURS)
        _check("size", self.size, SIZES)


@dataclass(frozen=True)
class Scene:
    """All that a caption can say about an image.

    Attributes:
        background: its colour.
        objects: one or two.
        relation: where the first object is, seen from the second; None where there is one object.

    Raises:
        ValueError: if a value is none of the public constants, or the relation does not fit the objects.
    """

    background: Background
    objects: tuple[Thing, ...]
    relation: Relation | None = None

    def __post_init__(self) -> None:
        """Check the values."""
        _check("background", self.background, BACKGROUNDS)
        if len(self.objects) not in (1, 2):
            raise ValueError(f"objects has {len(self.objects)} entries, expected 1 or 2")
        if len(self.objects) == 2:
            _check("relation", self.relation, RELATIONS)
        elif self.relation is not None:
            raise ValueError(f"relation is {self.relation!r}, expected None for one object")


def make_shapes(
    n: int,
    *,
    size: int = 32,
    seed: int = 0,
    wrong: float = 0.15,
    unrelated: float = 0.0,
    two_objects: float = 0.6,
) -> ImageSet:
    """Draw scenes with captions.

    Image i depends on ``seed`` and i alone, so a larger set begins with the smaller one; ``wrong`` and ``unrelated``
    change captions and no pixels. The attributes of an image are the fields of its ``Scene``, "caption_kind" and "exact_caption".

    Args:
        n: number of images.
        size: pixels a side, a multiple of 8 from 16 on.
        seed: of the whole set, 0 or larger.
        wrong: share of captions that are one half vague (true, but saying less), the other half wrong (one attribute
            replaced by another).
        unrelated: share of captions that belong to another scene.
        two_objects: share of scenes with two objects.

    Returns:
        n images (n, 3, size, size).

    Raises:
        ValueError: if an argument is outside of its range.
    """
    if n < 1:
        raise ValueError(f"n is {n}, expected at least 1 image")
    shapes = Shapes(size=size, seed=seed, wrong=wrong, unrelated=unrelated, two_objects=two_objects)
    images = torch.empty(n, 3, size, size, dtype=torch.uint8)
    captions: list[str] = []
    attributes: list[dict[str, Any]] = []
    for i in range(n):
        images[i], caption, known = shapes.draw(i)
        captions.append(caption)
        attributes.append(known)
    return ImageSet(images, captions, attributes)


@dataclass(frozen=True)
class Shapes:
    """An endless set of scenes, of which :func:`make_shapes` takes the first n; see there for the fields.

    Raises:
        ValueError: if a field is outside of its range.
    """

    size: int = 32
    seed: int = 0
    wrong: float = 0.15
    unrelated: float = 0.0
    two_objects: float = 0.6

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}, expected 0 or larger")
        for name in ("wrong", "unrelated", "two_objects"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected a share in [0, 1]")
        if self.wrong + self.unrelated > 1:
            raise ValueError(
                f"wrong is {self.wrong} and unrelated {self.unrelated}, expected at most 1 together"
            )
        _check_side(self.size)

    def draw(self, i: int) -> tuple[Tensor, str, dict[str, Any]]:
        """Image i, uint8 (3, size, size), its caption, and its attributes."""
        rng = np.random.default_rng((self.seed, i))
        scene = random_scene(rng, self.two_objects)
        image = render(scene, self.size, rng)
        kind, caption = _caption(scene, self.wrong, self.unrelated, self.two_objects, rng)
        known = asdict(scene) | {"caption_kind": kind, "exact_caption": describe(scene)}
        return image, caption, known


def describe(scene: Scene) -> str:
    """The exact caption of a scene.

    Example:
        >>> describe(Scene("white", (Thing("star", "yellow", "large"),)))
        'a large yellow star on a white background'
    """
    things = [f"a {thing.size} {thing.colour} {thing.shape}" for thing in scene.objects]
    return f"{_joined(things, scene.relation)} on a {scene.background} background"


def render(scene: Scene, size: int, rng: np.random.Generator) -> Tensor:
    """Draw a scene, anti-aliased, at slightly random positions and sizes.

    One object lies near the centre. Two objects lie each in its own half of the image, so they never touch, and
    stand further apart along the axis of their relation than across it.

    Args:
        scene: what to draw.
        size: pixels a side, a multiple of 8 from 16 on.
        rng: source of the jitter; the same draws are made at any ``size``.

    Returns:
        uint8 (3, size, size).

    Raises:
        ValueError: if ``size`` is no multiple of 8 or below 16.
    """
    _check_side(size)
    side = size * SUPERSAMPLING
    image = Image.new("RGB", (side, side), BACKGROUNDS[scene.background])
    pen = ImageDraw.Draw(image)
    direction = np.array(RELATIONS[scene.relation] if scene.relation else (0, 0))
    for thing, sign in zip(scene.objects, (1, -1), strict=False):
        jitter = rng.uniform(-1, 1, 3)
        diameter = SIZES[thing.size] * (1 + SIZE_JITTER * jitter[0])
        # In its half of the image an object has less room to move than across.
        room = np.where(direction != 0, 0.25, 0.5) - MARGIN - diameter * _EXTENT / 2
        centre = 0.5 + 0.25 * sign * direction + np.minimum(room, POSITION_JITTER) * jitter[1:]
        draw_thing(pen, thing, centre * side, diameter * side)
    pixels = np.asarray(image.reduce(SUPERSAMPLING))
    return torch.from_numpy(pixels.transpose(2, 0, 1).copy())


def _star_outline(inner: float) -> list[tuple[float, float]]:
    """Corners of a five-pointed star of radius 1, y downwards; ``inner`` is the radius of its notches."""
    radii = [1.0 if k % 2 == 0 else inner for k in range(10)]
    angles = [math.pi * k / 5 for k in range(10)]
    return [(r * math.sin(a), -r * math.cos(a)) for r, a in zip(radii, angles, strict=True)]


# Outlines for a diameter of 1, scaled so that all shapes look equally large: a square as wide as a circle looks
# larger, a star or triangle smaller. The bounding boxes are centred, and none is wider than _EXTENT.
_EXTENT = 1.08
_OUTLINES: Mapping[Shape, np.ndarray[Any, Any]] = {
    "square": 0.44 * np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)]),
    "triangle": 0.54 * np.array([(0, -0.92), (1, 0.92), (-1, 0.92)]),
    "star": np.add(0.56 * np.array(_star_outline(0.42)), (0, 0.0528)),
}


def draw_thing(
    pen: ImageDraw.ImageDraw, thing: Thing, centre: np.ndarray[Any, Any], d: float
) -> None:
    """Draw one object of diameter ``d`` around ``centre`` (x, y), both in pixels."""
    fill = COLOURS[thing.colour]
    if thing.shape == "circle":
        pen.circle(tuple(centre), d / 2, fill)
    else:
        pen.polygon((_OUTLINES[thing.shape] * d + centre).ravel().tolist(), fill)


def random_scene(rng: np.random.Generator, two_objects: float) -> Scene:
    """A scene with uniformly drawn attributes; two objects always differ in some of them.

    Args:
        rng: source of the draws.
        two_objects: chance of a second object.
    """
    background = _pick(rng, tuple(BACKGROUNDS))
    first = _random_thing(rng)
    if rng.random() >= two_objects:
        return Scene(background, (first,))
    second = _random_thing(rng)
    while second == first:  # "a above a" would be as true as "a below a"
        second = _random_thing(rng)
    return Scene(background, (first, second), _pick(rng, tuple(RELATIONS)))


def _random_thing(rng: np.random.Generator) -> Thing:
    """An object with uniformly drawn attributes."""
    return Thing(_pick(rng, SHAPES), _pick(rng, tuple(COLOURS)), _pick(rng, tuple(SIZES)))


def _caption(
    scene: Scene, wrong: float, unrelated: float, two_objects: float, rng: np.random.Generator
) -> tuple[CaptionKind, str]:
    """The caption that an image gets, and of which kind it is."""
    draw = rng.random()
    if draw < wrong / 2:
        return "vague", _pick(rng, vague_captions(scene))
    if draw < wrong:
        return "wrong", describe(_alter(scene, rng))
    if draw < wrong + unrelated:
        return "unrelated", describe(random_scene(rng, two_objects))
    return "exact", describe(scene)


def vague_captions(scene: Scene) -> list[str]:
    """Captions that are true and say less than the exact one."""
    shapes = [f"a {thing.shape}" for thing in scene.objects]
    colours = [f"{_article(thing.colour)} {thing.colour} shape" for thing in scene.objects]
    full = [f"a {thing.size} {thing.colour} {thing.shape}" for thing in scene.objects]
    return [
        " and ".join(shapes),
        " and ".join(colours),
        _joined(shapes, scene.relation) + f" on a {scene.background} background",
        _joined(full, scene.relation),
        "some shapes" if len(full) > 1 else "some shape",
    ]


def _alter(scene: Scene, rng: np.random.Generator) -> Scene:
    """The scene with exactly one attribute replaced by another value."""
    options: dict[str, Sequence[str]] = {"background": tuple(BACKGROUNDS)}
    if scene.relation:
        options["relation"] = tuple(RELATIONS)
    for k in range(len(scene.objects)):
        options |= {f"shape {k}": SHAPES, f"colour {k}": tuple(COLOURS), f"size {k}": tuple(SIZES)}
    chosen = _pick(rng, tuple(options))
    name, _, number = chosen.partition(" ")
    target: Any = scene.objects[int(number)] if number else scene
    others = [value for value in options[chosen] if value != getattr(target, name)]
    changed = replace(target, **{name: _pick(rng, others)})
    if isinstance(changed, Scene):
        return changed
    objects = list(scene.objects)
    objects[int(number)] = changed
    return replace(scene, objects=tuple(objects))


def _joined(things: Sequence[str], relation: Relation | None) -> str:
    """The one object, or both with their relation."""
    return f" {relation} ".join(things)


def _article(word: str) -> str:
    """The indefinite article before a word."""
    return "an" if word[0] in "aeiou" else "a"


def _pick(rng: np.random.Generator, options: Sequence[T]) -> T:
    """One of the options, uniformly."""
    return options[int(rng.integers(len(options)))]


def _check(name: str, value: object, known: Sequence[str] | Mapping[Any, Any]) -> None:
    """Refuse a value that is none of the known ones."""
    if value not in known:
        raise ValueError(f"{name} is {value!r}, expected one of {', '.join(known)}")


def _check_side(size: int) -> None:
    """Refuse a side that scenes cannot be drawn at."""
    if size < 16 or size % 8:
        raise ValueError(f"size is {size}, expected a multiple of 8 from 16 on")

"""Read the truth about a shapes scene back from its pixels, and compare it with what was asked for.

Analysis by synthesis: an object is what a drawn template explains. Coverage maps of every shape, at many diameters
and sub-pixel positions, are fitted to the difference from the background by least squares; the best fit names shape,
diameter, centre and colour, its share of explained energy says whether to believe it, and what it explained is
taken away before the next object is looked for. Nothing is trained.

Further letters: K templates, P window pixels, M objects.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeVar

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torch.nn import functional as F

from unicfg.training.shapes import (
    BACKGROUNDS,
    COLOURS,
    RGB,
    SHAPES,
    SIZES,
    SUPERSAMPLING,
    Background,
    Colour,
    Shape,
    Size,
    Thing,
    draw_thing,
)

Name = TypeVar("Name", bound=str)

SIDE = 32  # larger images are averaged down to it
MOST_OBJECTS = 4  # looked for in one image
LEAST_CONTRAST = 50.0  # of an object against the background; the palette's own is at least 90
FARTHEST_COLOUR = 60.0  # from the named colour, Euclidean, 0..255 a channel
# share of the energy around an object that its template explains; real ones have 0.99. An ellipse, a rectangle or a
# triangle upside down have less; a diamond or a polygon of many sides passes as a circle, which at 32 px it nearly is
LEAST_FIT = 0.97
SIZE_TOLERANCE = 0.2  # of the diameter; the palette's own jitter is 0.04

COARSE_DIAMETERS = (0.19, 0.24, 0.31, 0.40)  # shares of the side
DIAMETERS = tuple(0.16 * 1.06**k for k in range(20))  # 0.16 to 0.48
SHIFTS = (-0.75, -0.5, -0.25, 0.0, 0.25, 0.5, 0.75)  # pixels


@dataclass(frozen=True)
class Seen:
    """One object that was found.

    Attributes:
        shape: None where no template fits well.
        colour: None where no object colour is near.
        size: None where the diameter is neither.
        centre: (x, y) as shares of the side, y downwards.
        diameter: as a share of the side.
        fit: share of the energy around the object that its template explains.
    """

    shape: Shape | None
    colour: Colour | None
    size: Size | None
    centre: tuple[float, float]
    diameter: float
    fit: float


@dataclass(frozen=True)
class Reading:
    """What an image shows.

    Attributes:
        background: None where no background colour is near.
        objects: any number, the one that stands out most first.
    """

    background: Background | None
    objects: tuple[Seen, ...]


def read_scene(image: Tensor) -> Reading:
    """Read one image (3, H, W); see ``read_scenes``."""
    if image.ndim != 3:
        raise ValueError(f"image has shape {tuple(image.shape)}, expected (3, H, W)")
    return read_scenes(image[None])[0]


@torch.no_grad()
def read_scenes(images: Tensor) -> list[Reading]:
    """Read images; each is read by itself, so the result does not depend on the batch.

    Args:
        images: (B, 3, H, W), H = W >= 16, uint8 in 0..255 or float in [-1, 1].

    Returns:
        B readings.
    """
    readings: list[Reading] = []
    for chunk in _as_pixels(images).split(256):
        readings += _read(chunk)
    return readings


def _as_pixels(images: Tensor) -> Tensor:
    if images.ndim != 4 or images.shape[1] != 3 or images.shape[2] != images.shape[3]:
        raise ValueError(f"images have shape {tuple(images.shape)}, expected (B, 3, H, H)")
    if images.shape[-1] < 16:
        raise ValueError(f"images are {images.shape[-1]} pixels wide, expected at least 16")
    if images.dtype == torch.uint8:
        pixels = images.float().cpu()
    elif images.is_floating_point():
        pixels = (images.float().cpu() + 1) * 127.5
    else:
        raise TypeError(f"images are {images.dtype}, expected torch.uint8 or floats")
    if images.shape[-1] > SIDE:
        pixels = F.interpolate(pixels, (SIDE, SIDE), mode="area")
    return pixels


def _soften(planes: Tensor) -> Tensor:
    """Binomial 3 x 3 blur of planes (..., H, W): makes sharp and slightly blurred edges look the same."""
    kernel = torch.tensor([0.25, 0.5, 0.25])
    kernel = (kernel[:, None] * kernel)[None, None]
    flat = planes.reshape(-1, 1, *planes.shape[-2:])
    return F.conv2d(flat, kernel, padding=1).reshape(planes.shape)


def _coverage(shape: Shape, diameter: float, shift: tuple[float, float], window: int) -> Tensor:
    """Softened coverage map (window, window) of a shape, drawn as scenes are; diameter and shift in pixels."""
    side = window * SUPERSAMPLING
    image = Image.new("RGB", (side, side))
    centre = (np.array(shift) + window / 2) * SUPERSAMPLING
    thing = Thing(shape, "yellow", "small")
    draw_thing(ImageDraw.Draw(image), thing, centre, diameter * SUPERSAMPLING)
    red = np.asarray(image.reduce(SUPERSAMPLING))[..., 0] / COLOURS["yellow"][0]
    return _soften(torch.from_numpy(red).float()[None])[0]


@dataclass(frozen=True)
class _Templates:
    """K coverage maps and what they stand for."""

    maps: Tensor  # (K, window, window)
    norms: Tensor  # (K,) sums of squares
    shapes: tuple[Shape, ...]
    diameters: Tensor  # (K,) pixels
    shifts: Tensor  # (K, 2) pixels (x, y)


@lru_cache(maxsize=8)
def _templates(side: int, diameters: tuple[float, ...], shifts: tuple[float, ...]) -> _Templates:
    window = _window(side)
    table = [
        (shape, d * side, (x, y))
        for shape in SHAPES
        for d in diameters
        for y in shifts
        for x in shifts
    ]
    maps = torch.stack([_coverage(shape, d, shift, window) for shape, d, shift in table])
    return _Templates(
        maps,
        maps.square().sum((1, 2)),
        tuple(shape for shape, _, _ in table),
        torch.tensor([d for _, d, _ in table]),
        torch.tensor([shift for _, _, shift in table]),
    )


def _window(side: int) -> int:
    """Odd pixels a side of the largest template with its blur and shift."""
    return 2 * int(np.ceil(DIAMETERS[-1] * side * 0.56 + 2)) + 1


@dataclass
class _Fit:
    """The best template for one place in M images."""

    index: Tensor  # (M,) which image
    template: Tensor  # (M,) which template
    corner: Tensor  # (M, 2) row and column of the window's first pixel in the padded image
    colour: Tensor  # (M, 3) difference from the background


def _read(pixels: Tensor) -> list[Reading]:
    count, _, side, _ = pixels.shape
    background = _border_colour(pixels)
    window = _window(side)
    pad = window // 2
    fine = _templates(side, DIAMETERS, SHIFTS)
    rest = F.pad(_soften(pixels - background[..., None, None]), (pad,) * 4)
    free = torch.ones_like(rest[:, :1])
    active = torch.arange(count)
    found: list[_Fit] = []
    for _ in range(MOST_OBJECTS):
        corners, strong = _places(rest[active] * free[active], side)
        active, corners = active[strong], corners[strong]
        if not len(active):
            break
        fit = _fit(rest, active, corners, fine)
        strong = fit.colour.norm(dim=1) >= LEAST_CONTRAST
        fit = _Fit(fit.index[strong], fit.template[strong], fit.corner[strong], fit.colour[strong])
        active = fit.index
        _explain(rest, free, fit, fine)
        found.append(fit)
    objects: list[list[Seen]] = [[] for _ in range(count)]
    for fit in found:
        for i, seen in zip(
            fit.index.tolist(), _describe(rest, background, fit, fine, side), strict=True
        ):
            objects[i].append(seen)
    return [
        Reading(_nearest(colour, BACKGROUNDS), tuple(things))
        for colour, things in zip(background.tolist(), objects, strict=True)
    ]


def _border_colour(pixels: Tensor) -> Tensor:
    """Median (B, 3) of the outer two rings."""
    ring = torch.ones(pixels.shape[-2:], dtype=torch.bool)
    ring[2:-2, 2:-2] = False
    return pixels[..., ring].median(-1).values


def _places(rest: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """Where a template explains most: window corners (B, 2), and whether that is enough for an object (B,)."""
    coarse = _templates(side, COARSE_DIAMETERS, (0.0,))
    flat = rest.reshape(-1, 1, *rest.shape[-2:])
    overlap = F.conv2d(flat, coarse.maps[:, None])
    overlap = overlap.unflatten(0, (-1, 3))
    gain = overlap.square().sum(1) / coarse.norms[:, None, None]  # (B, K, H, W)
    best = gain.flatten(1).argmax(1)
    columns = gain.shape[-1]
    place = best % (columns * columns)
    k = best // (columns * columns)
    strength = (gain.flatten(1).amax(1) / coarse.norms[k]).sqrt()
    corners = torch.stack((place // columns, place % columns), 1)
    return corners, strength >= LEAST_CONTRAST / 2


def _windows(planes: Tensor, index: Tensor, corner: Tensor, window: int) -> Tensor:
    """Cut-outs (M, C, window, window)."""
    steps = torch.arange(window)
    rows = corner[:, 0, None, None] + steps[:, None]
    columns = corner[:, 1, None, None] + steps
    return planes[index[:, None, None], :, rows, columns].permute(0, 3, 1, 2)


def _fit(rest: Tensor, index: Tensor, corner: Tensor, fine: _Templates) -> _Fit:
    seen = _windows(rest, index, corner, fine.maps.shape[-1]).flatten(2)  # (M, 3, P)
    overlap = seen @ fine.maps.flatten(1).T  # (M, 3, K)
    best = (overlap.square().sum(1) / fine.norms).argmax(1)
    colour = overlap[torch.arange(len(best)), :, best] / fine.norms[best, None]
    return _Fit(index, best, corner, colour)


def _explain(rest: Tensor, free: Tensor, fit: _Fit, fine: _Templates) -> None:
    """Take away what the fit explains, in place, and mark its surroundings as taken."""
    window = fine.maps.shape[-1]
    for i, k, (y, x), colour in zip(
        fit.index.tolist(), fit.template.tolist(), fit.corner.tolist(), fit.colour, strict=True
    ):
        area = (slice(y, y + window), slice(x, x + window))
        rest[i][:, area[0], area[1]] -= colour[:, None, None] * fine.maps[k]
        free[i][0, area[0], area[1]] *= fine.maps[k] < 0.02


def _describe(
    rest: Tensor, background: Tensor, fit: _Fit, fine: _Templates, side: int
) -> list[Seen]:
    """What the fits stand for; ``rest`` is what no object explains."""
    window = fine.maps.shape[-1]
    left = _windows(rest, fit.index, fit.corner, window).square().sum(1)
    maps = fine.maps[fit.template]
    near = F.max_pool2d((maps > 0.02).float()[:, None], 3, 1, 1)[:, 0]
    explained = fit.colour.square().sum(1) * fine.norms[fit.template]
    share = explained / (explained + (left * near).sum((1, 2)))
    colours = background[fit.index] + fit.colour
    seen = []
    for k, corner, fits, colour in zip(
        fit.template.tolist(), fit.corner.tolist(), share.tolist(), colours.tolist(), strict=True
    ):
        x, y = (fine.shifts[k] + torch.tensor([corner[1], corner[0]]) + 0.5).tolist()
        diameter = fine.diameters[k].item() / side
        seen.append(
            Seen(
                fine.shapes[k] if fits >= LEAST_FIT else None,
                _nearest(colour, COLOURS),
                _size(diameter),
                (x / side, y / side),
                diameter,
                fits,
            )
        )
    return seen


def _nearest(colour: Sequence[float], named: Mapping[Name, RGB]) -> Name | None:
    """The nearest of the named colours; None if it is far away, or nearer to one of the other kind."""
    away = {name: math.dist(colour, rgb) for name, rgb in named.items()}
    name = min(away, key=away.__getitem__)
    nearest = min(math.dist(colour, rgb) for rgb in (*COLOURS.values(), *BACKGROUNDS.values()))
    return name if away[name] == nearest <= FARTHEST_COLOUR else None


def _size(diameter: float) -> Size | None:
    """The size whose diameter is near; None between the two and beyond them."""
    for name, nominal in SIZES.items():
        if abs(diameter / nominal - 1) <= SIZE_TOLERANCE:
            return name
    return None

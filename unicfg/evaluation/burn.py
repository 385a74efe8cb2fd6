"""Whether images look burnt: near the real images is right, more and less are both wrong.

Errors are over images. Shares are in [0, 1].
"""

from __future__ import annotations

import torch
from torch import Tensor

from unicfg.evaluation.results import Estimate
from unicfg.evaluation.uncertainty import LEAST, jackknife, mean_over_images, require

LUMA = (0.299, 0.587, 0.114)  # of red, green, blue
LARGEST = 1 + 1e-4  # rounding is let pass
END = 1 - 1 / 255  # from here on 8 bits show the largest number, and from -END down 0


def clipped(images: Tensor) -> Estimate:
    """Share of pixels of which a channel is 0 or 255 in 8 bits, that is within 1/255 of -1 or 1.

    White and black are clipped in real images too.

    Args:
        images: (N, 3, H, W), in [-1, 1].

    Raises:
        TooFew: if there are less than 8 images.
        ValueError: if the shape is wrong, or a number is not in [-1, 1].
    """
    ends = _checked(images).abs().amax(1) >= END
    return mean_over_images("clipped", ends.double().mean((1, 2)))


def chroma(images: Tensor) -> Estimate:
    """Mean over pixels of the largest less the smallest channel, as a share of the range.

    0 for greys, 1 for pure red. It is the chroma of the HSV and HSL hexagons, not a perceptual one.

    Args:
        images: (N, 3, H, W), in [-1, 1].

    Raises:
        TooFew: if there are less than 8 images.
        ValueError: if the shape is wrong, or a number is not in [-1, 1].
    """
    images = _checked(images)
    return mean_over_images("chroma", (images.amax(1) - images.amin(1)).mean((1, 2)) / 2)


def contrast(images: Tensor) -> Estimate:
    """RMS contrast: standard deviation of an image's luma in [0, 1] over its pixels; at most 0.5.

    Luma is 0.299 R + 0.587 G + 0.114 B (ITU-R BT.601). Peli 1990, "Contrast in complex images".

    Args:
        images: (N, 3, H, W), in [-1, 1].

    Raises:
        TooFew: if there are less than 8 images.
        ValueError: if the shape is wrong, or a number is not in [-1, 1].
    """
    images = _checked(images)
    luma = torch.einsum("nchw,c->nhw", images, images.new_tensor(LUMA))
    return mean_over_images("contrast", luma.flatten(1).std(1, correction=0) / 2)


def codebook(ids: Tensor, size: int) -> Estimate:
    """Share of the codebook that the images use at all.

    It grows with N * L until all codes that can come have come: compare at equal N and L. The error is a jackknife over
    images.

    Args:
        ids: (N, L), in 0 .. size - 1.
        size: V.

    Raises:
        TooFew: if there are less than 8 images.
        TypeError: if the ids are no integers.
        ValueError: if the shape is wrong, or an id is outside of the codebook.
    """
    _check_ids(ids, ("N", "L"))
    if size < 1 or ids.min() < 0 or ids.max() >= size:
        raise ValueError(
            f"ids are {int(ids.min())} to {int(ids.max())}, expected 0 to size - 1 = {size - 1}"
        )
    require("codebook", len(ids), LEAST)
    present = torch.zeros(len(ids), size, dtype=torch.bool, device=ids.device)
    present.scatter_(1, ids.long(), True)
    users = present.sum(0)
    # a code goes with an image if no other uses it
    lost = (present & (users == 1)).sum(1)
    used = (users > 0).sum()
    error = jackknife((used - lost) / size, len(ids), len(ids) - 1)
    return Estimate(float(used) / size, error, len(ids))


def repetition(ids: Tensor) -> Estimate:
    """Share of tokens that equal their left or their upper neighbour, of all tokens but the first, which has none.

    Args:
        ids: (N, h, w).

    Raises:
        TooFew: if there are less than 8 images.
        TypeError: if the ids are no integers.
        ValueError: if the shape is wrong, or there is one token an image.
    """
    _check_ids(ids, ("N", "h", "w"))
    tokens = ids[0].numel()
    if tokens < 2:
        raise ValueError(f"ids have shape {tuple(ids.shape)}, expected at least 2 tokens an image")
    repeats = torch.zeros_like(ids, dtype=torch.bool)
    repeats[:, :, 1:] |= ids[:, :, 1:] == ids[:, :, :-1]
    repeats[:, 1:] |= ids[:, 1:] == ids[:, :-1]
    return mean_over_images("repetition", repeats.sum((1, 2)).double() / (tokens - 1))


def _checked(images: Tensor) -> Tensor:
    if images.ndim != 4 or images.shape[1] != 3 or not images.numel():
        raise ValueError(f"images have shape {tuple(images.shape)}, expected (N, 3, H, W)")
    if not images.is_floating_point() or not (images.abs() <= LARGEST).all():
        raise ValueError(
            f"images are {images.dtype} in {float(images.min()):g} to {float(images.max()):g}, "
            "expected floats in [-1, 1]"
        )
    return images.double()


def _check_ids(ids: Tensor, letters: tuple[str, ...]) -> None:
    if ids.ndim != len(letters) or not ids.numel():
        raise ValueError(f"ids have shape {tuple(ids.shape)}, expected ({', '.join(letters)})")
    if ids.is_floating_point() or ids.dtype == torch.bool:
        raise TypeError(f"ids are {ids.dtype}, expected integers")

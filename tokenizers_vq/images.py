"""Between pictures as people have them and the floats in [-1, 1] that networks see."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def to_float(images: Tensor) -> Tensor:
    """Pixels 0..255 as floats in [-1, 1]; :func:`to_images` undoes it exactly.

    Args:
        images: uint8, any shape.

    Returns:
        float32 of the same shape.

    Raises:
        TypeError: if ``images`` are not uint8.
    """
    if images.dtype != torch.uint8:
        raise TypeError(f"images are {images.dtype}, expected torch.uint8")
    return images.float() / 127.5 - 1


def to_images(images: Tensor) -> list[Image.Image]:
    """Float images (B, 3, H, W) in [-1, 1], clamped, as RGB pictures.

    Raises:
        TypeError: if they are no floats: pixels 0..255 are none of these.
        ValueError: if the shape is another.
    """
    if not images.is_floating_point():
        raise TypeError(f"images are {images.dtype}, expected floats in [-1, 1]")
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images have shape {tuple(images.shape)}, expected (B, 3, H, W)")
    pixels = ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return [Image.fromarray(image.permute(1, 2, 0).cpu().numpy()) for image in pixels]


def from_image(image: Image.Image) -> Tensor:
    """A picture as float (3, H, W) in [-1, 1]; :func:`to_images` undoes it for RGB pictures."""
    return to_float(torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1))

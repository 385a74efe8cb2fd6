"""Weights on disk as 8-bit integers: a quarter of the size of float32, read back into floating point."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

SCALE = ".scale"  # a matrix ``name`` of integers is multiplied by the tensor ``name`` + SCALE
LARGEST = 127  # of the integers, either sign: one scale without an offset
SMALLEST = 4096  # numbers of a tensor: what is smaller is not worth the error


def to_int8(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Matrices and kernels as integers with a scale for each row, all other floating-point tensors in half precision.

    A row is what belongs to one output, or to one entry of an embedding: its largest magnitude becomes 127, so that
    each weight is off by at most 1/254 of it.

    Args:
        state: of a model.

    Raises:
        ValueError: if a weight is not finite, or too large for half precision, or the name of a scale is taken.
    """
    packed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if not tensor.is_floating_point():
            packed[name] = tensor
            continue
        if not tensor.isfinite().all():
            raise ValueError(
                f"{name} holds NaN or infinity, expected finite weights to store as int8"
            )
        if tensor.ndim < 2 or len(tensor) < 2 or tensor.numel() < SMALLEST:
            packed[name] = tensor.half()
            if not packed[name].isfinite().all():
                raise ValueError(
                    f"{name} reaches {float(tensor.abs().max()):g}, expected at most 65504, the end of half precision"
                )
        else:
            if name + SCALE in state:
                raise ValueError(f"{name}{SCALE} is a weight, expected the name to be free")
            scale = _rowwise_largest(tensor.float()) / LARGEST
            # a row of zeros stays one
            rounded = (tensor.float() / scale.where(scale > 0, 1.0)).round()
            # where a scale is so small that it has lost digits, the ratio may come out larger
            packed[name] = rounded.clamp(-LARGEST, LARGEST).to(torch.int8)
            packed[name + SCALE] = scale
    return packed


def from_int8(tensors: Mapping[str, Tensor], scaled: set[str]) -> dict[str, Tensor]:
    """The floating-point weights that :func:`to_int8` has stored.

    Args:
        tensors: integers and scales, among others.
        scaled: names of the tensors of integers that have a scale.
    """
    scales = {name + SCALE for name in scaled}
    return {
        name: tensor.float() * tensors[name + SCALE] if name in scaled else tensor
        for name, tensor in tensors.items()
        if name not in scales
    }


def scale_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of the scale of a tensor of integers."""
    return (shape[0], *(1 for _ in shape[1:]))


def _rowwise_largest(tensor: Tensor) -> Tensor:
    """The largest magnitude of each row, in a shape that broadcasts."""
    return tensor.abs().flatten(1).amax(1).view(scale_shape(tuple(tensor.shape)))

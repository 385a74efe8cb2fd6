"""What the mitigations share: checks, precision, and reductions over one sample."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from unicfg.guidance.core import to_dtype

Rule = Callable[[Any, Tensor, Tensor, Tensor], Tensor]


def per_sample(rule: Rule) -> Rule:
    """Give a method outputs of one shape in at least float32, and return its result in their dtype.

    Raises:
        TypeError: if an output is not a floating-point tensor.
        ValueError: if the shapes differ; ``uncond_out`` may have batch 1.
    """

    @functools.wraps(rule)
    def wrapper(self: Any, guided: Tensor, cond_out: Tensor, uncond_out: Tensor) -> Tensor:
        name = type(self).__name__
        for role, out in (("guided", guided), ("cond_out", cond_out), ("uncond_out", uncond_out)):
            if not isinstance(out, Tensor) or not out.is_floating_point():
                kind = out.dtype if isinstance(out, Tensor) else type(out).__name__
                raise TypeError(f"{name}: {role} is {kind}, expected a floating-point tensor")
        shape = cond_out.shape
        if guided.shape != shape or uncond_out.shape not in (shape, (1, *shape[1:])):
            raise ValueError(
                f"{name}: guided has shape {tuple(guided.shape)}, cond_out {tuple(shape)} and uncond_out "
                f"{tuple(uncond_out.shape)}, expected equal shapes"
            )
        precise = torch.promote_types(guided.dtype, torch.float32)
        g, c, u = (out.to(precise) for out in (guided, cond_out, uncond_out))
        result = rule(self, g, c, u.expand_as(c))
        return to_dtype(result, guided.dtype)

    return wrapper


def inner(a: Tensor, b: Tensor) -> Tensor:
    """Inner product of each sample, (B, 1, ..., 1)."""
    return _spread((a * b).flatten(1).sum(1), a)


def norm(x: Tensor) -> Tensor:
    """Euclidean norm of each sample, (B, 1, ..., 1)."""
    return _spread(torch.linalg.vector_norm(x.flatten(1), dim=1), x)


def deviation(x: Tensor) -> Tensor:
    """Standard deviation of each sample, (B, 1, ..., 1); 0 for a single number."""
    return _spread(x.flatten(1).std(1, correction=0), x)


def ratio(a: Tensor | float, b: Tensor, otherwise: float) -> Tensor:
    """A / b, and ``otherwise`` where b is 0."""
    return torch.where(b > 0, a / b.clamp(min=torch.finfo(b.dtype).tiny), otherwise)


def strength(g: Tensor, c: Tensor, u: Tensor) -> Tensor:
    """S - 1 of each sample, read back from the outputs, (B, 1, ..., 1); 0 where the branches agree."""
    direction = c - u
    size = inner(direction, direction)
    return torch.where(
        size > 0, inner(g - c, direction) / size.clamp(min=torch.finfo(g.dtype).tiny), 0.0
    )


def _spread(values: Tensor, like: Tensor) -> Tensor:
    """One value a sample (B,), with the dimensions of the outputs."""
    return values.view(-1, *[1] * (like.ndim - 1))


def check_range(
    owner: object, name: str, least: float, most: float = math.inf, *, open_end: bool = False
) -> None:
    """Refuse a setting outside of [least, most], or of (least, most] with ``open_end``.

    Raises:
        ValueError: names the mitigation, the setting, its value and the range.
    """
    value = getattr(owner, name)
    inside = least < value <= most if open_end else least <= value <= most
    if not inside:
        bounds = f"> {least:g}" if open_end else f">= {least:g}"
        upper = "" if most == math.inf else f" and <= {most:g}"
        raise ValueError(
            f"{type(owner).__name__}: {name} is {value}, expected a number {bounds}{upper}"
        )

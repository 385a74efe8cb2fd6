"""From guided logits to tokens: temperature, top-k, top-p, and the draw itself, all in float32."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from unicfg.sampling.randomness import is_count

# a smaller or larger one would be 0 or infinite in float32, or its inverse would, and 0 / 0 is no probability
_COLDEST, _HOTTEST = 1e-37, 1e37

ALL_MASKED = (
    "expected one with a guided logit above -inf, and the model or a mitigation masks every one"
)


@dataclass(frozen=True)
class TokenFilter:
    """What happens to logits between guidance and the draw, in this order.

    Applied after guidance: filtering first would mask different tokens in the two branches, and the formula
    would then have to combine -inf with numbers.

    Args:
        temperature: logits are divided by it; 0 takes the most likely token.
        top_k: keep the k most likely tokens; None keeps all.
        top_p: keep the smallest set of tokens with at least this probability (nucleus sampling, Holtzman et
            al., arXiv 1904.09751, equation 2); None or 1.0 keeps all.

    Raises:
        ValueError: if a value is out of its range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        """Check the ranges."""
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(f"temperature is {self.temperature}, expected a finite number >= 0")
        if self.top_k is not None and not is_count(self.top_k):
            raise ValueError(f"top_k is {self.top_k!r}, expected an int >= 1, or None for all")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}, expected 0 < top_p <= 1, or None for all")

    def __call__(self, logits: Tensor) -> Tensor:
        """Probabilities (..., V) in float32 of logits (..., V)."""
        logits = logits.float()
        if self.temperature == 0:
            best = logits.argmax(-1, keepdim=True)
            return torch.zeros_like(logits).scatter_(-1, best, 1.0)
        if self.temperature != 1:
            # shifting first keeps a tiny temperature from overflowing to +inf
            temperature = min(max(self.temperature, _COLDEST), _HOTTEST)
            logits = (logits - logits.amax(-1, keepdim=True)) / temperature
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            kept = logits.topk(self.top_k, dim=-1)
            logits = torch.full_like(logits, -math.inf).scatter_(-1, kept.indices, kept.values)
        probabilities = logits.softmax(-1)
        if self.top_p is not None and self.top_p < 1:
            probabilities = _nucleus(probabilities, self.top_p)
        return probabilities


def _nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    ordered, order = probabilities.sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(-1) - ordered  # probability of all tokens that are more likely
    # the likeliest is kept whatever top_p is, for float32 has no number below 1e-45
    ordered[..., 1:].masked_fill_(before[..., 1:] >= top_p, 0.0)
    kept = torch.zeros_like(probabilities).scatter_(-1, order, ordered)
    return kept / kept.sum(-1, keepdim=True)


def at_places(x: Tensor, places: Tensor, dim: int = 1) -> Tensor:
    """The entries of x (B, ...) at ``places`` int64 (B, K), 0 to L - 1, in its dimension ``dim`` of L entries."""
    shape = [1] * x.ndim
    shape[0], shape[dim] = places.shape
    return torch.take_along_dim(x, places.view(shape), dim=dim)


def draw(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """Invert the cumulative distribution: one uniform number a token.

    Args:
        probabilities: (..., V), not necessarily normalised; finite, and not all 0.
        uniform: float64 (...), in [0, 1).

    Returns:
        ids (...), int64; never one of probability 0.
    """
    cumulative = probabilities.double().cumsum(-1)
    threshold = uniform.unsqueeze(-1) * cumulative[..., -1:]
    ids = torch.searchsorted(cumulative, threshold, right=True).squeeze(-1)
    # where a GPU is not waited for, NaN comes this far: its place is beyond the end, and no embedding has a row there
    return ids.clamp(max=probabilities.shape[-1] - 1)

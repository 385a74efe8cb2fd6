"""Mitigations for logits: token models, and the twins there of what is done to denoisers.

In the equations g is the guided row of logits, c the conditional, u the unconditional one, p_c the softmax of c.

The softmax ignores a constant added to a row, norms and projections do not, so such a constant has to be fixed first
(a gauge): where it matters, rows are centred on their mean. Tokens that are masked (-inf) in any of the three outputs
take no part in sums and stay as guidance left them; a row that is masked throughout stays as it is. What only masks
(``plausibility``, ``top_k_of_cond``) asks the conditional output alone.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from unicfg.guidance.mitigations.common import check_range, per_sample, ratio

Row = Callable[[Any, Tensor, Tensor, Tensor, Tensor], Tensor]
LOGITS: Literal["logits"] = "logits"


def per_row(rule: Row) -> Callable[[Any, Tensor, Tensor, Tensor], Tensor]:
    """Give a method rows without -inf, and a mask (..., V), True where a token counts."""

    @functools.wraps(rule)
    def wrapper(self: Any, guided: Tensor, cond_out: Tensor, uncond_out: Tensor) -> Tensor:
        counts = ~(guided.isneginf() | cond_out.isneginf() | uncond_out.isneginf())
        g, c, u = (x.masked_fill(~counts, 0.0) for x in (guided, cond_out, uncond_out))
        return torch.where(counts, rule(self, g, c, u, counts), guided)

    return per_sample(wrapper)


def _mean(x: Tensor, counts: Tensor) -> Tensor:
    return (x * counts).sum(-1, keepdim=True) / counts.sum(-1, keepdim=True).clamp(min=1)


def _centred(x: Tensor, counts: Tensor) -> Tensor:
    """Rows with mean 0 over the tokens that count, and 0 elsewhere."""
    return (x - _mean(x, counts)) * counts


def _log_softmax(x: Tensor, counts: Tensor) -> Tensor:
    """Log probabilities among the tokens that count; 0 elsewhere."""
    masked = x.masked_fill(~counts, -math.inf)
    return (x - masked.logsumexp(-1, keepdim=True)).masked_fill(~counts, 0.0)


def _kl(log_p: Tensor, log_q: Tensor, counts: Tensor) -> Tensor:
    """KL(p || q) of each row in nats, (..., 1)."""
    return (log_p.exp() * counts * (log_p - log_q)).sum(-1, keepdim=True).clamp(min=0)


@dataclass(frozen=True)
class temperature_matching:
    """Give the guided logits the deviation of the conditional ones, by a share phi: the twin of ``rescale``.

    A guided row divided by a temperature, which is std(g) / std(c) at phi = 1, so that extrapolation turns the
    distribution and does not sharpen it (Lin et al., arXiv 2305.08891, equations 15 and 16, on centred logits).

    Args:
        phi: share in [0, 1].

    Raises:
        ValueError: if ``phi`` is out of its range.
    """

    phi: float = 1.0
    space: ClassVar[Literal["logits"]] = LOGITS

    def __post_init__(self) -> None:
        """Check the range."""
        check_range(self, "phi", 0, 1)

    @per_row
    def __call__(
        self, guided: Tensor, cond_out: Tensor, uncond_out: Tensor, counts: Tensor
    ) -> Tensor:
        """Rescale about the mean of the row."""
        mean, g = _mean(guided, counts), _centred(guided, counts)
        wanted, own = (
            x.square().sum(-1, keepdim=True).sqrt() for x in (_centred(cond_out, counts), g)
        )
        return mean + g * (1 + self.phi * (ratio(wanted, own, 1.0) - 1))


@dataclass(frozen=True)
class kl_trust_region:
    """Go along the direction only as far as the distribution stays within a KL divergence of the conditional one.

    The largest lambda <= 1 with KL(softmax(c + lambda * (g - c)) || p_c) <= limit, by bisection (the divergence grows
    with lambda): the twin of ``norm_clamp``, in units that mean the same for every model.

    Args:
        limit: in nats a token.

    Raises:
        ValueError: if ``limit`` is negative.
    """

    limit: float = 1.0
    space: ClassVar[Literal["logits"]] = LOGITS

    def __post_init__(self) -> None:
        """Check the range."""
        check_range(self, "limit", 0)

    @per_row
    def __call__(
        self, guided: Tensor, cond_out: Tensor, uncond_out: Tensor, counts: Tensor
    ) -> Tensor:
        """Shorten the update of the rows that go too far."""
        update, reference = guided - cond_out, _log_softmax(cond_out, counts)

        def within(share: Tensor) -> Tensor:
            log_p = _log_softmax(cond_out + share * update, counts)
            return _kl(log_p, reference, counts) <= self.limit

        low = torch.zeros_like(update[..., :1])
        high = torch.ones_like(low)
        whole = within(high)
        for _ in range(24):  # as fine as float32
            middle = (low + high) / 2
            inside = within(middle)
            low, high = torch.where(inside, middle, low), torch.where(inside, high, middle)
        return torch.where(whole, guided, cond_out + low * update)


@dataclass(frozen=True)
class project_logits:
    """Weaken the part of the update that is parallel to the conditional logits: the twin of ``apg``.

    c + (s - 1) * (D_perpendicular + eta * D_parallel), with D shortened to ``threshold``, on centred logits (Sadat et
    al., arXiv 2410.02416, algorithm 1). The parallel part is what makes a distribution sharper without turning it.

    Args:
        eta: share of the parallel part that is kept; 1 is plain guidance.
        threshold: largest norm of the centred direction of a row; infinity is none.

    Raises:
        ValueError: if a value is out of its range.
    """

    eta: float = 0.0
    threshold: float = math.inf
    space: ClassVar[Literal["logits"]] = LOGITS

    def __post_init__(self) -> None:
        """Check the ranges."""
        check_range(self, "eta", -math.inf)
        check_range(self, "threshold", 0)

    @per_row
    def __call__(
        self, guided: Tensor, cond_out: Tensor, uncond_out: Tensor, counts: Tensor
    ) -> Tensor:
        """Project."""
        c, update = _centred(cond_out, counts), _centred(guided - cond_out, counts)
        if self.threshold < math.inf:
            size = _centred(cond_out - uncond_out, counts).square().sum(-1, keepdim=True).sqrt()
            update = update * ratio(self.threshold, size, 1.0).clamp(max=1)
        along = (update * c).sum(-1, keepdim=True) * ratio(1.0, c.square().sum(-1, keepdim=True), 0)
        parallel = along * c
        return cond_out + update - parallel + self.eta * parallel


@dataclass(frozen=True)
class kl_scale:
    """Guide each token less, the more the condition changes its distribution already: the twin of ``magnitude_aware``.

    s' = 1 + (s - 1) * exp(-alpha * KL(p_c || p_u)).

    Args:
        alpha: in 1 / nats.

    Raises:
        ValueError: if ``alpha`` is negative.
    """

    alpha: float = 1.0
    space: ClassVar[Literal["logits"]] = LOGITS

    def __post_init__(self) -> None:
        """Check the range."""
        check_range(self, "alpha", 0)

    @per_row
    def __call__(
        self, guided: Tensor, cond_out: Tensor, uncond_out: Tensor, counts: Tensor
    ) -> Tensor:
        """Shorten the update."""
        log_c, log_u = _log_softmax(cond_out, counts), _log_softmax(uncond_out, counts)
        return cond_out + (-self.alpha * _kl(log_c, log_u, counts)).exp() * (guided - cond_out)


@dataclass(frozen=True)
class plausibility:
    """Mask tokens that the conditional model finds implausible: p_c < alpha * max p_c.

    The adaptive plausibility constraint of contrastive decoding (Li et al., arXiv 2210.15097, equation 2), which keeps
    extrapolation from promoting a token only because the unconditional model likes it even less.

    Args:
        alpha: in (0, 1]; 0.1 in the paper.

    Raises:
        ValueError: if ``alpha`` is out of its range.
    """

    alpha: float = 0.1
    space: ClassVar[Literal["logits"]] = LOGITS

    def __post_init__(self) -> None:
        """Check the range."""
        check_range(self, "alpha", 0, 1, open_end=True)

    @per_sample
    def __call__(self, guided: Tensor, cond_out: Tensor, uncond_out: Tensor) -> Tensor:
        """Mask."""
        least = cond_out.amax(-1, keepdim=True) + math.log(self.alpha)
        return guided.masked_fill(cond_out < least, -math.inf)


@dataclass(frozen=True)
class top_k_of_cond:
    """Keep the k tokens that the conditional model finds most likely, whatever guidance makes of them.

    At s = 4 the most likely 50 before and after guidance have little in common. As in Dia and in contrastive decoding.

    Args:
        k: at least 1.

    Raises:
        ValueError: if ``k`` is no int of at least 1.
    """

    k: int
    space: ClassVar[Literal["logits"]] = LOGITS

    def __post_init__(self) -> None:
        """Check k."""
        if isinstance(self.k, bool) or not isinstance(self.k, int) or self.k < 1:
            raise ValueError(f"top_k_of_cond: k is {self.k!r}, expected an int of at least 1")

    @per_sample
    def __call__(self, guided: Tensor, cond_out: Tensor, uncond_out: Tensor) -> Tensor:
        """Mask."""
        kept = cond_out.topk(min(self.k, cond_out.shape[-1]), dim=-1).indices
        chosen = torch.zeros_like(guided, dtype=torch.bool).scatter_(-1, kept, True)
        return guided.masked_fill(~chosen, -math.inf)

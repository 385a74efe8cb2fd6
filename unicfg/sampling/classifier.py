"""Guidance by a classifier, the older road: the conditional output is made from the unconditional one by Bayes.

log p(x | y) = log p(x) + log p(y | x) + constant. So a classifier gives an unconditional model a second output, and
everything else, the formula, schedules, mitigations and samplers, is that of classifier-free guidance:

    sample_diffusion(ClassifierDenoiser(model, log_prob, null), cond, uncond=null, guidance=Guidance(3.0), seeds=[0])
    sample_autoregressive(ClassifierTokens(model, log_prob, null), cond, uncond=null, guidance=Guidance(3.0), seeds=[0])

What it costs beside a second training: a denoiser's classifier has to know noisy samples, and runs forward and
backward at every step; a token model's has to judge every candidate for the next token at every step, and the model
decodes the rows of both branches, though they are alike.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from unicfg.guidance.spaces import Space, check_space, join
from unicfg.sampling.branches import network_and_null
from unicfg.sampling.paths import Path
from unicfg.training.dropout import expand_null

NoisyLogProb = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(x (R, ...), cond (R, ...), t (R,)) -> log p(cond | x_t) (R,), differentiable in x."""
PrefixLogProb = Callable[[Tensor, Tensor], Tensor]
"""(ids (N, n), cond (N, ...)) -> log p(cond | the first n tokens) (N,)."""

# at t = 1 there is nothing to tell a class by, though the conditional mean is another: the classifier is asked a little
# earlier
LATEST = 0.995


class ClassifierDenoiser:
    """A denoiser whose conditional prediction is its unconditional one, moved along a classifier's gradient.

    eps(x, y) = eps(x) - sigma * grad log p(y | x_t) (Dhariwal and Nichol, arXiv 2105.05233, section 4.2), in whatever
    space the model predicts. With the scale s it is multiplied by s. It is a model for ``sample_diffusion``.

    Args:
        model: ``network(x (R, *shape), cond, t (R,))`` or the ``ConditionDropout`` around it; it is only ever shown
            the null condition.
        log_prob: of the classifier.
        null_condition: of the model (...); rows with this condition get its prediction as it is. None takes that of a
            ``ConditionDropout``.
        path: that the model was trained on; None takes the model's.
        space: that the model predicts in; None takes the model's.

    The gradient is divided by alpha to become a change of x0, so a classifier's mistakes on nearly pure noise are
    magnified: that is what makes this road fragile.

    Raises:
        ValueError: if there is no null condition, or path or space are missing or unknown.
    """

    def __init__(
        self,
        model: Any,
        log_prob: NoisyLogProb,
        null_condition: Tensor | None = None,
        *,
        path: Path | None = None,
        space: Space | None = None,
    ) -> None:
        self.network, self.null_condition = _network_and_null(model, null_condition)
        self.log_prob = log_prob
        self._null: Any = None  # encoded, in the form for sampling
        own: Path | None = getattr(self.network, "path", None) if path is None else path
        if own is None:
            raise ValueError("path is None and the model has none, expected path=")
        self.path = own
        self.space = check_space(
            str(getattr(self.network, "space", None)) if space is None else space
        )

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Of one sample, where the network says so."""
        shape: tuple[int, ...] = self.network.latent_shape
        return shape

    def for_sampling(self) -> ClassifierDenoiser:
        """The same with what its network has for a sampling, and the null condition encoded; see ``WholeGridPass``."""
        made = copy.copy(self)
        if hasattr(self.network, "for_sampling"):
            made.network = self.network.for_sampling()
        if hasattr(made.network, "encode_condition"):
            made._null = made.network.encode_condition(self.null_condition[None])
        return made

    def encode_times(self, times: Tensor) -> list[ClassifiedTime]:
        """What a call needs to know of times (N,)."""
        encode = getattr(self.network, "encode_times", None)
        own = [None] * len(times) if encode is None else encode(times)
        return [ClassifiedTime(float(t), e) for t, e in zip(times, own, strict=True)]

    def __call__(self, x: Tensor, cond: Tensor, t: Tensor | ClassifiedTime) -> Tensor:
        """The prediction for x (R, *shape), conditions (R, ...) and times t (R,), or one of ``encode_times``."""
        known = t.encoded if isinstance(t, ClassifiedTime) else None
        if isinstance(t, ClassifiedTime):
            t = torch.full((len(x),), t.t, dtype=x.dtype, device=x.device)
        out = self._unconditional(x, t, known)
        named = _named(cond, self.null_condition)
        if not bool(named.any()):
            return out
        moved = out.clone()
        moved[named] += self._step(x[named], cond[named], t[named]).to(out.dtype)
        return moved

    def _unconditional(self, x: Tensor, t: Tensor, known: Any) -> Tensor:
        """The prediction without a condition, once for the rows of both branches where they are alike."""
        half = len(x) // 2
        alike = half > 0 and len(x) == 2 * half and torch.equal(x[:half], x[half:])
        if alike and torch.equal(t[:half], t[half:]):
            out = self._unconditional(x[:half], t[:half], known)
            return out.repeat(2, *[1] * (x.ndim - 1))
        if self._null is None:
            null: Any = expand_null(self.null_condition, len(x)).to(x.device)
        else:
            null = self._null.take(torch.zeros(len(x), dtype=torch.long))
        out = self.network(x, null, t if known is None else known)
        return out

    def _step(self, x: Tensor, cond: Tensor, t: Tensor) -> Tensor:
        """What the gradient adds to the prediction."""
        t = t.clamp(max=LATEST)
        # a caller's inference mode would not let a gradient be taken of what was made in it
        with torch.inference_mode(False), torch.enable_grad():
            leaf, cond, t = x.detach().clone().requires_grad_(), cond.clone(), t.clone()
            log_prob = self.log_prob(leaf, cond, t)
            if log_prob.shape != (len(x),):
                raise ValueError(
                    f"log_prob returned {tuple(log_prob.shape)} for {len(x)} rows, expected ({len(x)},)"
                )
            (gradient,) = torch.autograd.grad(log_prob.sum(), leaf)
        alpha, sigma = (
            level.view(-1, *[1] * (x.ndim - 1)) for level in self.path.coefficients(t.double())
        )
        eps = -sigma * gradient
        return join(
            -sigma * eps / alpha, eps, alpha, sigma, self.space
        )  # x stays: what eps gains x0 loses


@dataclass(frozen=True)
class ClassifiedTime:
    """A time, and what the network has encoded it to, or None."""

    t: float
    encoded: Any


class ClassifierTokens:
    """A token model whose conditional logits are its unconditional ones, reweighted by a classifier of prefixes.

    log p(v | ids, y) = log p(v | ids) + log p(y | ids, v) + constant: FUDGE (Yang and Klein, arXiv 2104.05218,
    equation 2). It is a model for ``sample_autoregressive``.

    Args:
        model: see :class:`unicfg.sampling.autoregressive.AutoregressiveModel`, or the ``ConditionDropout`` around it;
            it is only ever shown the null condition.
        log_prob: of the classifier.
        null_condition: of the model (...). None takes that of a ``ConditionDropout``.
        candidates: the most likely tokens that the classifier judges, 200 in the paper; the others are masked. None is
            all of them.

    Raises:
        ValueError: if there is no null condition, or ``candidates`` is less than 1.
    """

    def __init__(
        self,
        model: Any,
        log_prob: PrefixLogProb,
        null_condition: Tensor | None = None,
        *,
        candidates: int | None = None,
    ) -> None:
        self.network, self.null_condition = _network_and_null(model, null_condition)
        if candidates is not None and candidates < 1:
            raise ValueError(f"candidates is {candidates}, expected at least 1")
        self.log_prob, self.candidates = log_prob, candidates

    @property
    def num_tokens(self) -> int:
        """L."""
        count: int = self.network.num_tokens
        return count

    def make_cache(self, rows: int) -> ClassifiedRows:
        """An empty cache for ``rows`` sequences."""
        return ClassifiedRows(self.network.make_cache(rows), [None] * rows, range(rows))

    def prefill(self, cond: Tensor, cache: ClassifiedRows) -> None:
        """Keep the conditions (R, ...), or one (1, ...) for all; the network gets the null condition."""
        null = expand_null(self.null_condition, 1).to(cond.device)
        self.network.prefill(null, cache.inner)
        count = len(cache.places)
        for place, own in zip(cache.places, cond.expand(count, *cond.shape[1:]), strict=True):
            cache.conditions[place] = own

    def decode(self, ids: Tensor, cache: ClassifiedRows) -> Tensor:
        """Logits (R, V) of the token after ``ids`` (R, n)."""
        logits: Tensor = self.network.decode(ids, cache.inner)
        held = [cache.conditions[place] for place in cache.places]
        cond = torch.stack([own for own in held if own is not None])
        named = _named(cond, self.null_condition)
        if not bool(named.any()):
            return logits
        chosen, n = logits[named], ids.shape[1]
        count = min(self.candidates or chosen.shape[1], chosen.shape[1])
        best, tokens = chosen.topk(count)
        longer = torch.cat([ids[named][:, None].expand(-1, count, n), tokens[..., None]], dim=2)
        judged = self.log_prob(longer.flatten(0, 1), cond[named].repeat_interleave(count, 0))
        if judged.shape != (len(chosen) * count,):
            raise ValueError(
                f"log_prob returned {tuple(judged.shape)} for {len(chosen) * count} rows, expected one each"
            )
        weighed = torch.full_like(chosen, -torch.inf)
        weighed.scatter_(1, tokens, best + judged.view_as(best).to(best.dtype))
        logits = logits.clone()
        logits[named] = weighed
        return logits


@dataclass
class ClassifiedRows:
    """The cache of :class:`ClassifierTokens`: the network's own, and the condition of each row.

    Attributes:
        inner: of the network.
        conditions: one a row, of all rows.
        places: which of these rows this view is of.
    """

    inner: Any
    conditions: list[Tensor | None]
    places: range

    @property
    def length(self) -> int:
        """That of the network's cache."""
        length: int = self.inner.length
        return length

    @length.setter
    def length(self, value: int) -> None:
        self.inner.length = value

    def rows(self, start: int, stop: int) -> ClassifiedRows:
        """The rows from ``start`` up to ``stop``: the same memory, with a length of its own."""
        return ClassifiedRows(
            self.inner.rows(start, stop), self.conditions, self.places[start:stop]
        )


def _network_and_null(model: Any, null_condition: Tensor | None) -> tuple[Any, Tensor]:
    network, null = network_and_null(model, null_condition)
    if null is None:
        raise ValueError(
            "null_condition is None, expected the null condition of the model, or a ConditionDropout that holds it"
        )
    return network, null


def _named(cond: Tensor, null: Tensor) -> Tensor:
    """Which rows (R,) have a condition other than the null condition."""
    return (cond != null.to(cond.device)).reshape(len(cond), -1).any(1)

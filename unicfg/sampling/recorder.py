"""What guidance did at every step of a sampling, in numbers that families can be compared by.

A scale means another thing in logits than in noise predictions. What can be compared is how far guidance moves the
distribution that the next tokens, or the next noisy latents, are drawn from: the Kullback-Leibler divergence of the
guided step from the conditional one, in nats, summed along the way that the sampling took.

Where that way is drawn from these very steps, the mean of the sum is the divergence of the whole guided sampling from the
conditional one, by the chain rule: in autoregressive sampling, in masked sampling of a fixed order ("halton"), both without
temperature or filters, and in ancestral sampling of latents (eta = 1). Deterministic solvers walk another way through the
same field, and an order by confidence is chosen after the draw; there it is a measure of its own.

Further letters: S steps, N tokens drawn at one step in all samples.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from unicfg.guidance.core import Scale
from unicfg.sampling.autoregressive import TokenStep
from unicfg.sampling.hybrid import LatentStep
from unicfg.sampling.masked import UnmaskingStep
from unicfg.sampling.solvers import DenoisingStep

Step: TypeAlias = TokenStep | UnmaskingStep | DenoisingStep | LatentStep
"""What a callback of some sampler is given."""


@dataclass(frozen=True)
class Trace:
    """What a :class:`Recorder` has seen; NaN where a family, or a step that ran one branch only, has no such number.

    Attributes:
        progress: of each step (S,).
        branches: that each step needed (S,); with ``refresh`` fewer were run, with "heun" twice as many.
        scale: s (S, B).
        distance: Euclidean, of the guided output from the conditional one (S, B): logits without their mean, of all
            tokens drawn at the step; predictions in the model's space; of a hybrid the root mean square over the
            steps of its head.
        kl: of the guided step from the conditional one, in nats (S, B). Tokens: of the guided softmax, before
            temperature and filters. Latents: of the ancestral step to the next noise level, whatever the solver,
            (SNR' - SNR) / 2 * ||x0_guided - x0_cond||^2 (Kingma et al., arXiv 2107.00630, equation 13), up to
            ``least_noise``: what would be told apart under less noise is left out, or the last steps would decide.
        entropy: of the guided softmax in nats, mean over the tokens drawn (S, B).
        cosine: of the angle between conditional and unconditional output (S, B).
        saturation: tokens: probability of the likeliest one, mean over those drawn; latents: root mean square of the
            clean latents, where data have 1 (S, B).
        changed: chance that guidance changes which token is drawn, with the draws coupled as well as can be: half the
            L1 distance of the two distributions, mean over the tokens drawn (S, B).
        places: nats by place, summed over the steps (B, L); L is 1 where a sample has no places.
    """

    progress: Tensor
    branches: Tensor
    scale: Tensor
    distance: Tensor
    kl: Tensor
    entropy: Tensor
    cosine: Tensor
    saturation: Tensor
    changed: Tensor
    places: Tensor

    @property
    def strength(self) -> Tensor:
        """Sum of ``kl`` over all steps, in nats a sample (B,)."""
        return self.places.sum(1)


@dataclass(frozen=True)
class _Moment:
    """One step: a number a sample (B,) by name, and its part of ``places`` (B, L), unless its level decides that."""

    progress: float
    branches: int
    scale: Tensor
    numbers: dict[str, Tensor]
    places: Tensor


@dataclass(frozen=True)
class _Noisy:
    """What a denoising step leaves to be weighed when the next noise level is known."""

    ratio: float  # alpha^2 / sigma^2
    squares: Tensor  # (B, L), ||x0_guided - x0_cond||^2 by place


_NAMES = ("distance", "kl", "entropy", "cosine", "saturation", "changed")


class Recorder:
    """A callback for any sampler that keeps what guidance did; :meth:`trace` gives it.

    One recorder is for one call. Batches of one call, which start again at step 0, become further samples.

    Args:
        least_noise: ratio sigma / alpha of the finest noise under which latents are compared, > 0. The default is a
            tenth of the data's deviation, a fifth of the distance between the levels of a quantizer of 8 levels.

    Raises:
        ValueError: if ``least_noise`` is not above 0.

    Example:
        >>> recorder = Recorder()
        >>> ids = sample_autoregressive(wrapped, cond, guidance=Guidance(3.0), seeds=[0], callback=recorder)
        >>> recorder.trace().strength
        >>> latents = sample_hybrid(wrapped, cond, seeds=[0], callback=recorder, head_callback=recorder.head)
    """

    def __init__(self, least_noise: float = 0.1) -> None:
        if not 0 < least_noise < math.inf:
            raise ValueError(f"least_noise is {least_noise}, expected a finite number > 0")
        self._most = least_noise**-2
        self._batches: list[list[_Moment]] = []
        self._noisy: list[list[_Noisy]] = []
        self._head: list[DenoisingStep] = []

    def __call__(self, step: Step) -> None:
        """Keep the numbers of one step.

        Raises:
            TypeError: if it is no step of a sampler.
        """
        if not isinstance(step, Step):
            raise TypeError(
                f"step is a {type(step).__name__}, expected what a sampler calls back with"
            )
        if step.index == 0 or not self._batches:
            self._batches.append([])
            self._noisy.append([])
        if isinstance(step, DenoisingStep):
            moment, noisy = _of_denoising(step)
            self._noisy[-1].append(noisy)
        elif isinstance(step, LatentStep):
            moment = _of_latents(step, self._head, self._most)
            self._head = []
        else:
            moment = _of_tokens(step)
        self._batches[-1].append(moment)

    def head(self, step: DenoisingStep) -> None:
        """Keep a step of a hybrid's head, until the step of its token comes: the sampler's ``head_callback``."""
        if step.index == 0:  # what is held may be of a token that was not finished
            self._head = []
        self._head.append(step)

    def trace(self) -> Trace:
        """All that was seen, the batches as one.

        Raises:
            ValueError: if nothing was seen, or a batch has fewer steps than another.
        """
        counts = {len(batch) for batch in self._batches}
        if len(counts) != 1:
            raise ValueError(
                f"the recorder has seen samplings of {sorted(counts)} steps, expected one or more of equally many"
            )
        for batch, noisy in zip(self._batches, self._noisy, strict=True):
            if noisy:
                _weigh(batch, noisy, self._most)
        first = self._batches[0]
        columns = {
            name: torch.cat(
                [
                    torch.stack([moment.numbers[name] for moment in batch])
                    for batch in self._batches
                ],
                dim=1,
            )
            for name in _NAMES
        }
        return Trace(
            progress=torch.tensor([moment.progress for moment in first]),
            branches=torch.tensor([moment.branches for moment in first]),
            scale=torch.cat([torch.stack([m.scale for m in batch]) for batch in self._batches], 1),
            places=torch.cat([_summed([m.places for m in batch]) for batch in self._batches]),
            **columns,
        )


def _summed(parts: Sequence[Tensor]) -> Tensor:
    """Sum of tensors (B, n), of which n grows as tokens do."""
    total = torch.zeros_like(parts[-1])
    for part in parts:
        total[:, : part.shape[1]] += part
    return total


def _of_tokens(step: TokenStep | UnmaskingStep) -> _Moment:
    """Of the tokens that were drawn, whatever the number in each sample."""
    ids = step.ids
    batch, length = ids.shape
    if isinstance(step, TokenStep):
        sample = torch.arange(batch, device=ids.device)
        place = torch.full_like(sample, step.index)
        pick: slice | Tensor = slice(None)
    else:
        pick = step.revealed.gather(1, step.places)
        sample, place = pick.nonzero()[:, 0], step.places[pick]
    guided = step.guided[pick].double()
    cond, uncond = (
        None if out is None else out[pick].double() for out in (step.cond_out, step.uncond_out)
    )
    log_p = guided.log_softmax(-1)
    p = log_p.exp()
    absent = torch.full_like(p[:, 0], math.nan)
    own = {
        "kl": absent,
        "changed": absent,
        "distance": absent,
        "cosine": absent,
        "entropy": -torch.where(p > 0, p * log_p, 0.0).sum(-1),
        "saturation": p.amax(-1),
    }
    if cond is not None:
        log_q = cond.log_softmax(-1)
        own["kl"] = torch.where(p > 0, p * (log_p - log_q), 0.0).sum(-1).clamp(min=0)
        own["changed"] = (p - log_q.exp()).abs().sum(-1) / 2
        own["distance"] = (_centred(guided) - _centred(cond)).square().sum(-1)
        if uncond is not None:
            own["cosine"] = torch.cosine_similarity(_centred(cond), _centred(uncond), dim=-1)
    # how many of a sample's tokens; a sample that drew none has no mean
    count = torch.zeros(batch, dtype=torch.float64, device=ids.device)
    count.index_add_(0, sample, torch.ones_like(own["kl"]))
    totals = {
        name: torch.zeros_like(count).index_add_(0, sample, value) for name, value in own.items()
    }
    places = torch.zeros(batch, length, dtype=torch.float64, device=ids.device)
    places[sample, place] = own["kl"]
    numbers = {
        name: totals[name] / count for name in ("entropy", "saturation", "changed", "cosine")
    }
    numbers |= {"kl": totals["kl"], "distance": totals["distance"].sqrt()}
    return _moment(step, len(step.outputs), numbers, places)


def _centred(logits: Tensor) -> Tensor:
    """Logits without their mean, which the softmax does not see; 0 where a token is masked."""
    there = logits.isfinite()
    logits = logits.masked_fill(~there, 0.0)
    mean = logits.sum(-1, keepdim=True) / there.sum(-1, keepdim=True).clamp(min=1)
    return (logits - mean).masked_fill(~there, 0.0)


def _of_denoising(step: DenoisingStep) -> tuple[_Moment, _Noisy]:
    """Of latents (B, C, h, w), tokens (B, k, C) or whatever there is."""
    cond, uncond = step.cond_out, step.uncond_out
    batch = len(step.guided)
    absent = torch.full((batch,), math.nan, dtype=torch.float64, device=step.guided.device)
    numbers = dict.fromkeys(_NAMES, absent)
    numbers["saturation"] = step.x0.double().square().flatten(1).mean(1).sqrt()
    squares = _by_place(torch.full_like(step.x0, math.nan, dtype=torch.float64))
    if cond is not None:
        cond_x0 = step.level.to_space(cond.to(step.x0.dtype), "x0")
        squares = _by_place((step.x0 - cond_x0).double().square())
        numbers["distance"] = (step.guided - cond).double().flatten(1).norm(dim=1)
        if uncond is not None:
            ours, theirs = (out.double().flatten(1) for out in (cond, uncond))
            numbers["cosine"] = torch.cosine_similarity(ours, theirs, dim=1)
    alpha, sigma = (float(level.double().max()) for level in (step.level.alpha, step.level.sigma))
    ratio = (alpha / sigma) ** 2 if sigma > 0 else math.inf
    moment = _moment(step, len(step.outputs), numbers, torch.zeros_like(squares))
    return moment, _Noisy(ratio, squares.cpu())


def _by_place(x: Tensor) -> Tensor:
    """Sums over the channels (B, L) of (B, C, h, w) or (B, k, C); over everything (B, 1) of other shapes."""
    if x.ndim == 4:
        return x.sum(1).flatten(1)
    return x.sum(2) if x.ndim == 3 else x.flatten(1).sum(1, keepdim=True)


def _nats(noisy: Sequence[_Noisy], most: float) -> list[Tensor]:
    """KL (B, L) of each step from its noise level to the next one's, the last one's to none, up to alpha^2 / sigma^2 = most."""
    ratios = [min(own.ratio, most) for own in noisy] + [most]
    return [
        max(then - now, 0.0) / 2 * own.squares
        for own, (now, then) in zip(noisy, itertools.pairwise(ratios), strict=True)
    ]


def _weigh(batch: list[_Moment], noisy: Sequence[_Noisy], most: float) -> None:
    """Fill in ``kl`` and ``places`` of denoising steps, now that all noise levels are known."""
    for moment, nats in zip(batch, _nats(noisy, most), strict=True):
        moment.numbers["kl"] = nats.sum(1)
        moment.places.copy_(nats)


def _of_latents(step: LatentStep, head: Sequence[DenoisingStep], most: float) -> _Moment:
    """Of the tokens that a hybrid drew, from the steps of its head."""
    batch, length = step.known.shape
    absent = torch.full((batch,), math.nan, dtype=torch.float64, device=step.known.device)
    numbers = dict.fromkeys(_NAMES, absent)
    places = torch.zeros(batch, length, dtype=torch.float64, device=step.known.device)
    nats = places.new_full(step.places.shape, math.nan)
    if head:
        seen = [_of_denoising(own) for own in head]
        distances, cosines = (
            torch.stack([moment.numbers[name] for moment, _ in seen])
            for name in ("distance", "cosine")
        )
        numbers["distance"] = distances.square().mean(0).sqrt()
        numbers["cosine"] = cosines.mean(0)
        numbers["saturation"] = seen[-1][0].numbers["saturation"]
        nats = _summed(_nats([noisy for _, noisy in seen], most)).to(nats.device)
        numbers["kl"] = nats.sum(1)
    return _moment(step, len(step.states), numbers, places.scatter_(1, step.places, nats))


def _moment(step: Step, branches: int, numbers: dict[str, Tensor], places: Tensor) -> _Moment:
    scale = _each(step.scale, len(places))
    on_cpu = {name: value.cpu() for name, value in numbers.items()}
    return _Moment(step.progress, branches, scale, on_cpu, places.cpu())


def _each(scale: Scale, batch: int) -> Tensor:
    """A scale for each sample (B,)."""
    return torch.as_tensor(scale, dtype=torch.float64).cpu().expand(batch)

"""The training loss of every family: ``loss(model, data, cond, generator, part) -> scalar``.

``model`` is called as ``model(x, cond, ...)``, so it may be the bare network or its ``ConditionDropout``. All random
numbers come from ``generator``, on the CPU. They are drawn for the whole batch of a step, and a process that holds a
part of it takes its rows: the mean of the parts' losses is the loss of the batch, however it is split.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unicfg.guidance.spaces import Space, check_space, join
from unicfg.sampling.paths import Path, shift_time
from unicfg.training.dropout import WHOLE, Part


def token_loss(model: nn.Module, ids: Tensor, cond: Tensor) -> Tensor:
    """Mean cross-entropy of image tokens (B, L) under a causal token model, in nats a token."""
    logits = model(ids, cond)
    return F.cross_entropy(logits.flatten(0, 1).float(), ids.flatten())


def masked_loss(
    model: nn.Module,
    ids: Tensor,
    cond: Tensor,
    mask_token: int,
    generator: torch.Generator,
    part: Part = WHOLE,
) -> Tensor:
    """Cross-entropy of the masked ones of image tokens (B, L), in nats a masked token.

    The share to mask is cos(pi u / 2) with u uniform for each sample, at least one token (Chang et al.,
    arXiv 2202.04200, section 3.3).
    """
    of_all = random_mask(part.whole(ids.shape[0]), ids.shape[1], generator)
    masked = part.rows(of_all).to(ids.device)
    logits = model(ids.masked_fill(masked, mask_token), cond)
    loss = F.cross_entropy(logits[masked].float(), ids[masked], reduction="sum")
    return loss * (part.count / of_all.sum().item())


def random_mask(batch: int, length: int, generator: torch.Generator) -> Tensor:
    """Which tokens to hide, bool (B, L), by the cosine law of MaskGIT."""
    share = torch.cos(math.pi / 2 * stratified(batch, generator))
    count = (share * length).ceil().clamp(1, length)
    rank = torch.rand(batch, length, generator=generator).argsort(1).argsort(1)
    return rank < count[:, None]


def stratified(count: int, generator: torch.Generator) -> Tensor:
    """Uniform numbers in (0, 1), one from each of ``count`` equal parts, in random order.

    Each alone is uniform, and a batch covers the whole range: the loss has less variance (Kingma et al.,
    arXiv 2107.00630, appendix I.1).
    """
    inside = torch.rand(count, generator=generator, dtype=torch.float64)
    order = torch.randperm(count, generator=generator)
    return ((order + inside) / count).clamp(1e-6, 1 - 1e-6).float()


def check_noise_settings(shift: float, min_snr: float | None, where: str = "") -> None:
    """Refuse values that would train nothing, or away from the data.

    Raises:
        ValueError: if one is not positive and finite.
    """
    for name, value in (("shift", shift), ("min_snr", min_snr)):
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"{where}{name} is {value}, expected a finite number > 0")


@dataclass(frozen=True)
class Noising:
    """How noisy samples are made for training, and how the errors on them are weighed.

    Attributes:
        path: from data to noise.
        space: what the model predicts.
        time: how t is drawn: uniform, or the sigmoid of a standard normal (Esser et al., arXiv 2403.03206, eq. 19).
        shift: moves t towards the noise (there, equation 23); 1 leaves it.
        min_snr: gamma of min-SNR weighting (Hang et al., arXiv 2303.09556, section 3.4); None weighs all t alike.
    """

    path: Path
    space: Space
    time: Literal["uniform", "logit-normal"] = "uniform"
    shift: float = 1.0
    min_snr: float | None = None

    def __post_init__(self) -> None:
        """Check the values."""
        check_space(self.space)
        if self.time not in ("uniform", "logit-normal"):
            raise ValueError(f"time is {self.time!r}, expected 'uniform' or 'logit-normal'")
        check_noise_settings(self.shift, self.min_snr)

    def draw_times(self, count: int, generator: torch.Generator) -> Tensor:
        """Times (count,), stratified."""
        t = stratified(count, generator)
        if self.time == "logit-normal":
            t = torch.special.ndtri(t).sigmoid()
        return shift_time(t, self.shift)

    def weight(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        """Weight of the squared error at a noise level.

        Min-SNR weighs the error of x0 by min(SNR, gamma); the other spaces' errors are multiples of that one.
        """
        if self.min_snr is None:
            return torch.ones_like(alpha)
        ratio = (alpha / sigma).square()
        # the error of x0 is that of eps divided by the ratio, and min(ratio, gamma) / ratio is this, also where the
        # ratio is 0
        of_eps = (self.min_snr / ratio).clamp(max=1)
        # |error of eps|^2 in terms of the error in each space
        per_space = {
            "x0": ratio,
            "eps": torch.ones_like(ratio),
            "v": (alpha / (alpha.square() + sigma.square())).square(),
            "flow": (alpha / (alpha + sigma)).square(),
            "score": sigma.square(),
        }
        return of_eps * per_space[self.space]


def denoising_loss(
    model: nn.Module,
    latents: Tensor,
    cond: Tensor,
    noising: Noising,
    generator: torch.Generator,
    part: Part = WHOLE,
) -> Tensor:
    """Weighted squared error of a denoiser's predictions, for latents (B, C, h, w)."""
    batch = part.whole(len(latents))
    t = part.rows(noising.draw_times(batch, generator)).to(latents.device)
    noise = part.rows(torch.randn((batch, *latents.shape[1:]), generator=generator))
    noise = noise.to(latents.device)
    alpha, sigma = noising.path.coefficients(t.view(-1, *[1] * (latents.ndim - 1)))
    out = model(alpha * latents + sigma * noise, cond, t)
    return _squared_errors(out, latents, noise, alpha, sigma, noising).mean()


def hybrid_loss(
    model: nn.Module,
    latents: Tensor,
    cond: Tensor,
    noising: Noising,
    draws: int,
    masked: bool,
    generator: torch.Generator,
    context_noise: float = 0.0,
    part: Part = WHOLE,
) -> Tensor:
    """Weighted squared error of a hybrid's head, for latents (B, L, C).

    The transformer runs once and the small head ``draws`` times on its states, with noise of its own each time
    (Li et al., arXiv 2406.11838, section 4.1).

    Args:
        model: called as ``model(latents, cond, noisy, t, known)``.
        latents: clean latents (B, L, C).
        cond: condition ids (B, T).
        noising: for the head.
        draws: K, noisy versions of each latent.
        masked: train the masked order: some latents are hidden, and only these are counted.
        generator: of all random numbers.
        context_noise: the transformer sees latents with noise of a deviation drawn up to this for each sample, as a
            remedy for errors that add up: in sampling it goes on from latents that are not quite those of an image
            (NextStep-1, arXiv 2508.10711, has it in the tokenizer). What the head is to predict stays clean.
        part: of the batch, which these latents are.

    Raises:
        ValueError: if ``draws`` is less than 1, or ``context_noise`` negative or not finite.
    """
    if draws < 1:
        raise ValueError(f"draws is {draws}, expected at least 1")
    if not 0 <= context_noise < math.inf:
        raise ValueError(f"context_noise is {context_noise}, expected a finite number >= 0")
    length = latents.shape[1]
    batch = part.whole(len(latents))
    # rows first, so that a part can be taken; the draws of a sample then go in front
    t = noising.draw_times(batch * draws * length, generator).view(batch, draws, length)
    noise = torch.randn((batch, draws, *latents.shape[1:]), generator=generator)
    t, noise = (part.rows(own).transpose(0, 1).to(latents.device) for own in (t, noise))
    alpha, sigma = noising.path.coefficients(t[..., None])
    of_all = random_mask(batch, length, generator) if masked else None
    hidden = None if of_all is None else part.rows(of_all).to(latents.device)
    known = None if hidden is None else ~hidden
    context = latents
    if context_noise > 0:
        level = context_noise * torch.rand(batch, 1, 1, generator=generator)
        disturbance = level * torch.randn((batch, *latents.shape[1:]), generator=generator)
        context = latents + part.rows(disturbance).to(latents)
    out = model(context, cond, alpha * latents + sigma * noise, t, known)
    errors = _squared_errors(out, latents.expand_as(noise), noise, alpha, sigma, noising)
    if hidden is None or of_all is None:
        return errors.mean()
    # weighed by the hidden latents of the whole batch: parts may hide more or fewer
    share = part.count / (of_all.sum().item() * draws * latents.shape[2])
    return errors[:, hidden].sum() * share


def _squared_errors(
    out: Tensor, x0: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor, noising: Noising
) -> Tensor:
    target = join(x0, eps, alpha, sigma, noising.space)
    return noising.weight(alpha, sigma) * (out.float() - target).square()

"""Mitigations for predictions of a denoiser: diffusion, flow, and the head of a hybrid.

In the equations g is the guided output, c the conditional, u the unconditional one, D = c - u the direction; norms,
means and deviations are over one sample.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from unicfg.guidance.core import Mitigation, guide
from unicfg.guidance.mitigations.common import (
    check_range,
    deviation,
    inner,
    norm,
    per_sample,
    ratio,
    strength,
)
from unicfg.guidance.spaces import Space


@dataclass(frozen=True)
class static_threshold:
    """Clip the clean sample to [-limit, limit] (Imagen: Saharia et al., arXiv 2205.11487, section 2.3).

    Args:
        limit: 1 for pixels in [-1, 1]; latents of unit deviation need 3 or more.

    Raises:
        ValueError: if ``limit`` is not positive.
    """

    limit: float = 1.0
    space: ClassVar[Space] = "x0"

    def __post_init__(self) -> None:
        """Check the range."""
        check_range(self, "limit", 0, open_end=True)

    @per_sample
    def __call__(self, guided: Tensor, cond_out: Tensor, uncond_out: Tensor) -> Tensor:
        """Clip."""
        return guided.clamp(-self.limit, self.limit)


@dataclass(frozen=True)
class dynamic_threshold:
    """Clip the clean sample at a quantile q of its absolute values, and scale it back into the limit.

    clamp(g, -q, q) * limit / q with q = max(limit, quantile(abs(g), percentile)): Saharia et al., arXiv 2205.11487,
    section 2.3, where the limit is 1.

    Args:
        percentile: in (0, 1]; 0.995 in diffusers.
        limit: see :class:`static_threshold`.

    Raises:
        ValueError: if a value is out of its range.
    """

    percentile: float = 0.995
    limit: float = 1.0
    space: ClassVar[Space] = "x0"

    def __post_init__(self) -> None:
        """Check the ranges."""
        check_range(self, "percentile", 0, 1, open_end=True)
        check_range(self, "limit", 0, torch.finfo(torch.float32).max, open_end=True)

    @per_sample
    def __call__(self, guided: Tensor, cond_out: Tensor, uncond_out: Tensor) -> Tensor:
        """Clip and scale back."""
        # sorted, not torch.quantile, which refuses more than 16 million values
        ordered = guided.abs().flatten(1).sort(dim=1).values
        place = self.percentile * (ordered.shape[1] - 1)
        low = math.floor(place)
        high = min(low + 1, ordered.shape[1] - 1)
        share = place - low
        quantile = ordered[:, low] * (1 - share) + ordered[:, high] * share
        q = quantile.clamp(min=self.limit).view(-1, *[1] * (guided.ndim - 1))
        return guided.clamp(-q, q) * (self.limit / q)


@dataclass(frozen=True)
class rescale:
    """Give the guided output the deviation of the conditional one, by a share phi.

    phi * g * std(c) / std(g) + (1 - phi) * g: Lin et al., arXiv 2305.08891, equations 15 and 16, on v predictions.

    Args:
        phi: share in [0, 1]; 0.7 in the paper.

    Raises:
        ValueError: if ``phi`` is out of its range.
    """

    phi: float = 0.7
    space: ClassVar[Space] = "v"

    def __post_init__(self) -> None:
        """Check the range."""
        check_range(self, "phi", 0, 1)

    @per_sample
    def __call__(self, guided: Tensor, cond_out: Tensor, uncond_out: Tensor) -> Tensor:
        """Rescale; a constant output stays as it is."""
        factor = ratio(deviation(cond_out), deviation(guided), 1.0)
        return guided * (1 + self.phi * (factor - 1))


@dataclass(frozen=True)
class norm_clamp:
    """Shrink the guided output to at most ``limit`` times the norm of the conditional one.

    g * min(1, limit * |c| / |g|), on velocities: the renormalisation of Lumina-Image 2.0 (arXiv 2503.21758) and BAGEL
    (arXiv 2505.14683).

    Args:
        limit: 1 in both.

    Raises:
        ValueError: if ``limit`` is negative.
    """

    limit: float = 1.0
    space: ClassVar[Space] = "flow"

    def __post_init__(self) -> None:
        """Check the range."""
        check_range(self, "limit", 0)

    @per_sample
    def __call__(self, guided: Tensor, cond_out: Tensor, uncond_out: Tensor) -> Tensor:
        """Shrink."""
        return guided * ratio(self.limit * norm(cond_out), norm(guided), 1.0).clamp(max=1)


@dataclass(frozen=True)
class apg:
    """Adaptive projected guidance: weaken the part of the direction that is parallel to the conditional output.

    D <- D + momentum * D of the step before; D <- D * min(1, threshold / |D|); then
    c + (s - 1) * (D_perpendicular + eta * D_parallel), relative to c: Sadat et al., arXiv 2410.02416, algorithm 1, on
    x0 predictions.

    Args:
        eta: share of the parallel part that is kept; 0 in the paper, 1 is plain guidance.
        threshold: largest norm of the direction of one sample (r in the paper, where it depends on the size of the
            latents: 2.5 to 15); infinity is none.
        momentum: of the direction; the paper takes -0.75 to -0.5. It remembers the steps of one sampling, so it
            works inside of a sampler only.

    Raises:
        ValueError: if a value is out of its range.
    """

    eta: float = 0.0
    threshold: float = math.inf
    momentum: float = 0.0
    space: ClassVar[Space] = "x0"

    def __post_init__(self) -> None:
        """Check the ranges."""
        check_range(self, "eta", -math.inf)
        check_range(self, "threshold", 0)
        check_range(self, "momentum", -1, 1)

    def begin(self) -> _RunningApg:
        """The same for the steps of one sampling, with its own memory."""
        return _RunningApg(self)

    def __call__(self, guided: Tensor, cond_out: Tensor, uncond_out: Tensor) -> Tensor:
        """Project, without momentum.

        Raises:
            ValueError: if there is momentum: a single call has no step before it.
        """
        if self.momentum != 0:
            raise ValueError(
                f"apg: momentum is {self.momentum}, which needs the steps of one sampling: expected 0, a sampler of "
                "unicfg, or begin().at(progress) for each step of a loop of your own"
            )
        return self.project(guided, cond_out, cond_out - uncond_out)

    @per_sample
    def project(self, guided: Tensor, cond_out: Tensor, direction: Tensor) -> Tensor:
        """The update for a direction, where ``guided`` is cond_out + (s - 1) * direction."""
        update = guided - cond_out
        if self.threshold < math.inf:
            update = update * ratio(self.threshold, norm(direction), 1.0).clamp(max=1)
        along = inner(update, cond_out) * ratio(1.0, inner(cond_out, cond_out), 0.0)
        parallel = along * cond_out
        return cond_out + update - parallel + self.eta * parallel


class _RunningApg:
    """APG in the course of one sampling: remembers the direction of the step before."""

    space: ClassVar[Space] = "x0"

    def __init__(self, settings: apg) -> None:
        self.settings = settings
        self.progress: float | None = None
        self.before: Tensor | None = None  # momentum of all steps but the present one
        self.now: Tensor | None = None

    def begin(self) -> _RunningApg:
        """The same for the steps of another sampling, or of another token of a hybrid: without what it remembers."""
        return _RunningApg(self.settings)

    def at(self, progress: float) -> _RunningApg:
        """The step at ``progress``. A second evaluation at the same noise level (Heun) is no new step."""
        if progress != self.progress:
            self.progress, self.before = progress, self.now
        return self

    def __call__(self, guided: Tensor, cond_out: Tensor, uncond_out: Tensor) -> Tensor:
        momentum = self.settings.momentum
        if momentum == 0:
            return self.settings(guided, cond_out, uncond_out)
        return self._with_momentum(guided, cond_out, uncond_out)

    @per_sample
    def _with_momentum(self, guided: Tensor, cond_out: Tensor, uncond_out: Tensor) -> Tensor:
        direction = cond_out - uncond_out
        if self.before is not None:
            held = self.settings.momentum * self.before
            # added to what is there: a mitigation before this one may have moved it
            guided = guided + strength(guided, cond_out, uncond_out) * held
            direction = direction + held
        self.now = direction
        return self.settings.project(guided, cond_out, direction)


@dataclass(frozen=True)
class cfg_zero_star:
    """CFG-Zero*: scale the unconditional velocity to fit the conditional one best before extrapolating.

    a * u + s * (c - a * u) with a = <c, u> / |u|^2: Fan et al., arXiv 2503.18886, equations 8 and 9. Their zero-init is
    :class:`zero_init`.
    """

    space: ClassVar[Space] = "flow"

    @per_sample
    def __call__(self, guided: Tensor, cond_out: Tensor, uncond_out: Tensor) -> Tensor:
        """Extrapolate from the scaled unconditional output."""
        size = inner(uncond_out, uncond_out)
        a = torch.where(size > 0, inner(cond_out, uncond_out) / size, 1.0)
        rest = uncond_out - a * uncond_out  # c - a * u is longer than the direction by this
        return guided + strength(guided, cond_out, uncond_out) * rest


@dataclass(frozen=True)
class zero_init:
    """Stand still during the first steps, whose velocity is the least reliable: zero velocity up to a progress.

    Fan et al., arXiv 2503.18886, section 4.2: about 4 % of the steps. Where the scale is 1 nothing is touched. The solvers
    of ``unicfg.sampling`` take no second-order step from a place where a sample stood still; a multistep scheduler of
    diffusers cannot know, so there ``until`` is best left at 0.

    Args:
        until: last progress that is skipped, included; 0 skips the first step alone.

    Raises:
        ValueError: if ``until`` is out of [0, 1].
    """

    until: float = 0.0
    space: ClassVar[Space] = "flow"

    def __post_init__(self) -> None:
        """Check the range."""
        check_range(self, "until", 0, 1)

    def holds_at(self, progress: float) -> bool:
        """Whether samples stand still at ``progress``."""
        return progress <= self.until

    def at(self, progress: float) -> Mitigation:
        """What it does at ``progress``."""
        return self if self.holds_at(progress) else _nothing

    @per_sample
    def __call__(self, guided: Tensor, cond_out: Tensor, uncond_out: Tensor) -> Tensor:
        """No velocity."""
        return torch.zeros_like(guided)


def _nothing(guided: Tensor, cond_out: Tensor, uncond_out: Tensor) -> Tensor:
    return guided


@dataclass(frozen=True)
class tcfg:
    """Tangential damping: keep of the unconditional output only what lies along the main axis of both outputs.

    u is projected on the first right singular vector of [c; u] before the extrapolation: Kwon et al., arXiv
    2503.18137, section 4, on scores.
    """

    space: ClassVar[Space] = "eps"

    @per_sample
    def __call__(self, guided: Tensor, cond_out: Tensor, uncond_out: Tensor) -> Tensor:
        """Extrapolate from the projected unconditional output."""
        # the axis of two vectors by their 2 x 2 Gram matrix, which costs three inner products
        gram = torch.stack(
            [
                torch.stack([inner(a, b).flatten() for b in (cond_out, uncond_out)], dim=-1)
                for a in (cond_out, uncond_out)
            ],
            dim=-2,
        ).double()
        weights = torch.linalg.eigh(gram).eigenvectors[..., -1].to(guided.dtype)
        shape = (-1, *[1] * (guided.ndim - 1))
        axis = weights[:, 0].view(shape) * cond_out + weights[:, 1].view(shape) * uncond_out
        damped = ratio(inner(uncond_out, axis), inner(axis, axis), 0.0) * axis
        # c + (s - 1) * (c - damped), where guided is c + (s - 1) * (c - u)
        return guided + strength(guided, cond_out, uncond_out) * (uncond_out - damped)


@dataclass(frozen=True)
class frequency_decoupled:
    """Guide fine structure by another share of s - 1 than coarse structure.

    Band k of a Laplacian pyramid (Burt and Adelson, 1983: blurred by the binomial filter of five taps) gets
    c_k + share_k * (s - 1) * D_k: Sadat et al., arXiv 2506.19713, algorithms 1 and 2, where the scales of SDXL are 10
    for the fine and 5 for the coarse band: with s = 10, shares 1 and 4 / 9. It means the same in every space.

    Args:
        shares: of s - 1, from the finest band to the coarsest; each after the first halves the resolution.

    Raises:
        ValueError: if ``shares`` is empty, or, when called, if the outputs are no (B, C, h, w) that can be halved so
            often.
    """

    shares: tuple[float, ...] = (1.0, 0.5)

    def __post_init__(self) -> None:
        """Check the shares."""
        if not self.shares or not all(math.isfinite(share) for share in self.shares):
            raise ValueError(
                f"frequency_decoupled: shares is {self.shares}, expected finite numbers, at least one"
            )

    @per_sample
    def __call__(self, guided: Tensor, cond_out: Tensor, uncond_out: Tensor) -> Tensor:
        """Weigh the bands of the update."""
        halvings = len(self.shares) - 1
        if guided.ndim != 4 or min(guided.shape[2:]) < 2**halvings:
            raise ValueError(
                f"frequency_decoupled: the outputs have shape {tuple(guided.shape)}, expected (B, C, h, w) with at "
                f"least {2**halvings} rows and columns for {len(self.shares)} bands"
            )
        rest, kept = guided - cond_out, torch.zeros_like(guided)
        bands = []
        for _ in range(halvings):
            coarse = _resized(_blurred(rest), (rest.shape[2] // 2, rest.shape[3] // 2))
            bands.append(rest - _enlarged(coarse, rest))
            rest = coarse
        kept = self.shares[-1] * rest
        for share, band in zip(reversed(self.shares[:-1]), reversed(bands), strict=True):
            kept = _enlarged(kept, band) + share * band
        return cond_out + kept


def _enlarged(coarse: Tensor, like: Tensor) -> Tensor:
    return _blurred(_resized(coarse, (like.shape[2], like.shape[3])))


def _resized(x: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(x, size=size, mode="bilinear")


def _blurred(x: Tensor) -> Tensor:
    """The binomial filter on (B, C, h, w), which goes on as its reflection, or where it is too small, as its border."""
    taps = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0], dtype=x.dtype, device=x.device) / 16
    channels = x.shape[1]
    padded = F.pad(x, (2, 2, 2, 2), mode="reflect" if min(x.shape[2:]) > 2 else "replicate")
    rows = F.conv2d(padded, taps.view(1, 1, 5, 1).expand(channels, 1, 5, 1), groups=channels)
    return F.conv2d(rows, taps.view(1, 1, 1, 5).expand(channels, 1, 1, 5), groups=channels)


@dataclass(frozen=True)
class magnitude_aware:
    """MAMBO-G: guide less where the direction is large against the unconditional output.

    s' = 1 + (s - 1) * exp(-alpha * |D| / |u|): Zhu et al., arXiv 2508.03442, on velocities.

    Args:
        alpha: 8 in the paper's default, for scales around 10.

    Raises:
        ValueError: if ``alpha`` is negative.
    """

    alpha: float = 8.0
    space: ClassVar[Space] = "flow"

    def __post_init__(self) -> None:
        """Check the range."""
        check_range(self, "alpha", 0)

    @per_sample
    def __call__(self, guided: Tensor, cond_out: Tensor, uncond_out: Tensor) -> Tensor:
        """Shorten the update."""
        most = torch.finfo(guided.dtype).max
        size = ratio(norm(cond_out - uncond_out), norm(uncond_out), most)
        return cond_out + (-self.alpha * size).exp() * (guided - cond_out)


@dataclass(frozen=True)
class mimic_scale:
    """Give each channel the range that it would have at a smaller scale.

    The values of g about their mean are scaled so that the largest is as large as that of the output at the scale
    ``s``: the dynamic thresholding extension of Stable Diffusion interfaces, without a paper, on x0 of latents.

    Args:
        s: the scale whose range is taken; 7 there.

    Raises:
        ValueError: if ``s`` is not finite.
    """

    s: float = 7.0
    space: ClassVar[Space] = "x0"

    def __post_init__(self) -> None:
        """Check the scale."""
        if not math.isfinite(self.s):
            raise ValueError(f"mimic_scale: s is {self.s}, expected a finite number")

    @per_sample
    def __call__(self, guided: Tensor, cond_out: Tensor, uncond_out: Tensor) -> Tensor:
        """Narrow the range; one that is narrower already stays."""
        spatial = tuple(range(2, guided.ndim)) or (1,)
        mimic = guide(cond_out, uncond_out, self.s)
        mean = guided.mean(spatial, keepdim=True)
        wanted = (mimic - mimic.mean(spatial, keepdim=True)).abs().amax(spatial, keepdim=True)
        largest = (guided - mean).abs().amax(spatial, keepdim=True)
        return mean + (guided - mean) * ratio(wanted, largest, 1.0).clamp(max=1)

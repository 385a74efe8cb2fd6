"""Guidance for denoisers (x, sigma) -> x0, as k-diffusion's samplers and those made after them call them.

    model = guided(denoiser, Guidance(3.0), {"cond": null}, sigmas=sigmas)
    x0 = k_diffusion.sampling.sample_dpmpp_2m(model, x, sigmas, extra_args={"cond": cond})

The host is not imported: its interface is a call.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from unicfg.guidance.core import Guidance
from unicfg.guidance.schedules import at_levels, is_steady
from unicfg.guidance.spaces import Level
from unicfg.sampling.branches import Branch, network_and_null
from unicfg.sampling.calls import guided_call
from unicfg.training.dropout import Condition

__all__ = ["GuidedDenoiser", "guided"]

_NEAR = 1e-4  # relative: what rounding in the sampler may make of a level


def guided(
    denoiser: Callable[..., Tensor],
    guidance: Guidance,
    null: Mapping[str, Condition],
    *,
    sigmas: Tensor | Sequence[float] | None = None,
    branches: Mapping[str, Mapping[str, Condition] | Branch] | None = None,
) -> GuidedDenoiser:
    """A denoiser that is guided, for any sampler of k-diffusion's interface.

    Both branches run in one call of ``denoiser``, [cond; uncond], or one of them in B rows where s is 1 or 0. The noisy
    samples are x = x0 + sigma * eps (Karras et al., arXiv 2206.00364, section 2): mitigations work in their own
    spaces, and schedules in noise levels see sigma itself.

    A call knows sigma, not how far the sampling is. With ``sigmas`` progress is i / (N - 1) at their i-th entry, as
    in ``sample_diffusion``, and in between in proportion to log sigma; above the first level it is 0, below the last
    1. Without it, what depends on progress is refused.

    Mitigations that remember the steps (momentum) begin anew at every call at or above the first of ``sigmas``; below,
    each new sigma is a step. A sampler that both evaluates twice a step and adds noise (``s_churn``) can rise above the
    first level half-way: keep its ``s_tmax`` below that, as EDM does. One sampling at a time: for two at once, make two.

    Args:
        denoiser: ``denoiser(x (R, C, h, w), sigma (R,), **extra) -> x0 (R, C, h, w)``, in eval mode.
        guidance: scale, schedule and mitigations.
        null: the arguments among ``extra`` that are conditions, each with its null condition, without the batch
            dimension or one for each sample; see :func:`unicfg.guided_call`. The others are the same in all branches.
        sigmas: the levels that the sampler is given, (N + 1,), falling, the last where it ends, usually 0. For a
            sampler that chooses its own, any levels from its largest down to its smallest.
        branches: conditions of the branches beside "cond" and "uncond", by argument as in ``null``, or a
            :class:`Branch` with another denoiser.

    Returns:
        a callable ``(x (B, C, h, w), sigma (B,), **extra) -> x0 (B, C, h, w)``.

    Raises:
        TypeError: if ``guidance`` is no ``Guidance``.
        ValueError: if ``sigmas`` are no falling levels or are missing where guidance needs them, a mitigation is made
            for logits, ``null`` names no argument, or the denoiser is in training mode.
    """
    return GuidedDenoiser(denoiser, guidance, null, sigmas, branches)


class GuidedDenoiser:
    """What :func:`guided` returns, see there.

    Attributes:
        guidance: as it was given.
    """

    def __init__(
        self,
        denoiser: Callable[..., Tensor],
        guidance: Guidance,
        null: Mapping[str, Condition],
        sigmas: Tensor | Sequence[float] | None,
        branches: Mapping[str, Mapping[str, Condition] | Branch] | None,
    ) -> None:
        if not isinstance(guidance, Guidance):
            raise TypeError(f"guidance is {guidance!r}, expected a Guidance, as in Guidance(3.0)")
        begun = guidance.begin("x0")
        if not isinstance(null, Mapping) or not null:
            raise ValueError(
                f"null is {null!r}, expected the null condition of each argument that is a condition, as in "
                "{'cond': null}"
            )
        self.guidance, self._null = guidance, dict(null)
        self._network = _adapted(denoiser)
        self._branches = {name: _own(branch) for name, branch in (branches or {}).items()}
        self._levels = None if sigmas is None else _checked_levels(sigmas)
        if self._levels is None:
            _check_stepless(guidance)
            begun = guidance
        self._running = begun

    def __call__(self, x: Tensor, sigma: Tensor, **extra: Any) -> Tensor:
        """Denoise x (B, C, h, w) at sigma (B,), the same for all.

        Raises:
            TypeError: if a condition that ``null`` names is not given.
            ValueError: if sigma is not one level for all samples, the scale depends on a progress that is not known,
                or see :func:`unicfg.guided_call`.
            FloatingPointError: if a branch holds NaN or infinity.
        """
        missing = [name for name in self._null if name not in extra]
        if missing:
            raise TypeError(
                f"the denoiser is called without {missing}, which null names: expected them among extra_args"
            )
        at = _one_level(sigma, x)
        guidance, progress = self._guidance_at(at)
        cond = {name: extra.pop(name) for name in self._null}
        out = guided_call(
            self._network,
            cond,
            self._null,
            guidance,
            progress,
            inputs=(x, sigma, extra),
            branches=self._branches,
            level=_level(x, sigma) if guidance.mitigations else None,
        )
        if out.shape != x.shape:
            raise ValueError(
                f"the denoiser returned {tuple(out.shape)} for x {tuple(x.shape)}, expected equal shapes"
            )
        return out

    def _guidance_at(self, sigma: float) -> tuple[Guidance, float]:
        """The guidance for a call at this level, and its progress."""
        if self._levels is None:
            return _stepless(self.guidance, sigma), 0.0
        if sigma >= self._levels[0] * (1 - _NEAR):
            self._running = self.guidance.begin("x0")
        scale: Any = at_levels(self._running.scale, [sigma])  # type: ignore[arg-type]  # weights are nested schedules to it
        return replace(self._running, scale=scale), _progress(sigma, self._levels)


def _adapted(denoiser: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The denoiser as ``guided_call`` calls a model."""
    network, _ = network_and_null(denoiser, None)

    def call(x: Tensor, cond: dict[str, Any], sigma: Tensor, extra: dict[str, Any]) -> Tensor:
        out: Tensor = network(x, sigma, **cond, **extra)
        return out

    return call


def _own(branch: Mapping[str, Condition] | Branch) -> Any:
    if not isinstance(branch, Branch):
        return dict(branch)
    return branch if branch.model is None else replace(branch, model=_adapted(branch.model))


def _checked_levels(sigmas: Tensor | Sequence[float]) -> list[float]:
    """The levels at which there are steps, without the one where the sampling ends."""
    levels = torch.as_tensor(sigmas, dtype=torch.float64).flatten().tolist()
    falling = all(a > b for a, b in itertools.pairwise(levels))
    if len(levels) < 2 or not falling or levels[-1] < 0 or levels[0] == math.inf:
        raise ValueError(
            f"sigmas is {levels}, expected at least two levels that fall, the last >= 0"
        )
    return levels[:-1]


def _progress(sigma: float, levels: list[float]) -> float:
    """Progress at any noise level, linear in its logarithm between the levels of a grid."""
    last = len(levels) - 1
    low = bisect.bisect_left(levels, -sigma, key=lambda level: -level)  # the first level <= sigma
    for near in (low - 1, low):
        if 0 <= near <= last and abs(sigma - levels[near]) <= _NEAR * levels[near]:
            return near / max(last, 1)
    if low in (0, last + 1):
        return 0.0 if low == 0 else last / max(last, 1)
    width = math.log(levels[low - 1] / levels[low])
    return (low - 1 + math.log(levels[low - 1] / sigma) / width) / last


def _one_level(sigma: Tensor, x: Tensor) -> float:
    if sigma.shape != x.shape[:1] or not bool((sigma == sigma[:1]).all()):
        raise ValueError(
            f"sigma is {sigma.tolist()}, expected one level for all samples, ({len(x)},), as samplers give it"
        )
    # 0.7 in float32 is 0.69999999, which the ends of an interval must not see
    digits = math.ceil(-math.log10(torch.finfo(sigma.dtype).eps))
    return float(f"{float(sigma[0]):.{digits}g}")


def _level(x: Tensor, sigma: Tensor) -> Level:
    precise = torch.promote_types(x.dtype, torch.float32)
    of_each = sigma.to(precise).view(-1, *[1] * (x.ndim - 1))
    return Level(x.to(precise), torch.ones((), device=x.device), of_each, "x0")


def _check_stepless(guidance: Guidance) -> None:
    """Refuse mitigations that go by the steps, where these are not known."""
    for mitigation in guidance.mitigations:
        remembers = hasattr(mitigation, "begin") and getattr(mitigation, "momentum", 1) != 0
        if remembers or hasattr(mitigation, "at"):
            raise ValueError(
                f"sigmas is None, and the mitigation {mitigation!r} goes by the steps of a sampling: expected sigmas, "
                "the levels that the sampler is given"
            )


def _stepless(guidance: Guidance, sigma: float) -> Guidance:
    """The guidance at a noise level, if that is all it takes to know its scale."""
    scale: Any = at_levels(guidance.scale, [sigma])  # type: ignore[arg-type]  # weights are nested schedules to it
    if not is_steady(scale):
        raise ValueError(
            f"sigmas is None, and the scale {guidance.scale!r} depends on progress, which sigma alone does not tell: "
            "expected sigmas, the levels that the sampler is given, or a schedule in noise levels, as in noise_interval"
        )
    return replace(guidance, scale=scale)

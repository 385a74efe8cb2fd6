"""Progress and noise level of each evaluation of a sampling, read from a scheduler of diffusers that is set."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from unicfg.guidance.branches import CfgPlusPlus
from unicfg.guidance.core import Guidance, Mitigation
from unicfg.guidance.schedules import at_levels
from unicfg.guidance.spaces import SPACES, Level, Space
from unicfg.sampling.branches import progress_at

_SPACES: dict[str, Space] = {
    "epsilon": "eps",
    "sample": "x0",
    "v_prediction": "v",
    "flow_prediction": "flow",
}


@dataclass(frozen=True)
class Timetable:
    """The evaluations of one sampling, counted from 0.

    The network is called once for each entry of ``scheduler.timesteps``; a scheduler of second order has two entries
    a step, and each is an evaluation here, as in ``sample_diffusion(scheduler=...)``.

    Attributes:
        scheduler: after its ``set_timesteps``.
        first: index of the first evaluation in ``scheduler.timesteps``; above 0 where a pipeline starts from an image.
    """

    scheduler: Any
    first: int = 0

    @property
    def total(self) -> int:
        """Number of evaluations."""
        return len(self.scheduler.timesteps) - self.first

    def progress(self, index: int) -> float:
        """Progress of an evaluation: 0.0 at the first, 1.0 at the last.

        Raises:
            ValueError: if there are not so many.
        """
        if not 0 <= index < self.total:
            raise ValueError(
                f"the network is called for the {index + 1}th time, expected the {self.total} timesteps of "
                f"{type(self.scheduler).__name__}, one call each"
            )
        return progress_at(index, self.total)

    def level(self, index: int, x: Tensor, space: Space) -> Level:
        """Where the evaluation of x (B, ...) stands, for predictions in ``space``."""
        alpha, sigma = self._coefficients[index]
        return Level(x, alpha, sigma, space)

    def at_levels(self, guidance: Guidance) -> Guidance:
        """The guidance with schedules in noise levels, if it has any, as schedules in progress."""
        if _why_no_levels(self.scheduler):
            return guidance
        ratios = [float(s / a) if a > 0 else math.inf for a, s in self._coefficients]
        scale: Any = at_levels(guidance.scale, ratios)  # type: ignore[arg-type]  # weights are nested schedules to it
        return replace(guidance, scale=scale)

    @cached_property
    def _coefficients(self) -> list[tuple[Tensor, Tensor]]:
        """Alpha and sigma of what the network sees in each evaluation, which is after ``scale_model_input``.

        All at once and off the device: looking at them there would hold it up in every step.
        """
        if hasattr(self.scheduler, "sigmas"):
            # not the timesteps, which may be rounded
            sigmas = self.scheduler.sigmas[self.first :].double().cpu()
            if _is_straight(self.scheduler):
                return [(1 - sigma, sigma) for sigma in sigmas]
            norms = (1 + sigmas.square()).sqrt()
            return [(1 / norm, sigma / norm) for sigma, norm in zip(sigmas, norms, strict=True)]
        places = self.scheduler.timesteps[self.first :].long().cpu()
        kept = self.scheduler.alphas_cumprod.double().cpu()[places]
        return [(share.sqrt(), (1 - share).sqrt()) for share in kept]


def timetable_from(
    scheduler: Any, timestep: Any, index: int = 0, before: Timetable | None = None
) -> Timetable:
    """The timetable in which the evaluation ``index`` is at ``timestep``.

    Args:
        scheduler: after its ``set_timesteps``.
        timestep: as the host gives it, a number or a tensor () or (B,).
        index: of the evaluation, counted from 0.
        before: that of the evaluations so far, which is kept if it fits. PNDM lists its second timestep twice, so that a
            sampling that starts there does not tell which one it is before the next.

    Raises:
        ValueError: if the scheduler has no such timestep.
    """
    value = torch.as_tensor(timestep).flatten()[:1].cpu()
    places = (torch.as_tensor(scheduler.timesteps).cpu() == value).nonzero()
    # a scheduler of second order has a timestep twice: the first evaluation is at the first of them
    starts = [int(place) - index for place in places if int(place) >= index]
    if not starts:
        raise ValueError(
            f"timestep is {value.tolist()} in evaluation {index}, expected one of {type(scheduler).__name__}, whose "
            "set_timesteps() was called: is it the scheduler of this pipeline?"
        )
    if before is not None:
        return before if before.first in starts else Timetable(scheduler, starts[0])
    told = getattr(scheduler, "begin_index", None)
    return Timetable(scheduler, told if told in starts else starts[0])


def predicted_space(scheduler: Any) -> Space:
    """The space that a scheduler expects predictions in.

    Raises:
        ValueError: if its prediction type is unknown.
    """
    straight = _is_straight(scheduler)
    given = scheduler.config.get("prediction_type", "flow_prediction" if straight else "epsilon")
    if given not in _SPACES or (given == "flow_prediction") != straight:
        expected = "'flow_prediction'" if straight else "'epsilon', 'sample' or 'v_prediction'"
        raise ValueError(
            f"the scheduler {type(scheduler).__name__} has prediction_type {given!r}, expected {expected}"
        )
    return _SPACES[given]


def needs_level(guidance: Guidance) -> list[Mitigation]:
    """The mitigations that work in a space of their own."""
    return [m for m in guidance.mitigations if getattr(m, "space", None) in SPACES]


def check_levels(scheduler: Any, guidance: Guidance) -> None:
    """Refuse mitigations with a space of their own where a scheduler does not tell the noise levels.

    Raises:
        ValueError: names the mitigation, the scheduler and what is missing.
    """
    why = _why_no_levels(scheduler)
    if why and (needing := needs_level(guidance)):
        raise ValueError(
            f"the mitigation {describe(needing[0])}, and the scheduler {type(scheduler).__name__} {why}: expected "
            "another scheduler, or guidance without it"
        )


def describe(mitigation: Mitigation) -> str:
    """A mitigation and its space, as in "rescale works on v predictions"."""
    name = getattr(mitigation, "__name__", type(mitigation).__name__)
    return f"{name} works on {getattr(mitigation, 'space', None)} predictions"


def check_branches(guidance: Guidance, known: tuple[str, ...], more: str) -> None:
    """Refuse guidance whose branches a host does not run.

    Args:
        guidance: as given by the user.
        known: branches that there are.
        more: what to do about others.

    Raises:
        ValueError: names the branch.
    """
    if isinstance(guidance.scale, CfgPlusPlus):
        raise ValueError(
            "guidance is that of cfg_pp, whose solver adds the unconditional noise back, and a scheduler of diffusers "
            "is not shown it: expected other guidance, or sample_diffusion(solver='cfg_pp')"
        )
    missing = [name for name in guidance.branch_names if name not in known]
    if missing:
        raise ValueError(f"guidance has the branches {missing}, expected {known}: {more}")


def _is_straight(scheduler: Any) -> bool:
    """Whether x_t is (1 - sigma) * x0 + sigma * eps."""
    return hasattr(scheduler, "scale_noise") or bool(scheduler.config.get("use_flow_sigmas", False))


def _why_no_levels(scheduler: Any) -> str:
    """Why the noise levels cannot be read; empty if they can."""
    if not hasattr(scheduler, "alphas_cumprod") and not (
        hasattr(scheduler, "scale_noise") and hasattr(scheduler, "sigmas")
    ):
        return "has neither alphas_cumprod nor the sigmas of a flow"
    if hasattr(scheduler, "sigmas_interpol") or hasattr(scheduler, "noise_sampler"):
        return "evaluates the network between the noise levels that it lists"
    return ""

"""Which branches a sampling needs, and the rows [cond; uncond] of a guided pass, in that order.

Every sampler runs both branches in one call of 2B rows where it needs both, and B rows where the scale is 1 or 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from unicfg.guidance.core import Guidance, Scale
from unicfg.guidance.spaces import Level
from unicfg.training.dropout import ConditionDropout, expand_null


def require(model: Any, sampler: str, *names: str) -> None:
    """Refuse a model that lacks what a sampler asks of it.

    Raises:
        TypeError: names the sampler, the model and what it lacks.
    """
    missing = [name for name in names if not hasattr(model, name)]
    if missing:
        raise TypeError(
            f"{sampler} got a {type(model).__name__}, which has no {', '.join(missing)}: expected a model of the "
            "sampler's own kind"
        )


@dataclass(frozen=True)
class Guided:
    """What guidance made of the branches at one step.

    Attributes:
        out: the guided output (B, ...).
        scale: s at this step: a float or (B,).
        cond_out: the conditional output; None where the step did not need it.
        uncond_out: the unconditional output; None where the step did not need it.
    """

    out: Tensor
    scale: Scale
    cond_out: Tensor | None
    uncond_out: Tensor | None


def combine(
    guidance: Guidance,
    progress: float,
    cond_out: Tensor | None,
    uncond_out: Tensor | None,
    step: str,
    level: Level | None = None,
) -> Guided:
    """Guide the outputs of one step.

    Args:
        guidance: scale, schedule and mitigations.
        progress: fraction of sampling done.
        cond_out: (B, ...), or None where not needed.
        uncond_out: (B, ...), or None where not needed.
        step: what to call this step in an error, as in "step 3".
        level: where a denoiser's outputs were made.

    Raises:
        FloatingPointError: if an output holds NaN or +inf; names the step and the branch.
    """
    branches = {"cond": cond_out, "uncond": uncond_out}
    # before they are guided, which saturates +inf; -inf masks a logit and is let through
    broken = [name for name, out in branches.items() if out is not None and _is_broken(out)]
    if not broken:
        out = guidance.combine(progress, cond_out, uncond_out, level)
        if not _is_broken(out):
            return Guided(out, guidance.scale_at(progress), cond_out, uncond_out)
    raise FloatingPointError(
        f"the model's output holds NaN or +inf at {step}, "
        f"in the branches {broken or 'cond and uncond, combined'}"
    )


def _is_broken(out: Tensor) -> bool:
    """Whether there is a NaN or +inf, in one pass: the largest value is NaN if any is."""
    return out.numel() > 0 and not bool(out.amax() < math.inf)


def begin_guidance(guidance: Guidance | None, space: str) -> Guidance:
    """The guidance of one sampling; None is the conditional model.

    Args:
        guidance: as given to the sampler.
        space: what the model predicts, see :meth:`Guidance.begin`.

    Raises:
        TypeError: if it is something else.
        ValueError: if a mitigation has no meaning in ``space``.
    """
    guidance = Guidance(1.0) if guidance is None else guidance
    if not isinstance(guidance, Guidance):
        raise TypeError(f"guidance is {guidance!r}, expected a Guidance, as in Guidance(3.0)")
    return guidance.begin(space)


def progress_at(index: int, total: int) -> float:
    """Progress of step ``index`` of ``total``: 0.0 at the first, 1.0 at the last."""
    return index / max(total - 1, 1)


def needed_branches(guidance: Guidance, progresses: Iterable[float], batch: int) -> tuple[str, ...]:
    """Every branch that some step will need, in row order; checks every scale before the first step.

    Raises:
        ValueError: if a scale (B,) does not fit the batch.
    """
    needed: set[str] = set()
    for progress in progresses:
        scale = guidance.scale_at(progress)
        if isinstance(scale, Tensor) and scale.ndim == 1 and len(scale) not in (1, batch):
            raise ValueError(
                f"the scale has {len(scale)} values for a batch of {batch}, expected one each"
            )
        needed.update(guidance.branches_at(progress))
    return tuple(name for name in ("cond", "uncond") if name in needed)


def network_and_null(model: Any, uncond: Tensor | None) -> tuple[Any, Tensor | None]:
    """The bare network in eval mode, and the null condition that goes with it.

    Raises:
        ValueError: if the network is in training mode.
    """
    network: Any = model
    if isinstance(model, ConditionDropout):
        network = model.model
        null = model.null_condition
        if uncond is None and isinstance(null, Tensor):
            uncond = null
    if isinstance(network, nn.Module) and network.training:
        raise ValueError("model is in training mode, expected model.eval() before sampling")
    return network, uncond


def branch_conditions(
    cond: Tensor, uncond: Tensor | None, needed: tuple[str, ...]
) -> dict[str, Tensor]:
    """The condition of each needed branch: (B, ...), or (1, ...) where one row serves all.

    Raises:
        ValueError: if an unconditional branch is needed and there is no condition for it, or it does not fit.
    """
    conditions: dict[str, Tensor] = {}
    if "cond" in needed:
        conditions["cond"] = cond
    if "uncond" in needed:
        if uncond is None:
            raise ValueError(
                "guidance needs an unconditional branch: expected a ConditionDropout with a "
                "tensor as null condition, or uncond=, the null condition of the training"
            )
        if uncond.shape not in (cond.shape, cond.shape[1:]):
            raise ValueError(
                f"uncond has shape {tuple(uncond.shape)}, expected {tuple(cond.shape[1:])} "
                f"or {tuple(cond.shape)}"
            )
        rows = uncond if uncond.shape == cond.shape else expand_null(uncond, 1)
        conditions["uncond"] = rows.to(cond.device)
    return conditions


class WholeGridPass:
    """A network that sees the whole sample at every step, called once a step for all branches it needs.

    The network is any callable ``network(x, cond, *rest)`` on rows. Where it has a method
    ``encode_condition(cond)``, the conditions go through that once per sampling, and the result takes the place of
    ``cond`` in every call; it must have a method ``rows(start, stop)``.

    Args:
        network: the bare network.
        cond: (B, ...).
        uncond: one null condition (...), or (B, ...).
        guidance: scale, schedule and mitigations.
        progresses: of all steps.

    Raises:
        ValueError: if the conditions do not fit, or one is missing.
    """

    def __init__(
        self,
        network: Callable[..., Tensor],
        cond: Tensor,
        uncond: Tensor | None,
        guidance: Guidance,
        progresses: Iterable[float],
    ) -> None:
        self.network, self.guidance, self.batch = network, guidance, len(cond)
        needed = needed_branches(guidance, progresses, self.batch)
        conditions = branch_conditions(cond, uncond, needed)
        joint: Any = torch.cat(
            [rows.expand(self.batch, *cond.shape[1:]) for rows in conditions.values()]
        )
        encode = getattr(network, "encode_condition", None)
        joint = encode(joint) if encode is not None else joint
        self.conditions: dict[tuple[str, ...], Any] = {needed: joint}
        for i, name in enumerate(needed):
            start, stop = i * self.batch, (i + 1) * self.batch
            part = joint.rows(start, stop) if encode is not None else joint[start:stop]
            self.conditions[(name,)] = part

    def __call__(
        self, progress: float, step: str, x: Tensor, *rest: Tensor, level: Level | None = None
    ) -> Guided:
        """Run the branches that ``progress`` needs on x (B, ...) and guide them.

        Args:
            progress: fraction of sampling done.
            step: what to call this step in an error.
            x: (B, ...), the same for every branch.
            rest: further arguments of the network, (B, ...) each.
            level: of a denoiser, the noise level of x.

        Raises:
            FloatingPointError: if an output holds NaN or +inf.
        """
        return combine(self.guidance, progress, *self.branches(progress, x, *rest), step, level)

    def branches(
        self, progress: float, x: Tensor, *rest: Tensor
    ) -> tuple[Tensor | None, Tensor | None]:
        """Outputs of the branches that ``progress`` needs, in one call; None for the other."""
        needed = self.guidance.branches_at(progress)
        count = len(needed)
        out = self.network(
            torch.cat([x] * count),
            self.conditions[needed],
            *(torch.cat([value] * count) for value in rest),
        )
        parts = dict(zip(needed, out.split(self.batch), strict=True))
        return parts.get("cond"), parts.get("uncond")

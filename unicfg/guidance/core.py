"""The one formula, and the object that says how strongly to apply it and when.

A model that runs with and without its condition gives a direction, ``cond_out - uncond_out``. Guidance goes
further along it. For a token model the outputs are logits, for a diffusion model noise predictions; the
arithmetic is the same:

    out = uncond_out + s * (cond_out - uncond_out)

s = 1 is the conditional model, s = 0 the unconditional one, s > 1 exaggerates what the condition is
responsible for (Ho and Salimans, arXiv 2207.12598, equation 6, where w = s - 1).

Shape letters, for the whole library: B batch, L image tokens, T condition tokens, V codebook size, C latent
channels, H W image pixels, h w latent grid, D width.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from unicfg.guidance.spaces import SPACES, Level, Space, check_space

Scale = float | Tensor
Schedule = Callable[[float], Scale]
Mitigation = Callable[[Tensor, Tensor, Tensor], Tensor]


class Combination(Protocol):
    """What takes the place of the scale where there are other branches; see ``unicfg.guidance.branches``."""

    @property
    def names(self) -> tuple[str, ...]:
        """All branches that it may give a weight, in row order."""

    def strengths_at(self, progress: float) -> tuple[Scale, ...]:
        """All numbers, or tensors (B,), that it has at ``progress``."""

    def scale_at(self, progress: float) -> Scale:
        """The weight of the condition."""

    def branches_at(self, progress: float) -> tuple[str, ...]:
        """The branches whose outputs the step at ``progress`` needs, in row order."""

    def alone_at(self, progress: float) -> Tensor | None:
        """The samples that need one of these branches only, bool (B,) or (1,); None where all samples are alike."""

    def combine(self, progress: float, outputs: Mapping[str, Tensor]) -> Tensor:
        """The guided output (B, ...) of these branches; in masked sampling (B, K, V), of the tokens of the step."""

    def fixed_at(self, progress: float) -> Combination:
        """The same, at every step as it is at ``progress``."""


def guide(cond_out: Tensor, uncond_out: Tensor, s: Scale) -> Tensor:
    """Extrapolate from the unconditional output through the conditional one.

    Exact at both ends: bit-equal to ``cond_out`` at s = 1 and to ``uncond_out`` at s = 0. Half-precision
    inputs are combined in float32 and returned in their own dtype. Gradients flow to all three arguments.

    Logits may hold -inf: what is masked in ``cond_out`` stays masked (except at s = 0, which is
    ``uncond_out``), and what is masked only in ``uncond_out`` falls back to ``cond_out``. Nothing else is a mask: a
    large negative number is extrapolated like any other.

    Args:
        cond_out: output under the condition, floating point, (B, ...).
        uncond_out: output under the null condition, the same shape, dtype and device; its batch may be 1.
        s: scale; a number, a 0-d tensor, (B,) for one scale a sample, or a tensor with as many dimensions
            as ``cond_out`` that broadcasts to it.

    Returns:
        the guided output, in the shape and dtype of ``cond_out``.

    Raises:
        TypeError: if an output is not a floating-point tensor, the dtypes differ, or ``s`` is no number and no tensor.
        ValueError: if shapes or devices do not match, or ``s`` is not finite.

    Example:
        >>> guide(torch.tensor([[2.0, 0.0]]), torch.tensor([[1.0, 0.0]]), 3.0)
        tensor([[4., 0.]])
    """
    _check_outputs(cond_out, uncond_out)
    if isinstance(s, Tensor) and s.ndim and s.device != cond_out.device:
        raise ValueError(
            f"s is on {s.device} and the outputs on {cond_out.device}, expected one device"
        )
    return _guided(cond_out, uncond_out, _check_scale(s, cond_out))


def _guided(cond_out: Tensor, uncond_out: Tensor, s: Scale) -> Tensor:
    """:func:`guide` for what was checked; ``s`` may be on the host, where looking at it holds up no device."""
    if not isinstance(s, Tensor) and s in (0.0, 1.0):  # exact whatever the values are
        return (cond_out if s == 1.0 else uncond_out.expand_as(cond_out)).clone()
    precise = torch.promote_types(cond_out.dtype, torch.float32)
    cond, uncond = cond_out.to(precise), uncond_out.to(precise).expand_as(cond_out)

    most = torch.finfo(precise).max
    s = (
        _beside(s.double().clamp(-most, most), cond)
        if isinstance(s, Tensor)
        else max(-most, min(s, most))
    )
    # elsewhere looking at the result would stall the device
    if cond.device.type == "cpu" and cond.numel():
        out = _line(cond, uncond, s)
        # one number that is finite only if all are; where rounding follows, all must be small enough for it too
        shown = out.sum() if out.dtype == cond_out.dtype else out.abs().amax()
        if abs(shown.item()) <= torch.finfo(cond_out.dtype).max:
            return out.to(cond_out.dtype)
    return _guide_carefully(cond, uncond, s, cond_out.dtype)


def guide_unchecked(cond_out: Tensor, uncond_out: Tensor, s: Scale) -> Tensor:
    """:func:`guide` for a loop over small tensors, where its checks would take longer than the formula.

    The outputs are of one shape and in float32 at least, ``s`` broadcasts to them, and the caller looks at the result:
    where it is not finite, :func:`guide` has the answer.
    """
    return _line(cond_out, uncond_out, s)


def _guide_carefully(cond: Tensor, uncond: Tensor, s: Scale, dtype: torch.dtype) -> Tensor:
    """The formula for outputs that may hold -inf or be too large for it."""
    # -inf - (-inf) is NaN, so masked entries are set aside before the formula and restored after it
    cond_masked, uncond_masked = cond.isneginf(), uncond.isneginf()
    cond = cond.masked_fill(cond_masked, 0.0)
    uncond = torch.where(uncond_masked, cond, uncond)
    # what is too large for the arithmetic saturates: neither the difference nor the result becomes infinite
    most = torch.finfo(cond.dtype).max
    cond, uncond = cond.clamp(-most / 2, most / 2), uncond.clamp(-most / 2, most / 2)
    out = _line(cond, uncond, s)
    limits = torch.finfo(dtype)
    out = out.clamp(limits.min, limits.max)
    if isinstance(s, Tensor):
        masked = torch.where(s == 0, uncond_masked, cond_masked)
    else:
        masked = cond_masked
    return out.masked_fill(masked, -math.inf).to(dtype)


def _line(cond: Tensor, uncond: Tensor, s: Scale) -> Tensor:
    """The formula; u + s * (c - u) would not be exact at s = 1."""
    return torch.lerp(uncond, cond, s)


def mix(outputs: Sequence[Tensor], weights: Sequence[Scale]) -> Tensor:
    """The formula for any number of outputs: the sum of weight * output, with weights that add up to 1.

    Two outputs are :func:`guide`. With more, the result is the first plus its weighted differences from the others, so that
    one mask and one precision serve all: what is masked (-inf) in the first stays masked, and another output that is
    masked takes the value of the first there. In a sample where the first has no weight, the next takes its
    place.

    Args:
        outputs: (B, ...) each, of one dtype; the batch of all but the first may be 1.
        weights: one each, a number, (B,), or broadcastable, on any device; they add up to 1, which is the caller's to
            check.

    Returns:
        the sum, in the shape and dtype of the first output.

    Raises:
        TypeError: see :func:`guide`.
        ValueError: see :func:`guide`; if there are no outputs.
    """
    if not outputs or len(outputs) != len(weights):
        raise ValueError(
            f"there are {len(outputs)} outputs and {len(weights)} weights, expected one weight each"
        )
    first, *others = outputs
    if len(outputs) == 1:
        return first
    for out in others:
        _check_outputs(first, out)
    if len(outputs) == 2:
        return _guided(first, others[0], _check_scale(weights[0], first))
    precise = torch.promote_types(first.dtype, torch.float32)
    scales = [_check_scale(weight, first) for weight in weights]
    base = _anchor(outputs, scales)
    masked = base.isneginf()
    # each term may be at most its share of what a float holds, so that their sum is finite
    most = torch.finfo(precise).max / (2 * len(outputs))
    base = base.to(precise).masked_fill(masked, 0.0).clamp(-most, most)
    total = base.clone()
    for out, scale in zip(outputs, scales, strict=True):
        wide = out.to(precise).expand_as(base)
        wide = torch.where(wide.isneginf() | masked, base, wide).clamp(-most, most)
        scale = _beside(scale, base) if isinstance(scale, Tensor) else scale
        total = total + (scale * (wide - base)).clamp(-most, most)
    limits = torch.finfo(first.dtype)
    return total.clamp(limits.min, limits.max).masked_fill(masked, -math.inf).to(first.dtype)


def _anchor(outputs: Sequence[Tensor], scales: Sequence[Scale]) -> Tensor:
    """The output that the others are compared with: in each sample the first one that has a weight."""
    base, chosen = outputs[0], torch.as_tensor(scales[0] != 0)
    for out, scale in zip(outputs[1:], scales[1:], strict=True):
        if bool(
            chosen.all()
        ):  # looked at where the weights are, which is the host unless they came from elsewhere
            break
        weighed = torch.as_tensor(scale != 0, device=chosen.device)
        here = (~chosen & weighed).to(out.device, non_blocking=True)
        base = torch.where(here, out.expand_as(base), base)
        chosen = chosen | weighed
    return base


def _beside(values: Tensor, like: Tensor) -> Tensor:
    """Values in the dtype and on the device of ``like``, which nobody waits for: they are few."""
    return values.to(like, non_blocking=True)


def _check_outputs(cond_out: Tensor, uncond_out: Tensor) -> None:
    for name, out in (("cond_out", cond_out), ("uncond_out", uncond_out)):
        if not isinstance(out, Tensor) or not out.is_floating_point():
            kind = out.dtype if isinstance(out, Tensor) else type(out).__name__
            raise TypeError(f"{name} is {kind}, expected a floating-point tensor")
    if cond_out.dtype != uncond_out.dtype:
        raise TypeError(
            f"cond_out is {cond_out.dtype} and uncond_out {uncond_out.dtype}, expected one dtype"
        )
    if cond_out.device != uncond_out.device:
        raise ValueError(
            f"cond_out is on {cond_out.device} and uncond_out on {uncond_out.device}, "
            "expected one device"
        )
    cond_shape, uncond_shape = tuple(cond_out.shape), tuple(uncond_out.shape)
    # one unconditional row may serve a whole batch; any other broadcasting is a mistake in the making
    if uncond_shape != cond_shape and uncond_shape != (1, *cond_shape[1:]):
        raise ValueError(
            f"cond_out has shape {cond_shape} and uncond_out {uncond_shape}, "
            "expected equal shapes, or batch 1 in uncond_out"
        )


def _check_scale(s: Scale, out: Tensor) -> Scale:
    """Return ``s`` as a float, or as a tensor that broadcasts against ``out``."""
    if not isinstance(s, Tensor):
        if not isinstance(s, numbers.Real):
            raise TypeError(f"s is {s!r}, expected a number or a tensor")
        s = float(s)
        if not math.isfinite(s):
            raise ValueError(f"s is {s}, expected a finite number")
        return s
    if not bool(torch.isfinite(s).all()):
        raise ValueError(f"s is {s.tolist()}, expected finite numbers")
    if s.ndim == 1:
        if len(s) != len(out) and len(s) != 1:
            raise ValueError(f"s has {len(s)} values for a batch of {len(out)}, expected one each")
        return s.view(-1, *[1] * (out.ndim - 1))
    fits = s.ndim in (0, out.ndim) and all(
        a in (1, b) for a, b in zip(s.shape, out.shape, strict=False)
    )
    if not fits:
        raise ValueError(
            f"s has shape {tuple(s.shape)} and the outputs {tuple(out.shape)}, "
            "expected a number, (B,), or a shape that broadcasts to the outputs"
        )
    return s


def scale_from_w(w: Scale) -> Scale:
    """Convert w to s = 1 + w: the scale of ``cond + w * (cond - uncond)``, which is 0 without guidance.

    Used by Ho and Salimans (arXiv 2207.12598), VAR, Show-o, LLaDA, Meta's flow_matching and Dia.
    """
    return 1.0 + w


def scale_from_beta(beta: Scale) -> Scale:
    """Convert beta to s = 1 / beta, the temperature of guidance in GFT (arXiv 2501.15420).

    Raises:
        ValueError: if a beta is 0.
    """
    if bool(torch.as_tensor(beta == 0).any()):
        raise ValueError(f"beta is {beta}, expected a number other than 0")
    return 1.0 / beta


@dataclass(frozen=True, eq=False)
class Guidance:
    """How strongly to guide, when, and what reins it in. Immutable; holds no state between calls.

    Args:
        scale: a number, a tensor (B,) with one scale a sample, or a schedule: a callable from progress
            (0.0 at the first sampling step, 1.0 at the last) to either, see ``unicfg.guidance.schedules``. Or the
            weights of any number of branches, see ``unicfg.guidance.branches``.
        mitigations: callables ``(guided, cond_out, uncond_out) -> guided``, applied in order after the formula, each
            in the space that it declares; see ``unicfg.guidance.mitigations``.

    Raises:
        ValueError: if a fixed scale is not finite or has another shape than () or (B,).
        TypeError: if ``scale`` is no number, tensor or callable, ``mitigations`` no sequence, or one is not callable.

    Example:
        >>> Guidance(3.0).scale_at(0.5)
        3.0
        >>> Guidance(3.0).branches_at(0.5), Guidance(1.0).branches_at(0.5)
        (('cond', 'uncond'), ('cond',))
    """

    scale: Scale | Schedule | Combination = 1.0
    mitigations: tuple[Mitigation, ...] = ()

    def __post_init__(self) -> None:
        """Check what can be checked before the first step."""
        if not isinstance(self.mitigations, Sequence):
            raise TypeError(
                f"mitigations is {self.mitigations!r}, expected a tuple, as in (rescale(0.7),)"
            )
        object.__setattr__(self, "mitigations", tuple(self.mitigations))
        for mitigation in self.mitigations:
            if not callable(mitigation):
                raise TypeError(f"mitigation is {mitigation!r}, expected a callable")
        if isinstance(self.scale, Guidance):
            raise TypeError(
                f"scale is {self.scale!r}, expected a number, a schedule or weights of branches"
            )
        if self._combination is None and (
            isinstance(self.scale, Tensor) or not callable(self.scale)
        ):
            check_scale_value(self.scale, "scale")

    @property
    def _combination(self) -> Combination | None:
        # told by what it offers: branches are a module of their own, which imports this one
        return self.scale if hasattr(self.scale, "branches_at") else None  # type: ignore[return-value]

    def scale_at(self, progress: float) -> Scale:
        """The scale at ``progress`` in [0, 1]: a float, or a tensor (B,).

        With weights of branches, it is the weight of the condition.

        Raises:
            ValueError: if ``progress`` lies outside [0, 1], or a schedule gives a scale that is not finite.
            TypeError: if it gives neither a number nor a tensor.
        """
        if not 0.0 <= progress <= 1.0:
            raise ValueError(f"progress is {progress}, expected a fraction between 0 and 1")
        where = f"schedule at progress {progress}"
        if self._combination is not None:
            return check_scale_value(self._combination.scale_at(progress), where)
        if isinstance(self.scale, Tensor) or not callable(self.scale):
            return check_scale_value(self.scale, "scale")
        return check_scale_value(self.scale(progress), where)

    @property
    def branch_names(self) -> tuple[str, ...]:
        """All branches that some step may need."""
        return ("cond", "uncond") if self._combination is None else self._combination.names

    def strengths_at(self, progress: float) -> tuple[Scale, ...]:
        """The scale at ``progress``, or every number that the weights of branches have there."""
        if self._combination is None:
            return (self.scale_at(progress),)
        return self._combination.strengths_at(progress)

    def branches_at(self, progress: float) -> tuple[str, ...]:
        """The branches whose outputs the step at ``progress`` needs, in row order.

        ``("cond",)`` where every scale is 1, ``("uncond",)`` where every scale is 0, else both: a sampler runs
        B rows, not 2B, wherever one branch suffices. With weights of branches, those whose weight is not 0.
        """
        if self._combination is not None:
            needed = self._combination.branches_at(progress)
            # mitigations rein in against the condition, whatever it weighs
            missing = len(needed) > 1 and self.mitigations and "cond" not in needed
            return ("cond", *needed) if missing else needed
        s = self.scale_at(progress)
        for value, branch in ((1.0, "cond"), (0.0, "uncond")):
            if s == value if isinstance(s, float) else bool((torch.as_tensor(s) == value).all()):
                return (branch,)
        return ("cond", "uncond")

    def fixed_at(self, progress: float) -> Guidance:
        """The same guidance with the scale, or the weights, that it has at ``progress``."""
        fixed = self._combination.fixed_at(progress) if self._combination is not None else None
        return replace(self, scale=self.scale_at(progress) if fixed is None else fixed)

    def begin(self, space: str) -> Guidance:
        """The guidance of one sampling: mitigations that remember earlier steps start anew, scales are on the host.

        Each step asks the scales which branches it needs, which on a GPU would be to wait for it.
        Samplers call this before their first step; so does a loop of your own, if a mitigation has momentum.

        Args:
            space: what the model predicts: "eps", "x0", "v", "flow", "score" or "logits".

        Raises:
            ValueError: if a mitigation has no meaning there.
        """
        if space != "logits":
            check_space(space)
        methods = [*self.mitigations, *([self._combination] if self._combination else [])]
        for method in methods:
            native = getattr(method, "space", None)
            if native is not None and (native == "logits") != (space == "logits"):
                raise ValueError(
                    f"the guidance method {_name(method)} works on {native}, and the model predicts {space}: "
                    + (
                        "expected one for logits, such as temperature_matching or kl_trust_region"
                        if space == "logits"
                        else "expected one for denoisers, such as rescale or apg"
                    )
                )
        fresh = (m.begin() if hasattr(m, "begin") else m for m in self.mitigations)
        return replace(self, scale=_on_host(self.scale), mitigations=tuple(fresh))

    def combine(
        self,
        progress: float,
        cond_out: Tensor | None,
        uncond_out: Tensor | None,
        level: Level | None = None,
    ) -> Tensor:
        """:meth:`combine_branches` for the two branches of plain guidance.

        Args:
            progress: fraction of sampling done, in [0, 1].
            cond_out: (B, ...), or None where the step does not need it.
            uncond_out: (B, ...), or None where the step does not need it.
            level: see :meth:`combine_branches`.

        Raises:
            ValueError: see :meth:`combine_branches`.
        """
        given = {"cond": cond_out, "uncond": uncond_out}
        outputs = {name: out for name, out in given.items() if out is not None}
        return self.combine_branches(progress, outputs, level)

    def combine_branches(
        self, progress: float, outputs: Mapping[str, Tensor], level: Level | None = None
    ) -> Tensor:
        """Guide the outputs of the branches named by :meth:`branches_at`, then apply the mitigations.

        Where only one branch is needed, its output is returned as it is, for there is nothing to rein in; with a scale for
        each sample, so it is in those that need only one. With other
        branches than "cond" and "uncond", what a mitigation takes for the unconditional output is the weighted mean of
        all but the condition, from which the guided output is reached along a line as in plain guidance.

        Args:
            progress: fraction of sampling done, in [0, 1].
            outputs: of each needed branch, (B, ...).
            level: of denoisers, where the outputs were made: needed by mitigations with a space of their own.

        Raises:
            ValueError: if a branch that the step needs is missing, or a level that a mitigation needs.
        """
        needed = self.branches_at(progress)
        if any(name not in outputs for name in needed):
            raise ValueError(
                f"the step at progress {progress} needs {needed}, got {tuple(outputs)}"
            )
        if len(needed) == 1:
            return outputs[needed[0]]
        if not self.mitigations:
            return self._mixed(progress, {name: outputs[name] for name in needed})
        first = outputs[needed[0]]
        precise = torch.promote_types(first.dtype, torch.float32)  # rounded once, at the end
        wide = {}
        for name in needed:
            _check_outputs(first, outputs[name])
            wide[name] = outputs[name].to(precise).expand_as(first)
        guided = self._mixed(progress, wide)
        cond = wide["cond"]
        plain = needed == ("cond", "uncond")
        uncond = wide["uncond"] if plain else _other_end(guided, cond, self.scale_at(progress))
        mitigated = guided
        for mitigation in self.mitigations:
            mitigated = _mitigate(mitigation, progress, mitigated, cond, uncond, level)
        # a sample that needs one branch only is the same beside others as it is by itself
        alone = self._alone_at(progress)
        if alone is not None:
            mitigated = torch.where(
                _of_samples(alone.to(first.device, non_blocking=True), first), guided, mitigated
            )
        return to_dtype(mitigated, first.dtype)

    def still_at(self, progress: float) -> Tensor | None:
        """The samples that a mitigation holds where they are, bool (), (1,) or (B,); None where there are none.

        Solvers that look at more than one step have to know: where a sample stood still there is no x0 to go by.
        """
        if not any(hasattr(m, "holds_at") and m.holds_at(progress) for m in self.mitigations):
            return None
        if len(self.branches_at(progress)) == 1:
            return None
        alone = self._alone_at(progress)
        return torch.ones((), dtype=torch.bool) if alone is None else ~alone

    def _alone_at(self, progress: float) -> Tensor | None:
        """The samples that need one branch only, bool (B,) or (1,); None where all samples are alike."""
        if self._combination is not None:
            return self._combination.alone_at(progress)
        s = self.scale_at(progress)
        return (s == 1) | (s == 0) if isinstance(s, Tensor) and s.ndim else None

    def _mixed(self, progress: float, outputs: Mapping[str, Tensor]) -> Tensor:
        """The formula alone."""
        if self._combination is not None:
            return self._combination.combine(progress, outputs)
        s = self.scale_at(progress)
        cond_out, uncond_out = outputs["cond"], outputs["uncond"]
        _check_outputs(cond_out, uncond_out)
        return _guided(cond_out, uncond_out, _check_scale(s, cond_out))


def _on_host(scale: Any) -> Any:
    """A scale, a schedule or weights of branches with their tensors on the CPU; itself where they are."""
    if isinstance(scale, Tensor):
        return scale.cpu()
    if isinstance(scale, tuple):
        moved = tuple(_on_host(entry) for entry in scale)
        return scale if all(a is b for a, b in zip(moved, scale, strict=True)) else moved
    if not is_dataclass(scale) or isinstance(scale, type):
        return scale
    own = {field.name: getattr(scale, field.name) for field in fields(scale) if field.init}
    changes = {name: _on_host(value) for name, value in own.items()}
    changes = {name: value for name, value in changes.items() if value is not own[name]}
    return replace(scale, **changes) if changes else scale


def _other_end(guided: Tensor, cond_out: Tensor, weight: Scale) -> Tensor:
    """The mean of the other branches: guided = weight * cond_out + (1 - weight) * mean.

    Where the others' weights add up to 0 there is no mean, and it is as if the weight of the condition were 2.
    """
    w = _beside(torch.as_tensor(weight, dtype=cond_out.dtype), cond_out)
    beyond = torch.where((w - 1).abs() > 1e-6, w - 1, 1.0)
    step = (guided - cond_out) / _of_samples(beyond, cond_out)
    return torch.where(step.isfinite(), cond_out - step, cond_out)


def _of_samples(values: Tensor, out: Tensor) -> Tensor:
    """One value a sample, (), (1,) or (B,), with the dimensions of the outputs."""
    return values.view(-1, *[1] * (out.ndim - 1))


def to_dtype(out: Tensor, dtype: torch.dtype) -> Tensor:
    """Round to a dtype; what is too large for it saturates, and -inf, which masks a logit, stays."""
    if out.dtype == dtype:
        return out
    limits = torch.finfo(dtype)
    return torch.where(out.isneginf(), out, out.clamp(limits.min, limits.max)).to(dtype)


def _mitigate(
    mitigation: Any,
    progress: float,
    guided: Tensor,
    cond_out: Tensor,
    uncond_out: Tensor,
    level: Level | None,
) -> Tensor:
    """Apply one mitigation in its own space."""
    mitigation = mitigation.at(progress) if hasattr(mitigation, "at") else mitigation
    space = getattr(mitigation, "space", None)
    if space not in SPACES or (level is not None and level.space == space):
        mitigated: Tensor = mitigation(guided, cond_out, uncond_out)
        return mitigated
    if level is None:
        raise ValueError(
            f"level is None, expected the noise level of the outputs: the mitigation {_name(mitigation)} works on "
            f"{space} predictions"
        )
    open_ = level.leaves_open(space)
    if bool(open_.all()):
        return guided  # the outputs do not differ there, so there is nothing to rein in
    if bool(open_.any()):  # in some samples only
        inside = level.elsewhere(open_)
        return torch.where(
            open_, guided, _mitigate_at(inside, mitigation, space, guided, cond_out, uncond_out)
        )
    return _mitigate_at(level, mitigation, space, guided, cond_out, uncond_out)


def _mitigate_at(
    level: Level,
    mitigation: Any,
    space: Space,
    guided: Tensor,
    cond_out: Tensor,
    uncond_out: Tensor,
) -> Tensor:
    outputs = (level.to_space(out, space) for out in (guided, cond_out, uncond_out))
    return level.from_space(mitigation(*outputs), space)


def _name(mitigation: object) -> str:
    return getattr(mitigation, "__name__", type(mitigation).__name__)


def check_scale_value(s: object, where: str) -> Scale:
    """The scale as a float or a tensor () or (B,), if it is one.

    Raises:
        TypeError: if it is neither a number nor a tensor.
        ValueError: if it is not finite, or has more dimensions.
    """
    if isinstance(s, Tensor):
        if s.ndim > 1 or not bool(torch.isfinite(s).all()):
            raise ValueError(
                f"{where} is {s.tolist()}, expected finite numbers of shape () or (B,)"
            )
        return s
    if isinstance(s, bool) or not isinstance(s, numbers.Real):  # numpy's, too
        raise TypeError(f"{where} is {s!r}, expected a number, a tensor or a schedule")
    if not math.isfinite(s):
        raise ValueError(f"{where} is {s}, expected a finite number")
    return float(s)

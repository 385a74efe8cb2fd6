"""More branches than two: what is mixed, and how strongly.

Guidance with a null condition has the branches "cond" and "uncond". A negative prompt, an image that is edited, a
weaker model: each is one more output of the same shape, and all methods of this kind are one sum whose weights add up
to 1. What a branch runs (another condition, another network) is told to the sampler, see
:class:`unicfg.sampling.Branch`; what it weighs is said here and takes the place of the scale:

    Guidance(branches.negative(3.0, 1.5))

Every strength may be a number, a tensor (B,) or a schedule. To add a method, write a function that returns
:class:`Weights`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from unicfg.guidance.core import Scale, Schedule, check_scale_value, mix, to_dtype

__all__ = [
    "CfgPlusPlus",
    "PerpNeg",
    "Weights",
    "cfg_pp",
    "composed",
    "context_aware",
    "dexperts",
    "instruct_pix2pix",
    "negative",
    "nested",
    "perp_neg",
    "weak",
    "weights",
]

Strength = Scale | Schedule
_TOLERANCE = 1e-4  # of the sum of weights, relative to the largest
_LEAST = 1e-9  # of the largest weight: a smaller one is 0


@dataclass(frozen=True, eq=False)
class Weights:
    """Branches and their weights; :func:`weights` makes it.

    Attributes:
        names: of the branches, in row order.
        values: the weight of each.
    """

    names: tuple[str, ...]
    values: tuple[Strength, ...]

    def __post_init__(self) -> None:
        """Check what can be checked before the first step."""
        if "cond" not in self.names or len(set(self.names)) != len(self.names):
            raise ValueError(
                f"the branches are {self.names}, expected 'cond' among them, none twice"
            )
        if len(self.values) != len(self.names):
            raise ValueError(
                f"there are {len(self.names)} branches and {len(self.values)} weights, expected one each"
            )
        if not any(_is_schedule(value) for value in self.values):
            self.at(0.0)

    def at(self, progress: float) -> dict[str, Scale]:
        """The weight of every branch at ``progress``.

        Raises:
            ValueError: if they do not add up to 1, or one is not finite.
        """
        at = {n: _at(v, progress, n) for n, v in zip(self.names, self.values, strict=True)}
        exact = [torch.as_tensor(value, dtype=torch.float64) for value in at.values()]
        largest = max(float(value.abs().amax()) for value in exact)
        total = _added(exact)
        if not bool((total - 1).abs().amax() <= _TOLERANCE * max(1.0, largest)):
            raise ValueError(
                f"the weights {at} add up to {total.tolist()} at progress {progress}, expected 1"
            )
        # what only rounding has left of a weight of 0 would cost a branch
        return {name: _without_dust(value, _LEAST * largest) for name, value in at.items()}

    def strengths_at(self, progress: float) -> tuple[Scale, ...]:
        """All weights at ``progress``."""
        return tuple(self.at(progress).values())

    def scale_at(self, progress: float) -> Scale:
        """The weight of the condition."""
        return self.at(progress)["cond"]

    def branches_at(self, progress: float) -> tuple[str, ...]:
        """The branches with a weight other than 0 in some sample."""
        at = self.at(progress).items()
        return tuple(name for name, weight in at if bool((torch.as_tensor(weight) != 0).any()))

    def alone_at(self, progress: float) -> Tensor | None:
        """The samples in which one weight only is other than 0, bool (B,) or (1,); None where all samples are alike."""
        weights = self.strengths_at(progress)
        if not any(isinstance(weight, Tensor) and weight.ndim for weight in weights):
            return None
        used = [torch.as_tensor(weight != 0).long().cpu() for weight in weights]
        return torch.stack(torch.broadcast_tensors(*used)).sum(0) == 1

    def combine(self, progress: float, outputs: Mapping[str, Tensor]) -> Tensor:
        """The weighted sum of the outputs (B, ...)."""
        needed = self.branches_at(progress)
        at = self.at(progress)
        return mix([outputs[name] for name in needed], [at[name] for name in needed])

    def fixed_at(self, progress: float) -> Weights:
        """The same with the weights that it has at ``progress``."""
        return Weights(self.names, tuple(self.at(progress).values()))


def weights(**values: Strength) -> Weights:
    """Branches by name with the weight of each; they add up to 1.

    Example:
        >>> weights(cond=3.0, uncond=-1.5, negative=-0.5).at(0.0)
        {'cond': 3.0, 'uncond': -1.5, 'negative': -0.5}

    Raises:
        ValueError: if they do not, or "cond" is not among them.
    """
    # the condition first: what it masks stays masked
    ordered = {name: values[name] for name in sorted(values, key=lambda name: name != "cond")}
    return Weights(tuple(ordered), tuple(ordered.values()))


def negative(s: Strength, away: Strength) -> Weights:
    """Towards the prompt and away from another, each against the null condition.

    u + s (c - u) - away (n - u). With ``uncond=`` of a sampler, the negative prompt takes the place of the null
    condition instead, as in Stable Diffusion, and costs no third branch.

    Branches: cond, uncond, negative.
    """
    return weights(
        cond=s, uncond=_sum(1.0, (-1.0, s), (1.0, away)), negative=_sum(0.0, (-1.0, away))
    )


def composed(**scales: Strength) -> Weights:
    """Several conditions at once (composable AND): u + sum of s_i (c_i - u).

    Liu et al., arXiv 2206.01714. A negative scale is the paper's NOT.

    Branches: those named, "cond" among them, and uncond.

    Raises:
        ValueError: if "uncond" is among the scales, or "cond" is not.
    """
    if "uncond" in scales:
        raise ValueError(
            f"composed: uncond is {scales['uncond']!r}, expected other branches: its weight is what is left of 1"
        )
    rest = _sum(1.0, *((-1.0, scale) for scale in scales.values()))
    return weights(**scales, uncond=rest)


def instruct_pix2pix(s_text: Strength, s_image: Strength) -> Weights:
    """Two conditions, one on top of the other: u + s_image (i - u) + s_text (c - i).

    Brooks et al., arXiv 2211.09800, equation 3, with 7.5 and 1.5 in the paper. c has text and image, i the image
    alone. Chameleon has the same in logits.

    Branches: cond, image, uncond.
    """
    return weights(
        cond=s_text,
        image=_sum(0.0, (1.0, s_image), (-1.0, s_text)),
        uncond=_sum(1.0, (-1.0, s_image)),
    )


def nested(s_outer: Strength, s_inner: Strength) -> Weights:
    """Guidance inside of guidance: u + s_outer (i + s_inner (c - i) - u).

    The double guidance of MusicGen-Style (arXiv 2407.12563), where i has the style and c the text too.

    Branches: cond, image, uncond.
    """
    both = _product(s_outer, s_inner)
    return weights(
        cond=both,
        image=_sum(0.0, (1.0, s_outer), (-1.0, both)),
        uncond=_sum(1.0, (-1.0, s_outer)),
    )


def weak(s: Strength, cfg: Strength = 1.0) -> Weights:
    """Away from a weaker model that is shown the same condition: u + cfg (c - u) + (s - 1) (c - w).

    With ``cfg`` 1 this is c + (s - 1) (c - w), the scale s between the weak and the strong model. A smaller or less
    trained denoiser: autoguidance (Karras et al., arXiv 2406.02507). A smaller language model: contrastive decoding in the
    form of O'Brien and Lewis (arXiv 2309.09117); Li et al. (arXiv 2210.15097), whose idea it is, take the difference
    alone, and both mask what the strong model finds implausible: add ``mitigations.plausibility()``. The model itself with its attention disturbed or with layers left out: perturbed
    attention and skip-layer guidance (``models.perturb``).

    Branches: cond, uncond where cfg is not 1, weak.
    """
    cond = _sum(-1.0, (1.0, s), (1.0, cfg))
    return weights(cond=cond, uncond=_sum(1.0, (-1.0, cfg)), weak=_sum(1.0, (-1.0, s)))


def dexperts(alpha: Strength = 2.0) -> Weights:
    """A base model steered by two small ones: c + alpha (expert - antiexpert).

    Liu et al., arXiv 2105.03023, with 2.0 against toxicity and 3.2 for sentiment.

    Branches: cond, expert, antiexpert.
    """
    return weights(cond=1.0, expert=alpha, antiexpert=_sum(0.0, (-1.0, alpha)))


def context_aware(alpha: Strength = 0.5) -> Weights:
    """Context-aware decoding: (1 + alpha) c - alpha u, where u has not seen the context.

    Shi et al., arXiv 2305.14739: plain guidance with s = 1 + alpha and the question alone as ``uncond``.

    Branches: cond, uncond.
    """
    return weights(cond=_sum(1.0, (1.0, alpha)), uncond=_sum(0.0, (-1.0, alpha)))


@dataclass(frozen=True, eq=False)
class CfgPlusPlus:
    """The guidance of the solver "cfg_pp": both branches at every scale; :func:`cfg_pp` makes it.

    Attributes:
        s: the scale.
    """

    s: Strength
    space: ClassVar[str] = "eps"
    names: ClassVar[tuple[str, ...]] = ("cond", "uncond")

    def __post_init__(self) -> None:
        """Check what can be checked before the first step."""
        if not _is_schedule(self.s):
            self.scale_at(0.0)

    def scale_at(self, progress: float) -> Scale:
        """The scale.

        Raises:
            ValueError: if it is not between 0 and 1.
        """
        s = _at(self.s, progress)
        if not bool(((torch.as_tensor(s) >= 0) & (torch.as_tensor(s) <= 1)).all()):
            raise ValueError(f"s of cfg_pp is {s}, expected lambda between 0 and 1; 0.6 is strong")
        return s

    def strengths_at(self, progress: float) -> tuple[Scale, ...]:
        """The scale at ``progress``."""
        return (self.scale_at(progress),)

    def branches_at(self, progress: float) -> tuple[str, ...]:
        """Both."""
        return ("cond", "uncond")

    def alone_at(self, progress: float) -> None:
        """None: every sample needs both."""

    def combine(self, progress: float, outputs: Mapping[str, Tensor]) -> Tensor:
        """The formula."""
        s = self.scale_at(progress)
        return mix([outputs["cond"], outputs["uncond"]], [s, 1.0 - s])

    def fixed_at(self, progress: float) -> CfgPlusPlus:
        """The same with the scale that it has at ``progress``."""
        return replace(self, s=_at(self.s, progress))


def cfg_pp(s: Strength = 0.6) -> CfgPlusPlus:
    """CFG++, together with ``solver="cfg_pp"``: x0 is guided, and the noise that is added back is unconditional.

    Chung et al., arXiv 2406.08070, where s is lambda in [0, 1]; 0.6 is about as strong as a scale of 7.5. The solver
    needs the unconditional output also where s is 1, which is the strongest, not the conditional model. Neither goes
    without the other: a sampler refuses that, and logits.

    Branches: cond, uncond.
    """
    return CfgPlusPlus(s)


@dataclass(frozen=True, eq=False)
class PerpNeg:
    """Perp-Neg; :func:`perp_neg` makes it.

    Attributes:
        s: scale of the prompt.
        away: how far from the negative prompt.
        space: one of denoisers: in logits an angle changes with the constant that softmax ignores.
    """

    s: Strength
    away: Strength
    space: ClassVar[str] = "eps"
    names: ClassVar[tuple[str, ...]] = ("cond", "uncond", "negative")

    def __post_init__(self) -> None:
        """Check what can be checked before the first step."""
        _check_fixed(s=self.s, away=self.away)

    def scale_at(self, progress: float) -> Scale:
        """The scale of the prompt."""
        return _at(self.s, progress)

    def strengths_at(self, progress: float) -> tuple[Scale, ...]:
        """Both strengths at ``progress``."""
        return _at(self.s, progress), _at(self.away, progress)

    def branches_at(self, progress: float) -> tuple[str, ...]:
        """The branches that ``progress`` needs."""
        away = torch.as_tensor(_at(self.away, progress))
        if bool((away != 0).any()):
            return ("cond", "uncond", "negative")  # the direction of the prompt is needed for any s
        return negative(_at(self.s, progress), 0.0).branches_at(0.0)

    def alone_at(self, progress: float) -> Tensor | None:
        """The samples that stay away from nothing and have the scale 0 or 1; None where all samples are alike."""
        plain = negative(_at(self.s, progress), _at(self.away, progress)).alone_at(0.0)
        if plain is None:
            return None
        return plain & torch.as_tensor(_at(self.away, progress) == 0).cpu()

    def combine(self, progress: float, outputs: Mapping[str, Tensor]) -> Tensor:
        """Guide by the part of the negative direction that does not touch the prompt's."""
        plain = negative(_at(self.s, progress), _at(self.away, progress))
        if "negative" not in self.branches_at(progress):
            return plain.combine(0.0, outputs)
        dtype = outputs["uncond"].dtype
        precise = torch.promote_types(dtype, torch.float32)
        like = outputs["cond"]
        cond, uncond, other = (outputs[n].to(precise).expand_as(like) for n in self.names)
        toward, aside = (cond - uncond).flatten(1), (other - uncond).flatten(1)
        # where the prompt has no direction, nothing is taken out
        length = toward.square().sum(1, keepdim=True).clamp(min=torch.finfo(precise).tiny)
        along = (toward * aside).sum(1, keepdim=True) / length
        perpendicular = uncond + (aside - along * toward).view_as(uncond)
        branches = {"cond": cond, "uncond": uncond, "negative": perpendicular}
        return to_dtype(plain.combine(0.0, branches), dtype)

    def fixed_at(self, progress: float) -> PerpNeg:
        """The same with the strengths that it has at ``progress``."""
        return replace(self, s=_at(self.s, progress), away=_at(self.away, progress))


def perp_neg(s: Strength, away: Strength) -> PerpNeg:
    """Away from a negative prompt, but only across the prompt's own direction, so that what they share stays.

    u + s (c - u) - away * perp, where perp is the part of n - u perpendicular to c - u, in each sample (Armandpour et
    al., arXiv 2304.04968; its weight of the negative prompt is away / s). It is the same in every space of denoisers,
    and is refused for logits.

    Branches: cond, uncond, negative.
    """
    return PerpNeg(s, away)


@dataclass(frozen=True)
class _Sum:
    """A schedule: constant + sum of factor * schedule."""

    constant: float
    factors: tuple[float, ...]
    terms: tuple[Strength, ...]

    def __call__(self, progress: float) -> Scale:
        """The value at ``progress``."""
        values: list[Scale] = [self.constant]
        for factor, term in zip(self.factors, self.terms, strict=True):
            values.append(factor * _exact(_at(term, progress)))
        total: Scale = _added(values)
        return total


@dataclass(frozen=True)
class _Product:
    """A schedule: the product of two."""

    first: Strength
    second: Strength

    def __call__(self, progress: float) -> Scale:
        """The value at ``progress``."""
        return _exact(_at(self.first, progress)) * _exact(_at(self.second, progress))


def _sum(constant: float, *terms: tuple[float, Strength]) -> Strength:
    """A constant and the sum of factor * strength, as a schedule only where one of them is."""
    total = _Sum(constant, tuple(f for f, _ in terms), tuple(term for _, term in terms))
    return total if any(_is_schedule(term) for term in total.terms) else total(0.0)


def _product(first: Strength, second: Strength) -> Strength:
    """The product of two strengths, as a schedule only where one of them is."""
    product = _Product(first, second)
    return product if _is_schedule(first) or _is_schedule(second) else product(0.0)


def _added(values: Sequence[Any]) -> Any:
    """The sum of numbers and tensors (B,).

    Raises:
        ValueError: if two tensors have different lengths.
    """
    lengths = {len(v) for v in values if isinstance(v, Tensor) and v.ndim == 1 and len(v) > 1}
    if len(lengths) > 1:
        raise ValueError(f"strengths have {sorted(lengths)} values, expected one for each sample")
    return sum(values[1:], values[0])


def _exact(value: Scale) -> Scale:
    return value.double() if isinstance(value, Tensor) else value


def _without_dust(value: Scale, least: float) -> Scale:
    if isinstance(value, Tensor):
        return torch.where(value.abs() < least, 0.0, value)
    return 0.0 if abs(value) < least else value


def _is_schedule(value: Strength) -> bool:
    return callable(value) and not isinstance(value, Tensor)


def _at(value: Strength, progress: float, name: str = "") -> Scale:
    at = value(progress) if callable(value) and not isinstance(value, Tensor) else value
    return check_scale_value(at, f"the weight of {name!r}" if name else "the strength")


def _check_fixed(**values: Strength) -> None:
    """Refuse numbers that are none."""
    for name, value in values.items():
        if not _is_schedule(value):
            check_scale_value(value, name)

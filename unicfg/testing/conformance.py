"""Checks that any implementation of guidance can be put through: ours, a library's, a lambda.

    report = check(stateless("mine", lambda cond_out, uncond_out, s: uncond_out + s * (cond_out - uncond_out)))
    print(report)

Each check is a sentence that holds for guidance as such, with the mistake it was made for in its docstring. What an
implementation does not claim can be named in ``exempt``, with the reason, and is then not counted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from unicfg.guidance.core import Guidance, Scale
from unicfg.guidance.spaces import Level, Space

Run = Callable[[float, Tensor, Tensor, Scale], Tensor]
"""(progress, cond_out, uncond_out, s) -> guided, in the course of one sampling."""

STEPS = 4  # of the samplings in the checks


@dataclass(frozen=True)
class Subject:
    """An implementation to check.

    Attributes:
        name: for the report.
        begin: starts a sampling and returns its :data:`Run`; what the implementation remembers should start anew.
        kind: whether it works on logits (B, V) or on a denoiser's outputs (B, C, h, w).
        affine: whether it claims to be the same in every space of denoisers, as the plain formula is.
        exempt: checks that it does not claim to pass, by name, each with the reason.
    """

    name: str
    begin: Callable[[], Run]
    kind: Literal["denoiser", "logits"] = "denoiser"
    affine: bool = False
    exempt: Mapping[str, str] = field(default_factory=dict)


def stateless(
    name: str,
    rule: Callable[[Tensor, Tensor, Scale], Tensor],
    kind: Literal["denoiser", "logits"] = "denoiser",
    *,
    affine: bool = False,
    exempt: Mapping[str, str] | None = None,
) -> Subject:
    """A subject from a function (cond_out, uncond_out, s) -> guided that remembers nothing."""

    def begin() -> Run:
        return lambda progress, cond_out, uncond_out, s: rule(cond_out, uncond_out, s)

    return Subject(name, begin, kind, affine, exempt or {})


def of_guidance(
    name: str,
    guidance: Guidance,
    space: Space | Literal["logits"],
    *,
    exempt: Mapping[str, str] | None = None,
) -> Subject:
    """A subject from the mitigations of a ``Guidance``; its scale is set by the checks.

    Raises:
        ValueError: if the scale is one of several branches: the checks know two.
    """
    if guidance.branch_names != ("cond", "uncond") or not isinstance(guidance.scale, (float, int)):
        raise ValueError(f"scale is {guidance.scale!r}, expected a number: the checks set it")

    def begin() -> Run:
        begun = guidance.begin(space)

        def run(progress: float, cond_out: Tensor, uncond_out: Tensor, s: Scale) -> Tensor:
            level = None
            if space != "logits":
                alpha, sigma = (torch.tensor(v, dtype=torch.float64) for v in (0.6, 0.8))
                level = Level(torch.zeros_like(cond_out), alpha, sigma, space)
            at_scale = Guidance(s, begun.mitigations)
            outputs = {"cond": cond_out, "uncond": uncond_out}
            return at_scale.combine_branches(progress, outputs, level)

        return run

    kind: Literal["denoiser", "logits"] = "logits" if space == "logits" else "denoiser"
    return Subject(name, begin, kind, not guidance.mitigations, exempt or {})


def outputs(kind: str, batch: int = 4, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random cond_out and uncond_out, (B, 16) logits or (B, 3, 8, 8)."""
    shape = (batch, 16) if kind == "logits" else (batch, 3, 8, 8)
    both = torch.randn(2, *shape, generator=torch.Generator().manual_seed(seed))
    cond_out, uncond_out = both.unbind()
    return cond_out, uncond_out


def identity_at_1(subject: Subject) -> str | None:
    """Scale 1 is the conditional output, bit for bit: u + s (c - u) is not. Logits may be normalized on the way."""
    cond, uncond = outputs(subject.kind)
    return _not_this(subject, _once(subject, cond, uncond, 1.0), cond)


def identity_at_0(subject: Subject) -> str | None:
    """Scale 0 is the unconditional output: a gate ``if s > 1`` hides it."""
    cond, uncond = outputs(subject.kind)
    return _not_this(subject, _once(subject, cond, uncond, 0.0), uncond)


def between_0_and_1(subject: Subject) -> str | None:
    """Scale 0.5 is neither end: the same gate."""
    cond, uncond = outputs(subject.kind)
    half = _once(subject, cond, uncond, 0.5)
    for name, end in (("cond_out", cond), ("uncond_out", uncond)):
        if torch.equal(half, end):
            return f"s = 0.5 gives {name}"
    return None


def acts(subject: Subject) -> str | None:
    """Scale 3 does something: an implementation that is never called passes most other checks."""
    cond, uncond = outputs(subject.kind)
    return "s = 3 gives cond_out" if _equal(_once(subject, cond, uncond, 3.0), cond) else None


def continuous_at_1(subject: Subject) -> str | None:
    """Near scale 1 nothing jumps: u + s * update in place of c + (s - 1) * update does."""
    cond, uncond = outputs(subject.kind)
    runs = [_once(subject, cond, uncond, s) for s in (1.0 - 1e-3, 1.0, 1.0 + 1e-3)]
    if not torch.equal(runs[0].isfinite(), runs[2].isfinite()) or not torch.equal(
        runs[1].isfinite(), runs[2].isfinite()
    ):
        return "other entries are masked at s = 1.001 than at 1"
    jump = max(float(_finite(run - runs[1]).abs().max()) for run in (runs[0], runs[2]))
    return f"the output moves by {jump:.2g} between s = 1 and 1.001" if jump > 0.1 else None


def same_in_every_space(subject: Subject) -> str | None:
    """What eps predictions give is what x0 predictions give: guiding some channels alone is not affine."""
    cond, uncond = outputs("denoiser")
    x, alpha, sigma = torch.randn(cond.shape, generator=torch.Generator().manual_seed(1)), 0.6, 0.8
    in_eps = (x - sigma * _once(subject, cond, uncond, 3.0)) / alpha
    in_x0 = _once(subject, (x - sigma * cond) / alpha, (x - sigma * uncond) / alpha, 3.0)
    return _different(in_eps, in_x0, 1e-4)


def batch_invariant(subject: Subject) -> str | None:
    """A sample alone is the sample in a batch: norms and deviations over the whole batch are not."""
    cond, uncond = outputs(subject.kind)
    scale = torch.tensor([1.0, 3.0, 8.0, 20.0]).view(-1, *[1] * (cond.ndim - 1))
    cond = cond * scale  # samples of different size, so that one that feels the others shows it
    whole = _once(subject, cond, uncond, 3.0)
    alone = torch.cat([_once(subject, cond[i : i + 1], uncond[i : i + 1], 3.0) for i in range(4)])
    return _different(whole, alone, 1e-4)


def scale_for_each_sample(subject: Subject) -> str | None:
    """A tensor (B,) of scales gives each sample its own."""
    cond, uncond = outputs(subject.kind)
    scales = [1.5, 3.0, 5.0, 0.5]
    whole = _once(subject, cond, uncond, torch.tensor(scales))
    alone = [_once(subject, cond[i : i + 1], uncond[i : i + 1], s) for i, s in enumerate(scales)]
    return _different(whole, torch.cat(alone), 1e-4)


def keeps_the_dtype(subject: Subject) -> str | None:
    """Half precision comes back in half precision, in the shape it had."""
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        cond, uncond = (out.to(dtype) for out in outputs(subject.kind))
        out = _once(subject, cond, uncond, 3.0)
        if out.dtype != dtype or out.shape != cond.shape:
            return f"{dtype} {tuple(cond.shape)} becomes {out.dtype} {tuple(out.shape)}"
    return None


def rounds_once(subject: Subject) -> str | None:
    """In bfloat16 the result is that of float32, rounded once: guidance amplifies what is lost on the way."""
    cond, uncond = (out.bfloat16() for out in outputs(subject.kind))
    out = _once(subject, cond, uncond, 7.5).float()
    exact = _once(subject, cond.float(), uncond.float(), 7.5)
    error = float(_finite((out - exact) / exact.abs().clamp(min=0.1)).abs().max())
    limit = 2**-8  # half a unit in the last place
    return (
        f"off by {error:.2g} of the value, where rounding is {limit:.2g}" if error > limit else None
    )


def defined_on_constants(subject: Subject) -> str | None:
    """Zero and constant outputs give no NaN: a deviation or a norm of 0 is divided by."""
    cond, _ = outputs(subject.kind)
    flat = torch.full_like(cond, 0.5)
    cases = {"zeros": (0 * cond, 0 * cond), "constants": (flat, 0 * flat), "equals": (cond, cond)}
    for name, (c, u) in cases.items():
        if bool(_once(subject, c, u, 3.0).isnan().any()):
            return f"{name} give NaN"
    return None


def no_overflow(subject: Subject) -> str | None:
    """Large half-precision outputs saturate: a sum of squares in float16 is infinite from 256 on."""
    cond, uncond = (3e4 * out.sign().half() for out in outputs(subject.kind))
    out = _once(subject, cond, uncond, 7.5)
    bad = ~out.isfinite() if subject.kind == "denoiser" else out.isnan() | out.isposinf()
    what = "not finite" if subject.kind == "denoiser" else "NaN or +inf"
    return f"{int(bad.sum())} of {bad.numel()} values are {what}" if bool(bad.any()) else None


def keeps_masks(subject: Subject) -> str | None:
    """Logits of -inf stay masked, at every scale, and make no NaN and no +inf."""
    cond, uncond = outputs("logits")
    cond[:, 0] = uncond[:, 0] = cond[:, 1] = uncond[:, 2] = -math.inf
    for s in (0.0, 0.5, 1.0, 3.0):
        out = _once(subject, cond, uncond, s)
        if bool((out.isnan() | out.isposinf()).any()):
            return f"s = {s:g} gives NaN or +inf"
        if not bool(out[:, 0].isneginf().all()):
            return f"s = {s:g} unmasks what both branches mask"
        if s > 0 and not bool(out[:, 1].isneginf().all()):
            return f"s = {s:g} unmasks what cond_out masks"
    return None


def ignores_a_constant(subject: Subject) -> str | None:
    """What is drawn does not depend on the constant that softmax ignores."""
    cond, uncond = outputs("logits")
    plain = _once(subject, cond, uncond, 3.0).softmax(-1)
    shifted = _once(subject, cond + 5.0, uncond - 7.0, 3.0).softmax(-1)
    return _different(plain, shifted, 1e-4)


def starts_anew(subject: Subject) -> str | None:
    """A sampling does not feel the one before it."""
    first, second = outputs(subject.kind, seed=1), outputs(subject.kind, seed=2)
    _sampling(subject, first)
    after_another = _sampling(subject, second)
    return _different(after_another, _sampling(subject, second), 1e-6)


def same_at_a_second_evaluation(subject: Subject) -> str | None:
    """A solver that evaluates twice at a noise level, as Heun does, gets the same answer: it is no new step."""
    cond, uncond = outputs(subject.kind)
    run = subject.begin()
    run(0.0, uncond, cond, 3.0)
    once = run(1 / (STEPS - 1), cond, uncond, 3.0)
    return _different(run(1 / (STEPS - 1), cond, uncond, 3.0), once, 1e-6)


Check = Callable[[Subject], str | None]
CHECKS: tuple[Check, ...] = (
    identity_at_1,
    identity_at_0,
    between_0_and_1,
    acts,
    continuous_at_1,
    same_in_every_space,
    batch_invariant,
    scale_for_each_sample,
    keeps_the_dtype,
    rounds_once,
    defined_on_constants,
    no_overflow,
    keeps_masks,
    ignores_a_constant,
    starts_anew,
    same_at_a_second_evaluation,
)
_ONLY_FOR: dict[Check, str] = {
    keeps_masks: "logits",
    ignores_a_constant: "logits",
    same_in_every_space: "denoiser",
}


@dataclass(frozen=True)
class Report:
    """What became of each check.

    Attributes:
        subject: what was checked.
        results: by the name of the check: "pass", "not claimed: why", "does not apply", or the fault.
    """

    subject: Subject
    results: dict[str, str]

    @property
    def faults(self) -> dict[str, str]:
        """The checks that failed."""
        fine = ("pass", "does not apply", "not claimed")
        return {name: text for name, text in self.results.items() if not text.startswith(fine)}

    @property
    def passed(self) -> bool:
        """Whether none did."""
        return not self.faults

    def __str__(self) -> str:
        """One line a check."""
        lines = [f"{name:28} {text}" for name, text in self.results.items()]
        return "\n".join([self.subject.name, *lines])


def check(subject: Subject, checks: Sequence[Check] = CHECKS) -> Report:
    """Put an implementation through the checks; what it raises is a fault like any other."""
    names = {one.__name__ for one in (*CHECKS, *checks)}
    unknown = sorted(set(subject.exempt) - names)
    if unknown:
        raise ValueError(f"exempt names {unknown}, expected some of {sorted(names)}")
    results = {}
    for one in checks:
        name = one.__name__
        if _ONLY_FOR.get(one, subject.kind) != subject.kind or (
            one is same_in_every_space and not subject.affine
        ):
            results[name] = "does not apply"
        elif name in subject.exempt:
            results[name] = f"not claimed: {subject.exempt[name]}"
        else:
            try:
                results[name] = one(subject) or "pass"
            except Exception as error:  # whatever a stranger's code raises
                results[name] = f"{type(error).__name__}: {' '.join(str(error).split())}"[:160]
    return Report(subject, results)


def _once(subject: Subject, cond: Tensor, uncond: Tensor, s: Scale) -> Tensor:
    """The guided output at the second step of a sampling; by then a warm-up at the first is over."""
    run = subject.begin()
    return run(1 / (STEPS - 1), cond.clone(), uncond.clone(), s)


def _sampling(subject: Subject, pair: tuple[Tensor, Tensor]) -> Tensor:
    run, (cond, uncond) = subject.begin(), pair
    return torch.stack([run(i / (STEPS - 1), cond + i, uncond - i, 3.0) for i in range(STEPS)])


def _not_this(subject: Subject, out: Tensor, expected: Tensor) -> str | None:
    if _equal(out, expected) or subject.kind == "denoiser":
        return _different(out, expected)
    return _different(out.log_softmax(-1), expected.log_softmax(-1), 1e-5)


def _finite(x: Tensor) -> Tensor:
    return x[x.isfinite()]


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a, b)


def _different(a: Tensor, b: Tensor, tolerance: float = 0.0) -> str | None:
    if a.shape != b.shape:
        return f"shape {tuple(a.shape)}, expected {tuple(b.shape)}"
    if torch.equal(a, b):
        return None
    if not torch.equal(a.isfinite(), b.isfinite()):
        return "other values are finite"
    error = float(_finite(a - b).abs().max())
    return None if error <= tolerance else f"differs by up to {error:.2g}"

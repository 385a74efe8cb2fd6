"""Solvers: from noise to data along a time grid, for any path and any space a model predicts in.

Everything rests on x_t = alpha * x0 + sigma * eps. A guided prediction gives x0 and eps, and one step formula,

    x' = alpha' * x0 + sigma' * eps

is DDIM on every variance-preserving path and Euler on the straight one. The reason is geometry: divided by
alpha + sigma, every path is the straight line (1 - tau) * x0 + tau * eps with tau = sigma / (alpha + sigma), and its
velocity d = eps - x0 is the same quantity everywhere. In these coordinates neither end of a path is singular.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from unicfg.guidance.branches import CfgPlusPlus
from unicfg.guidance.core import Guidance, Scale
from unicfg.guidance.spaces import (
    Level,
    Space,
    check_level,
    split_unchecked,
)
from unicfg.sampling.branches import (
    Guided,
    OfBranches,
    progress_at,
)
from unicfg.sampling.paths import Path, shift_time
from unicfg.sampling.randomness import is_count, normal

Solver = Literal["ddim", "heun", "dpmpp_2m", "cfg_pp"]
Spacing = Literal["uniform", "karras"]
SOLVERS: tuple[Solver, ...] = get_args(Solver)
SPACINGS: tuple[Spacing, ...] = get_args(Spacing)

SIGMA_MIN, SIGMA_MAX, RHO = 0.002, 80.0, 7.0  # Karras et al., arXiv 2206.00364, table 1

Evaluate = Callable[[int, float, Tensor, float], Guided]
Pin = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class DenoisingStep(OfBranches):
    """What a callback sees at each step, with the outputs of the step's first evaluation.

    Attributes:
        index: of the step, 0 to steps - 1.
        progress: index / (steps - 1).
        scale: s at this step: a float or (B,).
        t: time of the evaluation, 1 at the noise.
        level: the noisy latents ``x`` that the model saw (B, *shape), their noise level, and the model's space.
        x0: the clean latents that the guided output stands for (B, *shape).
        guided: the guided output (B, *shape), in the model's space.
        outputs: of each branch that the step needed (B, *shape).
    """

    index: int
    progress: float
    scale: Scale
    t: float
    level: Level
    x0: Tensor
    guided: Tensor
    outputs: Mapping[str, Tensor]

    @property
    def x(self) -> Tensor:
        """The noisy latents that the model saw (B, *shape)."""
        return self.level.x


Callback = Callable[[DenoisingStep], None]


def integrate(
    evaluate: Evaluate,
    x: Tensor,
    times: Tensor,
    path: Path,
    space: Space,
    solver: Solver = "ddim",
    eta: float = 0.0,
    sources: Sequence[torch.Generator] = (),
    *,
    pin: Pin | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """Carry noisy samples along a time grid.

    The evaluation at grid point i of N intervals has progress i / (N - 1). The second evaluation of a Heun step
    belongs to the next grid point and has that one's progress: both evaluations at a noise level are guided
    alike, and a schedule does not lower the order that the solver has on a given velocity field.

    Args:
        evaluate: ``(index, progress, x (R, ...), t) -> Guided``; ``index`` is that of the grid point. What is
            not finite is its to find, see ``soundness.Watch``.
        x: noisy samples (R, ...) at ``times[0]``, of any number of dimensions.
        times: float64 (N + 1,), falling, in [0, 1].
        path: gives alpha and sigma at each time.
        space: of the guided outputs.
        solver: "ddim", "heun", "dpmpp_2m" or "cfg_pp".
        eta: fresh noise of "ddim", from 0 to 1.
        sources: one generator a row, used where eta > 0.
        pin: ``(x, alpha, sigma) -> x``, applied before every evaluation and at the end: holds a known region.
        callback: called with a :class:`DenoisingStep` once a step.

    Returns:
        the samples at ``times[-1]``, clean where that is 0.

    Raises:
        ValueError: if the solver is unknown, ``eta`` does not go with it, or the space says nothing at one of the
            noise levels (eps and score where alpha is 0).
    """
    check_solver(solver, eta)
    alpha, sigma = path.coefficients(times)
    check_level(alpha[:-1], sigma[:-1], space)
    walk = _Walk(evaluate, times.tolist(), alpha, sigma, space, pin)
    before: Prediction | None = None
    for i in range(walk.steps):
        now = walk.predict(i, x)
        if callback is not None:
            callback(report_step(i, progress_at(i, walk.steps), float(times[i]), now))
        if solver == "heun":
            x = _heun(walk, i, now)
        elif solver == "dpmpp_2m":
            x = _dpmpp_2m(walk, i, now, before)
        elif solver == "cfg_pp":
            x = _cfg_pp(walk, i, now)
        else:
            x = _ddim(walk, i, now, eta, sources)
        before = now
    return walk.pinned(walk.steps, x)


@dataclass  # not frozen, which would take its time thousands of times
class Prediction:
    """A guided output at x, and what it says about both halves of x."""

    x: Tensor
    guided: Guided
    alpha: Tensor
    sigma: Tensor
    space: Space

    @property
    def out(self) -> Tensor:
        """The guided output in the dtype of x."""
        return self.guided.out.to(self.x.dtype)

    @functools.cached_property
    def halves(self) -> tuple[Tensor, Tensor]:
        """The clean sample x0 and the noise eps."""
        return split_unchecked(self.out, self.x, self.alpha, self.sigma, self.space)

    def of_moving(self, values: Tensor) -> Tensor:
        """The values (B, ...), and 0 in the samples that are held where they are."""
        still = self.guided.still
        if still is None:
            return values
        here = still.to(values.device, non_blocking=True)
        return values.masked_fill(here.view(-1, *[1] * (values.ndim - 1)), 0.0)

    @property
    def x0(self) -> Tensor:
        """The clean sample."""
        return self.halves[0]

    @property
    def eps(self) -> Tensor:
        """The noise."""
        return self.halves[1]


class _Walk:
    """The noise levels of a grid (N + 1,) and the way to a prediction at each of them."""

    def __init__(
        self,
        evaluate: Evaluate,
        times: list[float],
        alpha: Tensor,
        sigma: Tensor,
        space: Space,
        pin: Pin | None,
    ) -> None:
        self.evaluate, self.times, self.space, self.pin = evaluate, times, space, pin
        self.alpha, self.sigma = alpha.unbind(), sigma.unbind()
        self.steps = len(times) - 1
        self.step = step_weights(alpha, sigma, space)

    def tau(self, i: int) -> Tensor:
        """Place on the straight line that the path becomes when divided by alpha + sigma."""
        return self.sigma[i] / (self.alpha[i] + self.sigma[i])

    def log_ratio(self, i: int) -> float:
        """Log of alpha / sigma, infinite at either end: lambda in DPM-Solver."""
        return float(self.alpha[i].log() - self.sigma[i].log())

    def pinned(self, i: int, x: Tensor) -> Tensor:
        return x if self.pin is None else self.pin(x, self.alpha[i], self.sigma[i])

    def predict(self, i: int, x: Tensor) -> Prediction:
        x = self.pinned(i, x)
        # Heun looks at the end of a grid that stops above 0: guided as the last step is
        progress = progress_at(min(i, self.steps - 1), self.steps)
        guided = self.evaluate(i, progress, x, self.times[i])
        return Prediction(x, guided, self.alpha[i], self.sigma[i], self.space)

    def first_order(self, i: int, now: Prediction) -> Tensor:
        """The step formula from grid point i to the next."""
        of_x, of_out = self.step[i]
        x = now.x if of_x == 1.0 else of_x * now.x  # 1 on the whole straight path
        return torch.add(x, now.out, alpha=of_out)


def step_weights(alpha: Tensor, sigma: Tensor, space: Space) -> list[tuple[float, float]]:
    """The step formula alpha' x0 + sigma' eps as weights of x and of the output, for each of N steps.

    Both halves are linear in x and the output, and few rows are walked a thousand times: two operations instead of
    seven.
    """
    one, zero = torch.ones_like(alpha[:-1]), torch.zeros_like(alpha[:-1])
    of_x = split_unchecked(zero, one, alpha[:-1], sigma[:-1], space)
    of_out = split_unchecked(one, zero, alpha[:-1], sigma[:-1], space)
    x, out = (alpha[1:] * x0 + sigma[1:] * eps for x0, eps in (of_x, of_out))
    return list(zip(x.tolist(), out.tolist(), strict=True))


def _ddim(
    walk: _Walk, i: int, now: Prediction, eta: float, sources: Sequence[torch.Generator]
) -> Tensor:
    """One step of DDIM (Song et al., arXiv 2010.02502, equation 12), or of Euler on the straight path.

    The fresh share of the noise is the paper's equation 16 for a path of any kind: eta times the deviation of the
    posterior of x' given x and x0, which is sigma' * sqrt(1 - (ratio' / ratio)^2) with ratio = sigma / alpha. The
    rest of sigma' stays with the predicted noise, so the marginal at the next time is kept for every eta.
    """
    alpha, sigma = walk.alpha[i + 1], walk.sigma[i + 1]
    if eta == 0 or sigma == 0:
        return walk.first_order(i, now)
    # ratio' / ratio without a division by alpha, which may be 0 at the start
    kept = sigma * walk.alpha[i] / (alpha * walk.sigma[i])
    fresh = eta * sigma * (1 - kept.square()).clamp(min=0).sqrt()
    noise = normal(sources, tuple(now.x.shape[1:])).to(now.x, non_blocking=True)
    return alpha * now.x0 + (sigma.square() - fresh.square()).sqrt() * now.eps + fresh * noise


def _heun(walk: _Walk, i: int, now: Prediction) -> Tensor:
    """One trapezoidal step (Karras et al., arXiv 2206.00364, algorithm 1), in the straight coordinates.

    Their line 6, too: a step that ends at sigma = 0 is Euler's, for there is nothing to evaluate.
    """
    alpha, sigma = walk.alpha[i + 1], walk.sigma[i + 1]
    euler = walk.first_order(i, now)
    if sigma == 0:
        return euler
    then = walk.predict(i + 1, euler)
    velocity = now.of_moving(((now.eps - now.x0) + (then.eps - then.x0)) / 2)
    straight = now.x / (walk.alpha[i] + walk.sigma[i])
    return (alpha + sigma) * (straight + (walk.tau(i + 1) - walk.tau(i)) * velocity)


def _dpmpp_2m(walk: _Walk, i: int, now: Prediction, before: Prediction | None) -> Tensor:
    """One step of DPM-Solver++(2M) (Lu et al., arXiv 2211.01095, algorithm 2).

    The step formula with x0 extrapolated along log(alpha / sigma) from the step before. The first step and one
    that ends at sigma = 0, where that logarithm is infinite, are of first order.
    """
    alpha, sigma = walk.alpha[i + 1], walk.sigma[i + 1]
    if before is None or sigma == 0:
        return walk.first_order(i, now)
    step = walk.log_ratio(i + 1) - walk.log_ratio(i)
    step_before = walk.log_ratio(i) - walk.log_ratio(i - 1)  # infinite after a start at alpha = 0
    change = before.of_moving(now.of_moving(now.x0 - before.x0))
    x0 = now.x0 + change * (step / (2 * step_before))
    return alpha * x0 + sigma * (now.x - walk.alpha[i] * x0) / walk.sigma[i]


def _cfg_pp(walk: _Walk, i: int, now: Prediction) -> Tensor:
    """One step of CFG++ (Chung et al., arXiv 2406.08070, algorithm 2).

    The step formula with x0 of the guided output and the noise of the unconditional one: what is added back was not
    extrapolated, so that the next x stays where noisy samples are.
    """
    alpha, sigma = walk.alpha[i], walk.sigma[i]
    uncond_out = now.guided.outputs["uncond"].to(now.x.dtype)
    _, noise = split_unchecked(uncond_out, now.x, alpha, sigma, now.space)
    return walk.alpha[i + 1] * now.x0 + walk.sigma[i + 1] * noise


def time_grid(
    path: Path,
    steps: int = 50,
    spacing: Spacing = "uniform",
    shift: float = 1.0,
    times: Sequence[float] | Tensor | None = None,
) -> Tensor:
    """The times at which a sampling stops, float64 (steps + 1,), falling.

    Args:
        path: that the sampling walks on.
        steps: intervals, at least 1.
        spacing: "uniform" in t from 1 to 0; "karras" from a ratio sigma / alpha of 80, or the path's largest, down to
            0.002, and then 0 (Karras et al., arXiv 2206.00364, equation 5).
        shift: t' = shift * t / (1 + (shift - 1) * t) (Esser et al., arXiv 2403.03206, equation 23), on a uniform grid.
        times: the grid itself; the other arguments are then left alone.

    Raises:
        ValueError: if an argument is out of range, or one is given that has no effect.
    """
    if times is not None:
        if (steps, spacing, shift) != (50, "uniform", 1.0):
            raise ValueError(
                f"times is given with steps {steps}, spacing {spacing!r} and shift {shift}, "
                "expected these to be left alone"
            )
        return _check_times(torch.as_tensor(times, dtype=torch.float64, device="cpu"))
    check_steps(steps)
    if spacing == "uniform":
        t = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
        return shift_time(t, shift)
    if spacing != "karras":
        raise ValueError(f"spacing is {spacing!r}, expected one of {', '.join(SPACINGS)}")
    if shift != 1:
        raise ValueError(f"shift is {shift} with spacing 'karras', which has none: expected 1.0")
    most = min(SIGMA_MAX, last_ratio(path)) ** (1 / RHO)
    least = SIGMA_MIN ** (1 / RHO)
    ratios = torch.linspace(most, least, steps, dtype=torch.float64) ** RHO
    return torch.cat([path.time(ratios), torch.zeros(1, dtype=torch.float64)])


def last_ratio(path: Path) -> float:
    """The ratio sigma / alpha at t = 1, infinite where alpha is 0 there."""
    alpha, sigma = path.coefficients(torch.ones(1, dtype=torch.float64))
    return float(sigma / alpha)


def report_step(index: int, progress: float, t: float, now: Prediction) -> DenoisingStep:
    """What a callback is told of an evaluation."""
    guided = now.guided
    return DenoisingStep(
        index,
        progress,
        guided.scale,
        t,
        Level(now.x, now.alpha, now.sigma, now.space),
        now.x0,
        guided.out,
        guided.outputs,
    )


def check_solver(solver: str, eta: float) -> None:
    """Refuse a solver that is not there, or fresh noise in one that draws none.

    Raises:
        ValueError: if so.
    """
    if solver not in SOLVERS:
        raise ValueError(f"solver is {solver!r}, expected one of {', '.join(SOLVERS)}")
    if not 0 <= eta <= 1:
        raise ValueError(f"eta is {eta}, expected a number between 0 and 1")
    if eta > 0 and solver != "ddim":
        raise ValueError(f"eta is {eta} with solver {solver!r}, which draws no noise: expected 0")


def check_cfg_pp(guidance: Guidance, solver: str) -> None:
    """Refuse CFG++'s solver without its guidance, whose scale means something else, and the other way round.

    Raises:
        ValueError: if so.
    """
    if isinstance(guidance.scale, CfgPlusPlus) != (solver == "cfg_pp"):
        raise ValueError(
            f"solver is {solver!r} with the scale {guidance.scale!r}, expected solver 'cfg_pp' together with "
            "Guidance(branches.cfg_pp(0.6)), or neither"
        )


def check_steps(steps: int, name: str = "steps") -> int:
    """The number of steps, if it is one.

    Raises:
        ValueError: if it is no int, or below 1.
    """
    if not is_count(steps):
        raise ValueError(f"{name} is {steps!r}, expected an int of at least 1")
    return operator.index(steps)


def _check_times(times: Tensor) -> Tensor:
    falling = (
        times.ndim == 1
        and len(times) >= 2
        and bool((times.diff() < 0).all())
        and bool(times[0] <= 1)
        and bool(times[-1] >= 0)
    )
    if not falling:
        raise ValueError(
            f"times is {times.tolist()}, expected at least two falling values between 1 and 0"
        )
    return times

"""Guided sampling from noise: any path, any space a model predicts in, three solvers or a scheduler of diffusers.

Everything rests on x_t = alpha * x0 + sigma * eps. A guided prediction gives x0 and eps, and one step formula,

    x' = alpha' * x0 + sigma' * eps

is DDIM on every variance-preserving path and Euler on the straight one. The reason is geometry: divided by
alpha + sigma, every path is the straight line (1 - tau) * x0 + tau * eps with tau = sigma / (alpha + sigma), and its
velocity d = eps - x0 is the same quantity everywhere. In these coordinates neither end of a path is singular.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from unicfg.guidance.core import Guidance, Scale
from unicfg.guidance.spaces import (
    Space,
    check_level,
    check_space,
    join,
    split,
    split_unchecked,
)
from unicfg.sampling.branches import (
    Guided,
    WholeGridPass,
    check_guidance,
    network_and_null,
    progress_at,
)
from unicfg.sampling.paths import Path, shift_time
from unicfg.sampling.randomness import check_seeds, generators, normal
from unicfg.training.dropout import ConditionDropout

Solver = Literal["ddim", "heun", "dpmpp_2m"]
Spacing = Literal["uniform", "karras"]
SOLVERS: tuple[Solver, ...] = get_args(Solver)
SPACINGS: tuple[Spacing, ...] = get_args(Spacing)

SIGMA_MIN, SIGMA_MAX, RHO = 0.002, 80.0, 7.0  # Karras et al., arXiv 2206.00364, table 1

Evaluate = Callable[[int, float, Tensor, Tensor], Guided]
Pin = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class DenoisingStep:
    """What a callback sees at each step, with the outputs of the step's first evaluation.

    Attributes:
        index: of the step, 0 to steps - 1.
        progress: index / (steps - 1).
        scale: s at this step: a float or (B,).
        t: time of the evaluation, 1 at the noise.
        x: the noisy latents that the model saw (B, *shape).
        x0: the clean latents that the guided output stands for (B, *shape).
        guided: the guided output (B, *shape), in the model's space.
        cond_out: conditional output (B, *shape); None where the step did not need it.
        uncond_out: unconditional output (B, *shape); None where the step did not need it.
    """

    index: int
    progress: float
    scale: Scale
    t: float
    x: Tensor
    x0: Tensor
    guided: Tensor
    cond_out: Tensor | None
    uncond_out: Tensor | None


Callback = Callable[[DenoisingStep], None]


@torch.no_grad()  # not inference_mode: its tensors could not be trained on afterwards
def sample_diffusion(
    model: ConditionDropout | Callable[..., Tensor],
    cond: Tensor,
    *,
    seeds: Sequence[int],
    shape: Sequence[int] | None = None,
    path: Path | None = None,
    space: Space | None = None,
    guidance: Guidance | None = None,
    uncond: Tensor | None = None,
    steps: int = 50,
    solver: Solver = "ddim",
    spacing: Spacing = "uniform",
    shift: float = 1.0,
    eta: float = 0.0,
    times: Sequence[float] | Tensor | None = None,
    init: Tensor | None = None,
    mask: Tensor | None = None,
    scheduler: Any | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """Walk from noise to clean latents along guided predictions.

    Args:
        model: ``network(x (R, *shape), cond, t (R,)) -> out (R, *shape)`` with t in [0, 1], 1 at the noise; or the
            ``ConditionDropout`` it was trained in, which brings the null condition.
        cond: condition of each sample (B, ...).
        seeds: one int a sample. The same seed gives the same latents in a batch of any size.
        shape: of one sample, as in (C, h, w). None takes ``latent_shape`` of the network.
        path: that the model was trained on, see ``unicfg.sampling.paths``. None takes ``path`` of the network.
        space: that the model predicts in: "eps", "x0", "v", "flow" or "score". None takes ``space`` of the network.
        guidance: scale, schedule and mitigations, applied in the model's own space; None is ``Guidance(1.0)``.
        uncond: the null condition (...), or a negative condition a sample (B, ...). None takes the one that
            ``model`` was trained with.
        steps: intervals of the time grid.
        solver: "ddim" (first order), "heun" (second order, 2 * steps - 1 evaluations) or "dpmpp_2m" (second order,
            one evaluation a step); see :func:`integrate`.
        spacing: "uniform" in t from 1 to 0, or "karras" (arXiv 2206.00364, equation 5, in sigma / alpha, rho 7).
        shift: of a uniform grid towards the noise, > 0 (Esser et al., arXiv 2403.03206, equation 23).
        eta: fresh noise in each step of "ddim", from 0 (none) to 1 (ancestral sampling).
        times: the grid itself, falling, in [0, 1], at least two values; ``steps``, ``spacing`` and ``shift`` are
            then left alone. A grid that ends above 0 gives latents that are still noisy.
        init: clean latents to inpaint, (B, *shape) or ``shape``.
        mask: bool, True where to draw anew: (h, w), (B, h, w), (B, 1, h, w) or (B, C, h, w). The rest is ``init``,
            noised at every step by the sample's own initial noise (Lugmayr et al., arXiv 2201.09865, equation 8a).
        scheduler: a scheduler of diffusers to make the steps in place of ``solver``; the caller's object is copied,
            not used. Its settings hold, clipping included. What it returns last is the result.
        callback: called with a :class:`DenoisingStep` once a step (with a scheduler, once for each of its timesteps).

    Returns:
        latents (B, *shape), float32.

    Raises:
        ValueError: if an argument is out of range or does not fit the others, the model predicts in another space or
            path than was asked for, or guidance needs a null condition and there is none.
        TypeError: if a seed is no int, or ``guidance`` no ``Guidance``.
        FloatingPointError: if an output of the model is not finite; names the step and the branch.

    Example:
        >>> latents = sample_diffusion(wrapped, cond, guidance=Guidance(3.0), seeds=[0, 1], solver="heun")
    """
    network, uncond = network_and_null(model, uncond)
    guidance = check_guidance(guidance)
    shape = tuple(
        _declared(network, "latent_shape", "shape", None if shape is None else tuple(shape))
    )
    path = _check_path(_declared(network, "path", "path", path))
    space = check_space(_declared(network, "space", "space", space))
    sources = generators(check_seeds(seeds, len(cond)))
    noise = normal(sources, shape).to(cond.device)
    pin = _pin(init, mask, noise)
    if scheduler is None:
        _check_solver(solver, eta)
        grid = time_grid(path, steps, spacing, shift, times)
        progresses = [progress_at(i, len(grid) - 1) for i in range(len(grid) - 1)]
        evaluate = _evaluation(WholeGridPass(network, cond, uncond, guidance, progresses))
        x = noise * path.coefficients(grid)[1][0]
        return integrate(
            evaluate, x, grid, path, space, solver, eta, sources, pin=pin, callback=callback
        )
    if times is not None or (solver, spacing, shift, eta) != ("ddim", "uniform", 1.0, 0.0):
        raise ValueError(
            "scheduler is given, which makes the steps itself: expected solver, spacing, shift, eta and times to be "
            "left alone"
        )
    scheduled = _Scheduled(scheduler, _check_steps(steps), path, space)
    progresses = [progress_at(i, len(scheduled.timesteps)) for i in range(len(scheduled.timesteps))]
    evaluate = _evaluation(WholeGridPass(network, cond, uncond, guidance, progresses))
    return scheduled.sample(evaluate, noise, sources, pin, callback)


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
        evaluate: ``(index, progress, x (R, ...), t (R,)) -> Guided``; ``index`` is that of the grid point.
        x: noisy samples (R, ...) at ``times[0]``, of any number of dimensions; its dtype is that of ``t``.
        times: float64 (N + 1,), falling, in [0, 1].
        path: gives alpha and sigma at each time.
        space: of the guided outputs.
        solver: "ddim", "heun" or "dpmpp_2m".
        eta: fresh noise of "ddim", from 0 to 1.
        sources: one generator a row, used where eta > 0.
        pin: ``(x, alpha, sigma) -> x``, applied before every evaluation and at the end: holds a known region.
        callback: called with a :class:`DenoisingStep` once a step.

    Returns:
        the samples at ``times[-1]``, clean where that is 0.

    Raises:
        ValueError: if the solver is unknown, ``eta`` does not go with it, or the space says nothing at one of the
            noise levels (eps and score where alpha is 0).
        FloatingPointError: if an output is not finite; names the step and the branch.
    """
    _check_solver(solver, eta)
    alpha, sigma = path.coefficients(times)
    check_level(alpha[:-1], sigma[:-1], space)
    walk = _Walk(evaluate, times.tolist(), alpha.unbind(), sigma.unbind(), space, pin)
    before: _Prediction | None = None
    for i in range(walk.steps):
        now = walk.predict(i, x)
        if callback is not None:
            callback(_report(i, progress_at(i, walk.steps), float(times[i]), now))
        if solver == "heun":
            x = _heun(walk, i, now)
        elif solver == "dpmpp_2m":
            x = _dpmpp_2m(walk, i, now, before)
        else:
            x = _ddim(walk, i, now, eta, sources)
        before = now
    return walk.pinned(walk.steps, x)


@dataclass(frozen=True)
class _Prediction:
    """A guided output at x, and what it says about both halves of x."""

    x: Tensor
    x0: Tensor
    eps: Tensor
    guided: Guided


@dataclass(frozen=True)
class _Walk:
    """The noise levels of a grid (N + 1,) and the way to a prediction at each of them."""

    evaluate: Evaluate
    times: list[float]
    alpha: tuple[Tensor, ...]
    sigma: tuple[Tensor, ...]
    space: Space
    pin: Pin | None

    @property
    def steps(self) -> int:
        return len(self.times) - 1

    def tau(self, i: int) -> Tensor:
        """Place on the straight line that the path becomes when divided by alpha + sigma."""
        return self.sigma[i] / (self.alpha[i] + self.sigma[i])

    def log_ratio(self, i: int) -> float:
        """Log of alpha / sigma, infinite at either end: lambda in DPM-Solver."""
        return float(self.alpha[i].log() - self.sigma[i].log())

    def pinned(self, i: int, x: Tensor) -> Tensor:
        return x if self.pin is None else self.pin(x, self.alpha[i], self.sigma[i])

    def predict(self, i: int, x: Tensor) -> _Prediction:
        x = self.pinned(i, x)
        t = torch.full((len(x),), self.times[i], dtype=x.dtype, device=x.device)
        guided = self.evaluate(i, progress_at(i, self.steps), x, t)
        _require_finite(guided, f"step {i}")
        out = guided.out.to(x.dtype)
        x0, eps = split_unchecked(out, x, self.alpha[i], self.sigma[i], self.space)
        return _Prediction(x, x0, eps, guided)


def _ddim(
    walk: _Walk, i: int, now: _Prediction, eta: float, sources: Sequence[torch.Generator]
) -> Tensor:
    """One step of DDIM (Song et al., arXiv 2010.02502, equation 12), or of Euler on the straight path.

    The fresh share of the noise is the paper's equation 16 for a path of any kind: eta times the deviation of the
    posterior of x' given x and x0, which is sigma' * sqrt(1 - (ratio' / ratio)^2) with ratio = sigma / alpha. The
    rest of sigma' stays with the predicted noise, so the marginal at the next time is kept for every eta.
    """
    alpha, sigma = walk.alpha[i + 1], walk.sigma[i + 1]
    if eta == 0 or sigma == 0:
        return alpha * now.x0 + sigma * now.eps
    # ratio' / ratio without a division by alpha, which may be 0 at the start
    kept = sigma * walk.alpha[i] / (alpha * walk.sigma[i])
    fresh = eta * sigma * (1 - kept.square()).clamp(min=0).sqrt()
    noise = normal(sources, tuple(now.x.shape[1:])).to(now.x)
    return alpha * now.x0 + (sigma.square() - fresh.square()).sqrt() * now.eps + fresh * noise


def _heun(walk: _Walk, i: int, now: _Prediction) -> Tensor:
    """One trapezoidal step (Karras et al., arXiv 2206.00364, algorithm 1), in the straight coordinates.

    Their line 6, too: a step that ends at sigma = 0 is Euler's, for there is nothing to evaluate.
    """
    alpha, sigma = walk.alpha[i + 1], walk.sigma[i + 1]
    euler = alpha * now.x0 + sigma * now.eps
    if sigma == 0:
        return euler
    then = walk.predict(i + 1, euler)
    velocity = ((now.eps - now.x0) + (then.eps - then.x0)) / 2
    straight = now.x / (walk.alpha[i] + walk.sigma[i])
    return (alpha + sigma) * (straight + (walk.tau(i + 1) - walk.tau(i)) * velocity)


def _dpmpp_2m(walk: _Walk, i: int, now: _Prediction, before: _Prediction | None) -> Tensor:
    """One step of DPM-Solver++(2M) (Lu et al., arXiv 2211.01095, algorithm 2).

    The step formula with x0 extrapolated along log(alpha / sigma) from the step before. The first step and one
    that ends at sigma = 0, where that logarithm is infinite, are of first order.
    """
    alpha, sigma = walk.alpha[i + 1], walk.sigma[i + 1]
    if before is None or sigma == 0:
        return alpha * now.x0 + sigma * now.eps
    step = walk.log_ratio(i + 1) - walk.log_ratio(i)
    step_before = walk.log_ratio(i) - walk.log_ratio(i - 1)  # infinite after a start at alpha = 0
    x0 = now.x0 + (now.x0 - before.x0) * (step / (2 * step_before))
    return alpha * x0 + sigma * (now.x - walk.alpha[i] * x0) / walk.sigma[i]


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
    _check_steps(steps)
    if spacing == "uniform":
        t = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
        return shift_time(t, shift)
    if spacing != "karras":
        raise ValueError(f"spacing is {spacing!r}, expected one of {', '.join(SPACINGS)}")
    if shift != 1:
        raise ValueError(f"shift is {shift} with spacing 'karras', which has none: expected 1.0")
    most = min(SIGMA_MAX, _last_ratio(path)) ** (1 / RHO)
    least = SIGMA_MIN ** (1 / RHO)
    ratios = torch.linspace(most, least, steps, dtype=torch.float64) ** RHO
    return torch.cat([path.time(ratios), torch.zeros(1, dtype=torch.float64)])


def _last_ratio(path: Path) -> float:
    """The ratio sigma / alpha at t = 1, infinite where alpha is 0 there."""
    alpha, sigma = path.coefficients(torch.ones(1, dtype=torch.float64))
    return float(sigma / alpha)


class _Scheduled:
    """A scheduler of diffusers, copied and set, with the noise level of each of its timesteps.

    Only what it offers is looked at, its class is not: one with ``alphas_cumprod`` keeps a variance-preserving state
    (up to ``scale_model_input``), one with ``scale_noise``, or set to flow sigmas, a straight one. Divided by
    alpha + sigma both are the same line, so a model of either kind can be asked, at equal tau.

    Args:
        scheduler: the caller's.
        steps: for its ``set_timesteps``.
        path: of the model.
        space: of the model.

    Raises:
        ValueError: if it lacks something, or works in a way that cannot be followed.
    """

    def __init__(self, scheduler: Any, steps: int, path: Path, space: Space) -> None:
        _check_scheduler(scheduler)
        self.scheduler = copy.deepcopy(scheduler)
        self.scheduler.set_timesteps(steps)
        if hasattr(self.scheduler, "set_begin_index"):
            # else the step is looked up by timestep, and is the wrong one where rounding made two of them equal
            self.scheduler.set_begin_index(0)
        self.path, self.space = path, space
        self.name = type(scheduler).__name__
        self.timesteps = list(self.scheduler.timesteps)
        self.straight = hasattr(scheduler, "scale_noise") or _setting(
            scheduler, "use_flow_sigmas", False
        )
        self.target = self._expected_space()
        self.taus = [self._tau(i) for i in range(len(self.timesteps))]
        self._check_levels()

    def sample(
        self,
        evaluate: Evaluate,
        noise: Tensor,
        sources: list[torch.Generator],
        pin: Pin | None,
        callback: Callback | None,
    ) -> Tensor:
        """From noise (B, *shape) to what the last step of the scheduler returns."""
        x = noise * float(getattr(self.scheduler, "init_noise_sigma", 1.0))
        takes_generator = "generator" in inspect.signature(self.scheduler.step).parameters
        extra = {"generator": sources} if takes_generator else {}
        for i, timestep in enumerate(self.timesteps):
            x = self._pinned(i, x, pin)
            progress = progress_at(i, len(self.timesteps))
            out = self._predict(i, progress, x, evaluate, callback)
            state = torch.get_rng_state()
            x = self.scheduler.step(out, timestep, x, **extra).prev_sample
            if not torch.equal(state, torch.get_rng_state()):
                raise ValueError(
                    f"the scheduler {self.name} draws noise that no seed determines, expected one whose step() takes "
                    "a generator"
                )
        if pin is not None:
            x = pin(x, torch.ones(()), torch.zeros(()))
        return x.to(noise.dtype)

    def _predict(
        self, i: int, progress: float, x: Tensor, evaluate: Evaluate, callback: Callback | None
    ) -> Tensor:
        """The guided output at the scheduler's state x (B, *shape), as the scheduler wants it."""
        own_alpha, own_sigma = self._coefficients(i)
        alpha, sigma, time = self._model_level(i)
        x = self._scaled(i, x)
        x = x * ((alpha + sigma) / (own_alpha + own_sigma)).to(x.dtype)
        t = torch.full((len(x),), time, dtype=torch.float32, device=x.device)
        guided = evaluate(i, progress, x, t)
        _require_finite(guided, f"step {i}")
        out = guided.out.to(x.dtype)
        x0, eps = split(out, x, alpha, sigma, self.space)
        if callback is not None:
            callback(_report(i, progress, time, _Prediction(x, x0, eps, guided)))
        if self.space == self.target and self.space != "v":
            return out  # without rounding; v alone depends on the coefficients
        return join(x0, eps, own_alpha, own_sigma, self.target)

    def _tau(self, i: int) -> float:
        """The place sigma / (alpha + sigma) of the scheduler's state at its timestep i."""
        if self.straight:
            return float(self.scheduler.sigmas[i])
        ratio = self._ratio(i)
        return 1 / (1 + 1 / ratio) if ratio > 0 else 0.0

    def _ratio(self, i: int) -> float:
        """The ratio sigma / alpha at timestep i: the one it works with, or else the one the timestep means."""
        if hasattr(self.scheduler, "sigmas"):
            return float(self.scheduler.sigmas[i])  # a timestep may be rounded, this is not
        table = self.scheduler.alphas_cumprod.double()
        ratios = ((1 - table) / table).sqrt()
        place = float(self.timesteps[i])
        low = int(place)
        if place == low:
            return float(ratios[low])
        return float(ratios[low] ** (low + 1 - place) * ratios[low + 1] ** (place - low))

    def _coefficients(self, i: int) -> tuple[Tensor, Tensor]:
        """Alpha and sigma of the scheduler's state, after ``scale_model_input``."""
        tau = torch.tensor(self.taus[i], dtype=torch.float64)
        norm = 1.0 if self.straight else (tau.square() + (1 - tau).square()).sqrt()
        return (1 - tau) / norm, tau / norm

    def _model_level(self, i: int) -> tuple[Tensor, Tensor, float]:
        """Alpha and sigma of the model's path at the same tau, and the time of that."""
        tau = torch.tensor(self.taus[i], dtype=torch.float64)
        time = self.path.time(tau / (1 - tau))
        alpha, sigma = self.path.coefficients(time)
        return alpha, sigma, float(time)

    def _scaled(self, i: int, x: Tensor) -> Tensor:
        if not hasattr(self.scheduler, "scale_model_input"):
            return x
        scaled: Tensor = self.scheduler.scale_model_input(x, self.timesteps[i])
        return scaled

    def _pinned(self, i: int, x: Tensor, pin: Pin | None) -> Tensor:
        if pin is None:
            return x
        scale = self._scaled(i, torch.ones((), dtype=torch.float64))
        alpha, sigma = self._coefficients(i)
        return pin(x, alpha / scale, sigma / scale)

    def _expected_space(self) -> Space:
        names: dict[str, Space] = {
            "epsilon": "eps",
            "sample": "x0",
            "v_prediction": "v",
            "flow_prediction": "flow",
        }
        prediction = _setting(
            self.scheduler, "prediction_type", "flow_prediction" if self.straight else "epsilon"
        )
        if prediction not in names or (prediction == "flow_prediction") != self.straight:
            raise ValueError(
                f"the scheduler {self.name} has prediction_type {prediction!r}, expected "
                + (
                    "'flow_prediction'"
                    if self.straight
                    else "'epsilon', 'sample' or 'v_prediction'"
                )
            )
        return names[prediction]

    def _check_levels(self) -> None:
        if self.taus[-1] > self.taus[0] or self.taus[-1] <= 0:
            raise ValueError(
                f"the scheduler {self.name} goes from tau {self.taus[0]} to {self.taus[-1]}, "
                "expected falling noise above 0"
            )
        most = self.taus[0] / (1 - self.taus[0]) if self.taus[0] < 1 else math.inf
        last = _last_ratio(self.path)
        # the tables of two schedules agree no better than this where both mean the same
        if most > last * 1.01:
            raise ValueError(
                f"the scheduler {self.name} starts at sigma / alpha = {most:.6g}, and the model's path ends at "
                f"{last:.6g}: expected a scheduler that starts on the path"
            )
        alpha, sigma, _ = self._model_level(0)
        check_level(alpha, sigma, self.space)
        if self.taus[0] == 1 and self.target == "eps":
            raise ValueError(
                f"the scheduler {self.name} starts at alpha = 0 with prediction_type 'epsilon', which says nothing "
                "there: expected 'v_prediction' or 'sample'"
            )


def _check_scheduler(scheduler: Any) -> None:
    name = type(scheduler).__name__
    missing = [
        part
        for part in ("set_timesteps", "timesteps", "step", "config")
        if not hasattr(scheduler, part)
    ]
    if not hasattr(scheduler, "alphas_cumprod") and not (
        hasattr(scheduler, "scale_noise") and hasattr(scheduler, "sigmas")
    ):
        missing.append("alphas_cumprod (or sigmas and scale_noise, of a flow scheduler)")
    if missing:
        raise ValueError(
            f"scheduler is {name}, which lacks {', '.join(missing)}: expected one of diffusers"
        )
    for part, why in (
        ("sigmas_interpol", "evaluates the model between its noise levels"),
        ("noise_sampler", "draws noise for a whole batch at once"),
    ):
        if hasattr(scheduler, part):
            raise ValueError(f"scheduler is {name}, which {why}: expected another")


def _setting(scheduler: Any, name: str, default: Any) -> Any:
    """One entry of a scheduler's config, which is an object or a dict."""
    config = scheduler.config
    return config.get(name, default) if isinstance(config, dict) else getattr(config, name, default)


def _evaluation(guided_pass: WholeGridPass) -> Evaluate:
    def evaluate(index: int, progress: float, x: Tensor, t: Tensor) -> Guided:
        guided = guided_pass(progress, f"step {index}", x, t)
        if guided.out.shape != x.shape:
            raise ValueError(
                f"the model returned {tuple(guided.out.shape)} for x {tuple(x.shape)}, expected equal shapes"
            )
        return guided

    return evaluate


def _require_finite(guided: Guided, step: str) -> None:
    """Refuse what :func:`branches.combine` lets through because it means something in logits.

    Raises:
        FloatingPointError: if an output is not finite.
    """
    # guidance saturates what is infinite in one branch, so a result near the largest number is as telling
    if bool(guided.out.abs().amax() < torch.finfo(guided.out.dtype).max / 4):
        return
    outputs = {"cond": guided.cond_out, "uncond": guided.uncond_out, "guided": guided.out}
    broken = [
        name for name, out in outputs.items() if out is not None and not bool(out.isfinite().all())
    ]
    if broken:
        raise FloatingPointError(
            f"the model's output is not finite at {step}, in the branches {broken}"
        )


def _report(index: int, progress: float, t: float, now: _Prediction) -> DenoisingStep:
    guided = now.guided
    return DenoisingStep(
        index,
        progress,
        guided.scale,
        t,
        now.x,
        now.x0,
        guided.out,
        guided.cond_out,
        guided.uncond_out,
    )


def _declared(network: Any, attribute: str, name: str, given: Any) -> Any:
    """What the caller gives or the network declares; never two different answers."""
    own = getattr(network, attribute, None)
    if given is None and own is None:
        raise ValueError(f"{name} is None and the model has no {attribute}, expected {name}=")
    if given is None or own is None:
        return own if given is None else given
    if (tuple(own) if name == "shape" else own) != given:
        verb = {"shape": "makes", "path": "is trained on", "space": "predicts"}[name]
        raise ValueError(f"{name} is {given!r}: the model {verb} {own}, not {given}")
    return given


def _check_path(path: Any) -> Path:
    if not (hasattr(path, "coefficients") and hasattr(path, "time")):
        raise ValueError(
            f"path is {path!r}, expected an object with coefficients and time, as in paths.cosine()"
        )
    checked: Path = path
    return checked


def _check_solver(solver: str, eta: float) -> None:
    if solver not in SOLVERS:
        raise ValueError(f"solver is {solver!r}, expected one of {', '.join(SOLVERS)}")
    if not 0 <= eta <= 1:
        raise ValueError(f"eta is {eta}, expected a number between 0 and 1")
    if eta > 0 and solver != "ddim":
        raise ValueError(f"eta is {eta} with solver {solver!r}, which draws no noise: expected 0")


def _check_steps(steps: int) -> int:
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps is {steps!r}, expected an int of at least 1")
    return steps


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


def _pin(init: Tensor | None, mask: Tensor | None, noise: Tensor) -> Pin | None:
    """What holds the known region at its noised value; None without inpainting.

    Raises:
        ValueError: if one of the two is missing, or a size does not fit.
    """
    if init is None and mask is None:
        return None
    if init is None or mask is None:
        raise ValueError(
            f"{'init' if init is None else 'mask'} is None, expected both init and mask, or neither"
        )
    clean = _check_init(init, noise)
    anew = _check_mask(mask, tuple(noise.shape)).to(noise.device)

    def pin(x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return torch.where(anew, x, alpha * clean + sigma * noise)

    return pin


def _check_init(init: Tensor, noise: Tensor) -> Tensor:
    if init.shape not in (noise.shape, noise.shape[1:]):
        raise ValueError(
            f"init has shape {tuple(init.shape)}, expected {tuple(noise.shape)} or {tuple(noise.shape[1:])}"
        )
    if not init.is_floating_point() or not bool(init.isfinite().all()):
        raise ValueError(f"init is {init.dtype} or not finite, expected finite latents")
    return init.to(noise).expand_as(noise)


def _check_mask(mask: Tensor, full: tuple[int, ...]) -> Tensor:
    """The mask with a dimension for each of ``full`` = (B, C, h, w)."""
    if mask.dtype != torch.bool:
        raise ValueError(f"mask is {mask.dtype}, expected bool, True where to draw anew")
    batch, spatial = full[0], full[2:]
    if tuple(mask.shape) in (full, (batch, 1, *spatial)):
        return mask
    if tuple(mask.shape) == (batch, *spatial):
        return mask[:, None]
    if tuple(mask.shape) == spatial:
        return mask[None, None]
    raise ValueError(
        f"mask has shape {tuple(mask.shape)}, "
        f"expected {spatial}, {(batch, *spatial)}, {(batch, 1, *spatial)} or {full}"
    )

"""The schedulers of diffusers as solvers, without importing it: what they offer is looked at, not their class."""

from __future__ import annotations

import copy
import inspect
import math
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from unicfg.guidance.spaces import (
    Space,
    check_level,
    join,
)
from unicfg.sampling.branches import (
    progress_at,
)
from unicfg.sampling.paths import Path
from unicfg.sampling.solvers import (
    Callback,
    Evaluate,
    Pin,
    Prediction,
    last_ratio,
    report_step,
)


class Scheduled:
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

    @property
    def ratios(self) -> list[float]:
        """Sigma / alpha at each timestep."""
        return [tau / (1 - tau) if tau < 1 else math.inf for tau in self.taus]

    @property
    def times(self) -> list[float]:
        """The model's time at each timestep."""
        return [self._model_level(i)[2] for i in range(len(self.timesteps))]

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
        draws = _Draws()
        for i, timestep in enumerate(self.timesteps):
            x = self._pinned(i, x, pin)
            progress = progress_at(i, len(self.timesteps))
            out = self._predict(i, progress, x, evaluate, callback)
            with draws:
                x = self.scheduler.step(out, timestep, x, **extra).prev_sample
            if draws.without_generator:
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
        guided = evaluate(i, progress, x, time)
        check_level(alpha, sigma, self.space)
        now = Prediction(x, guided, alpha, sigma, self.space)
        if callback is not None:
            callback(report_step(i, progress, time, now))
        if self.space == self.target and self.space != "v":
            return now.out  # without rounding; v alone depends on the coefficients
        return join(now.x0, now.eps, own_alpha, own_sigma, self.target)

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
        if any(b > a for a, b in pairwise(self.taus)) or self.taus[-1] <= 0:
            raise ValueError(
                f"the scheduler {self.name} goes from tau {self.taus[0]} to {self.taus[-1]}, "
                "expected falling noise above 0"
            )
        most = self.taus[0] / (1 - self.taus[0]) if self.taus[0] < 1 else math.inf
        last = last_ratio(self.path)
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


class _Draws(TorchDispatchMode):
    """Sees whether random numbers are drawn without a generator, in this thread alone and on any device."""

    def __init__(self) -> None:
        super().__init__()
        self.without_generator = False

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded in func.tags and kwargs.get("generator") is None:
            self.without_generator = True
        return func(*args, **kwargs)


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
    required = [
        parameter.name
        for parameter in list(inspect.signature(scheduler.step).parameters.values())[3:]
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    ]
    if required:
        raise ValueError(
            f"scheduler is {name}, whose step() needs {', '.join(required)} besides output, timestep and sample: "
            "expected another"
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

"""Guided sampling from noise to latents; the steps are made by :mod:`unicfg.sampling.solvers`, or by a scheduler."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from unicfg.guidance.core import Guidance
from unicfg.guidance.schedules import at_levels
from unicfg.guidance.spaces import Level, Space, check_space
from unicfg.sampling.branches import (
    Branch,
    Guided,
    WholeGridPass,
    begin_guidance,
    check_condition,
    network_and_null,
    plan,
    progress_at,
)
from unicfg.sampling.paths import Path
from unicfg.sampling.randomness import check_seeds, generators, normal
from unicfg.sampling.schedulers import Scheduled
from unicfg.sampling.solvers import (
    Callback,
    Evaluate,
    Pin,
    Solver,
    Spacing,
    check_cfg_pp,
    check_solver,
    check_steps,
    integrate,
    time_grid,
)
from unicfg.sampling.soundness import LATENTS, Watch
from unicfg.training.dropout import ConditionDropout


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
    branches: Mapping[str, Branch] | None = None,
    steps: int = 50,
    solver: Solver = "ddim",
    spacing: Spacing = "uniform",
    shift: float = 1.0,
    eta: float = 0.0,
    times: Sequence[float] | Tensor | None = None,
    init: Tensor | None = None,
    mask: Tensor | None = None,
    scheduler: Any | None = None,
    refresh: int = 1,
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
        guidance: scale, schedule and mitigations, each applied in its own space; None is ``Guidance(1.0)``.
        uncond: the null condition (...), or a negative condition a sample (B, ...). None takes the one that
            ``model`` was trained with.
        branches: what runs in the branches that guidance names beside "cond" and "uncond".
        steps: intervals of the time grid.
        solver: "ddim" (first order), "heun" (second order, 2 * steps - 1 evaluations) or "dpmpp_2m" (second order,
            one evaluation a step), or "cfg_pp" (DDIM that renoises with the unconditional output, for
            ``Guidance(branches.cfg_pp(0.6))``); see :func:`integrate`.
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
        refresh: evaluate the other branches than the condition in every ``refresh``-th evaluation only, and take their
            distance from it, as the model predicts it, from the last time in between: guidance for less than two passes a
            step, at a loss that grows with it (Dinh et al., arXiv 2408.11194, for classifiers).
        callback: called with a :class:`DenoisingStep` once a step (with a scheduler, once for each of its timesteps).

    Returns:
        latents (B, *shape), float32.

    Raises:
        ValueError: if an argument is out of range or does not fit the others, the model predicts in another space or
            path than was asked for, or guidance needs a null condition and there is none.
        TypeError: if a seed is no int, or ``guidance`` no ``Guidance``.
        FloatingPointError: if an output of the model, or what the steps make of it, is not finite; names the step, the
            branch and the samples.

    Example:
        >>> latents = sample_diffusion(wrapped, cond, guidance=Guidance(3.0), seeds=[0, 1], solver="heun")
    """
    network, uncond = network_and_null(model, uncond)
    check_condition(cond)
    shape = tuple(
        _declared(network, "latent_shape", "shape", None if shape is None else tuple(shape))
    )
    path = _check_path(_declared(network, "path", "path", path))
    space = check_space(_declared(network, "space", "space", space))
    guidance = begin_guidance(guidance, space)
    watch = Watch(cond.device, LATENTS)
    check_cfg_pp(guidance, solver)
    sources = generators(check_seeds(seeds, len(cond)))
    noise = normal(sources, shape).to(cond.device)
    pin = _pin(init, mask, noise)
    if scheduler is None:
        check_solver(solver, eta)
        grid = time_grid(path, steps, spacing, shift, times)
        progresses = [progress_at(i, len(grid) - 1) for i in range(len(grid) - 1)]
        alpha, sigma = path.coefficients(grid[:-1])
        guidance = _at_levels(guidance, (sigma / alpha).tolist())
        groups = plan(network, cond, uncond, branches, guidance, progresses)
        run = WholeGridPass(groups, guidance, len(cond), grid.tolist(), cond.device, refresh, watch)
        evaluate = _evaluation(run, path, space, watch, told=callback is not None)
        x = noise * path.coefficients(grid)[1][0]
        latents = integrate(
            evaluate, x, grid, path, space, solver, eta, sources, pin=pin, callback=callback
        )
        watch.see_latents(latents, "after the last step")
        watch.finish()
        return latents
    if times is not None or (solver, spacing, shift, eta) != ("ddim", "uniform", 1.0, 0.0):
        raise ValueError(
            "scheduler is given, which makes the steps itself: expected solver, spacing, shift, eta and times to be "
            "left alone"
        )
    scheduled = Scheduled(scheduler, check_steps(steps), path, space)
    progresses = [progress_at(i, len(scheduled.timesteps)) for i in range(len(scheduled.timesteps))]
    guidance = _at_levels(guidance, scheduled.ratios)
    groups = plan(network, cond, uncond, branches, guidance, progresses)
    run = WholeGridPass(groups, guidance, len(cond), scheduled.times, cond.device, refresh, watch)
    evaluate = _evaluation(run, path, space, watch, told=callback is not None)
    latents = scheduled.sample(evaluate, noise, sources, pin, callback)
    watch.see_latents(latents, f"after the last step of the scheduler {scheduled.name}")
    watch.finish()
    return latents


def _at_levels(guidance: Guidance, ratios: Sequence[float]) -> Guidance:
    """The guidance with schedules in noise levels as schedules in progress."""
    scale: Any = at_levels(guidance.scale, ratios)  # type: ignore[arg-type]  # weights are nested schedules to it
    return replace(guidance, scale=scale)


def _evaluation(
    guided_pass: WholeGridPass, path: Path, space: Space, watch: Watch, *, told: bool
) -> Evaluate:
    """The guided prediction at each step; ``told``: somebody is shown it, so it is looked at first."""

    def evaluate(index: int, progress: float, x: Tensor, t: float) -> Guided:
        level = None
        if guided_pass.guidance.mitigations:
            level = Level(x, *path.coefficients(torch.tensor(t, dtype=torch.float64)), space)
        where = f"before step {index}"
        if not watch.at_once:
            watch.see_latents(x, where)
        try:
            guided = guided_pass(progress, f"step {index}", x, t=t, level=level)
        except Exception:
            watch.see_latents(x, where)  # the model is not to blame for what it was given
            watch.finish()
            raise
        if guided.out.shape != x.shape:
            raise ValueError(
                f"the model returned {tuple(guided.out.shape)} for x {tuple(x.shape)}, expected equal shapes"
            )
        if told:
            watch.finish()
        return guided

    return evaluate


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

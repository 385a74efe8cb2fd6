"""Guided sampling of continuous tokens: a transformer gives hidden states, a small denoiser draws each token.

The order is causal, with the same cache as ``sample_autoregressive``, or masked: sets of tokens in a random order of
each sample (Li et al., arXiv 2406.11838, sections 3.3 and 3.4).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor

from unicfg.guidance.core import Guidance, Scale, guide, guide_unchecked
from unicfg.guidance.spaces import Level, check_level
from unicfg.sampling.autoregressive import CachedBranches
from unicfg.sampling.branches import (
    Branch,
    Group,
    Guided,
    WholeGridPass,
    begin_guidance,
    check_condition,
    combine,
    network_and_null,
    plan,
    require,
    takes_places,
)
from unicfg.sampling.masked import reveal_counts
from unicfg.sampling.randomness import check_seeds, generators, normal
from unicfg.sampling.solvers import (
    Callback,
    Solver,
    Spacing,
    check_cfg_pp,
    check_solver,
    check_steps,
    integrate,
    step_weights,
    time_grid,
)
from unicfg.sampling.soundness import LATENTS, Watch
from unicfg.sampling.tokens import at_places
from unicfg.training.dropout import ConditionDropout

Denoise = Callable[[Tensor], Tensor]
Walk = Callable[[Tensor, Tensor, Tensor | None], Tensor | None]
GuideAt = Literal["head", "states", "both"]
PASSES = 16
GUIDE_AT: tuple[GuideAt, ...] = get_args(GuideAt)


class HybridModel(Protocol):
    """What ``sample_hybrid`` asks of a model; ``models.HybridTransformer`` is one.

    ``head.prepare(times (N,))`` is called once and gives a function of hidden states (R, k, D), which gives N denoisers
    (R, k, C) -> (R, k, C), one a time; the head has ``latent_shape``, ``path`` and ``space`` besides, and may have
    ``prepare_walk(times (N,), weights (N, 2))``, as ``models.DiffusionHead`` has it, to be used with ``compile=True``.
    With the order "causal" the model has ``make_cache``, ``prefill`` and ``decode`` as in
    :class:`unicfg.sampling.autoregressive.AutoregressiveModel`, where ids are latents (R, n, C) and logits are hidden
    states (R, D). With "masked" it has ``states`` and ``encode_condition``.
    """

    head: Any

    @property
    def num_tokens(self) -> int:
        """L, the tokens of one sample."""

    @property
    def order(self) -> str:
        """One of "causal" and "masked"."""

    def encode_condition(self, cond: Tensor) -> Any:
        """What ``states`` needs to know of the condition (R, T), once per sampling."""

    def states(self, latents: Tensor, cond: Any, known: Tensor | None) -> Tensor:
        """Hidden states (R, L, D) of latents (R, L, C), of which ``known`` (R, L) may be seen.

        It may take ``places`` (R, K), the tokens whose states (R, K, D) are wanted.
        """


@dataclass(frozen=True)
class LatentStep:
    """What a callback sees after each token, or set of tokens.

    Attributes:
        index: of the step: L of them in causal order.
        progress: share of the tokens that are known before the step, of what is known before the last one: 0.0 at the
            first step, 1.0 at the last, 0.0 at an only one. In causal order index / (L - 1).
        scale: s at this step: a float or (B,).
        latents: (B, L, C); 0 where not drawn yet.
        known: bool (B, L), True where drawn.
        places: of the tokens just drawn (B, k).
        states: hidden states of the tokens just drawn (B, k, D), of each branch that the step needed.
    """

    index: int
    progress: float
    scale: Scale
    latents: Tensor
    known: Tensor
    places: Tensor
    states: Mapping[str, Tensor]

    @property
    def cond_state(self) -> Tensor | None:
        """Conditional hidden states (B, k, D); None where not needed."""
        return self.states.get("cond")

    @property
    def uncond_state(self) -> Tensor | None:
        """Unconditional hidden states (B, k, D); None where not needed."""
        return self.states.get("uncond")


@torch.no_grad()  # not inference_mode: its tensors could not be trained on afterwards
def sample_hybrid(
    model: ConditionDropout | HybridModel,
    cond: Tensor,
    *,
    seeds: Sequence[int],
    guidance: Guidance | None = None,
    uncond: Tensor | None = None,
    branches: Mapping[str, Branch] | None = None,
    guide_at: GuideAt = "head",
    steps: int = 20,
    passes: int | None = None,
    solver: Solver = "ddim",
    spacing: Spacing = "uniform",
    temperature: float = 1.0,
    compile: bool = False,
    callback: Callable[[LatentStep], None] | None = None,
    head_callback: Callback | None = None,
) -> Tensor:
    """Draw continuous tokens, guided inside the denoising head.

    Args:
        model: a model, or the ``ConditionDropout`` it was trained in, which brings the null condition.
        cond: condition ids (B, T).
        seeds: one int a sample. The same seed gives the same image in a batch of any size.
        guidance: scale, schedule over the tokens, and mitigations; None is ``Guidance(1.0)``.
        uncond: the null condition (T,), or a negative condition a sample (B, T). None takes the one that
            ``model`` was trained with.
        branches: what runs in the branches that guidance names beside "cond" and "uncond".
        guide_at: what is extrapolated. "head": the head's predictions with the conditional and the unconditional
            state, on the same noise, in one pass of both halves. "states": the hidden states; the head then runs
            once. "both": the head, with the extrapolated state as the conditional one.
        steps: of the head for each token.
        passes: of the transformer, with the order "masked", 16 by default; the number of tokens follows the cosine law
            of MaskGIT. With the order "causal" there is one a token, and this is left alone.
        solver: of the head, see :func:`unicfg.sampling.sample_diffusion`.
        spacing: of the head's times.
        temperature: multiplies the noise that the head starts from; below 1 the tokens are less diverse.
        compile: with the order "causal", decode with a compiled step, see :func:`sample_autoregressive`. So does the head,
            where solver is "ddim" and guidance is of one conditional and one unconditional branch without mitigations.
        callback: called with a :class:`LatentStep` after each token or set of tokens.
        head_callback: called with a :class:`DenoisingStep` of k tokens (B, k, C) after each step of the head, which then
            does not run compiled; the head's progress is that of the token's own steps. With ``guide_at="head"``.

    Returns:
        latents (B, L, C), float32.

    Raises:
        ValueError: if seeds, shapes or ranges do not fit, or guidance needs a null condition and there is none.
        TypeError: if a seed is no int, or ``guidance`` no ``Guidance``.
        FloatingPointError: if an output of the model, or what the steps make of it, is not finite; names the token, the
            samples and, where it looks at once, the branch.

    Example:
        >>> latents = sample_hybrid(wrapped, cond, guidance=Guidance(3.0), seeds=[0, 1])
    """
    network, uncond = network_and_null(model, uncond)
    check_condition(cond)
    require(network, "sample_hybrid", "head", "num_tokens", "order")
    guidance = begin_guidance(guidance, network.head.space)
    if guide_at not in GUIDE_AT:
        raise ValueError(f"guide_at is {guide_at!r}, expected one of {', '.join(GUIDE_AT)}")
    if guide_at == "states" and guidance.mitigations:
        raise ValueError(
            "guide_at is 'states' with mitigations, which are made for predictions of the head: expected 'head' or "
            "'both'"
        )
    if not (math.isfinite(temperature) and temperature >= 0):
        raise ValueError(f"temperature is {temperature}, expected a finite number >= 0")
    if guide_at != "head" and hasattr(guidance.scale, "space"):
        raise ValueError(
            f"guide_at is {guide_at!r} with {type(guidance.scale).__name__}, which is made for predictions of the "
            "head: expected 'head'"
        )
    if guide_at != "head" and head_callback is not None:
        raise ValueError(
            f"guide_at is {guide_at!r} with head_callback, which would be shown predictions of extrapolated states as "
            "conditional ones: expected 'head'"
        )
    check_solver(solver, 0.0)
    check_cfg_pp(guidance, solver)
    passes = _check_passes(passes, network.order)
    times = time_grid(network.head.path, steps, spacing)
    batch, length = len(cond), network.num_tokens
    sources = generators(check_seeds(seeds, batch))
    (channels,) = network.head.latent_shape
    noise = temperature * normal(sources, (length, channels)).to(cond.device)
    latents = torch.zeros_like(noise)
    known = torch.zeros(batch, length, dtype=torch.bool, device=cond.device)
    causal = network.order == "causal"
    if compile and not causal:
        raise ValueError(
            "compile is True with a model of the order 'masked', expected 'causal': there is no decode step to compile"
        )
    edges = list(range(length + 1)) if causal else _edges(length, passes)
    # the share of what the last pass sees; one token a pass is the same share of passes
    progresses = [known / max(edges[-2], 1) for known in edges[:-1]]
    groups = plan(network, cond, uncond, branches, guidance, progresses)
    if guide_at != "head" and len(groups) > 1:
        raise ValueError(
            f"guide_at is {guide_at!r} with branches of another model, whose hidden states mean something else: "
            "expected 'head'"
        )
    # nothing is evaluated at the end
    heads = [(group, group.network.head.prepare(times[:-1].to(cond.device))) for group in groups]
    levels = list(zip(*network.head.path.coefficients(times), strict=True))
    walk = None
    if compile and solver == "ddim" and len(groups) == 1 and head_callback is None:
        walk = _compiled_walk(network.head, times)
    watch = Watch(cond.device, LATENTS)
    head = _Head(
        network.head,
        heads,
        guidance,
        guide_at,
        solver,
        times,
        levels,
        walk,
        head_callback,
        watch,
    )
    if causal:
        turns = _causal_turns(groups, guidance, progresses, latents, compile)
    else:
        turns = _masked_turns(groups, guidance, progresses, latents, known, edges, sources)
    for turn in turns:
        drawn = head(turn, at_places(noise, turn.places))
        latents.scatter_(1, turn.places[..., None].expand_as(drawn), drawn)
        known.scatter_(1, turn.places, True)
        if callback is not None:
            watch.finish()
            scale = guidance.scale_at(turn.progress)
            callback(
                LatentStep(
                    turn.index,
                    turn.progress,
                    scale,
                    latents.clone(),
                    known.clone(),
                    turn.places,
                    turn.states,
                )
            )
    watch.finish()
    return latents


def _compiled_walk(head: Any, times: Tensor) -> Walk | None:
    """What ``prepare_walk`` of the head gives for the formula of "ddim"."""
    if not hasattr(head, "prepare_walk"):
        return None
    alpha, sigma = head.path.coefficients(times)
    check_level(alpha[:-1], sigma[:-1], head.space)
    weights = torch.tensor(step_weights(alpha, sigma, head.space))
    walk: Walk = head.prepare_walk(times[:-1], weights)
    return walk


def _check_passes(passes: int | None, order: str) -> int:
    if passes is None:
        return PASSES
    if order == "causal":
        raise ValueError(
            f"passes is {passes}, expected None: a model of the order 'causal' takes one a token"
        )
    return check_steps(passes, "passes")


def _edges(length: int, passes: int) -> list[int]:
    """How many tokens are known before each pass of the masked order, and at the end."""
    counts = reveal_counts(torch.tensor([length]), min(passes, length), "cosine")
    return [0, *torch.cat(counts).cumsum(0).tolist()]


@dataclass(frozen=True)
class _Turn:
    """The tokens to draw next: their places (B, k), and hidden states (B, k, D) in each needed branch."""

    index: int
    progress: float
    places: Tensor
    states: dict[str, Tensor]


def _causal_turns(
    groups: Sequence[Group],
    guidance: Guidance,
    progresses: Sequence[float],
    latents: Tensor,
    compile: bool,
) -> Iterator[_Turn]:
    """One token after another; ``latents`` (B, L, C) are filled in between by the caller."""
    batch = len(latents)
    run = CachedBranches(groups, batch, compile)
    for index, progress in enumerate(progresses):
        states = run(latents[:, :index], guidance.branches_at(progress))
        places = torch.full((batch, 1), index, device=latents.device)
        yield _Turn(index, progress, places, {name: s[:, None] for name, s in states.items()})


def _masked_turns(
    groups: Sequence[Group],
    guidance: Guidance,
    progresses: Sequence[float],
    latents: Tensor,
    known: Tensor,
    edges: Sequence[int],
    sources: Sequence[torch.Generator],
) -> Iterator[_Turn]:
    """Sets of tokens in a random order of each sample."""
    batch, length, _ = latents.shape
    orders = torch.stack([torch.randperm(length, generator=source) for source in sources])
    orders = orders.to(latents.device)
    of_states = [Group(_States(group.network), group.conditions) for group in groups]
    run = WholeGridPass(of_states, guidance, batch)
    for index, progress in enumerate(progresses):
        places = orders[:, edges[index] : edges[index + 1]]
        yield _Turn(index, progress, places, run.branches(progress, latents, known, places=places))


@dataclass(frozen=True)
class _States:
    """A hybrid network's states as a plain callable for :class:`WholeGridPass`."""

    network: Any

    def encode_condition(self, cond: Tensor) -> Any:
        return self.network.encode_condition(cond)

    def for_sampling(self) -> _States:
        own = getattr(self.network, "for_sampling", None)
        return self if own is None else _States(own())

    def __call__(self, latents: Tensor, cond: Any, known: Tensor, places: Tensor) -> Tensor:
        if not takes_places(self.network.states):
            return at_places(self.network.states(latents, cond, known), places)
        states: Tensor = self.network.states(latents, cond, known, places=places)
        return states


@dataclass(frozen=True)
class _Head:
    """Draws the latents of one turn from their hidden states and noise."""

    denoiser: Any
    heads: Sequence[tuple[Group, Callable[[Tensor], Sequence[Denoise]]]]
    guidance: Guidance
    guide_at: GuideAt
    solver: Solver
    times: Tensor
    levels: Sequence[tuple[Tensor, Tensor]]
    walk: Walk | None
    callback: Callback | None
    watch: Watch

    def __call__(self, turn: _Turn, noise: Tensor) -> Tensor:
        """Latents (B, k, C) for noise (B, k, C)."""
        # the schedule runs over the tokens, so within one token the scale stands still
        guidance, states = self.guidance.fixed_at(turn.progress), turn.states
        token = f"token {turn.index}"
        if self.guide_at != "head":
            # mitigations are for predictions; hidden states have no space
            plain = replace(guidance, mitigations=())
            extrapolated = combine(plain, 0.0, states, token, watch=self.watch).out
            states = {**states, "cond": extrapolated}
            if self.guide_at == "states":
                guidance = Guidance(1.0)
        needed = guidance.branches_at(0.0)
        x = noise * self.denoiser.path.coefficients(self.times)[1][0]
        drawn = self._walk(guidance, needed, states, x)
        if drawn is None:
            drawn = self._steps(guidance, needed, states, x, token)
        self.watch.see_latents(drawn, f"after the last step of {token}")
        return drawn

    def _walk(
        self, guidance: Guidance, needed: tuple[str, ...], states: Mapping[str, Tensor], x: Tensor
    ) -> Tensor | None:
        """All steps in compiled code; None where they are more than it can do, or end in what is not finite."""
        s = _plain_scale(guidance, needed, x)
        plain = s is not None or (needed == ("cond",) and not guidance.mitigations)
        if self.walk is None or not plain:
            return None
        rows, tokens, _ = x.shape
        if s is not None:
            s = torch.as_tensor(s, dtype=x.dtype, device=x.device).reshape(-1, 1, 1)
            # strides of its own are a shape to the compiler
            s = s.expand(rows, tokens, 1).clone(memory_format=torch.contiguous_format).view(-1, 1)
        hidden = torch.cat([states[name] for name in needed]).flatten(0, 1)
        drawn = self.walk(hidden, x.flatten(0, 1), s)
        if drawn is None or (self.watch.at_once and LATENTS.broken(drawn)):
            return None
        return drawn.view(x.shape)

    def _steps(
        self,
        guidance: Guidance,
        needed: tuple[str, ...],
        states: Mapping[str, Tensor],
        x: Tensor,
        token: str,
    ) -> Tensor:
        """One step after another."""
        passes = []
        for group, prepared in self.heads:
            # a group alone also runs the states that were extrapolated without a condition, at s = 0
            alone = len(self.heads) == 1
            names = [name for name in needed if alone or name in group.conditions]
            if names:
                passes.append((names, prepared(torch.cat([states[name] for name in names]))))
        path, space = self.denoiser.path, self.denoiser.space
        scale = guidance.scale_at(0.0)
        running = guidance.begin(space)  # each token is denoised by itself: nothing is carried over
        plain_scale = _plain_scale(running, needed, x)
        watch, told = self.watch, self.callback is not None

        def evaluate(index: int, progress: float, x: Tensor, t: float) -> Guided:
            # called for every step of every token: the common case takes the shortest way
            if plain_scale is not None:
                both = passes[0][1][index](torch.cat([x, x]))
                cond_out, uncond_out = both.chunk(2)
                out = guide_unchecked(cond_out, uncond_out, plain_scale)
                outputs = {"cond": cond_out, "uncond": uncond_out}
                if (watch.at_once or told) and LATENTS.broken(out):
                    out = guide(cond_out, uncond_out, plain_scale)
                    look(outputs, out, index)
                return Guided(out, scale, outputs)
            outputs = {}
            for names, denoisers in passes:
                rows = denoisers[index](torch.cat([x] * len(names)))
                outputs.update(zip(names, rows.chunk(len(names)), strict=True))
            level = Level(x, *self.levels[index], space) if running.mitigations else None
            out = running.combine_branches(progress, outputs, level)
            # without mitigations, which hide what they are given, what is not finite reaches the latents
            if watch.at_once or told or running.mitigations:
                look(outputs, out, index)
            return Guided(out, scale, outputs, running.still_at(progress))

        def look(outputs: Mapping[str, Tensor], out: Tensor, index: int) -> None:
            step = f"step {index} of {token}"
            watch.see_outputs(outputs, step)
            watch.see_guided(out, step)
            if told:
                watch.finish()

        return integrate(evaluate, x, self.times, path, space, self.solver, callback=self.callback)


def _plain_scale(guidance: Guidance, needed: tuple[str, ...], like: Tensor) -> Scale | None:
    """The scale where guidance is the formula and nothing else, of both branches in one pass."""
    scale = guidance.scale
    if guidance.mitigations or needed != ("cond", "uncond") or like.dtype != torch.float32:
        return None
    if isinstance(scale, Tensor):
        scale = scale.to(like, non_blocking=True)
        return scale.view(-1, *[1] * (like.ndim - 1)) if scale.ndim else scale
    return float(scale) if isinstance(scale, (int, float)) else None

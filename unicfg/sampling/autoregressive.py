"""Guided sampling of one token after another, with a KV cache, both branches in one pass.

A decode step reads every weight once, whatever the number of rows, so the conditional and the unconditional rows
go through the network together; where the scale is 1 (or 0) only one branch is run, and a branch that joins late
catches up on the tokens so far in a single chunk.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from unicfg.guidance.core import Guidance, Scale
from unicfg.sampling.branches import (
    Branch,
    Group,
    OfBranches,
    begin_guidance,
    check_condition,
    combine,
    network_and_null,
    plan,
    progress_at,
    require,
)
from unicfg.sampling.randomness import check_seeds, generators, uniform
from unicfg.sampling.soundness import Watch
from unicfg.sampling.tokens import ALL_MASKED, TokenFilter, draw
from unicfg.training.dropout import ConditionDropout


class Cache(Protocol):
    """What a model remembers of a number of sequences, one row each."""

    length: int

    def rows(self, start: int, stop: int) -> Cache:
        """The rows from ``start`` up to ``stop``: the same memory, with a length of its own."""


class AutoregressiveModel(Protocol):
    """What ``sample_autoregressive`` asks of a model; ``models.TokenTransformer`` is one."""

    @property
    def num_tokens(self) -> int:
        """L, the tokens of one sample."""

    def make_cache(self, rows: int) -> Any:
        """An empty :class:`Cache` for R ``rows``; it may take ``compile``, a bool."""

    def prefill(self, cond: Tensor, cache: Any) -> None:
        """Run the condition (R, T), or (1, T) for all rows, into the cache."""

    def decode(self, ids: Tensor, cache: Any) -> Tensor:
        """Logits (R, V) of the token after ``ids`` (R, n); extends the cache by what it lacks."""


@dataclass(frozen=True)
class TokenStep(OfBranches):
    """What a callback sees after each token.

    Attributes:
        index: of the token, 0 to L - 1.
        progress: index / (L - 1).
        scale: s at this step: a float or (B,).
        ids: tokens so far (B, index + 1).
        guided: the guided logits that the token was drawn from (B, V).
        outputs: logits (B, V) of each branch that the step needed.
    """

    index: int
    progress: float
    scale: Scale
    ids: Tensor
    guided: Tensor
    outputs: Mapping[str, Tensor]


@torch.no_grad()  # not inference_mode: its tensors could not be trained on afterwards
def sample_autoregressive(
    model: ConditionDropout | AutoregressiveModel,
    cond: Tensor,
    *,
    seeds: Sequence[int],
    guidance: Guidance | None = None,
    uncond: Tensor | None = None,
    branches: Mapping[str, Branch] | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    compile: bool = False,
    callback: Callable[[TokenStep], None] | None = None,
) -> Tensor:
    """Draw image tokens by extrapolated logits.

    Args:
        model: a model, or the ``ConditionDropout`` it was trained in, which brings the null condition.
        cond: condition ids (B, T).
        seeds: one int a sample. The same seed gives the same image in a batch of any size.
        guidance: scale, schedule and mitigations; None is ``Guidance(1.0)``, the conditional model.
        uncond: the null condition (T,), or a negative condition a sample (B, T). None takes the one that
            ``model`` was trained with.
        branches: what runs in the branches that guidance names beside "cond" and "uncond".
        temperature: divides the guided logits; 0 takes the most likely token.
        top_k: keep the k most likely tokens, after guidance.
        top_p: keep the most likely tokens up to this probability, after guidance.
        compile: decode with a compiled step, or on a GPU with a recorded one. The first sampling with a number of rows waits
            for the compiler, or a second for the recording; those that follow find it, whatever their prompts.
        callback: called with a :class:`TokenStep` after each token.

    Returns:
        ids (B, L), int64.

    Raises:
        ValueError: if seeds, shapes or ranges do not fit, or guidance needs a null condition and there is none.
        TypeError: if a seed is no int, or ``guidance`` no ``Guidance``.
        FloatingPointError: if an output holds NaN or +inf, or leaves no token to draw; names the token, the branch and the
            samples.

    Example:
        >>> ids = sample_autoregressive(wrapped, cond, guidance=Guidance(3.0), seeds=[0, 1])
    """
    network, uncond = network_and_null(model, uncond)
    check_condition(cond)
    require(network, "sample_autoregressive", "num_tokens", "make_cache", "prefill", "decode")
    guidance = begin_guidance(guidance, "logits")
    choose = TokenFilter(temperature, top_k, top_p)
    batch, total = len(cond), network.num_tokens
    noise = uniform(generators(check_seeds(seeds, batch)), (total,)).to(cond.device)

    progresses = [progress_at(index, total) for index in range(total)]
    groups = plan(network, cond, uncond, branches, guidance, progresses)
    run = CachedBranches(groups, batch, compile)
    watch = Watch(cond.device)
    ids = cond.new_empty((batch, 0), dtype=torch.long)
    for index, progress in enumerate(progresses):
        outputs = run(ids, guidance.branches_at(progress))
        guided = combine(guidance, progress, outputs, f"token {index}", watch=watch)
        masked = guided.out.amax(-1).isneginf()
        watch.see(f"no token {index} can be drawn", masked, ALL_MASKED)
        ids = torch.cat([ids, draw(choose(guided.out), noise[:, index])[:, None]], dim=1)
        if callback is not None:
            watch.finish()
            callback(TokenStep(index, progress, guided.scale, ids, guided.out, guided.outputs))
    watch.finish()
    return ids


class CachedBranches:
    """The rows of a guided decode step: one cache a network for all its branches, and a view of it for each.

    Args:
        groups: see :func:`unicfg.sampling.branches.plan`; the networks have ``make_cache``, ``prefill`` and ``decode``.
        batch: B.
        compile: decode with compiled steps.

    Raises:
        TypeError: if a network cannot be compiled: its ``make_cache`` takes no ``compile``.
    """

    def __init__(self, groups: Sequence[Group], batch: int, compile: bool = False) -> None:
        self.groups, self.batch = groups, batch
        self.joint: list[Cache] = []
        self.caches: dict[str, Cache] = {}
        for group in groups:
            joint = _make_cache(group.network, batch * len(group.conditions), compile)
            for i, (name, rows) in enumerate(group.conditions.items()):
                cache = joint.rows(i * batch, (i + 1) * batch)
                group.network.prefill(rows, cache)
                self.caches[name] = cache
            self.joint.append(joint)

    def __call__(self, ids: Tensor, needed: tuple[str, ...]) -> dict[str, Tensor]:
        """Output for the next token in each needed branch."""
        outputs: dict[str, Tensor] = {}
        for group, joint in zip(self.groups, self.joint, strict=True):
            for names in group.runs(needed):
                if len({self.caches[name].length for name in names}) > 1:
                    # one of them joins late: each catches up by itself, this once
                    for name in names:
                        outputs[name] = group.network.decode(ids, self.caches[name])
                else:
                    outputs.update(self._together(group, joint, names, ids))
        return {name: outputs[name] for name in needed}

    def _together(
        self, group: Group, joint: Cache, names: tuple[str, ...], ids: Tensor
    ) -> dict[str, Tensor]:
        """Neighbouring branches with caches of one length, in one call."""
        if len(names) == 1:
            return {names[0]: group.network.decode(ids, self.caches[names[0]])}
        first = group.place(names[0])
        cache = joint
        if len(names) < len(group.conditions):
            cache = joint.rows(first * self.batch, (first + len(names)) * self.batch)
        cache.length = self.caches[names[0]].length
        out = group.network.decode(torch.cat([ids] * len(names)), cache)
        for name in names:
            self.caches[name].length = cache.length
        return dict(zip(names, out.split(self.batch), strict=True))


def _make_cache(network: Any, rows: int, compile: bool) -> Any:
    if not compile:
        return network.make_cache(rows)
    if "compile" not in inspect.signature(network.make_cache).parameters:
        raise TypeError(
            f"compile is True, and make_cache of {type(network).__name__} takes no compile=: expected compile=False, or a "
            "model that has a compiled step"
        )
    return network.make_cache(rows, compile=True)


class Uncached:
    """Any ``next_logits(ids (R, n), cond (R, ...)) -> (R, V)`` as a model for :func:`sample_autoregressive`.

    For models of one's own that have no cache to offer: every step runs the whole sequence again, still with both
    branches in one call.

    Args:
        next_logits: logits of the token after ``ids``.
        num_tokens: L.

    Example:
        >>> ids = sample_autoregressive(Uncached(model, 16), cond, uncond=null, guidance=Guidance(3.0), seeds=[0])
    """

    def __init__(self, next_logits: Callable[[Tensor, Tensor], Tensor], num_tokens: int) -> None:
        self.next_logits = next_logits
        self.num_tokens = num_tokens

    def make_cache(self, rows: int) -> ConditionRows:
        """Room for the conditions of ``rows`` sequences."""
        return ConditionRows([None] * rows, range(rows))

    def prefill(self, cond: Tensor, cache: ConditionRows) -> None:
        """Keep the conditions (R, ...), or one (1, ...) for all rows."""
        for row, own in zip(
            cache.places, cond.expand(len(cache.places), *cond.shape[1:]), strict=True
        ):
            cache.shared[row] = own

    def decode(self, ids: Tensor, cache: ConditionRows) -> Tensor:
        """Logits (R, V) of the token after ``ids`` (R, n)."""
        held = [cache.shared[row] for row in cache.places]
        return self.next_logits(ids, torch.stack([own for own in held if own is not None]))


@dataclass
class ConditionRows:
    """The cache of :class:`Uncached`: the condition of each row, and no token.

    Attributes:
        shared: one condition a row, of all rows.
        places: which of these rows this view is of.
        length: tokens held: always 0.
    """

    shared: list[Tensor | None]
    places: range
    length: int = 0

    def rows(self, start: int, stop: int) -> ConditionRows:
        """The rows from ``start`` up to ``stop``: the same memory."""
        return ConditionRows(self.shared, self.places[start:stop])

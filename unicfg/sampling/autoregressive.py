"""Guided sampling of one token after another, with a KV cache, both branches in one pass.

A decode step reads every weight once, whatever the number of rows, so the conditional and the unconditional rows
go through the network together; where the scale is 1 (or 0) only one branch is run, and a branch that joins late
catches up on the tokens so far in a single chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from unicfg.guidance.core import Guidance, Scale
from unicfg.sampling.randomness import check_seeds, uniform_per_sample
from unicfg.sampling.tokens import TokenFilter, draw
from unicfg.training.dropout import ConditionDropout, expand_null


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
        """An empty :class:`Cache` for R ``rows``."""

    def prefill(self, cond: Tensor, cache: Any) -> None:
        """Run the condition (R, T), or (1, T) for all rows, into the cache."""

    def decode(self, ids: Tensor, cache: Any) -> Tensor:
        """Logits (R, V) of the token after ``ids`` (R, n); extends the cache by what it lacks."""


@dataclass(frozen=True)
class TokenStep:
    """What a callback sees after each token.

    Attributes:
        index: of the token, 0 to L - 1.
        progress: index / (L - 1).
        scale: s at this step: a float or (B,).
        ids: tokens so far (B, index + 1).
        guided: the guided logits that the token was drawn from (B, V).
        cond_out: conditional logits (B, V); None where the step did not need them.
        uncond_out: unconditional logits (B, V); None where the step did not need them.
    """

    index: int
    progress: float
    scale: Scale
    ids: Tensor
    guided: Tensor
    cond_out: Tensor | None
    uncond_out: Tensor | None


@torch.no_grad()  # not inference_mode: its tensors could not be trained on afterwards
def sample_autoregressive(
    model: ConditionDropout | AutoregressiveModel,
    cond: Tensor,
    *,
    seeds: Sequence[int],
    guidance: Guidance | None = None,
    uncond: Tensor | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
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
        temperature: divides the guided logits; 0 takes the most likely token.
        top_k: keep the k most likely tokens, after guidance.
        top_p: keep the most likely tokens up to this probability, after guidance.
        callback: called with a :class:`TokenStep` after each token.

    Returns:
        ids (B, L), int64.

    Raises:
        ValueError: if seeds, shapes or ranges do not fit, or guidance needs a null condition and there is none.
        TypeError: if a seed is no int, or ``guidance`` no ``Guidance``.
        FloatingPointError: if the model's outputs leave no token to draw; names the token and the branch.

    Example:
        >>> ids = sample_autoregressive(wrapped, cond, guidance=Guidance(3.0), seeds=[0, 1])
    """
    network, uncond = _network_and_null(model, uncond)
    guidance = Guidance(1.0) if guidance is None else guidance
    if not isinstance(guidance, Guidance):
        raise TypeError(f"guidance is {guidance!r}, expected a Guidance, as in Guidance(3.0)")
    choose = TokenFilter(temperature, top_k, top_p)
    batch, total = len(cond), network.num_tokens
    noise = uniform_per_sample(check_seeds(seeds, batch), (total,)).to(cond.device)

    branches = _Branches(network, cond, uncond, _needed(guidance, total, batch))
    ids = cond.new_empty((batch, 0), dtype=torch.long)
    for index in range(total):
        progress = _progress(index, total)
        cond_out, uncond_out = branches(ids, guidance.branches_at(progress))
        guided = guidance.combine(progress, cond_out, uncond_out)
        _check_finite(guided, {"cond": cond_out, "uncond": uncond_out}, index)
        token = draw(choose(guided), noise[:, index])
        ids = torch.cat([ids, token[:, None]], dim=1)
        if callback is not None:
            scale = guidance.scale_at(progress)
            callback(TokenStep(index, progress, scale, ids, guided, cond_out, uncond_out))
    return ids


def _progress(index: int, total: int) -> float:
    return index / max(total - 1, 1)


def _needed(guidance: Guidance, total: int, batch: int) -> set[str]:
    """Every branch that some step will need; checks every scale before the first step."""
    needed: set[str] = set()
    for index in range(total):
        scale = guidance.scale_at(_progress(index, total))
        if isinstance(scale, Tensor) and scale.ndim == 1 and len(scale) not in (1, batch):
            raise ValueError(
                f"the scale has {len(scale)} values for a batch of {batch}, expected one each"
            )
        needed.update(guidance.branches_at(_progress(index, total)))
    return needed


def _check_finite(guided: Tensor, outputs: dict[str, Tensor | None], index: int) -> None:
    """Stop at the first token that cannot be drawn.

    Raises:
        FloatingPointError: if a row of the guided logits holds NaN or +inf, or is masked throughout.
    """
    if bool(torch.isfinite(guided.amax(-1)).all()):
        return
    broken = [
        k for k, v in outputs.items() if v is not None and bool((v.isnan() | v.isposinf()).any())
    ]
    raise FloatingPointError(
        f"no token {index} can be drawn: the guided logits hold NaN or +inf, or mask every token; "
        f"NaN or +inf came from the branches {broken}"
    )


def _network_and_null(
    model: ConditionDropout | AutoregressiveModel, uncond: Tensor | None
) -> tuple[Any, Tensor | None]:
    """The bare network in eval mode, and the null condition that goes with it."""
    network: Any = model
    if isinstance(model, ConditionDropout):
        network = model.model
        null = model.null_condition
        if uncond is None and isinstance(null, Tensor):
            uncond = null
    if isinstance(network, nn.Module) and network.training:
        raise ValueError("model is in training mode, expected model.eval() before sampling")
    return network, uncond


class _Branches:
    """The rows of a guided pass, [cond; uncond] in that order: the one place that knows it."""

    def __init__(self, network: Any, cond: Tensor, uncond: Tensor | None, needed: set[str]) -> None:
        batch = len(cond)
        conditions = {"cond": cond}
        if "uncond" in needed:
            if uncond is None:
                raise ValueError(
                    "guidance needs an unconditional branch: expected a ConditionDropout with a "
                    "tensor as null condition, or uncond=, the null condition of the training"
                )
            conditions["uncond"] = _check_uncond(uncond, cond)
        names = [name for name in ("cond", "uncond") if name in needed]
        self.network = network
        self.batch = batch
        self.joint: Cache = network.make_cache(batch * len(names))
        self.caches: dict[str, Cache] = {}
        for i, name in enumerate(names):
            cache = self.joint.rows(i * batch, (i + 1) * batch)
            network.prefill(conditions[name], cache)
            self.caches[name] = cache

    def __call__(self, ids: Tensor, needed: tuple[str, ...]) -> tuple[Tensor | None, Tensor | None]:
        """Logits of the next token in each needed branch, None in the others."""
        lengths = {self.caches[name].length for name in needed}
        if len(needed) == 2 and len(lengths) == 1:
            return self._together(ids, lengths.pop())
        outputs = {name: self.network.decode(ids, self.caches[name]) for name in needed}
        return outputs.get("cond"), outputs.get("uncond")

    def _together(self, ids: Tensor, length: int) -> tuple[Tensor, Tensor]:
        self.joint.length = length
        logits = self.network.decode(torch.cat([ids, ids]), self.joint)
        for cache in self.caches.values():
            cache.length = self.joint.length
        return logits[: self.batch], logits[self.batch :]


def _check_uncond(uncond: Tensor, cond: Tensor) -> Tensor:
    """The null condition as (1, T), or one negative condition a sample as (B, T)."""
    if uncond.shape not in (cond.shape, cond.shape[1:]):
        raise ValueError(
            f"uncond has shape {tuple(uncond.shape)}, expected {tuple(cond.shape[1:])} "
            f"or {tuple(cond.shape)}"
        )
    rows = uncond if uncond.shape == cond.shape else expand_null(uncond, 1)
    return rows.to(cond.device)

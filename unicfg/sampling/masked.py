"""Guided sampling of masked tokens, many at a time (MaskGIT: Chang et al., arXiv 2202.04200, section 3.2).

Every step predicts all masked tokens at once, from guided logits, draws each of them, and keeps those it is most
confident of; the others are masked again. The guided distribution serves both: the draw and the confidence.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor

from unicfg.guidance.core import Guidance, Scale
from unicfg.sampling.branches import (
    Branch,
    Guided,
    OfBranches,
    WholeGridPass,
    begin_guidance,
    check_condition,
    network_and_null,
    plan,
    require,
)
from unicfg.sampling.randomness import check_seeds, generators, uniform
from unicfg.sampling.solvers import check_steps
from unicfg.sampling.soundness import Watch
from unicfg.sampling.tokens import ALL_MASKED, TokenFilter, at_places, draw
from unicfg.training.dropout import ConditionDropout

Reveal = Literal["cosine", "linear", "arccos", "halton"]
REVEALS: tuple[Reveal, ...] = get_args(Reveal)
CHOICE_NOISE = 4.5


class MaskedModel(Protocol):
    """What ``sample_masked`` asks of a model; ``models.MaskedTransformer`` is one.

    It may have ``encode_condition(cond)``, and its call an argument ``places``: see
    :class:`unicfg.sampling.branches.WholeGridPass`.
    """

    @property
    def num_tokens(self) -> int:
        """L, the tokens of one sample."""

    @property
    def mask_token(self) -> int:
        """The id that stands for an unknown token."""

    def __call__(self, ids: Tensor, cond: Any) -> Tensor:
        """Logits (R, L, V) of ids (R, L); (R, K, V) where it takes ``places`` (R, K) and they are given."""


@dataclass(frozen=True)
class UnmaskingStep(OfBranches):
    """What a callback sees after each pass.

    Attributes:
        index: of the step, 0 to steps - 1; steps that reveal no token in any sample are left out, unless they refresh a
            direction that is held.
        progress: what the schedule has revealed before the step, as a share of what it has before the last one: 0.0 at
            the first step, 1.0 at the last, 0.0 at an only one; the same for all samples whatever their masks.
        scale: s at this step: a float or (B,).
        ids: tokens (B, L); ``mask_token`` where still unknown.
        revealed: bool (B, L), True at the tokens that this step has revealed.
        places: int64 (B, K), the tokens that the step may draw: those that the fixed order reveals, or all among which
            confidence chooses. A sample that has fewer than another has tokens at the end of its row that it does not draw.
        guided: guided logits (B, K, V), of these.
        outputs: logits (B, K, V) of each branch that the step needed.
    """

    index: int
    progress: float
    scale: Scale
    ids: Tensor
    revealed: Tensor
    places: Tensor
    guided: Tensor
    outputs: Mapping[str, Tensor]


@torch.no_grad()  # not inference_mode: its tensors could not be trained on afterwards
def sample_masked(
    model: ConditionDropout | MaskedModel,
    cond: Tensor,
    *,
    seeds: Sequence[int],
    guidance: Guidance | None = None,
    uncond: Tensor | None = None,
    branches: Mapping[str, Branch] | None = None,
    steps: int = 12,
    reveal: Reveal = "cosine",
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    choice_noise: float = CHOICE_NOISE,
    init: Tensor | None = None,
    mask: Tensor | None = None,
    refresh: int = 1,
    callback: Callable[[UnmaskingStep], None] | None = None,
) -> Tensor:
    """Draw image tokens in a few parallel steps by extrapolated logits.

    Args:
        model: a model, or the ``ConditionDropout`` it was trained in, which brings the null condition.
        cond: condition ids (B, T).
        seeds: one int a sample. The same seed gives the same image in a batch of any size.
        guidance: scale, schedule and mitigations; None is ``Guidance(1.0)``, the conditional model.
        uncond: the null condition (T,), or a negative condition a sample (B, T). None takes the one that
            ``model`` was trained with.
        branches: what runs in the branches that guidance names beside "cond" and "uncond".
        steps: of the schedule; more than L count as L. A step in which no sample has a token to reveal runs no
            pass, so a sample alone takes no more passes than it has masked tokens (without ``refresh``).
        reveal: how many tokens are still masked after a share r of the steps: "cosine" cos(pi r / 2), "linear" 1 - r
            (arXiv 2202.04200, section 3.3), "arccos" 2 arccos(r) / pi. "halton" reveals as many as "arccos" does, at
            places that a low-discrepancy sequence fixes, whatever the confidence (Besnier et al., arXiv 2503.17076).
        temperature: divides the guided logits; 0 takes the most likely tokens.
        top_k: keep the k most likely tokens, after guidance.
        top_p: keep the most likely tokens up to this probability, after guidance.
        choice_noise: Gumbel noise on the log confidence, which is that of the guided softmax before temperature and filters,
            annealed to 0 over the steps; 0 keeps the most confident. MaskGIT's choice temperature; "halton" has none.
        init: tokens to inpaint, (B, L) or (B, h, w), or one sample's (L,), (h, w) for all.
        mask: bool, True where to draw anew: a shape of ``init``. The rest of ``init`` is shown to the model and comes
            back as it is.
        refresh: run the other branches than the condition in every ``refresh``-th step only, see
            :func:`sample_diffusion`; the outputs of the others, which a callback sees, are then made from the held distance.
        callback: called with an :class:`UnmaskingStep` after each step.

    Returns:
        ids (B, L), int64.

    Raises:
        ValueError: if seeds, shapes or ranges do not fit, or guidance needs a null condition and there is none.
        TypeError: if a seed is no int, ``guidance`` no ``Guidance``, or ``model`` no masked model.
        FloatingPointError: if an output holds NaN or +inf where a token may be drawn (in a sample that has fewer left than
            another also where it keeps one), or leaves none to draw; names the step, the branch and the samples.

    Example:
        >>> ids = sample_masked(wrapped, cond, guidance=Guidance(3.0), seeds=[0, 1], steps=8)
    """
    network, uncond = network_and_null(model, uncond)
    check_condition(cond)
    require(network, "sample_masked", "num_tokens", "mask_token")
    guidance = begin_guidance(guidance, "logits")
    choose = TokenFilter(temperature, top_k, top_p)
    _check_options(steps, reveal, choice_noise)
    batch = len(cond)
    sources = generators(check_seeds(seeds, batch))
    ids = _start(network, batch, init, mask, cond.device)
    masked = ids == network.mask_token
    steps = min(steps, network.num_tokens)
    counts = torch.stack(reveal_counts(masked.sum(1), steps, reveal))  # (S, B)
    fixed = reveal == "halton"
    left = counts.flip(0).cumsum(0).flip(0)
    # a fixed order is known before the step: nothing else need be asked for
    asked = counts if fixed else left
    # one look at a GPU, not one a step
    busy, sizes, remaining = torch.stack([x.amax(1) for x in (counts, asked, left)]).tolist()
    if not any(busy):
        return ids  # the mask leaves nothing to draw
    shares = [1 - masked_share(reveal, index / steps) for index in range(steps)]
    # rounded, or the ends of an interval at 0.4 would miss a step at 0.3999999999999999
    progresses = [round(share / max(shares[-1], 1e-12), 12) for share in shares]
    # with refresh, a step that reveals nothing here may hold the direction for those that do: a sample is not to depend on
    # the others of its batch
    passes = [p for p, runs in zip(progresses, busy, strict=True) if runs or refresh > 1]
    groups = plan(network, cond, uncond, branches, guidance, passes)
    # another mitigation may look at the whole sample
    by_row = all(getattr(m, "space", None) == "logits" for m in guidance.mitigations)
    watch = Watch(cond.device)
    run = WholeGridPass(groups, guidance, batch, refresh=refresh, watch=watch)
    columns = torch.arange(network.num_tokens, device=cond.device)
    ranks = halton_order(network.num_tokens).to(cond.device) if fixed else columns
    for index, progress in enumerate(progresses):
        # before an idle step is passed over: it may be idle here, and not in a batch with other masks
        noise = uniform(sources, (2, network.num_tokens)).to(cond.device, non_blocking=True)
        if not remaining[index]:
            break
        if not busy[index] and not run.refreshes_at(progress):
            run.pass_over(progress)
            continue
        places = ranks.masked_fill(~masked, len(ranks)).argsort(dim=1)[:, : sizes[index]]
        # a sample that asks for fewer than another has some at the end that are not its own to draw
        drawable = columns[: sizes[index]] < asked[index][:, None]
        guided = run(progress, f"step {index}", ids, places=places if by_row else None)
        _check_logits(guided.out, places if by_row else ids, network.mask_token)
        if not by_row:
            guided = _guided_at(guided, places)
        none = (guided.out.amax(-1).isneginf() & drawable).any(1)
        watch.see(f"no token can be drawn at step {index}", none, ALL_MASKED)
        drawn = draw(choose(guided.out), noise[:, 0].gather(1, places))
        kept = drawable
        if not fixed:
            # of the guided softmax itself: after temperature and filters every token may be certain
            chosen = guided.out.double().log_softmax(-1).gather(-1, drawn[..., None])
            gumbel = -(-noise[:, 1].gather(1, places).clamp(min=1e-300).log()).log()
            score = chosen.squeeze(-1) + choice_noise * (1 - (index + 1) / steps) * gumbel
            kept = _highest(score, drawable, counts[index])
        ids = ids.scatter(1, places, drawn.where(kept, ids.gather(1, places)))
        revealed = torch.zeros_like(masked).scatter(1, places, kept)
        masked = masked & ~revealed
        if callback is not None:
            watch.finish()
            callback(
                UnmaskingStep(
                    index, progress, guided.scale, ids, revealed, places, guided.out, guided.outputs
                )
            )
    watch.finish()
    return ids


def masked_share(reveal: Reveal, r: float) -> float:
    """Share of the tokens that is still masked after a share ``r`` of the steps."""
    if reveal == "cosine":
        return math.cos(math.pi / 2 * r)
    if reveal == "linear":
        return 1 - r
    return 2 / math.pi * math.acos(r)


def reveal_counts(masked: Tensor, steps: int, reveal: Reveal) -> list[Tensor]:
    """How many tokens each step reveals, in each sample by itself: the rest of the batch plays no part.

    Args:
        masked: number of masked tokens of each sample (B,).
        steps: of the schedule.
        reveal: the schedule.

    Returns:
        one (B,) a step. A sample with at least as many tokens as steps reveals one or more a step, and the rest at
        the last; one with fewer spreads them over the schedule, the first at the first step, and some of its steps
        reveal none.
    """
    counts, left = [], masked
    for index in range(steps):
        share = masked_share(reveal, (index + 1) / steps) if index + 1 < steps else 0.0
        wanted = (masked.double() * share + 1e-9).floor().long()  # 22 * (1 - 21 / 22) is 1, not 0
        after = torch.where(masked < steps, wanted, torch.minimum(wanted, (left - 1).clamp(min=0)))
        counts.append(left - after)
        left = after
    return counts


def halton_order(length: int) -> Tensor:
    """The step at which each place of a square grid is visited by a Halton sequence, (L,), a permutation.

    Points (radical inverse in base 2, in base 3) fall on the grid's cells one after another, evenly spread from the
    first few on; a cell that was visited before is passed over.

    Raises:
        ValueError: if ``length`` is no square number.
    """
    side = math.isqrt(length)
    if side * side != length:
        raise ValueError(f"the model has {length} tokens, expected a square number for 'halton'")
    rank = [-1] * length
    point, visited = 1, 0
    while visited < length:
        row, column = int(_radical_inverse(point, 2) * side), int(_radical_inverse(point, 3) * side)
        if rank[row * side + column] < 0:
            rank[row * side + column] = visited
            visited += 1
        point += 1
    return torch.tensor(rank)


def _radical_inverse(number: int, base: int) -> float:
    """The digits of a number mirrored at the point: 6 = 110 in base 2 becomes 0.011."""
    inverse, unit = 0.0, 1.0 / base
    while number:
        number, digit = divmod(number, base)
        inverse += digit * unit
        unit /= base
    return inverse


def _highest(score: Tensor, among: Tensor, count: Tensor) -> Tensor:
    """True at the ``count`` (B,) highest scores (B, L) of each row, looking only where ``among`` is True."""
    order = score.masked_fill(~among, -math.inf).argsort(dim=1, descending=True, stable=True)
    rank = torch.empty_like(order)
    places = torch.arange(order.shape[1], device=order.device).expand_as(order)
    rank.scatter_(1, order, places)
    return among & (rank < count[:, None].to(rank.device))


def _check_logits(logits: Tensor, tokens: Tensor, mask_token: int) -> None:
    if logits.ndim != 3 or logits.shape[:2] != tokens.shape or logits.shape[2] > mask_token:
        raise ValueError(
            f"the model returned logits {tuple(logits.shape)} for tokens {tuple(tokens.shape)}, expected (B, tokens, V) with V at "
            f"most {mask_token}, the id that stands for an unknown token"
        )


def _guided_at(guided: Guided, places: Tensor) -> Guided:
    outputs = {name: at_places(out, places) for name, out in guided.outputs.items()}
    return guided._replace(out=at_places(guided.out, places), outputs=outputs)


def _start(
    network: Any, batch: int, init: Tensor | None, mask: Tensor | None, device: torch.device
) -> Tensor:
    """The ids (B, L) to begin with: all masked, or those of ``init`` where ``mask`` is False."""
    length, unknown = network.num_tokens, network.mask_token
    if init is None and mask is None:
        return torch.full((batch, length), unknown, dtype=torch.long, device=device)
    if init is None or mask is None:
        missing = "init" if init is None else "mask"
        raise ValueError(f"{missing} is None, expected both init and mask, or neither")
    if init.is_floating_point() or init.dtype == torch.bool:
        raise TypeError(f"init is {init.dtype}, expected token ids")
    if mask.dtype != torch.bool:
        raise TypeError(f"mask is {mask.dtype}, expected bool, True where to draw anew")
    given = _rows("init", init, batch, length).to(device)
    anew = _rows("mask", mask, batch, length).to(device)
    known = given[~anew]
    if known.numel() and not (int(known.min()) >= 0 and int(known.max()) < unknown):
        raise ValueError(
            f"init holds ids from {int(known.min())} to {int(known.max())}, "
            f"expected 0 to {unknown - 1}"
        )
    return given.long().masked_fill(anew, unknown)


def _rows(name: str, value: Tensor, batch: int, length: int) -> Tensor:
    """A value for each token as (B, L)."""
    side = math.isqrt(length)
    shapes = [(length,)] + ([(side, side)] if side * side == length else [])
    if tuple(value.shape) in shapes:
        return value.reshape(1, length).expand(batch, length)
    if tuple(value.shape) in [(batch, *shape) for shape in shapes]:
        return value.reshape(batch, length)
    raise ValueError(
        f"{name} has shape {tuple(value.shape)}, expected ({length},), ({batch}, {length}), "
        f"({side}, {side}) or ({batch}, {side}, {side})"
    )


def _check_options(steps: int, reveal: str, choice_noise: float) -> None:
    check_steps(steps)
    if reveal not in REVEALS:
        raise ValueError(f"reveal is {reveal!r}, expected one of {', '.join(REVEALS)}")
    if not (math.isfinite(choice_noise) and choice_noise >= 0):
        raise ValueError(f"choice_noise is {choice_noise}, expected a finite number >= 0")
    if reveal == "halton" and choice_noise != CHOICE_NOISE:
        raise ValueError(
            f"choice_noise is {choice_noise} with reveal 'halton', which asks for no confidence: expected reveal to be "
            "'cosine', 'linear' or 'arccos'"
        )

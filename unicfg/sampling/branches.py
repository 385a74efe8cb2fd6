"""Which branches a sampling needs, and the rows of a guided pass: [cond; uncond; ...], in that order.

Every sampler runs all branches of a step that share a network in one call of B rows each, and leaves out those that
the step does not need.
"""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from unicfg.guidance.core import Guidance, Scale, to_dtype
from unicfg.guidance.schedules import is_steady
from unicfg.guidance.spaces import Level
from unicfg.sampling.randomness import is_count
from unicfg.sampling.soundness import Watch
from unicfg.sampling.tokens import at_places
from unicfg.training.dropout import ConditionDropout, expand_null


def check_condition(cond: object) -> None:
    """Refuse a condition that is no tensor with a row for each sample.

    Raises:
        TypeError: if it is something else.
    """
    if not isinstance(cond, Tensor) or not cond.ndim:
        raise TypeError(f"cond is {cond!r:.100}, expected a tensor (B, ...)")


def require(model: Any, sampler: str, *names: str) -> None:
    """Refuse a model that lacks what a sampler asks of it.

    Raises:
        TypeError: names the sampler, the model and what it lacks.
    """
    missing = [name for name in names if not hasattr(model, name)]
    if missing:
        raise TypeError(
            f"{sampler} got a {type(model).__name__}, which has no {', '.join(missing)}: expected a model of the "
            "sampler's own kind"
        )


@dataclass(frozen=True)
class Branch:
    """What a branch beside "cond" and "uncond" runs; see ``unicfg.guidance.branches`` for what it weighs.

    Attributes:
        cond: its condition, one for all samples (T,) or (B, T), or whatever else the caller takes for a condition; None is
            that of the prompt.
        model: its model, or the ``ConditionDropout`` around it: of the same kind as the sampler's, on the same tokens
            or latents. None is the sampler's own, which runs the branch in the same pass as the others.
    """

    cond: Any = None
    model: Any = None


def branch_of(name: str, branches: Mapping[str, Any]) -> Branch:
    """The branch of this name.

    Raises:
        ValueError: if it is not there, is no ``Branch``, or says nothing.
    """
    if name not in branches:
        raise ValueError(
            f"guidance needs the branch {name!r}: expected branches={{{name!r}: Branch(...)}}"
        )
    branch = branches[name]
    if not isinstance(branch, Branch):
        raise ValueError(f"the branch {name!r} is {branch!r}, expected a Branch")
    if branch.cond is None and branch.model is None:
        raise ValueError(
            f"the branch {name!r} has neither cond nor model, expected one: it would repeat 'cond'"
        )
    return branch


class OfBranches:
    """What the steps of the samplers share: the two usual ones of their outputs, by name."""

    outputs: Mapping[str, Tensor]

    @property
    def cond_out(self) -> Tensor | None:
        """The conditional output; None where the step did not need it."""
        return self.outputs.get("cond")

    @property
    def uncond_out(self) -> Tensor | None:
        """The unconditional output; None where the step did not need it."""
        return self.outputs.get("uncond")


class Guided(NamedTuple):
    """What guidance made of the branches at one step.

    Attributes:
        out: the guided output (B, ...).
        scale: s at this step: a float or (B,).
        outputs: of each branch that the step needed (B, ...).
        still: the samples that a mitigation holds where they are, bool (), (1,) or (B,); None where there are none.
    """

    out: Tensor
    scale: Scale
    outputs: Mapping[str, Tensor]
    still: Tensor | None = None


def combine(
    guidance: Guidance,
    progress: float,
    outputs: Mapping[str, Tensor],
    step: str,
    level: Level | None = None,
    watch: Watch | None = None,
) -> Guided:
    """Guide the outputs of one step.

    Args:
        guidance: scale, schedule and mitigations.
        progress: fraction of sampling done.
        outputs: of each branch that the step needs (B, ...).
        step: what to call this step in an error, as in "step 3".
        level: where a denoiser's outputs were made.
        watch: of the sampling: says what is looked for, and may look later. None looks at once, as at logits.

    Raises:
        ValueError: if the outputs of two branches differ in shape.
        FloatingPointError: if an output holds what ``watch`` refuses, and is looked at; names the step, the branch and
            the samples.
    """
    watch = Watch() if watch is None else watch
    watch.see_outputs(outputs, step)
    check_same_shape(outputs)
    out = guidance.combine_branches(progress, outputs, level)
    watch.see_guided(out, step)
    return Guided(out, guidance.scale_at(progress), outputs, guidance.still_at(progress))


def check_same_shape(outputs: Mapping[str, Tensor]) -> None:
    """Refuse branches that speak of different things.

    Raises:
        ValueError: names the branch, and both shapes or dtypes.
    """
    (first, out), *others = outputs.items()
    for name, other in others:
        if other.dtype != out.dtype:
            raise ValueError(
                f"the branch {name!r} gives {other.dtype} and {first!r} {out.dtype}, expected models of one dtype"
            )
        if other.shape != out.shape:
            raise ValueError(
                f"the branch {name!r} gives {tuple(other.shape)} and {first!r} {tuple(out.shape)}, expected equal "
                "shapes: a model of the same tokenizer, codebook and latents"
            )


def begin_guidance(guidance: Guidance | None, space: str) -> Guidance:
    """The guidance of one sampling; None is the conditional model.

    Args:
        guidance: as given to the sampler.
        space: what the model predicts, see :meth:`Guidance.begin`.

    Raises:
        TypeError: if it is something else.
        ValueError: if a mitigation has no meaning in ``space``.
    """
    guidance = Guidance(1.0) if guidance is None else guidance
    if not isinstance(guidance, Guidance):
        raise TypeError(f"guidance is {guidance!r}, expected a Guidance, as in Guidance(3.0)")
    return guidance.begin(space)


def needs_progress(guidance: Guidance) -> bool:
    """Whether guidance is another at other steps of a sampling."""
    return not is_steady(guidance.scale) or any(hasattr(m, "at") for m in guidance.mitigations)


def progress_at(index: int, total: int) -> float:
    """Progress of step ``index`` of ``total``: 0.0 at the first, 1.0 at the last."""
    return index / max(total - 1, 1)


def needed_branches(guidance: Guidance, progresses: Iterable[float], batch: int) -> tuple[str, ...]:
    """Every branch that some step will need, in row order; checks every scale before the first step.

    Raises:
        ValueError: if a scale (B,) does not fit the batch.
    """
    needed: dict[str, None] = {}
    for progress in progresses:
        for scale in guidance.strengths_at(progress):
            if isinstance(scale, Tensor) and scale.ndim == 1 and len(scale) not in (1, batch):
                raise ValueError(
                    f"the scale has {len(scale)} values for a batch of {batch}, expected one each"
                )
        needed.update(dict.fromkeys(guidance.branches_at(progress)))
    first = tuple(name for name in ("cond", "uncond") if name in needed)
    return first + tuple(name for name in needed if name not in first)


def network_and_null(model: Any, uncond: Tensor | None) -> tuple[Any, Tensor | None]:
    """The bare network in eval mode, and the null condition that goes with it.

    Raises:
        ValueError: if the network is in training mode.
        TypeError: if ``uncond`` is no tensor.
    """
    network: Any = model
    if isinstance(model, ConditionDropout):
        network = model.model
    if not (uncond is None or isinstance(uncond, Tensor)):
        raise TypeError(f"uncond is {uncond!r:.100}, expected a tensor, or None")
    if uncond is None:
        # of the dropout wrapper, or of a model that brings one without it
        null = getattr(model, "null_condition", None)
        uncond = null if isinstance(null, Tensor) else None
    if isinstance(network, nn.Module) and network.training:
        raise ValueError("model is in training mode, expected model.eval() before sampling")
    return network, uncond


@dataclass(frozen=True)
class Group:
    """The branches that one network runs, together in one pass.

    Attributes:
        network: the bare network.
        conditions: of each branch, in row order: (B, ...), or (1, ...) where one row serves all.
    """

    network: Any
    conditions: dict[str, Tensor]

    def runs(self, needed: Iterable[str]) -> list[tuple[str, ...]]:
        """The needed branches of this group, as stretches of neighbouring rows."""
        wanted, open_ = set(needed), False
        stretches: list[tuple[str, ...]] = []
        for name in self.conditions:
            if name not in wanted:
                open_ = False
            elif open_:
                stretches[-1] += (name,)
            else:
                stretches.append((name,))
                open_ = True
        return stretches

    def place(self, name: str) -> int:
        """The place of a branch in row order."""
        return list(self.conditions).index(name)


def plan(
    network: Any,
    cond: Tensor,
    uncond: Tensor | None,
    branches: Mapping[str, Branch] | None,
    guidance: Guidance,
    progresses: Iterable[float],
) -> list[Group]:
    """Which network runs which branches of a sampling, with which conditions.

    Args:
        network: the sampler's own.
        cond: (B, ...).
        uncond: the null condition (...), or (B, ...).
        branches: those beside "cond" and "uncond".
        guidance: says which branches are needed.
        progresses: of all steps.

    Raises:
        ValueError: if a branch is needed and not there, or there and of no use, or a condition does not fit, or a
            model is of another kind, or in training mode.
    """
    extra = {} if branches is None else dict(branches)
    for name in ("cond", "uncond"):
        if name in extra:
            raise ValueError(
                f"branches has {name!r}, expected other names: these two are the arguments cond and uncond"
            )
    needed = needed_branches(guidance, progresses, len(cond))
    unknown = [name for name in extra if name not in guidance.branch_names]
    if unknown:
        raise ValueError(
            f"branches has {unknown}, and guidance knows {guidance.branch_names}: expected weights for each, as in "
            "Guidance(branches.weak(2.0))"
        )
    groups: list[Group] = []
    for name in needed:
        own, condition = network, cond
        if name == "uncond":
            condition = _uncond(cond, uncond)
        elif name != "cond":
            own, condition = _resolve(name, branch_of(name, extra), network, cond)
        group = next((group for group in groups if group.network is own), None)
        if group is None:
            groups.append(group := Group(own, {}))
        group.conditions[name] = condition
    return groups


def _uncond(cond: Tensor, uncond: Tensor | None) -> Tensor:
    if uncond is None:
        raise ValueError(
            "guidance needs an unconditional branch: expected a ConditionDropout with a "
            "tensor as null condition, or uncond=, the null condition of the training"
        )
    return _one_or_each("uncond", uncond, cond)


def _one_or_each(name: str, own: object, cond: Tensor) -> Tensor:
    if not isinstance(own, Tensor):
        raise TypeError(f"{name} is {own!r:.100}, expected a tensor")
    if own.shape not in (cond.shape, cond.shape[1:]):
        raise ValueError(
            f"{name} has shape {tuple(own.shape)}, expected {tuple(cond.shape[1:])} "
            f"or {tuple(cond.shape)}"
        )
    rows = own if own.shape == cond.shape else expand_null(own, 1)
    return rows.to(cond.device)


# what two models must agree in for their outputs to be mixed
_KIND = ("num_tokens", "mask_token", "latent_shape", "space", "path", "order", "codebook_size")


def _resolve(name: str, branch: Branch, network: Any, cond: Tensor) -> tuple[Any, Tensor]:
    """The network and the condition of a branch."""
    condition = (
        cond
        if branch.cond is None
        else _one_or_each(f"cond of the branch {name!r}", branch.cond, cond)
    )
    if branch.model is None:
        return network, condition
    other, _ = network_and_null(branch.model, None)
    # a hybrid's denoiser is its head
    pairs = [
        (getattr(network, part, None), getattr(other, part, None)) for part in ("head", "config")
    ]
    pairs.append((network, other))
    for (own, foreign), attribute in itertools.product(pairs, _KIND):
        ours, theirs = getattr(own, attribute, None), getattr(foreign, attribute, None)
        # a plain callable declares nothing, and the sampler was told
        if None not in (ours, theirs) and ours != theirs:
            raise ValueError(
                f"the model of the branch {name!r} has {attribute} {theirs!r} and the guided one {ours!r}: expected a "
                "model of the same kind, tokenizer and codebook"
            )
    return other, condition


@dataclass(frozen=True)
class _Conditions:
    """The conditions of a group, each row once, and what its stretches of branches make of them.

    Attributes:
        joint: ids (N, ...), or what the network has encoded them to.
        places: of each branch, the row of each sample (B,).
        made: the rows of each stretch that was asked for.
    """

    joint: Any
    places: Mapping[str, Tensor]
    made: dict[tuple[str, ...], Any]

    def of(self, names: tuple[str, ...]) -> Any:
        """The rows of some branches, in this order."""
        if names not in self.made:
            index = torch.cat([self.places[name] for name in names])
            plain = isinstance(self.joint, Tensor)
            self.made[names] = (
                self.joint[index.to(self.joint.device)] if plain else self.joint.take(index)
            )
        return self.made[names]


class WholeGridPass:
    """Networks that see the whole sample at every step, called once a step for all branches that each of them runs.

    A network is any callable ``network(x, cond, *rest)`` on rows, or ``network(x, cond, t)`` for a denoiser. What it
    has of the following is used, once per sampling:

    - ``for_sampling()``: a network that computes the same, and is called in its place;
    - ``encode_condition(cond)``: what takes the place of ``cond`` in every call; it has a method ``take(index)``, the
      rows (R,) of an index, which may name one more than once: what all samples share is encoded once;
    - ``encode_times(times (N,))``: a list of what takes the place of ``t``, the same for all rows;
    - an argument ``places`` (R, K): the tokens whose outputs are wanted, so that it need not compute the others.

    Args:
        groups: see :func:`plan`.
        guidance: scale, schedule and mitigations.
        batch: B.
        times: of a denoiser, those that it will be called with.
        device: of x, for the times.
        refresh: run the other branches than "cond" in every ``refresh``-th call only, or where they were not needed before;
            in between their distance from it is that of the last time.
        watch: see :func:`combine`.

    Raises:
        ValueError: if ``refresh`` is less than 1.
    """

    def __init__(
        self,
        groups: Sequence[Group],
        guidance: Guidance,
        batch: int,
        times: Sequence[float] = (),
        device: torch.device | None = None,
        refresh: int = 1,
        watch: Watch | None = None,
    ) -> None:
        if not is_count(refresh):
            raise ValueError(f"refresh is {refresh!r}, expected an int >= 1")
        self.guidance, self.batch, self.refresh, self.watch = guidance, batch, refresh, watch
        self._held: dict[str, Tensor] = {}  # cond_out - out of the other branches
        self._calls = 0
        self.groups = [Group(_own_form(group.network), group.conditions) for group in groups]
        self.encoded = [self._encode(group) for group in self.groups]
        self.encoded_times = [_encode_times(group.network, times, device) for group in self.groups]

    def _encode(self, group: Group) -> _Conditions:
        own = list(group.conditions.values())
        encode = getattr(group.network, "encode_condition", None)
        joint: Any = torch.cat(own)
        # a condition that serves all samples is one row, taken B times
        starts = itertools.accumulate([len(rows) for rows in own], initial=0)
        places = {
            name: torch.arange(start, start + len(rows)).expand(self.batch)
            for (name, rows), start in zip(group.conditions.items(), starts, strict=False)
        }
        return _Conditions(joint if encode is None else encode(joint), places, {})

    def refreshes_at(self, progress: float) -> bool:
        """Whether the next call, at ``progress``, runs all branches for the sake of those that follow."""
        return self._is_due(self._others_at(progress))

    def _is_due(self, others: Sequence[str]) -> bool:
        due = self._calls % self.refresh == 0 or any(name not in self._held for name in others)
        return bool(others) and due

    def pass_over(self, progress: float) -> None:
        """Count a call that is not made, so that what is refreshed does not depend on it."""
        self._calls += 1
        if not self._others_at(progress):
            self._held = {}

    def _others_at(self, progress: float) -> list[str]:
        """The branches beside "cond" whose distance from it is held; none where nothing is."""
        if self.refresh == 1:
            return []
        needed = self.guidance.branches_at(progress)
        return [name for name in needed if name != "cond"] if "cond" in needed else []

    def __call__(
        self,
        progress: float,
        step: str,
        x: Tensor,
        *rest: Tensor,
        t: float | None = None,
        level: Level | None = None,
        places: Tensor | None = None,
    ) -> Guided:
        """Run the branches that ``progress`` needs on x (B, ...) and guide them.

        Args:
            progress: fraction of sampling done.
            step: what to call this step in an error.
            x: (B, ...), the same for every branch.
            rest: further arguments of the network, (B, ...) each.
            t: of a denoiser, the time of x.
            level: of a denoiser, the noise level of x.
            places: int64 (B, K), the tokens of x (B, L, ...) whose outputs (B, K, ...) are wanted; None is all.

        Raises:
            ValueError: if the outputs of two branches differ in shape.
            FloatingPointError: see :func:`combine`.
        """
        outputs = self.branches(progress, x, *rest, t=t, places=places)
        return combine(self.guidance, progress, outputs, step, level, self.watch)

    def branches(
        self,
        progress: float,
        x: Tensor,
        *rest: Tensor,
        t: float | None = None,
        places: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Outputs of the branches that ``progress`` needs, in as few calls as there are networks."""
        needed, others = self.guidance.branches_at(progress), self._others_at(progress)
        fresh = self._is_due(others)
        self._calls += 1
        if not others:
            self._held = {}
            return self._run(needed, x, rest, t, places)
        if not fresh:
            cond_out = self._run(("cond",), x, rest, t, places)["cond"]
            held = {name: _at(self._held[name], places) for name in others}
            near = {name: to_dtype(cond_out - held[name], cond_out.dtype) for name in others}
            return {name: near.get(name, cond_out) for name in needed}
        # everywhere: the steps that follow want other places
        outputs = self._run(needed, x, rest, t)
        self._held = {name: _distance(outputs, name) for name in others}
        return {name: _at(out, places, x.shape[1:2]) for name, out in outputs.items()}

    def _run(
        self,
        needed: tuple[str, ...],
        x: Tensor,
        rest: tuple[Tensor, ...],
        t: float | None,
        places: Tensor | None = None,
    ) -> dict[str, Tensor]:
        parts: dict[str, Tensor] = {}
        for group, encoded, times in zip(
            self.groups, self.encoded, self.encoded_times, strict=True
        ):
            for names in group.runs(needed):
                count = len(names)
                more: list[Any] = [torch.cat([value] * count) for value in rest]
                if t is not None:
                    rows = (len(x) * count,)
                    known = times.get(t)
                    more.append(
                        torch.full(rows, t, dtype=x.dtype, device=x.device)
                        if known is None
                        else known
                    )
                own = (torch.cat([x] * count), encoded.of(names), *more)
                wanted = None if places is None else torch.cat([places] * count)
                if wanted is not None and takes_places(group.network):
                    out = group.network(*own, places=wanted)
                    _check_tokens(out, tuple(wanted.shape))
                else:
                    out = _at(group.network(*own), wanted, x.shape[1:2])
                parts.update(zip(names, out.split(self.batch), strict=True))
        return {name: parts[name] for name in needed}


def takes_places(network: Any) -> bool:
    """Whether a network, or any callable, can be told which tokens are wanted of it."""
    called = network.forward if isinstance(network, nn.Module) else network
    try:
        return "places" in inspect.signature(called).parameters
    except (TypeError, ValueError):  # a callable that is not written in Python
        return False


def _at(out: Tensor, places: Tensor | None, tokens: Sequence[int] | None = None) -> Tensor:
    """Outputs (R, L, ...) at places (R, K): (R, K, ...). With ``tokens``, (L,), others are refused."""
    if places is None:
        return out
    if tokens is not None:
        _check_tokens(out, (len(places), *tokens))
    return at_places(out, places)


def _check_tokens(out: Tensor, expected: tuple[int, ...]) -> None:
    if out.ndim < 3 or tuple(out.shape[:2]) != expected:
        raise ValueError(
            f"the model returned {tuple(out.shape)}, expected ({', '.join(map(str, expected))}, ...), an output for each "
            "token of each row: rows are those of all branches in the pass"
        )


def _distance(outputs: Mapping[str, Tensor], name: str) -> Tensor:
    """How far the conditional output is from another one; 0 where a mask in either leaves no distance."""
    precise = torch.promote_types(outputs["cond"].dtype, torch.float32)
    both = [outputs[key].to(precise) for key in ("cond", name)]
    distance = both[0] - both[1]
    distance = distance.masked_fill(~distance.isfinite(), 0.0)
    # what is no number is none in the steps that follow, either: they may be the first to want this place
    unsound = ~(both[0] < math.inf) | ~(both[1] < math.inf)
    return distance.masked_fill(unsound, math.nan)


def _own_form(network: Any) -> Any:
    """The network as it is to be called in a sampling."""
    return network.for_sampling() if hasattr(network, "for_sampling") else network


def _encode_times(
    network: Any, times: Sequence[float], device: torch.device | None
) -> dict[float, Any]:
    if not times or not hasattr(network, "encode_times"):
        return {}
    distinct = list(dict.fromkeys(times))
    encoded = network.encode_times(torch.tensor(distinct, device=device))
    return dict(zip(distinct, encoded, strict=True))

"""One guided call of any model: what the samplers do at each step, for a loop of one's own."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor

from unicfg.guidance.branches import CfgPlusPlus
from unicfg.guidance.core import Guidance
from unicfg.guidance.spaces import SPACES, Level
from unicfg.sampling.branches import Branch, branch_of, combine, needed_branches, network_and_null
from unicfg.training.dropout import Condition, expand_null, same_kind

Output = TypeVar("Output")
ByPart: TypeAlias = Mapping[
    Any, Any
]  # of an output: what goes with each part, by its name or place
Run: TypeAlias = tuple[
    tuple[str, ...], Any
]  # branches of one network, and its output for their rows


def guided_call(
    model: Callable[..., Output],
    cond: Condition,
    null: Condition | None,
    guidance: Guidance | ByPart,
    progress: float,
    *,
    inputs: Sequence[Any] = (),
    branches: Mapping[str, Branch | Condition] | None = None,
    level: Level | ByPart | None = None,
) -> Output:
    """Run the branches that guidance needs here in one call of the model, and guide what it returns.

    The model is called as under ``ConditionDropout``: ``model(x, cond, *rest)`` for ``inputs=(x, *rest)``, or
    ``model(cond)`` without inputs. For another order, or arguments by name, give a function:

        guided_call(lambda x, c, t: net(x, t, context=c), cond, null, guidance, progress, inputs=(x, t))

    Its rows are [cond; uncond; ...], B each; where s is 1 or 0 they are the B rows of one branch. Gradients flow: a
    loop that samples puts it under ``torch.no_grad()``.

    Args:
        model: any callable, or the ``ConditionDropout`` it was trained in, whose network is called.
        cond: of each sample, whatever the model takes: a tensor (B, ...), as in token ids (B, T), or a tuple, list,
            dict, named tuple or dataclass of these, as in embeddings (B, T, D) with a mask (B, T), nested at will.
        null: the null condition in the same structure, without the batch dimension, as ``null_condition`` of a
            ``ConditionDropout``; or with it, a negative condition for each sample. None takes that of the model.
        guidance: scale, schedule and mitigations. Of an output with several parts, one Guidance guides all that are
            tensors of floats; a mapping from the name or the place of a part to its Guidance guides those that it
            names. Mitigations that remember the steps of a sampling do so in ``guidance.begin(space)``: call that
            once before the first step, for each part.
        progress: fraction of sampling done, in [0, 1]: step i of n is at i / (n - 1).
        inputs: what the model takes beside the condition, the same for every branch: tensors (B, ...), in structures
            or not, are repeated for each branch; numbers, tensors () and anything else pass as they are. What serves
            all rows at once (a mask (L, L), a table of positions) belongs in the function.
        branches: what runs in the branches that guidance names beside "cond" and "uncond": a condition like ``null``,
            or a :class:`Branch` with another model, which is called by itself.
        level: of denoisers, where the inputs stand, for mitigations with a space of their own; or a mapping, a level
            a part.

    Returns:
        what the model returns, with B rows. A part that is not guided is that of the first branch that ran, if it has as
        many rows as the call had, and is else returned as it is.

    Raises:
        TypeError: if structures or dtypes differ, or an argument is of another kind.
        ValueError: if a batch, a shape or a scale (B,) does not fit, a branch is needed and not there, a part is named
            that the output does not have, or the model is in training mode.
        FloatingPointError: if a guided output holds NaN or +inf; names the part and the branch.

    Example:
        >>> logits = guided_call(model, prompt, null, Guidance(3.0), progress, inputs=(ids,))
        >>> both = {"logits": Guidance(3.0), "noise": Guidance(2.0, (mitigations.rescale(),))}
        >>> out = guided_call(hybrid, prompt, null, both, progress, inputs=(x, t), level=Level(x, alpha, sigma, "eps"))
    """
    if isinstance(inputs, Tensor) or not isinstance(inputs, Sequence):
        raise TypeError(f"inputs is a {type(inputs).__name__}, expected a tuple, as in inputs=(x,)")
    batch = _batch(cond)
    extra = {} if branches is None else dict(branches)
    network, _ = network_and_null(model, None)
    null = getattr(model, "null_condition", None) if null is None else null
    conditions: dict[int, tuple[Any, dict[str, Condition]]] = {}  # of each network
    for name in _needed(guidance, progress, batch, extra):
        own, condition = _resolve(name, network, cond, null, extra)
        conditions.setdefault(id(own), (own, {}))[1][name] = condition
    runs: list[Run] = []
    for own, of_branch in conditions.values():
        count = len(of_branch)
        rows = _mapped(_joined, "cond", *of_branch.values())
        repeated = [_repeated(f"inputs[{i}]", v, batch, count) for i, v in enumerate(inputs)]
        runs.append((tuple(of_branch), own(*repeated[:1], rows, *repeated[1:])))
    _check_mitigations(guidance, runs[0][1])
    out: Output = _guided(runs, guidance, progress, level, batch, "output")
    return out


def _needed(
    guidance: Guidance | ByPart, progress: float, batch: int, extra: Mapping[str, Any]
) -> list[str]:
    """All branches that some part needs, in row order."""
    every = list(_each(guidance))
    for each in every:
        if not isinstance(each, Guidance):
            raise TypeError(f"guidance is {each!r}, expected a Guidance, as in Guidance(3.0)")
        if isinstance(each.scale, CfgPlusPlus):
            raise ValueError(
                "guidance is that of cfg_pp, whose solver adds the unconditional noise back: expected other guidance, "
                "or sample_diffusion(solver='cfg_pp')"
            )
    known = {name for each in every for name in each.branch_names} - {"cond", "uncond"}
    unknown = [name for name in extra if name not in known]
    if unknown:
        raise ValueError(
            f"branches has {unknown}, and guidance knows {sorted(known)} beside cond and uncond: expected weights for "
            "each, as in Guidance(branches.negative(3.0, 1.5))"
        )
    needed = {name: None for each in every for name in needed_branches(each, [progress], batch)}
    if not needed:
        raise ValueError("guidance names no part, expected a Guidance for at least one")
    first = ("cond", "uncond")
    return sorted(needed, key=lambda name: first.index(name) if name in first else len(first))


def _each(guidance: Any) -> Iterator[Any]:
    if isinstance(guidance, Mapping):
        for value in guidance.values():
            yield from _each(value)
    else:
        yield guidance


def _resolve(
    name: str, network: Any, cond: Condition, null: Condition | None, extra: Mapping[str, Any]
) -> tuple[Any, Condition]:
    """The network and the condition of a branch."""
    if name == "cond":
        return network, cond
    if name == "uncond":
        if null is None:
            raise ValueError(
                "null is None and guidance needs the unconditional branch: expected the null condition, or a "
                "ConditionDropout as model"
            )
        return network, _fitted("null", null, cond)
    branch = extra.get(name)
    if branch is not None and not isinstance(branch, Branch):
        extra = {name: Branch(branch)}
    branch = branch_of(name, extra)
    own = network if branch.model is None else network_and_null(branch.model, None)[0]
    return own, cond if branch.cond is None else _fitted(f"branches[{name!r}]", branch.cond, cond)


def _batch(cond: Condition) -> int:
    """B, if all tensors of the condition agree."""
    sizes: dict[int, str] = {}
    for name, leaf in _leaves("cond", cond):
        if not isinstance(leaf, Tensor) or leaf.ndim == 0:
            kind = "a tensor ()" if isinstance(leaf, Tensor) else f"a {type(leaf).__name__}"
            raise TypeError(f"{name} is {kind}, expected a tensor (B, ...), or a structure of them")
        sizes.setdefault(len(leaf), name)
    if len(sizes) != 1:
        told = ", ".join(f"{name} has {size}" for size, name in sizes.items()) or "cond is empty"
        raise ValueError(f"{told}: expected tensors of one batch B")
    return next(iter(sizes))


def _fitted(name: str, own: Any, cond: Any) -> Any:
    """A condition with a row for each sample, in the structure of ``cond``."""
    children = _children(cond)
    if children is not None:
        others = _children(own)
        if isinstance(cond, (tuple, list)) and isinstance(own, (tuple, list)):
            others = dict(zip(children, own, strict=False)) if len(own) == len(children) else None
        if others is None or others.keys() != children.keys():
            raise TypeError(f"{name} is {_told(own)}, expected {_told(cond)}, as cond is")
        fitted = {k: _fitted(f"{name}[{k!r}]", others[k], child) for k, child in children.items()}
        return _rebuilt(cond, fitted)
    if not isinstance(own, Tensor) or own.dtype != cond.dtype:
        raise TypeError(f"{name} is {_told(own)}, expected {_told(cond)}, as cond is")
    if own.shape not in (cond.shape, cond.shape[1:]):
        raise ValueError(
            f"{name} has shape {tuple(own.shape)}, expected {tuple(cond.shape[1:])} for all samples, or "
            f"{tuple(cond.shape)}, one each"
        )
    rows = own if own.shape == cond.shape else expand_null(own, len(cond))
    return rows.to(cond.device)


def _joined(name: str, *parts: Any) -> Any:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _repeated(name: str, value: Any, batch: int, count: int) -> Any:
    """An input for ``count`` branches."""

    def repeat(name: str, leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or leaf.ndim == 0:
            return leaf
        # also where there is one branch, so that a mistake does not wait for another scale
        if len(leaf) != batch:
            raise ValueError(
                f"{name} has shape {tuple(leaf.shape)} and cond a batch of {batch}: expected ({batch}, ...); what "
                "serves all rows at once belongs in a function around the model"
            )
        return leaf if count == 1 else torch.cat([leaf] * count)

    return _mapped(repeat, name, value)


def _check_mitigations(guidance: Guidance | ByPart, out: Any) -> None:
    """Refuse to rein in several parts of an output by the mitigations of one Guidance."""
    if not isinstance(guidance, Guidance) or not guidance.mitigations:
        return
    parts = [name for name, leaf in _leaves("output", out) if _is_guidable(leaf)]
    if len(parts) > 1:
        raise ValueError(
            f"guidance has mitigations, which belong to one kind of output, and the model returns {parts}: expected a "
            "mapping with a Guidance for each part that is to be guided"
        )


def _guided(
    runs: Sequence[Run],
    guidance: Guidance | ByPart | None,
    progress: float,
    level: Level | ByPart | None,
    batch: int,
    name: str,
) -> Any:
    """An output, or a part of it, as guidance makes it of its branches; None leaves it as it is."""
    names, first = runs[0]
    children = _children(first)
    if children is None:
        if isinstance(guidance, Mapping):
            raise ValueError(
                f"guidance names the parts {list(guidance)} and {name} is {_told(first)}: expected a Guidance"
            )
        if guidance is None or not _is_guidable(first):
            rows = isinstance(first, Tensor) and first.ndim > 0 and len(first) == batch * len(names)
            return first[:batch] if rows else first
        return _guided_tensor(runs, guidance, progress, level, batch, name)
    if isinstance(guidance, Mapping) and not guidance.keys() <= children.keys():
        raise ValueError(
            f"guidance names the parts {list(guidance)} and {name} has {list(children)}, expected some of these"
        )
    others = [_children(out) for _, out in runs]
    if any(other is None or other.keys() != children.keys() for other in others):
        raise TypeError(
            f"{name} is {' and '.join(_told(out) for _, out in runs)} in different models, expected one structure"
        )
    made = {}
    for key in children:
        parts = [(own, other[key]) for (own, _), other in zip(runs, others, strict=True) if other]
        of_part = guidance.get(key) if isinstance(guidance, Mapping) else guidance
        at = level.get(key) if isinstance(level, Mapping) else level
        made[key] = _guided(parts, of_part, progress, at, batch, f"{name}[{key!r}]")
    return _rebuilt(first, made)


def _guided_tensor(
    runs: Sequence[Run],
    guidance: Guidance,
    progress: float,
    level: Level | ByPart | None,
    batch: int,
    name: str,
) -> Tensor:
    outputs: dict[str, Tensor] = {}
    for names, out in runs:
        rows = batch * len(names)
        if not isinstance(out, Tensor) or out.ndim == 0 or len(out) != rows:
            raise ValueError(
                f"{name} is {_told(out)} for {rows} rows ({', '.join(names)}), expected ({rows}, ...)"
            )
        outputs.update(zip(names, out.split(batch), strict=True))
    if isinstance(level, Mapping):
        raise ValueError(f"level names the parts {list(level)}, expected the Level of {name}")
    needed = {branch: outputs[branch] for branch in guidance.branches_at(progress)}
    shape = next(iter(needed.values())).shape
    native = [m for m in guidance.mitigations if getattr(m, "space", None) in SPACES]
    if native and level is not None and level.x.shape != shape:
        raise ValueError(
            f"level.x has shape {tuple(level.x.shape)} and {name} {tuple(shape)} a branch, expected equal shapes: the "
            "level of the noisy sample that this output is a prediction for"
        )
    return combine(guidance, progress, needed, f"progress {progress}, {name}", level).out


def _is_guidable(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.ndim > 0 and leaf.is_floating_point()


def _children(tree: Any) -> dict[Any, Any] | None:
    """The parts of a structure by name or place; None for what is none."""
    # before dict: an output of transformers is both
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        return {field.name: getattr(tree, field.name) for field in dataclasses.fields(tree)}
    if isinstance(tree, dict):
        return dict(tree)
    if isinstance(tree, (tuple, list)):
        return dict(zip(getattr(tree, "_fields", range(len(tree))), tree, strict=True))
    return None


def _rebuilt(example: Any, children: dict[Any, Any]) -> Any:
    """A structure like the example, of other parts."""
    if isinstance(example, (tuple, list)):
        return same_kind(example, list(children.values()))
    if isinstance(example, dict) and not dataclasses.is_dataclass(example):
        return children
    return dataclasses.replace(example, **children)


def _leaves(name: str, tree: Any) -> Iterator[tuple[str, Any]]:
    """All that is no structure, with where it is to be found."""
    children = _children(tree)
    if children is None:
        yield name, tree
    else:
        for key, child in children.items():
            yield from _leaves(f"{name}[{key!r}]", child)


def _mapped(function: Callable[..., Any], name: str, first: Any, *others: Any) -> Any:
    """Structures that are alike, joined leaf by leaf: ``function(name, *leaves)``."""
    children = _children(first)
    if children is None:
        return function(name, first, *others)
    beside = [_children(other) or {} for other in others]
    made = {
        key: _mapped(function, f"{name}[{key!r}]", child, *(other[key] for other in beside))
        for key, child in children.items()
    }
    return _rebuilt(first, made)


def _told(value: Any) -> str:
    """A value in words."""
    if isinstance(value, Tensor):
        return f"{value.dtype} {tuple(value.shape)}"
    children = _children(value)
    kind = type(value).__name__
    return kind if children is None else f"a {kind} with {list(children)}"

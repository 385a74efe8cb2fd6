"""Condition dropout: the one thing that training needs for guidance.

For a share of the samples the condition is replaced by a null condition, so that one network learns both the
conditional and the unconditional output (Ho and Salimans, arXiv 2207.12598, algorithm 1).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

Condition: TypeAlias = "Tensor | tuple[Condition, ...] | list[Condition] | Mapping[str, Condition]"


@dataclass(frozen=True)
class Part:
    """Which of ``count`` equal parts of a batch: what one process holds of it, or one pass of several.

    Random numbers are drawn for the whole batch, and each part takes its rows, so that a training does not depend
    on how its batches are split.

    Attributes:
        index: 0 to count - 1.
        count: of the parts.

    Raises:
        ValueError: if ``index`` is not in that range.
    """

    index: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        """Check the range."""
        if not 0 <= self.index < self.count:
            raise ValueError(f"index is {self.index}, expected 0 to {self.count - 1}")

    def whole(self, rows: int) -> int:
        """Rows of the batch of which this part has ``rows``."""
        return rows * self.count

    def rows(self, of_whole: Tensor) -> Tensor:
        """This part's rows of a tensor (B * count, ...) for the whole batch: (B, ...)."""
        return of_whole.chunk(self.count)[self.index]


WHOLE = Part()


def drop_condition(condition: Condition, null_condition: Condition, drop: Tensor) -> Condition:
    """Replace the condition of the chosen samples, out of place.

    Args:
        condition: a tensor (B, ...), or a tuple, list or mapping of these.
        null_condition: the same structure without the batch dimension.
        drop: bool (B,), True where the condition is to be replaced.

    Returns:
        a new condition of the same structure, mappings as dicts; ``condition`` itself is left as it was.

    Raises:
        TypeError: if the structures or dtypes differ, there is something else than tensors in it, or ``drop`` is not bool.
        ValueError: if the shapes do not match.

    Example:
        >>> ids, null = torch.tensor([[5, 6], [7, 8]]), torch.tensor([0, 0])
        >>> drop_condition(ids, null, torch.tensor([True, False]))
        tensor([[0, 0],
                [7, 8]])
    """
    if isinstance(condition, Mapping):
        if not isinstance(null_condition, Mapping) or condition.keys() != null_condition.keys():
            raise TypeError(f"null_condition is no dict with the keys {sorted(condition)}")
        return {k: drop_condition(v, null_condition[k], drop) for k, v in condition.items()}
    if isinstance(condition, (tuple, list)):
        if not isinstance(null_condition, (tuple, list)) or len(condition) != len(null_condition):
            raise TypeError(f"null_condition is no sequence of {len(condition)} entries")
        pairs = zip(condition, null_condition, strict=True)
        return same_kind(condition, [drop_condition(c, n, drop) for c, n in pairs])
    condition = _tensor(condition, "condition")
    if not isinstance(null_condition, Tensor) or condition.dtype != null_condition.dtype:
        kind = getattr(null_condition, "dtype", type(null_condition).__name__)
        raise TypeError(f"condition is {condition.dtype} and null_condition {kind}, expected equal")
    if drop.dtype != torch.bool:
        raise TypeError(f"drop is {drop.dtype}, expected bool")
    if drop.shape != condition.shape[:1]:
        raise ValueError(f"drop has shape {tuple(drop.shape)}, expected ({len(condition)},)")
    null = expand_null(null_condition, len(condition))
    if null.shape != condition.shape:
        raise ValueError(
            f"null_condition has shape {tuple(null_condition.shape)}, "
            f"expected {tuple(condition.shape[1:])} to stand for one condition"
        )
    mask = drop.to(condition.device).view(-1, *[1] * (condition.ndim - 1))
    return torch.where(mask, null.to(condition.device), condition)


def expand_null(null_condition: Tensor, batch: int) -> Tensor:
    """One null condition (T, ...) as a batch (B, T, ...), without copying."""
    return null_condition.expand(batch, *null_condition.shape)


class ConditionDropout(nn.Module):
    """Wrap any model so that it learns with and without its condition: ``wrapped(x, cond, ...)``.

    In training mode the condition of each sample is replaced by ``null_condition`` with probability ``p``,
    independently; in eval mode the wrapper is transparent. The draws come from a generator of its own, whose
    state is part of ``state_dict``, so a resumed run drops what the uninterrupted one would have dropped.
    Processes that train on parts of one batch call :meth:`reseed` before each step, or are made with another seed each.

    The wrapper owns the null condition and samplers read it from here, so what was trained is what is sampled.
    A floating-point tensor becomes a parameter and is trained with the model. Ids become a buffer: the
    embedding that they select is trained in the model's own table.

    Args:
        model: any callable module ``model(x, cond, ...)``.
        null_condition: what stands for "no condition": a tensor without batch dimension (T,) or (T, D), or a
            tuple, list or mapping of tensors.
        p: probability of dropping, in [0, 1].
        seed: of the draws.

    Raises:
        ValueError: if ``p`` lies outside [0, 1].
        TypeError: if ``null_condition``, or in training mode a condition, holds something else than tensors.

    Example:
        >>> wrapped = ConditionDropout(model, null_condition=torch.zeros(8, dtype=torch.long), p=0.1)
        >>> loss = loss_function(wrapped(x, cond), target)
    """

    def __init__(
        self, model: nn.Module, null_condition: Condition, p: float = 0.1, *, seed: int = 0
    ) -> None:
        super().__init__()
        if not 0 <= p <= 1:
            raise ValueError(f"p is {p}, expected a probability between 0 and 1")
        self.model = model
        self.p = p
        self._structure = self._register(null_condition)
        self._random = torch.Generator().manual_seed(seed)
        self._part = WHOLE

    def reseed(self, seed: int, part: Part = WHOLE) -> None:
        """Begin the draws anew.

        Args:
            seed: the same gives the same draws; one for each step, equal in all processes.
            part: of the batch, which the next calls get: they drop what they would drop of the whole batch.
        """
        self._random.manual_seed(seed)
        self._part = part

    def _register(self, condition: Condition) -> Any:
        """Store each tensor under a numbered name; returns the structure with names for tensors."""
        if isinstance(condition, Mapping):
            return {k: self._register(v) for k, v in condition.items()}
        if isinstance(condition, (tuple, list)):
            return same_kind(condition, [self._register(v) for v in condition])
        name = f"null_{sum(key.startswith('null_') for key in (*self._parameters, *self._buffers))}"
        condition = _tensor(condition, "null_condition")
        if condition.is_floating_point():
            self.register_parameter(name, nn.Parameter(condition.detach().clone()))
        else:
            self.register_buffer(name, condition.detach().clone())
        return name

    @property
    def null_condition(self) -> Condition:
        """The null condition, in the structure it was given."""
        return self._lookup(self._structure)

    def _lookup(self, structure: Any) -> Condition:
        if isinstance(structure, dict):
            return {k: self._lookup(v) for k, v in structure.items()}
        if isinstance(structure, (tuple, list)):
            return same_kind(structure, [self._lookup(v) for v in structure])
        tensor: Tensor = getattr(self, structure)
        return tensor

    def forward(self, x: Any, cond: Condition, *args: Any, **kwargs: Any) -> Any:
        """Call the model with ``cond``, or in training mode with the null condition for some samples."""
        if self.training and self.p > 0:
            rows = self._part.whole(_batch_size(cond))
            drop = torch.rand(rows, generator=self._random) < self.p
            cond = drop_condition(cond, self.null_condition, self._part.rows(drop))
        return self.model(x, cond, *args, **kwargs)

    def get_extra_state(self) -> Tensor:
        """State of the random draws, for ``state_dict``."""
        return self._random.get_state()

    def set_extra_state(self, state: Tensor) -> None:
        """Restore the random draws from ``state_dict``."""
        self._random.set_state(state.cpu())


def same_kind(example: Any, items: list[Any]) -> Any:
    """Items as a list, tuple or named tuple, whichever the example is."""
    return type(example)(*items) if hasattr(example, "_fields") else type(example)(items)


def _tensor(condition: object, name: str) -> Tensor:
    if not isinstance(condition, Tensor):
        raise TypeError(
            f"{name} is or holds {condition!r:.100}, expected a tensor, or a tuple, list or mapping of tensors"
        )
    return condition


def _batch_size(condition: Condition) -> int:
    first: object = condition
    while isinstance(first, (Mapping, tuple, list)) and first:
        first = next(iter(first.values() if isinstance(first, Mapping) else first))
    return len(_tensor(first, "cond"))

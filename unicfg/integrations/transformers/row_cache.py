"""A cache for models of transformers as the samplers want it: allocated once, with views of rows on the same memory."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin


def cache_argument(model: Any) -> str:
    """How a model's forward calls its cache: ``cache`` from transformers 5.24 on, ``past_key_values`` before."""
    known = inspect.signature(model.forward).parameters
    return "cache" if "cache" in known else "past_key_values"


class Memory:
    """A tensor (N, ...) that several views hold rows of, allocated when one of them first writes.

    Args:
        total: N.
    """

    def __init__(self, total: int) -> None:
        self.total = total
        self.held: Tensor | None = None

    def like(self, part: Tensor, *shape: int) -> Tensor:
        """The tensor (N, *shape), in the dtype and on the device of ``part`` if it is new."""
        if self.held is None:
            self.held = part.new_zeros(self.total, *shape)
        return self.held


class RowLayer(CacheLayerMixin):
    """Keys and values of one layer for the rows from ``start`` up to ``stop``, and how many tokens of them count.

    Args:
        memories: of the keys and of the values of all rows.
        start: first row of this view.
        stop: the row behind its last.
        spare: tokens to make room for, besides those of the first write.
    """

    is_sliding = False

    def __init__(
        self, memories: tuple[Memory, Memory], start: int, stop: int, spare: int, length: int = 0
    ) -> None:
        super().__init__()
        self.memories, self.start, self.stop, self.spare = memories, start, stop, spare
        self.is_initialized = True
        self.move(length)

    def rows(self, start: int, stop: int) -> RowLayer:
        """The rows from ``start`` up to ``stop`` of this view: the same memory."""
        first = self.start
        return RowLayer(self.memories, first + start, first + stop, self.spare, self.length)

    def move(self, length: int) -> None:
        """Let the first ``length`` tokens count."""
        self.length = length
        keys, values = (memory.held for memory in self.memories)
        if keys is not None and values is not None:
            self.keys = keys[self.start : self.stop, :, :length]
            self.values = values[self.start : self.stop, :, :length]

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Make room, unless there is."""
        for memory, part in zip(self.memories, (key_states, value_states), strict=True):
            _, heads, count, width = part.shape
            memory.like(part, heads, count + self.spare, width)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write tokens behind those that count; one row (1, ...) is written to all rows of the view.

        Args:
            key_states: (R, heads, n, D), or (1, heads, n, D).
            value_states: likewise.
            args: what other kinds of layers need.
            kwargs: what other kinds of layers need.

        Returns:
            keys and values of all tokens that count, in as many rows as were given.

        Raises:
            ValueError: if there is no room left.
        """
        self.lazy_initialization(key_states, value_states)
        begin = self.length
        self.move(begin + key_states.shape[2])
        assert self.keys is not None and self.values is not None
        if self.keys.shape[2] < self.length:
            raise ValueError(
                f"the cache has room for {self.keys.shape[2]} tokens, and {self.length} are to be held"
            )
        self.keys[:, :, begin:] = key_states
        self.values[:, :, begin:] = value_states
        given = len(key_states)
        return self.keys[:given], self.values[:given]

    def get_seq_length(self) -> int:
        """Tokens that count."""
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of what the next ``query_length`` tokens may see: no more than is there."""
        return self.length + query_length, 0

    def get_max_length(self) -> int:
        """Tokens that there is room for; -1 as long as there is none."""
        held = self.memories[0].held
        return -1 if held is None else held.shape[2]

    def reset(self) -> None:
        """Let no token count."""
        self.move(0)


class RowCache(Cache):
    """A cache for transformers' models that is allocated once, and has views of neighbouring rows.

    What ``sample_autoregressive`` asks of a cache: a view shares the memory and has a length of its own. Attention
    sees the tokens so far, not the whole buffer. Beam search, which would reorder rows, is not for it.

    Args:
        row_layers: of the model, in order; see :meth:`empty`.
    """

    def __init__(self, row_layers: Sequence[RowLayer]) -> None:
        super().__init__(layers=list(row_layers))
        self.row_layers = row_layers

    @classmethod
    def empty(cls, layers: int, rows: int, spare: int) -> RowCache:
        """Room for ``rows`` sequences, of as many tokens as are written first and ``spare`` more.

        Args:
            layers: of the model.
            rows: R.
            spare: tokens.
        """
        memories = [(Memory(rows), Memory(rows)) for _ in range(layers)]
        return cls([RowLayer(pair, 0, rows, spare) for pair in memories])

    @property
    def length(self) -> int:
        """Tokens that count."""
        return self.row_layers[0].length

    @length.setter
    def length(self, length: int) -> None:
        for layer in self.row_layers:
            layer.move(length)

    def rows(self, start: int, stop: int) -> RowCache:
        """The rows from ``start`` up to ``stop``: the same memory, with a length of its own."""
        return RowCache([layer.rows(start, stop) for layer in self.row_layers])

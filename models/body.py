"""The transformer body that every family shares; what goes in and what comes out is the family's own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.blocks import (
    Block,
    EncodedCondition,
    KVCache,
    Modulation,
    Prefix,
    attention,
    causal_mask,
    encode_prefix,
    inner_width,
    modulation_of_rows,
)
from models.compiled import compiled_method
from models.fused import can_fuse, run_blocks
from models.packed import pack
from models.recorded import RecordedMethod
from tokenizers_vq.files import FORMAT_VERSION, check_counts, check_format_version

# bytes for each thread, of the widest tensor in a block: a larger one has left a CPU's cache when the next operation reads
# it. Measured on two cores with 32 MiB of cache: 2 to 8 MiB are alike, 1 and 16 slower
IN_CACHE = 4 << 20
# far beyond what anyone trains: larger numbers are a damaged or a hostile file
MOST_WIDTH, MOST_DEPTH, MOST_SIDE = 1 << 16, 512, 256


@dataclass
class BodyConfig:
    """What the configurations of all families have in common; written to ``config.json``."""

    grid: int = 8  # h = w, tokens or latents a side
    condition_vocabulary: int = 2048  # text tokens, or number of classes + 1
    condition_length: int = 32  # T; 1 for class labels
    width: int = 256  # D
    depth: int = 6
    heads: int = 4
    dropout: float = 0.0
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        """Check the values."""
        check_format_version(vars(self))
        check_counts(self, grid=MOST_SIDE, condition_vocabulary=1 << 24, condition_length=1 << 12)
        check_counts(self, width=MOST_WIDTH, depth=MOST_DEPTH, heads=MOST_WIDTH)
        if self.width % self.heads:
            raise ValueError(f"width is {self.width}, expected a multiple of heads ({self.heads})")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}, expected a probability below 1")


class Body(nn.Module):
    """A condition prefix, learned positions, transformer blocks and a last norm.

    The prefix attends only to itself; image tokens attend to the prefix and to each other, as far as a mask lets
    them. Positions are learned, one for each row and one for each column of the grid.

    Args:
        config: sizes.
        grid: tokens a side, where it differs from the configuration's.
    """

    def __init__(self, config: BodyConfig, grid: int | None = None) -> None:
        super().__init__()
        self.num_tokens = (grid or config.grid) ** 2
        self.heads = config.heads
        self.prefix = Prefix(config.condition_vocabulary, config.condition_length, config.width)
        self.row = nn.Parameter(torch.zeros(grid or config.grid, 1, config.width))
        self.column = nn.Parameter(torch.zeros(1, grid or config.grid, config.width))
        self.blocks = nn.ModuleList(
            Block(config.width, config.heads, config.dropout) for _ in range(config.depth)
        )
        self.norm = nn.RMSNorm(config.width, eps=1e-6)

    def positions(self) -> Tensor:
        """One vector for each place of the grid in raster order, (L, D)."""
        return (self.row + self.column).flatten(0, 1)

    def encode_condition(self, cond: Tensor | EncodedCondition) -> EncodedCondition:
        """Keys and values of condition ids (B, T); what is encoded already is passed on.

        Raises:
            ValueError: if the shape is not (B, T), or an id lies outside the vocabulary.
        """
        if isinstance(cond, EncodedCondition):
            return cond
        return encode_prefix(self.blocks, self.prefix(cond))

    def forward(
        self,
        x: Tensor,
        cond: Tensor | EncodedCondition,
        mask: Tensor | None = None,
        modulations: Sequence[Modulation] | None = None,
        places: Tensor | None = None,
    ) -> Tensor:
        """Hidden states (B, L, D) of embedded tokens x (B, L, D), or (B, K, D) of some of them.

        Args:
            x: embedded tokens with their positions (B, L, D).
            cond: condition ids (B, T), or what ``encode_condition`` made of them.
            mask: bool (L, T + L), True where a token may look; None is everywhere.
            modulations: one for each block, from the time.
            places: int64 (B, K), the tokens whose states are wanted; None is all. The last block computes no others.

        On a CPU, without gradients, rows go through the blocks a few at a time, see ``IN_CACHE``.

        Raises:
            ValueError: if there are both a mask and places, or the condition has another number of rows.
        """
        if mask is not None and places is not None:
            raise ValueError("mask and places are given, expected one of them, or neither")
        encoded, count = self.encode_condition(cond), self._rows_at_once(x)
        if len(encoded.layers[0].key) != len(x):
            raise ValueError(
                f"cond has {len(encoded.layers[0].key)} rows, expected {len(x)}, one for each row of tokens"
            )
        if count >= len(x):
            return self._run(x, encoded, mask, modulations, places)
        parts = []
        for start in range(0, len(x), count):
            stop = min(start + count, len(x))
            own = None
            if modulations is not None:
                own = [modulation_of_rows(by, start, stop) for by in modulations]
            there = None if places is None else places[start:stop]
            parts.append(self._run(x[start:stop], encoded.rows(start, stop), mask, own, there))
        return torch.cat(parts)

    def _rows_at_once(self, x: Tensor) -> int:
        """How many rows of x (B, L, D) go through all blocks before the next do: all on a GPU, and where gradients are kept."""
        if x.device.type != "cpu" or torch.is_grad_enabled() or not len(x):
            return len(x)
        widest = x.shape[1] * 2 * inner_width(x.shape[2]) * x.element_size()
        turns = -(-len(x) // max(IN_CACHE * torch.get_num_threads() // widest, 1))
        return -(-len(x) // turns)

    def _run(
        self,
        x: Tensor,
        cond: EncodedCondition,
        mask: Tensor | None,
        modulations: Sequence[Modulation] | None,
        places: Tensor | None,
    ) -> Tensor:
        layers, last = cond.layers, len(self.blocks) - 1
        for i, (block, (past_key, past_value)) in enumerate(zip(self.blocks, layers, strict=True)):

            def attend(
                q: Tensor, k: Tensor, v: Tensor, pk: Tensor = past_key, pv: Tensor = past_value
            ) -> Tensor:
                k, v = torch.cat([pk, k], dim=2), torch.cat([pv, v], dim=2)
                return attention(q, k, v, mask)

            modulation = modulations[i] if modulations is not None else None
            if places is None or i < last:
                x = block(x, attend, modulation)
            else:
                x = block(x, attend, modulation, places)
        hidden: Tensor = self.norm(x)
        return hidden

    def forward_causal(self, x: Tensor, cond: Tensor | EncodedCondition) -> Tensor:
        """The same where each token sees itself and those before it."""
        mask = causal_mask(x.shape[1], self.prefix.length, x.device)
        return self(x, cond, mask)

    def make_cache(self, rows: int, network: nn.Module, compile: bool = False) -> KVCache:
        """An empty cache for ``rows`` sequences, in the model's dtype and on its device.

        Args:
            rows: R.
            network: the model that the body belongs to; it is packed for decoding.
            compile: take its compiled step in place of that, see ``models.compiled``.

        Raises:
            ValueError: if ``rows`` is less than 1.
        """
        if rows < 1:
            raise ValueError(f"rows is {rows}, expected at least 1")
        weight = self.prefix.position
        width = weight.shape[1]
        places = self.prefix.length + self.num_tokens
        shape, count = (rows, self.heads, places, width // self.heads), 2 * len(self.blocks)
        step = compiled_method(network, "step") if compile else None
        if step is None or step.failed:
            held = [weight.new_empty(shape) for _ in range(count)]
            return KVCache(*_halves(held), self.prefix.length, 0, pack(network))
        lease = None
        if isinstance(step, RecordedMethod):
            held, lease = step.take(count, shape, weight)
        else:  # it looks at all places and masks those that are not filled yet: what they hold must be finite
            held = [weight.new_zeros(shape) for _ in range(count)]
        # all at once: a number that goes to a GPU by itself is waited for
        numbers = torch.arange(self.num_tokens, device=weight.device)
        # the step packs the network by itself
        return KVCache(*_halves(held), self.prefix.length, 0, network, step, numbers, lease)

    def prefill(self, cond: Tensor, cache: KVCache) -> None:
        """Run the condition (R, T), or one condition (1, T) for all rows, into an empty cache.

        Raises:
            ValueError: if the shape does not fit.
        """
        if cond.shape[0] not in (1, cache.num_rows):
            raise ValueError(f"cond has {cond.shape[0]} rows, the cache {cache.num_rows}")
        cache.store_prefix(self.encode_condition(cond))

    def check_decode(self, known: Tensor, cache: KVCache) -> None:
        """Refuse to decode tokens or latents (R, n, ...) that do not continue the cache.

        Raises:
            ValueError: if there are too many tokens, or fewer than the cache holds, or another row count.
        """
        rows, tokens = known.shape[:2]
        if rows != cache.num_rows:
            raise ValueError(f"ids have {rows} rows, the cache {cache.num_rows}")
        if known.device != cache.keys[0].device:
            raise ValueError(f"ids are on {known.device}, the cache on {cache.keys[0].device}")
        if not cache.length <= tokens < self.num_tokens:
            raise ValueError(
                f"ids hold {tokens} tokens, expected at least the cache's {cache.length} "
                f"and fewer than L = {self.num_tokens}"
            )

    def extend(self, x: Tensor, cache: KVCache) -> Tensor:
        """Hidden states of new tokens x (R, n, D) that follow those in the cache; it is extended.

        Returns:
            (R, D), of the last token.
        """
        new = x.shape[1]
        mask = causal_mask(new, cache.prefix + cache.length, x.device) if new > 1 else None
        for layer, block in enumerate(self.blocks):

            def attend(q: Tensor, k: Tensor, v: Tensor, layer: int = layer) -> Tensor:
                return cache.attend(layer, q, k, v, mask)

            x = block(x, attend)
        cache.length += new
        hidden: Tensor = self.norm(x[:, -1])
        return hidden

    def compiled_step(self, known: Tensor, cache: KVCache) -> Tensor | None:
        """What the model's compiled ``step`` says of the token after those that are known, if it can be taken.

        Args:
            known: all tokens or latents so far (R, n, ...).
            cache: with R rows; it is extended.

        Returns:
            (R, ...), or None where there is no compiled step, or more than one token is missing in the cache.
        """
        step, count = cache.compiled, known.shape[1]
        if step is None or count != cache.length:
            return None
        previous = known[:, -1] if count else known.new_zeros(len(known), *known.shape[2:])
        # a column of all tokens so far has their number as its stride, which is a shape to the compiler
        previous = previous.clone(memory_format=torch.contiguous_format)
        assert cache.numbers is not None
        out: Tensor | None = step(previous, cache.numbers[count], cache.keys, cache.values)
        if out is not None:
            cache.length += 1
        return out

    def step(
        self,
        embedded: Tensor,
        start: Tensor,
        place: Tensor,
        keys: Sequence[Tensor],
        values: Sequence[Tensor],
    ) -> Tensor:
        """What :meth:`extend` does for one token, with shapes that do not change from token to token.

        Args:
            embedded: the token before it (R, D); of no matter for the first.
            start: what stands before the first (D,).
            place: of the token, 0 to L - 1, int64 ().
            keys: of each layer (R, heads, T + L, D / heads); place T + ``place`` is filled in.
            values: the same.

        Returns:
            (R, D).
        """
        x = torch.where(place == 0, start, embedded)
        x = x + self.positions().index_select(0, place[None])
        if x.is_cuda and can_fuse(self.blocks):
            hidden: Tensor = self.norm(
                run_blocks(self.blocks, x, place, keys, values, self.prefix.length)
            )
            return hidden
        x = x[:, None]
        slot = (self.prefix.length + place)[None]
        # masked, not cut off: the shapes stay
        seen = torch.arange(keys[0].shape[2], device=place.device) <= slot
        for block, key, value in zip(self.blocks, keys, values, strict=True):

            def attend(
                q: Tensor, k: Tensor, v: Tensor, key: Tensor = key, value: Tensor = value
            ) -> Tensor:
                key.index_copy_(2, slot, k)
                value.index_copy_(2, slot, v)
                # written out: one query a row is too little for the kernel that attention has on a CPU
                scores = (q @ key.transpose(-1, -2)) * q.shape[-1] ** -0.5
                return scores.masked_fill(~seen, -torch.inf).softmax(-1) @ value

            x = block(x, attend)
        hidden = self.norm(x[:, 0])
        return hidden


def check_places(places: Tensor | None, rows: int, tokens: int) -> None:
    """Refuse places that are not (``rows``, K), or name a token that is not there.

    Raises:
        ValueError: if the shape is another, or one is not from 0 to ``tokens`` - 1.
    """
    if places is None:
        return
    if places.ndim != 2 or len(places) != rows or places.dtype != torch.long:
        raise ValueError(
            f"places is {tuple(places.shape)} of {places.dtype}, expected ({rows}, K) of torch.int64"
        )
    if places.device.type == "cpu" and places.numel():  # elsewhere it would stall the device
        low, high = int(places.min()), int(places.max())
        if low < 0 or high >= tokens:
            raise ValueError(f"places holds {low} to {high}, expected 0 to {tokens - 1}")


def _halves(held: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Keys and values."""
    return tuple(held[::2]), tuple(held[1::2])


def previous_tokens(start: Tensor, embedded: Tensor, positions: Tensor, first: int) -> Tensor:
    """Inputs of a causal body: each place holds the token before it, and its own position.

    Args:
        start: stands before the first token (D,).
        embedded: tokens ``max(first - 1, 0)`` to n - 1, (R, ..., D).
        positions: (L, D).
        first: the first place that is wanted.

    Returns:
        places ``first`` to n, (R, n + 1 - first, D).
    """
    if first == 0:
        embedded = torch.cat([start.expand(len(embedded), 1, -1), embedded], dim=1)
    return embedded + positions[first : first + embedded.shape[1]]


def initialize(network: nn.Module, depth: int) -> None:
    """Small normal weights; what adds to the residual stream starts smaller still. Biases and norms stay."""
    for name, parameter in network.named_parameters():
        if parameter.ndim == 1 and not name.endswith("start"):
            continue
        # each block adds to the residual stream twice: its outputs start small
        residual = name.endswith(("out.weight", "down.weight"))
        nn.init.normal_(parameter, std=0.02 * ((2 * depth) ** -0.5 if residual else 1.0))

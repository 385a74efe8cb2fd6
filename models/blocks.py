"""The building blocks that every family shares: one attention, one feed-forward, one time embedding, one cache."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unicfg.sampling.tokens import at_places


class KeyValue(NamedTuple):
    """Keys and values of one layer, each (B, heads, tokens, D / heads)."""

    key: Tensor
    value: Tensor


Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Scaled dot-product attention of (B, heads, tokens, D / heads) each; mask (queries, keys), True to look."""
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:
        # its backward pass takes nine times as long there in bfloat16 as in float32
        with torch.autocast("cpu", enabled=False):
            return attention(q.float(), k.float(), v.float(), mask).to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def inner_width(width: int) -> int:
    """The width of the feed-forward in a block of width D: 8/3 of it, rounded up to a multiple of 64."""
    return -(-8 * width // (3 * 64)) * 64


class Block(nn.Module):
    """A pre-norm transformer block: RMSNorm, attention, RMSNorm, SwiGLU.

    SwiGLU: Shazeer, arXiv 2002.05202, equation 5, with 8/3 of the width so that the parameters equal those of a
    plain feed-forward of 4 times the width.

    Args:
        width: D, a multiple of ``heads``.
        heads: number of attention heads.
        dropout: probability of zeroing, on the output of attention and feed-forward, in training.
    """

    def __init__(self, width: int, heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        inner = inner_width(width)
        self.norm1 = nn.RMSNorm(width, eps=1e-6)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.norm2 = nn.RMSNorm(width, eps=1e-6)
        self.gate_up = nn.Linear(width, 2 * inner, bias=False)
        self.down = nn.Linear(inner, width, bias=False)

    def project(self, normed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values (B, heads, tokens, D / heads) of normed tokens (B, tokens, D)."""
        b, n, d = normed.shape
        qkv = self.qkv(normed).view(b, n, 3, self.heads, d // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        return q, k, v

    def forward(
        self,
        x: Tensor,
        attend: Attend,
        modulation: Modulation | None = None,
        places: Tensor | None = None,
    ) -> Tensor:
        """Apply the block to x (B, tokens, D).

        Args:
            x: (B, tokens, D).
            attend: attention of queries, keys and values of these tokens, (B, heads, tokens, D / heads) each;
                the caller's function adds what lies outside of x: a prefix, a cache, a mask.
            modulation: of both halves, in a network that is told the time.
            places: int64 (B, K), the tokens that are wanted of the block; None is all. All are attended to.

        Returns:
            (B, tokens, D), or (B, K, D) at ``places``.
        """
        first, second = modulation if modulation is not None else (None, None)
        q, k, v = self.project(modulate(self.norm1(x), first))
        if places is not None:
            x, q = at_places(x, places), at_places(q, places, dim=2)
        mixed = self.out(attend(q, k, v).transpose(1, 2).reshape(x.shape))
        x = x + F.dropout(gate(mixed, first), self.dropout, self.training)
        weight, up = self.gate_up(modulate(self.norm2(x), second)).chunk(2, dim=-1)
        fed = self.down(F.silu(weight) * up)
        return x + F.dropout(gate(fed, second), self.dropout, self.training)


class AdaLN(NamedTuple):
    """What a time step does to one half of a block: (B, 1, D) each, or (1, 1, D) for all rows.

    Attributes:
        shift: added to the normed input.
        factor: multiplies it before that.
        gate: multiplies the output.
    """

    shift: Tensor
    factor: Tensor
    gate: Tensor


Modulation = tuple[AdaLN, AdaLN]


def modulate(x: Tensor, by: AdaLN | None) -> Tensor:
    """Scale and shift x (B, tokens, D); the gate comes after the sublayer."""
    return x if by is None else torch.addcmul(by.shift, x, by.factor)


def gate(x: Tensor, by: AdaLN | None) -> Tensor:
    """Weigh the output of a sublayer."""
    return x if by is None else by.gate * x


def modulation_of_rows(by: Modulation, start: int, stop: int) -> Modulation:
    """The rows from ``start`` up to ``stop``; one row serves all."""
    first, second = (
        AdaLN(*(part if len(part) == 1 else part[start:stop] for part in half)) for half in by
    )
    return first, second


class AdaLNZero(nn.Module):
    """Shift, scale and gate from an embedding of the time; all zero at first, so that a block starts as the identity.

    Peebles and Xie, arXiv 2212.09748, section 3.2, "adaLN-Zero block".

    Args:
        width: D.
        halves: sublayers to modulate.
    """

    def __init__(self, width: int, halves: int) -> None:
        super().__init__()
        self.halves = halves
        self.linear = nn.Linear(width, 3 * halves * width)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, embedding: Tensor) -> list[AdaLN]:
        """Embedding (..., D) -> one modulation a half, (..., D) each."""
        return self.split(self.linear(F.silu(embedding)))

    def split(self, by: Tensor) -> list[AdaLN]:
        """What the layer gives (..., 3 * halves * D) -> one modulation a half, (..., D) each."""
        parts = by.chunk(3 * self.halves, dim=-1)
        return [
            AdaLN(parts[3 * i], 1 + parts[3 * i + 1], parts[3 * i + 2]) for i in range(self.halves)
        ]


class TimeEmbedding(nn.Module):
    """Time t in [0, 1] as a vector: sines and cosines of many frequencies, then two layers.

    Shape: (B,) -> (B, D).

    Args:
        width: D.
        frequencies: half the number of features, spaced geometrically between 1 and 1000 radians.
    """

    def __init__(self, width: int, frequencies: int = 64) -> None:
        super().__init__()
        self.frequencies = frequencies
        self.net = nn.Sequential(
            nn.Linear(2 * frequencies, width), nn.SiLU(), nn.Linear(width, width)
        )

    def forward(self, t: Tensor) -> Tensor:
        """Embed."""
        # made here, not a buffer: one in bfloat16 would be off by whole turns at the high frequencies
        frequencies = torch.logspace(0, 3, self.frequencies, device=t.device)
        angles = t.float()[..., None] * frequencies
        features = torch.cat([angles.cos(), angles.sin()], dim=-1)
        embedded: Tensor = self.net(features.to(self.net[0].bias.dtype))  # type: ignore[arg-type]
        return embedded


class Prefix(nn.Module):
    """The condition as a fixed number of tokens in front of the image.

    Text ids or a class id, it is all the same: a table of embeddings and a position for each. Padding is a
    token like any other, so that shapes are static and no mask is needed.
    """

    def __init__(self, vocabulary: int, length: int, width: int) -> None:
        super().__init__()
        self.length = length
        self.embedding = nn.Embedding(vocabulary, width)
        self.position = nn.Parameter(torch.zeros(length, width))

    def forward(self, cond: Tensor) -> Tensor:
        """Condition ids (B, T) -> (B, T, D).

        Raises:
            ValueError: if the shape is not (B, T), or an id lies outside the vocabulary.
        """
        vocabulary = self.embedding.num_embeddings
        if cond.ndim != 2 or cond.shape[1] != self.length:
            raise ValueError(f"cond has shape {tuple(cond.shape)}, expected (B, {self.length})")
        if cond.device.type == "cpu" and cond.numel():  # elsewhere the check would stall the device
            low, high = int(cond.min()), int(cond.max())
            if low < 0 or high >= vocabulary:
                raise ValueError(
                    f"cond holds ids from {low} to {high}, expected 0 to {vocabulary - 1}"
                )
        embedded: Tensor = self.embedding(cond)
        return embedded + self.position


@dataclass(frozen=True)
class EncodedCondition:
    """Keys and values of a condition in every layer: what a network needs to know of it in each step.

    The prefix attends only to itself and to no time step, so these are valid for the whole of a sampling, whatever
    family it is.

    Attributes:
        layers: one entry a block, R rows each.
    """

    layers: tuple[KeyValue, ...]

    def take(self, index: Tensor) -> EncodedCondition:
        """The rows of an index (R,), which may name one more than once."""
        index = index.to(self.layers[0].key.device)
        return EncodedCondition(
            tuple(
                KeyValue(k.index_select(0, index), v.index_select(0, index)) for k, v in self.layers
            )
        )

    def rows(self, start: int, stop: int) -> EncodedCondition:
        """The rows from ``start`` up to ``stop``: the same memory."""
        return EncodedCondition(
            tuple(KeyValue(k[start:stop], v[start:stop]) for k, v in self.layers)
        )


def encode_prefix(blocks: nn.ModuleList, x: Tensor) -> EncodedCondition:
    """Run an embedded prefix (B, T, D) through the blocks; the last one's output is not needed and not computed."""
    layers = []
    for i, block in enumerate(blocks):
        assert isinstance(block, Block)
        if i + 1 == len(blocks):
            _, k, v = block.project(block.norm1(x))
        else:
            held: list[KeyValue] = []

            def attend(q: Tensor, k: Tensor, v: Tensor, held: list[KeyValue] = held) -> Tensor:
                held.append(KeyValue(k, v))
                return attention(q, k, v)

            x = Block.forward(block, x, attend)  # also where a subclass perturbs the image's tokens
            k, v = held[0]
        layers.append(KeyValue(k, v))
    return EncodedCondition(tuple(layers))


@dataclass
class KVCache:
    """Keys and values of the prefix and of the image tokens so far, allocated once, at their final size.

    An argument of every call that uses it, never an attribute of a model: two samplings at once cannot touch
    each other.

    Attributes:
        keys: of each layer (R, heads, T + L, D / heads), R rows.
        values: the same.
        prefix: T, the tokens of the condition, which come first.
        length: image tokens held so far, between 0 and L.
        network: the network to decode with; see ``models.packed``.
        compiled: its compiled step, see ``models.compiled``, or None.
        numbers: 0 to L - 1 on the device, by which that step is told its place.
        lease: of memory that others use before and after, see ``models.recorded``.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    prefix: int
    length: int
    network: nn.Module
    compiled: Any = None
    numbers: Tensor | None = None
    lease: Any = None

    @property
    def num_rows(self) -> int:
        """R."""
        return self.keys[0].shape[0]

    @property
    def nbytes(self) -> int:
        """Memory of keys and values."""
        return sum(part.nbytes for part in (*self.keys, *self.values))

    def rows(self, start: int, stop: int) -> KVCache:
        """The rows from ``start`` up to ``stop``: the same memory, with a length of its own."""
        return replace(
            self,
            keys=tuple(key[start:stop] for key in self.keys),
            values=tuple(value[start:stop] for value in self.values),
        )

    def store_prefix(self, condition: EncodedCondition) -> None:
        """Fill in the prefix; one row serves all rows."""
        for layer, (key, value) in enumerate(condition.layers):
            self.keys[layer][:, :, : self.prefix] = key
            self.values[layer][:, :, : self.prefix] = value

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """Append the keys and values of new tokens in one layer, then attend to all so far.

        ``length`` is moved by the caller once all layers are done.
        """
        start = self.prefix + self.length
        stop = start + k.shape[2]
        keys, values = self.keys[layer], self.values[layer]
        keys[:, :, start:stop] = k
        values[:, :, start:stop] = v
        return attention(q, keys[:, :, :stop], values[:, :, :stop], mask)


def causal_mask(new: int, past: int, device: torch.device) -> Tensor:
    """Mask (new, past + new), True where a query may look: all of the past, then itself and before."""
    full = torch.ones(new, past + new, dtype=torch.bool, device=device)
    return full.tril(diagonal=past)

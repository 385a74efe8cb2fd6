"""Transformers over image tokens: causal for ``sample_autoregressive``, bidirectional for ``sample_masked``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.blocks import EncodedCondition, KVCache
from models.body import Body, BodyConfig, check_places, initialize, previous_tokens
from models.packed import pack
from tokenizers_vq.files import check_counts
from tokenizers_vq.hub import StrictHubMixin


@dataclass
class TokenTransformerConfig(BodyConfig):
    """What it takes to rebuild a token model; written to ``config.json``."""

    codebook_size: int = 1000  # V

    def __post_init__(self) -> None:
        """Check the values."""
        super().__post_init__()
        check_counts(self, codebook_size=1 << 24)


class TokenTransformer(nn.Module, StrictHubMixin, library_name="unicfg", tags=["token-model"]):
    """A causal transformer over image tokens in raster order, with the condition as a prefix.

    Args:
        config: sizes.
    """

    config_class = TokenTransformerConfig

    def __init__(self, config: TokenTransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.body = Body(config)
        self.embedding = nn.Embedding(config.codebook_size, config.width)
        self.start = nn.Parameter(torch.zeros(config.width))
        self.head = nn.Linear(config.width, config.codebook_size, bias=False)
        initialize(self, config.depth)

    @property
    def num_tokens(self) -> int:
        """L, the tokens of one image."""
        return self.body.num_tokens

    def _inputs(self, ids: Tensor, first: int) -> Tensor:
        embedded = self.embedding(ids[:, max(first - 1, 0) :])
        return previous_tokens(self.start, embedded, self.body.positions(), first)

    def forward(self, ids: Tensor, cond: Tensor | EncodedCondition) -> Tensor:
        """Logits of every token given the ones before it; used in training.

        Args:
            ids: image tokens (B, L), or (B, h, w) in raster order.
            cond: condition ids (B, T).

        Returns:
            logits (B, L, V); entry i predicts ``ids[:, i]`` and has not seen it.

        Raises:
            ValueError: if the shapes do not fit the configuration.
        """
        ids = check_tokens(ids, self.num_tokens)
        logits: Tensor = self.head(self.body.forward_causal(self._inputs(ids[:, :-1], 0), cond))
        return logits

    def make_cache(self, rows: int, compile: bool = False) -> KVCache:
        """An empty cache for ``rows`` sequences, in the model's dtype and on its device.

        Args:
            rows: R.
            compile: decode with the compiled step, see ``models.compiled``.

        Raises:
            ValueError: if ``rows`` is less than 1.
        """
        return self.body.make_cache(rows, self, compile)

    def prefill(self, cond: Tensor, cache: KVCache) -> None:
        """Run the condition (R, T), or one condition (1, T) for all rows, into an empty cache.

        Raises:
            ValueError: if the shape does not fit.
        """
        self.body.prefill(cond, cache)

    def decode(self, ids: Tensor, cache: KVCache) -> Tensor:
        """Logits of the next token after all tokens so far.

        Only what the cache does not hold yet is computed: one token in the usual step, a whole chunk for a
        branch that joins late.

        Args:
            ids: all tokens so far (R, n), 0 <= n < L.
            cache: a prefilled cache with R rows; it is extended.

        Returns:
            logits (R, V) of token n.

        Raises:
            ValueError: if ``ids`` are too many, or fewer than the cache holds, or of another row count.
        """
        self.body.check_decode(ids, cache)
        out = self.body.compiled_step(ids, cache)
        if out is not None:
            return out
        network = cache.network if cache.compiled is None else cache.compiled.eager
        assert isinstance(network, TokenTransformer)
        hidden = network.body.extend(network._inputs(ids, cache.length), cache)
        logits: Tensor = network.head(hidden)
        return logits

    def step(
        self, previous: Tensor, place: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor]
    ) -> Tensor:
        """Logits (R, V) of token ``place`` () after ``previous`` (R,); see :meth:`Body.step`."""
        hidden = self.body.step(self.embedding(previous), self.start, place, keys, values)
        logits: Tensor = self.head(hidden)
        return logits


class MaskedTransformer(nn.Module, StrictHubMixin, library_name="unicfg", tags=["token-model"]):
    """A bidirectional transformer over image tokens, some of which are masked, with the condition as a prefix.

    Args:
        config: sizes.
    """

    config_class = TokenTransformerConfig

    def __init__(self, config: TokenTransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.body = Body(config)
        self.embedding = nn.Embedding(config.codebook_size + 1, config.width)
        self.head = nn.Linear(config.width, config.codebook_size, bias=False)
        initialize(self, config.depth)

    @property
    def num_tokens(self) -> int:
        """L, the tokens of one image."""
        return self.body.num_tokens

    @property
    def mask_token(self) -> int:
        """The id of a token that is not known; the last of the embedding."""
        return self.config.codebook_size

    def encode_condition(self, cond: Tensor | EncodedCondition) -> EncodedCondition:
        """What ``forward`` needs to know of condition ids (B, T), to be computed once per sampling."""
        return self.body.encode_condition(cond)

    def for_sampling(self) -> MaskedTransformer:
        """The same network with its weights in the layout that is fastest here, see ``models.packed``."""
        return pack(self)

    def forward(
        self, ids: Tensor, cond: Tensor | EncodedCondition, places: Tensor | None = None
    ) -> Tensor:
        """Logits of every token given those that are not masked.

        Args:
            ids: image tokens (B, L), or (B, h, w) in raster order; ``mask_token`` where one is unknown.
            cond: condition ids (B, T), or what ``encode_condition`` made of them.
            places: int64 (B, K), the tokens whose logits are wanted, 0 to L - 1; None is all.

        Returns:
            logits (B, L, V), or (B, K, V) at ``places``.

        Raises:
            ValueError: if the shapes do not fit the configuration, or a place is not there.
        """
        check_places(places, len(ids), self.num_tokens)
        x = self.embedding(check_tokens(ids, self.num_tokens)) + self.body.positions()
        logits: Tensor = self.head(self.body(x, cond, None, None, places))
        return logits


def check_tokens(ids: Tensor, expected: int) -> Tensor:
    """Ids as (B, L).

    Raises:
        ValueError: if L is another.
    """
    ids = ids.flatten(1)
    if ids.shape[1] != expected:
        raise ValueError(f"ids have {ids.shape[1]} tokens, expected L = {expected}")
    return ids

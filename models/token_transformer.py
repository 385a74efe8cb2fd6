"""``TokenTransformer``: logits of image tokens given a condition."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.blocks import Block, KVCache, Prefix, causal_mask, prefix_keys_values
from models.packed import pack
from tokenizers_vq.hub import FORMAT_VERSION, StrictHubMixin, check_format_version


@dataclass
class TokenTransformerConfig:
    """What it takes to rebuild a transformer; written to ``config.json``."""

    codebook_size: int = 1000  # V
    grid: int = 8  # h = w, tokens a side
    condition_vocabulary: int = 2048  # text tokens, or number of classes + 1
    condition_length: int = 32  # T; 1 for class labels
    width: int = 256  # D
    depth: int = 6
    heads: int = 4
    dropout: float = 0.0
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        """Check the values."""
        check_format_version(self.format_version)
        for name in ("codebook_size", "grid", "condition_vocabulary", "condition_length", "depth"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 1")
        if self.heads < 1 or self.width % self.heads:
            raise ValueError(f"width is {self.width}, expected a multiple of heads ({self.heads})")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}, expected a probability below 1")


class TokenTransformer(nn.Module, StrictHubMixin, library_name="unicfg", tags=["token-model"]):
    """A causal transformer over image tokens with the condition as a prefix.

    The prefix attends only to itself; image tokens attend to the prefix and to the tokens before them, in
    raster order. Positions are learned, one for each row and one for each column of the grid.

    Args:
        config: sizes.
    """

    config_class = TokenTransformerConfig

    def __init__(self, config: TokenTransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.prefix = Prefix(config.condition_vocabulary, config.condition_length, config.width)
        self.embedding = nn.Embedding(config.codebook_size, config.width)
        self.start = nn.Parameter(torch.zeros(config.width))
        self.row = nn.Parameter(torch.zeros(config.grid, 1, config.width))
        self.column = nn.Parameter(torch.zeros(1, config.grid, config.width))
        self.blocks = nn.ModuleList(
            Block(config.width, config.heads, config.dropout) for _ in range(config.depth)
        )
        self.norm = nn.RMSNorm(config.width, eps=1e-6)
        self.head = nn.Linear(config.width, config.codebook_size, bias=False)
        self._initialize()

    def _initialize(self) -> None:
        for name, parameter in self.named_parameters():
            if parameter.ndim == 1 and name != "start":
                continue  # norms start at 1
            # each block adds to the residual stream twice: its outputs start small
            residual = name.endswith(("out.weight", "down.weight"))
            shrink = (2 * self.config.depth) ** -0.5 if residual else 1.0
            nn.init.normal_(parameter, std=0.02 * shrink)

    @property
    def num_tokens(self) -> int:
        """L, the tokens of one image."""
        return self.config.grid**2

    def _positions(self) -> Tensor:
        return (self.row + self.column).flatten(0, 1)

    def _inputs(self, ids: Tensor, first: int) -> Tensor:
        """Embed positions ``first`` to ``ids.shape[1]``: each holds the token before it, and its own place."""
        rows, known = ids.shape
        x: Tensor = self.embedding(ids[:, max(first - 1, 0) :])
        if first == 0:
            x = torch.cat([self.start.expand(rows, 1, -1), x], dim=1)
        return x + self._positions()[first : known + 1]

    def forward(self, ids: Tensor, cond: Tensor) -> Tensor:
        """Logits of every token given the ones before it; used in training.

        Args:
            ids: image tokens (B, L), or (B, h, w) in raster order.
            cond: condition ids (B, T).

        Returns:
            logits (B, L, V); entry i predicts ``ids[:, i]`` and has not seen it.

        Raises:
            ValueError: if the shapes do not fit the configuration.
        """
        ids = ids.flatten(1)
        if ids.shape[1] != self.num_tokens:
            raise ValueError(f"ids have {ids.shape[1]} tokens, expected L = {self.num_tokens}")
        past = prefix_keys_values(self.blocks, self.prefix(cond))
        mask = causal_mask(self.num_tokens, self.prefix.length, ids.device)
        x = self._inputs(ids[:, :-1], 0)
        for block, (prefix_key, prefix_value) in zip(self.blocks, past, strict=True):

            def attend(
                q: Tensor, k: Tensor, v: Tensor, pk: Tensor = prefix_key, pv: Tensor = prefix_value
            ) -> Tensor:
                k, v = torch.cat([pk, k], dim=2), torch.cat([pv, v], dim=2)
                return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

            x = block(x, attend)
        logits: Tensor = self.head(self.norm(x))
        return logits

    def make_cache(self, rows: int) -> KVCache:
        """An empty cache for ``rows`` sequences, in the model's dtype and on its device.

        Raises:
            ValueError: if ``rows`` is less than 1.
        """
        if rows < 1:
            raise ValueError(f"rows is {rows}, expected at least 1")
        config, weight = self.config, self.head.weight
        places = self.prefix.length + self.num_tokens
        shape = (config.depth, rows, config.heads, places, config.width // config.heads)
        keys, values = weight.new_empty(shape), weight.new_empty(shape)
        return KVCache(keys, values, self.prefix.length, 0, pack(self))

    def prefill(self, cond: Tensor, cache: KVCache) -> None:
        """Run the condition (R, T), or one condition (1, T) for all rows, into an empty cache.

        Raises:
            ValueError: if the shape does not fit.
        """
        if cond.shape[0] not in (1, cache.keys.shape[1]):
            raise ValueError(f"cond has {cond.shape[0]} rows, the cache {cache.keys.shape[1]}")
        cache.store_prefix(prefix_keys_values(self.blocks, self.prefix(cond)))

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
        rows, known = ids.shape
        if rows != cache.keys.shape[1]:
            raise ValueError(f"ids have {rows} rows, the cache {cache.keys.shape[1]}")
        if not cache.length <= known < self.num_tokens:
            raise ValueError(
                f"ids hold {known} tokens, expected at least the cache's {cache.length} "
                f"and fewer than L = {self.num_tokens}"
            )
        network = cache.network
        assert isinstance(network, TokenTransformer)
        x = self._inputs(ids, cache.length)
        new = x.shape[1]
        past = cache.prefix + cache.length
        mask = causal_mask(new, past, x.device) if new > 1 else None
        for layer, block in enumerate(network.blocks):

            def attend(q: Tensor, k: Tensor, v: Tensor, layer: int = layer) -> Tensor:
                return cache.attend(layer, q, k, v, mask)

            x = block(x, attend)
        cache.length += new
        logits: Tensor = network.head(network.norm(x[:, -1]))
        return logits

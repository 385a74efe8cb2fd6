"""The rows that one causal language model runs for a guided step: all its branches in one call, with one cache."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import MODEL_FOR_MASKED_LM_MAPPING, DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from unicfg.integrations.transformers.prompts import Prompts
from unicfg.integrations.transformers.row_cache import cache_argument


def check_causal(model: Any, name: str = "model") -> None:
    """Refuse what is no decoder of tokens.

    Raises:
        TypeError: names the class and what to use instead.
        ValueError: if it is in training mode.
    """
    kind = type(model).__name__
    config = getattr(model, "config", None)
    if config is None or not hasattr(model, "generate") or not model.can_generate():
        raise TypeError(
            f"{name} is a {kind}, which does not generate: expected a causal language model"
        )
    if config.is_encoder_decoder:
        raise TypeError(
            f"{name} is a {kind}, an encoder and a decoder: expected a causal language model, or for MusicGen "
            "unicfg.integrations.transformers.musicgen"
        )
    if type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", True):
        raise TypeError(
            f"{name} is a {kind} with is_decoder False, an encoder: its tokens look ahead. Expected a causal language "
            "model, or is_decoder=True in its configuration"
        )
    if model.training:
        raise ValueError(f"{name} is in training mode, expected model.eval() before sampling")


class CausalRows:
    """Branches of one model over one sampling: joined when they are first needed, dropped after they are last needed.

    A branch that joins late runs its prompt and all tokens so far in one call. Where the cache cannot change its rows
    (a static one, or layers with a recurrent state), all branches run from the first token to the last.

    Args:
        model: a causal language model of transformers.
        prompts: of each branch, R rows each.
        steps: of each branch, the first and the last step that needs it.
        cache: an empty cache to use; None makes one.
        use_cache: False runs everything again for each token.
        capacity: tokens a row at most, for a static cache.
    """

    def __init__(
        self,
        model: Any,
        prompts: Mapping[str, Prompts],
        steps: Mapping[str, tuple[int, int]],
        cache: Any = None,
        use_cache: bool = True,
        capacity: int | None = None,
    ) -> None:
        self.model, self.use_cache = model, use_cache
        length = max(part.ids.shape[1] for part in prompts.values())
        self.prompts = {name: part.padded(length) for name, part in prompts.items()}
        self.cache = _usable(model, cache, length if capacity is None else capacity)
        self.steps = dict(steps)
        fixed = not _rows_can_change(self.cache)
        if use_cache and fixed:
            whole = (0, max(last for _, last in steps.values()))
            self.steps = dict.fromkeys(steps, whole)
        self.names: tuple[str, ...] = ()
        self._held = 0  # tokens in the cache behind the prompts
        accepted = inspect.signature(model.forward).parameters
        self._few_logits = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}
        self._cache_argument = cache_argument(model)
        self._takes_positions = "position_ids" in accepted
        # a static cache holds places that are not filled yet, which only a mask tells from others
        self._masked = fixed or any(bool((p.mask == 0).any()) for p in self.prompts.values())

    def __call__(self, index: int, ids: Tensor) -> dict[str, Tensor]:
        """Logits of the next token, at least in every branch that step ``index`` needs.

        Args:
            index: of the step; later than that of the call before.
            ids: tokens so far (R, n), without the prompts.

        Returns:
            (R, V) of each branch, float32.
        """
        wanted = [name for name, (first, last) in self.steps.items() if first <= index <= last]
        if not self.use_cache:
            return self._run(wanted, self._everything(wanted, ids), None, ids.shape[1])
        self._keep([name for name in self.names if name in wanted], len(ids))
        outputs: dict[str, Tensor] = {}
        if self.names:
            rows = torch.cat([ids[:, self._held :]] * len(self.names))
            outputs = self._run(self.names, rows, self.cache, ids.shape[1])
        joining = tuple(name for name in wanted if name not in self.names)
        if joining:
            cache = DynamicCache(config=self.model.config) if self.names else self.cache
            outputs |= self._run(joining, self._everything(joining, ids), cache, ids.shape[1])
            if self.names:
                _append(self.cache, cache)
            self.names += joining
        self._held = ids.shape[1]
        return outputs

    def reorder(self, index: Tensor) -> None:
        """Sequence i goes on as sequence ``index[i]`` did; index is int64 (R,)."""
        if self.names and self.use_cache:
            rows = torch.cat([index + i * len(index) for i in range(len(self.names))])
            self.cache.reorder_cache(rows)

    def rewind(self, drawn: int) -> None:
        """Go back to where ``drawn`` tokens were known, or to the start where a layer has forgotten them."""
        if drawn >= self._held:
            return
        if all(type(layer) is DynamicLayer for layer in self.cache.layers) and drawn > 0:
            self.cache.crop(drawn - self._held)
            self._held = drawn
        else:
            self.names, self._held = (), 0
            self.cache = DynamicCache(config=self.model.config)

    def _keep(self, names: Sequence[str], rows: int) -> None:
        if tuple(names) == self.names:
            return
        kept = [i for i, name in enumerate(self.names) if name in names]
        self.names = tuple(names)
        if kept:
            self.cache.reorder_cache(
                torch.cat([torch.arange(i * rows, (i + 1) * rows) for i in kept])
            )
        else:
            self.cache = DynamicCache(config=self.model.config)

    def _everything(self, names: Sequence[str], ids: Tensor) -> Tensor:
        return torch.cat([torch.cat([self.prompts[name].ids, ids], dim=1) for name in names])

    def _run(self, names: Sequence[str], rows: Tensor, cache: Any, drawn: int) -> dict[str, Tensor]:
        """One call for the last tokens (R, n) of the branches, of which ``drawn`` in all are behind the prompts."""
        device = self.model.device  # prompts may be elsewhere, as generate allows
        prompts = torch.cat([self.prompts[name].mask for name in names]).to(device)
        mask = torch.nn.functional.pad(prompts, (0, drawn), value=1)
        extra: dict[str, Any] = dict(self._few_logits)
        if self._takes_positions:
            # what is not padding counts from 0: a model with learned positions needs it, and none is hurt by it
            extra["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)[:, -rows.shape[1] :]
        out = self.model(
            input_ids=rows.to(device),
            attention_mask=mask if self._masked else None,
            use_cache=self.use_cache,
            return_dict=True,
            **{self._cache_argument: cache},
            **extra,
        )
        logits = out.logits[:, -1].to(rows.device, torch.float32)
        count = len(rows) // len(names)
        return dict(zip(names, logits.split(count), strict=True))


def _usable(model: Any, cache: Any, capacity: int) -> Any:
    """The cache, or one of its kind that is large enough."""
    if cache is None:
        return DynamicCache(config=model.config)
    layers: Any = cache.layers
    if isinstance(cache, StaticCache) and capacity > max(layer.max_cache_len for layer in layers):
        config = model.config.get_text_config(decoder=True)
        return StaticCache(config=config, max_cache_len=capacity, offloading=cache.offloading)
    return cache


def _rows_can_change(cache: Any) -> bool:
    return all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers)


def _append(cache: Any, other: Any) -> None:
    """The rows of ``other`` behind those of ``cache``: of as many tokens, padding included."""
    for own, more in zip(cache.layers, other.layers, strict=True):
        own.keys = torch.cat([own.keys, more.keys.to(own.keys.device)])
        own.values = torch.cat([own.values, more.values.to(own.values.device)])

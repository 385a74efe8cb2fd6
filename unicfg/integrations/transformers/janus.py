"""Janus, which writes images as tokens, under one guidance: ``sample_autoregressive`` draws them.

The unconditional rows are those that Janus was trained with (Wu et al., arXiv 2410.13848): the text is replaced by
padding, which is attended to; only what is padding in the prompt itself is hidden in both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import JanusForConditionalGeneration

from unicfg.guidance.core import Guidance
from unicfg.integrations.transformers.prompts import HIDDEN, as_condition
from unicfg.integrations.transformers.row_cache import Memory, RowCache, cache_argument
from unicfg.sampling.autoregressive import TokenStep, sample_autoregressive


class PromptedCache:
    """A :class:`RowCache`, and the prompt of each row.

    Args:
        states: keys and values.
        prompts: conditions of all rows (N, T).
        start: first row of this view.
        stop: the row behind its last.
    """

    def __init__(self, states: RowCache, prompts: Memory, start: int, stop: int) -> None:
        self.states, self.prompts, self.start, self.stop = states, prompts, start, stop
        self._padded: bool | None = None

    @property
    def length(self) -> int:
        """Tokens that the states hold, of the prompt and of the image."""
        return self.states.length

    @length.setter
    def length(self, length: int) -> None:
        self.states.length = length

    @property
    def prompt(self) -> Tensor:
        """Conditions (R, T)."""
        if self.prompts.held is None:
            raise ValueError("the cache holds no condition, expected prefill() before decode()")
        return self.prompts.held[self.start : self.stop]

    @prompt.setter
    def prompt(self, cond: Tensor) -> None:
        self.prompts.like(cond, *cond.shape[1:])[self.start : self.stop] = cond

    @property
    def is_padded(self) -> bool:
        """Whether some place of a prompt is hidden; looked up once, which on a GPU waits for it."""
        if self._padded is None:
            self._padded = bool((self.prompt == HIDDEN).any())
        return self._padded

    def rows(self, start: int, stop: int) -> PromptedCache:
        """The rows from ``start`` up to ``stop``: the same memory, with a length of its own."""
        first = self.start
        states = self.states.rows(start, stop)
        return PromptedCache(states, self.prompts, first + start, first + stop)


class JanusImages:
    """The image mode of Janus as a model for ``sample_autoregressive``.

    Conditions are what :meth:`condition` makes of prompts; the null condition of each is :meth:`null`.

    Args:
        model: of transformers, in eval mode.

    Attributes:
        num_tokens: L, the tokens of an image.
        codebook_size: V.

    Raises:
        TypeError: if it is another model.
        ValueError: if it is in training mode, or its generation_config lacks a token that prompts are made of.

    Example:
        >>> images = JanusImages(model)
        >>> cond = images.condition(**processor(text=prompts, generation_mode="image", padding=True, return_tensors="pt"))
        >>> ids = sample_autoregressive(images, cond, uncond=images.null(cond), guidance=Guidance(5.0), seeds=[0])
        >>> pixels = images.decode_images(ids)
    """

    def __init__(self, model: JanusForConditionalGeneration) -> None:
        if not isinstance(model, JanusForConditionalGeneration):
            raise TypeError(
                f"model is a {type(model).__name__}, expected a JanusForConditionalGeneration"
            )
        if model.training:
            raise ValueError("model is in training mode, expected model.eval() before sampling")
        host: Any = model
        self.model = host
        self.num_tokens: int = self.model.model.vision_model.config.num_image_tokens
        self.codebook_size: int = self.model.model.vqmodel.config.num_embeddings
        config = self.model.generation_config
        tokens = {
            "bos_token_id": config.bos_token_id,
            "pad_token_id": config.pad_token_id,
            "generation_kwargs['boi_token_id']": (config.generation_kwargs or {}).get(
                "boi_token_id"
            ),
        }
        missing = [name for name, token in tokens.items() if not isinstance(token, int)]
        if missing:
            raise ValueError(
                f"generation_config of the model has no {', '.join(missing)}: expected the id of a token, as "
                "Janus' own generation_config.json has it"
            )
        self._bos, self._pad, self._begin = tokens.values()

    def condition(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Prompts as a condition.

        Args:
            input_ids: (B, T), from the processor with ``generation_mode="image"``, padded on the left.
            attention_mask: (B, T), 0 at the padding; None hides nothing.

        Returns:
            (B, T), int64: ids, and -1 at the padding.

        Raises:
            TypeError: if ``input_ids`` is no tensor of integers.
            ValueError: if shapes differ, or a prompt does not end with the token that begins an image.
        """
        cond = as_condition(input_ids, attention_mask, self.model.device)
        last = cond[:, -1].tolist()
        if any(token != self._begin for token in last):
            raise ValueError(
                f"input_ids ends with {last} under its mask, expected the begin of an image, {self._begin}, in every "
                "row: as from processor(text, generation_mode='image'), padded on the left"
            )
        return cond

    def null(self, cond: Tensor) -> Tensor:
        """The null condition (B, T) of each condition (B, T): its text is padding that is attended to."""
        kept = torch.tensor([self._bos, self._begin, HIDDEN], device=cond.device)
        return torch.where(torch.isin(cond, kept), cond, self._pad)

    def make_cache(self, rows: int) -> PromptedCache:
        """Room for the prompts and images of ``rows`` sequences."""
        layers = self.model.config.text_config.num_hidden_layers
        # the last token of a prompt is run with the image, whose last token is not run
        states = RowCache.empty(layers, rows, self.num_tokens)
        return PromptedCache(states, Memory(rows), 0, rows)

    def prefill(self, cond: Tensor, cache: PromptedCache) -> None:
        """Run conditions (R, T), or (1, T) for all rows, into the cache, but for the last token."""
        cache.prompt = cond
        if cond.shape[1] > 1:
            mask = (cond[:, :-1] != HIDDEN).long()
            self._run(self._text(cond[:, :-1]), mask, cache)

    def decode(self, ids: Tensor, cache: PromptedCache) -> Tensor:
        """Logits (R, V) of the token after ``ids`` (R, n)."""
        prompt = cache.prompt
        held = cache.length - (prompt.shape[1] - 1)  # of the last token of the prompt and ids
        parts = [self._text(prompt[:, -1:])] if held == 0 else []
        if ids.shape[1]:
            parts.append(
                self.model.prepare_embeddings_for_image_generation(ids[:, max(held - 1, 0) :])
            )
        mask = None
        if cache.is_padded:
            mask = torch.nn.functional.pad((prompt != HIDDEN).long(), (0, ids.shape[1]), value=1)
        hidden = self._run(torch.cat(parts, dim=1), mask, cache)
        return self.model.model.generation_head(hidden[:, -1])

    def decode_images(self, ids: Tensor) -> Tensor:
        """Image tokens (B, L) -> images (B, 3, H, W) in [-1, 1], by the model's own decoder."""
        with torch.no_grad():
            pixels: Tensor = self.model.decode_image_tokens(ids)
        return pixels.permute(0, 3, 1, 2).clamp(-1, 1)

    def _text(self, ids: Tensor) -> Tensor:
        return self.model.get_input_embeddings()(ids.clamp(min=0))  # what is hidden may be anything

    def _run(self, embeds: Tensor, mask: Tensor | None, cache: PromptedCache) -> Tensor:
        language_model = self.model.model.language_model
        out = language_model(
            inputs_embeds=embeds,
            attention_mask=mask,
            use_cache=True,
            **{cache_argument(language_model): cache.states},
        )
        return out.last_hidden_state


def generate_images(
    model: JanusForConditionalGeneration,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    seeds: Sequence[int],
    guidance: Guidance | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    callback: Callable[[TokenStep], None] | None = None,
) -> Tensor:
    """Draw image tokens of Janus: ``sample_autoregressive`` of :class:`JanusImages`, with its own null condition.

    In place of ``model.generate(generation_mode="image", guidance_scale=s)``, whose s is that of ``Guidance(s)``.

    Args:
        model: of transformers, in eval mode.
        input_ids: (B, T), from the processor with ``generation_mode="image"``, padded on the left.
        attention_mask: (B, T), 0 at the padding; None hides nothing.
        seeds: one int a sample. The same seed gives the same image in a batch of any size.
        guidance: scale, schedule over the tokens, and mitigations; None is ``Guidance(1.0)``, the conditional model.
        temperature: divides the guided logits; 0 takes the most likely token.
        top_k: keep the k most likely tokens, after guidance.
        top_p: keep the most likely tokens up to this probability, after guidance.
        callback: called with a :class:`TokenStep` after each token.

    Returns:
        ids (B, L), int64, for ``model.decode_image_tokens`` or :meth:`JanusImages.decode_images`.

    Raises:
        TypeError: if the model is another, a seed is no int, or ``guidance`` no ``Guidance``.
        ValueError: if seeds, shapes or ranges do not fit, or a prompt is not one for images.
        FloatingPointError: if the model's outputs leave no token to draw.

    Example:
        >>> inputs = processor(text=["a red circle"], generation_mode="image", return_tensors="pt")
        >>> ids = generate_images(model, **inputs, guidance=Guidance(5.0), seeds=[0])
    """
    images = JanusImages(model)
    cond = images.condition(input_ids, attention_mask)
    return sample_autoregressive(
        images,
        cond,
        uncond=images.null(cond),
        seeds=seeds,
        guidance=guidance,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        callback=callback,
    )

"""MusicGen, which writes audio as several codebooks of tokens, under one guidance.

The unconditional rows are those of the training (Copet et al., arXiv 2306.05284): no text at all, that is encoder
states of zeros, none of which is attended to. Codebook k is delayed by k steps (section 2.2 there), and every step draws
one token of each codebook from logits that are guided codebook by codebook.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import MusicgenForConditionalGeneration
from transformers.cache_utils import EncoderDecoderCache

from unicfg.guidance.core import Guidance
from unicfg.integrations.transformers.prompts import HIDDEN, as_condition
from unicfg.integrations.transformers.row_cache import Memory, RowCache, cache_argument
from unicfg.sampling.autoregressive import CachedBranches, TokenStep
from unicfg.sampling.branches import Branch, begin_guidance, combine, plan, progress_at
from unicfg.sampling.randomness import check_seeds, generators, uniform
from unicfg.sampling.tokens import TokenFilter, draw


class CrossCache:
    """Keys and values of the decoder's own tokens and of the text, and which places of the text are hidden.

    Args:
        own: of the decoder's tokens.
        text: of the encoder's states.
        masks: bool of all rows (N, T), False where hidden.
        start: first row of this view.
        stop: the row behind its last.
    """

    def __init__(self, own: RowCache, text: RowCache, masks: Memory, start: int, stop: int) -> None:
        self.own, self.text, self.masks, self.start, self.stop = own, text, masks, start, stop

    @property
    def length(self) -> int:
        """Steps that the cache holds, the one of the start token included."""
        return self.own.length

    @length.setter
    def length(self, length: int) -> None:
        self.own.length = length

    @property
    def mask(self) -> Tensor:
        """Bool (R, T), False where the text is hidden."""
        if self.masks.held is None:
            raise ValueError("the cache holds no condition, expected prefill() before decode()")
        return self.masks.held[self.start : self.stop]

    @mask.setter
    def mask(self, mask: Tensor) -> None:
        self.masks.like(mask, *mask.shape[1:])[self.start : self.stop] = mask

    def rows(self, start: int, stop: int) -> CrossCache:
        """The rows from ``start`` up to ``stop``: the same memory, with a length of its own."""
        first = self.start
        own, text = self.own.rows(start, stop), self.text.rows(start, stop)
        return CrossCache(own, text, self.masks, first + start, first + stop)


class MusicgenCodes:
    """MusicGen as a model that decodes one step of all codebooks at a time; :func:`generate_codes` samples it.

    Conditions are what :meth:`condition` makes of texts; the null condition is :meth:`null`.

    Args:
        model: of transformers, in eval mode.
        frames: L, of the audio, of which each codebook has one token.

    Attributes:
        num_codebooks: K.
        codebook_size: V.
        num_tokens: steps: L and the delay of the last codebook.
        delays: of each codebook, in steps.
        start: the token before the first and behind the last frame of a codebook.

    Raises:
        TypeError: if it is another model.
        ValueError: if it is in training mode, lacks a start token, or ``frames`` is less than 1.
    """

    def __init__(self, model: MusicgenForConditionalGeneration, frames: int) -> None:
        if not isinstance(model, MusicgenForConditionalGeneration):
            raise TypeError(
                f"model is a {type(model).__name__}, expected a MusicgenForConditionalGeneration"
            )
        if model.training:
            raise ValueError("model is in training mode, expected model.eval() before sampling")
        if isinstance(frames, bool) or not isinstance(frames, int) or frames < 1:
            raise ValueError(f"frames is {frames!r}, expected an int >= 1")
        host: Any = model
        self.model, self.frames = host, frames
        config = self.model.config.decoder
        self.num_codebooks: int = config.num_codebooks
        self.codebook_size: int = config.vocab_size
        # the codebooks of the two channels of stereo alternate, and each pair is delayed alike
        self.delays = [k // config.audio_channels for k in range(self.num_codebooks)]
        self.num_tokens = frames + self.delays[-1]
        start = self.model.generation_config.decoder_start_token_id
        start = config.bos_token_id if start is None else start
        if not isinstance(start, int):
            raise ValueError(
                f"decoder_start_token_id of the model's generation_config is {start!r}, expected the id of a token"
            )
        self.start = start

    def condition(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Texts as a condition.

        Args:
            input_ids: (B, T), from the processor.
            attention_mask: (B, T), 0 at the padding; None hides nothing.

        Returns:
            (B, T), int64: ids, and -1 at the padding.

        Raises:
            TypeError: if ``input_ids`` is no tensor of integers.
            ValueError: if shapes differ.
        """
        return as_condition(input_ids, attention_mask, self.model.device)

    def null(self, cond: Tensor) -> Tensor:
        """The null condition (T,) of conditions (B, T): every place is hidden."""
        return torch.full_like(cond[0], HIDDEN)

    def is_open(self, index: int) -> Tensor:
        """Bool (K,): which codebooks have a frame at this step; the others have the start token."""
        return torch.tensor([delay <= index < delay + self.frames for delay in self.delays])

    def codes(self, ids: Tensor) -> Tensor:
        """Codes (B, K, L) of the tokens of all steps (B, L + delay, K): every codebook without its delay."""
        parts = [ids[:, delay : delay + self.frames, k] for k, delay in enumerate(self.delays)]
        return torch.stack(parts, dim=1)

    def make_cache(self, rows: int) -> CrossCache:
        """Room for the texts and steps of ``rows`` sequences."""
        layers = self.model.config.decoder.num_hidden_layers
        own = RowCache.empty(layers, rows, self.num_tokens)
        return CrossCache(own, RowCache.empty(layers, rows, 0), Memory(rows), 0, rows)

    def prefill(self, cond: Tensor, cache: CrossCache) -> None:
        """Encode conditions (R, T), or one (1, T) for all rows, into the cache."""
        mask = cond != HIDDEN
        cache.mask = mask
        # a call is what makes the decoder keep the text; its own step is run again, with those that follow
        self._run(self._start(len(cond)), self._states(cond, mask), mask, cache)
        cache.length = 0

    def decode(self, ids: Tensor, cache: CrossCache) -> Tensor:
        """Logits (R, K, V) of the step after ``ids`` (R, n, K)."""
        mask = cache.mask
        cache.text.length = mask.shape[1]
        config = self.model.config.decoder
        # the text is in the cache: of the states only their shape is looked at
        states = torch.zeros((), dtype=self.model.dtype, device=ids.device)
        steps = torch.cat([self._start(len(ids)), ids], dim=1)[:, cache.length :]
        return self._run(steps, states.expand(*mask.shape, config.hidden_size), mask, cache)

    def _start(self, rows: int) -> Tensor:
        shape = (rows, 1, self.num_codebooks)
        return torch.full(shape, self.start, device=self.model.device)

    def _states(self, cond: Tensor, mask: Tensor) -> Tensor:
        """Encoder states (R, T, D), 0 where hidden."""
        config = self.model.config.decoder
        if not bool(mask.any()):
            return torch.zeros(
                *cond.shape, config.hidden_size, dtype=self.model.dtype, device=cond.device
            )
        encoder = self.model.text_encoder
        states = encoder(input_ids=cond.clamp(min=0), attention_mask=mask.long()).last_hidden_state
        if hasattr(self.model, "enc_to_dec_proj"):
            states = self.model.enc_to_dec_proj(states)
        return states.masked_fill(~mask[..., None], 0.0)

    def _run(self, steps: Tensor, states: Tensor, mask: Tensor, cache: CrossCache) -> Tensor:
        """Logits (R, K, V) after the last of the steps (R, n, K)."""
        rows, count, codebooks = steps.shape
        out = self.model.decoder(
            # its rows are codebooks of samples
            input_ids=steps.transpose(1, 2).reshape(rows * codebooks, count),
            encoder_hidden_states=states,
            encoder_attention_mask=mask.long(),
            use_cache=True,
            **{cache_argument(self.model.decoder): EncoderDecoderCache(cache.own, cache.text)},
        )
        return out.logits[:, -1].view(rows, codebooks, -1)


@torch.no_grad()
def generate_codes(
    model: MusicgenForConditionalGeneration,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    frames: int,
    seeds: Sequence[int],
    guidance: Guidance | None = None,
    uncond: Tensor | None = None,
    branches: Mapping[str, Branch] | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    callback: Callable[[TokenStep], None] | None = None,
) -> Tensor:
    """Draw audio codes of MusicGen from guided logits.

    In place of ``model.generate(guidance_scale=s, max_new_tokens=L + delay)``, whose s is that of ``Guidance(s)``.

    Args:
        model: of transformers, in eval mode.
        input_ids: texts (B, T), from the processor.
        attention_mask: (B, T), 0 at the padding; None hides nothing.
        frames: L; ``model.config.audio_encoder.frame_rate`` of them are a second.
        seeds: one int a sample. The same seed gives the same audio in a batch of any size.
        guidance: scale, schedule over the steps, and mitigations; None is ``Guidance(1.0)``, the conditional model.
        uncond: the null condition (T,), or a negative condition a sample (B, T), see :meth:`MusicgenCodes.condition`.
            None is that of the training, no text.
        branches: what runs in the branches that guidance names beside "cond" and "uncond"; a model is a
            :class:`MusicgenCodes`.
        temperature: divides the guided logits; 0 takes the most likely token.
        top_k: keep the k most likely tokens, after guidance.
        top_p: keep the most likely tokens up to this probability, after guidance.
        callback: called after each step with a :class:`TokenStep` whose ids are (B, index + 1, K), delayed, and whose
            logits are (B, K, V).

    Returns:
        codes (B, K, L), int64, for :func:`decode_codes`.

    Raises:
        TypeError: if the model is another, a seed is no int, or ``guidance`` no ``Guidance``.
        ValueError: if seeds, shapes or ranges do not fit.
        FloatingPointError: if an output of the model is not finite; names the step and the branch.

    Example:
        >>> inputs = processor(text=["a slow piano"], return_tensors="pt")
        >>> codes = generate_codes(model, **inputs, frames=250, guidance=Guidance(3.0), seeds=[0])
    """
    network = MusicgenCodes(model, frames)
    guidance = begin_guidance(guidance, "logits")
    choose = TokenFilter(temperature, top_k, top_p)
    cond = network.condition(input_ids, attention_mask)
    batch, steps, codebooks = len(cond), network.num_tokens, network.num_codebooks
    noise = uniform(generators(check_seeds(seeds, batch)), (steps, codebooks)).to(cond.device)

    progresses = [progress_at(index, steps) for index in range(steps)]
    uncond = network.null(cond) if uncond is None else uncond
    groups = plan(network, cond, uncond, branches, guidance, progresses)
    run = CachedBranches(groups, batch)
    ids = cond.new_empty((batch, 0, codebooks))
    for index, progress in enumerate(progresses):
        outputs = run(ids, guidance.branches_at(progress))
        guided = combine(guidance, progress, outputs, f"step {index}")
        drawn = draw(choose(guided.out), noise[:, index])
        drawn = torch.where(network.is_open(index).to(drawn.device), drawn, network.start)
        ids = torch.cat([ids, drawn[:, None]], dim=1)
        if callback is not None:
            callback(TokenStep(index, progress, guided.scale, ids, guided.out, guided.outputs))
    return network.codes(ids)


@torch.no_grad()
def decode_codes(model: MusicgenForConditionalGeneration, codes: Tensor) -> Tensor:
    """Audio of codes, by the model's own audio encoder.

    Args:
        model: of transformers.
        codes: (B, K, L), from :func:`generate_codes`.

    Returns:
        (B, channels, samples), float.

    Raises:
        ValueError: if ``codes`` has another number of codebooks.
    """
    whole: Any = model
    config = whole.config.decoder
    if codes.ndim != 3 or codes.shape[1] != config.num_codebooks:
        raise ValueError(
            f"codes has shape {tuple(codes.shape)}, expected (B, {config.num_codebooks}, L)"
        )
    channels = config.audio_channels
    # of one chunk each
    parts = [
        whole.audio_encoder.decode(codes[None, :, i::channels], audio_scales=[None] * len(codes))
        for i in range(channels)
    ]
    return torch.cat([part.audio_values for part in parts], dim=1)

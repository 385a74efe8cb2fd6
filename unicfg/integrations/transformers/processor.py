"""Guidance as a logits processor, where that is all that fits: beam search, assisted decoding, pipelines."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor

from unicfg.guidance.core import Guidance
from unicfg.integrations.transformers.passes import CausalRows, check_causal
from unicfg.integrations.transformers.prompts import as_prompts
from unicfg.sampling.branches import begin_guidance, combine, needs_progress, progress_at


class GuidedLogitsProcessor(LogitsProcessor):
    """Guides the scores that a model gave for its prompt, by a second forward for the unconditional prompt.

    :func:`guided_generate` is faster, with one forward for both. This is for where the loop belongs to someone else.
    Scores are returned as log-probabilities, so those of beams add up. What is drawn is whatever follows the prompt of the
    first call, so beams may change places and drafts may be taken back. One object serves one prompt: take another, or
    call :meth:`begin`, where a prompt goes on from what was drawn, as in a chat.

    Args:
        model: the causal language model that generates, or a weaker one with the same vocabulary.
        guidance: scale, schedule and mitigations, of the branches "cond" and "uncond".
        uncond_ids: unconditional prompts: ids (T,), (R, T), a list of ids, or a tokenizer's output.
        uncond_attention_mask: of ``uncond_ids``, 0 at the padding on the left.
        num_tokens: how many are drawn at most; a schedule needs it to know its progress.

    Raises:
        TypeError: if the model is no causal language model.
        ValueError: if a schedule is given without ``num_tokens``, or guidance has other branches.

    Example:
        >>> guided = GuidedLogitsProcessor(model, Guidance(1.5), null_ids)
        >>> model.generate(ids, num_beams=4, logits_processor=LogitsProcessorList([guided]))
    """

    def __init__(
        self,
        model: Any,
        guidance: Guidance,
        uncond_ids: Any,
        uncond_attention_mask: Tensor | None = None,
        num_tokens: int | None = None,
    ) -> None:
        check_causal(model)
        self.guidance = guidance
        begin_guidance(guidance, "logits")
        if set(guidance.branch_names) - {"cond", "uncond"}:
            raise ValueError(
                f"guidance has the branches {guidance.branch_names}, expected 'cond' and 'uncond': use guided_generate"
            )
        if num_tokens is None and needs_progress(guidance):
            raise ValueError(
                "num_tokens is None with a schedule, expected how many tokens are drawn at most: it needs to know its progress"
            )
        self.model, self.num_tokens = model, num_tokens
        self.prompts = as_prompts(uncond_ids, "uncond_ids", model.device, uncond_attention_mask)
        self.begin()

    def begin(self) -> None:
        """Take the ids of the next call for a prompt."""
        self._running = self.guidance.begin("logits")
        self._prompt: Tensor | None = None
        self._seen: Tensor | None = None  # what followed it in the last forward
        self._rows: CausalRows | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Guided log-probabilities (R, V) of the token after ids (R, T), for scores (R, V) of the model.

        Raises:
            ValueError: if the number of rows does not fit ``uncond_ids``, or there are more tokens than ``num_tokens``.
        """
        drawn = self._drawn(input_ids)
        index = drawn.shape[1]
        if self.num_tokens is not None and index >= self.num_tokens:
            raise ValueError(
                f"token {index} is asked for and num_tokens is {self.num_tokens}, expected at least {index + 1}"
            )
        progress = 0.0 if self.num_tokens is None else progress_at(index, self.num_tokens)
        needed = self._running.branches_at(progress)
        outputs = {"cond": scores.float()} if "cond" in needed else {}
        if "uncond" in needed:
            outputs |= self._uncond(drawn)
        ordered = {name: outputs[name] for name in needed}
        guided = combine(self._running, progress, ordered, f"token {index}")
        return guided.out.log_softmax(-1)

    def _drawn(self, ids: Tensor) -> Tensor:
        """What follows the prompt (R, n), which is the ids of the first call, or of one that has another prompt."""
        prompt = self._prompt
        known = (
            prompt is not None
            and len(ids) == len(prompt)
            and ids.shape[1] >= prompt.shape[1]
            and torch.equal(ids[:, : prompt.shape[1]], prompt)
        )
        if not known:
            self.begin()
            prompt = self._prompt = ids
        assert prompt is not None
        return ids[:, prompt.shape[1] :]

    def _uncond(self, drawn: Tensor) -> dict[str, Tensor]:
        """Unconditional logits (R, V) after the tokens (R, n), of which as many as can be are in the cache."""
        count = len(drawn)
        if self._rows is None or self._seen is None:
            prompts = self.prompts.for_rows(count, "uncond_ids").to(drawn.device)
            self._rows = CausalRows(self.model, {"uncond": prompts}, {"uncond": (0, sys.maxsize)})
        else:
            length = min(drawn.shape[1], self._seen.shape[1])
            same = (drawn[:, None, :length] == self._seen[None, :, :length]).cumprod(-1).sum(-1)
            # a row goes on from the one that it has most of, among those with its unconditional prompt
            group = torch.arange(count, device=drawn.device) // (count // len(self.prompts.ids))
            same = same.masked_fill(group[:, None] != group[None], -1)
            longest, best = same.max(1)
            if not torch.equal(same.diagonal(), longest):  # else each goes on from itself
                self._rows.reorder(best)
            # the last token is run in any case, for its logits
            self._rows.rewind(min(int(longest.min()), drawn.shape[1] - 1))
        self._seen = drawn
        return self._rows(drawn.shape[1], drawn)

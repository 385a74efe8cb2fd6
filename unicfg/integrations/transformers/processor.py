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
from unicfg.sampling.branches import begin_guidance, combine, progress_at


class GuidedLogitsProcessor(LogitsProcessor):
    """Guides the scores that a model gave for its prompt, by a second forward for the unconditional prompt.

    :func:`guided_generate` is faster, with one forward for both. This is for where the loop belongs to someone else.
    Scores are returned as log-probabilities, so those of beams add up. Where beams change places the unconditional
    rows follow.

    One object serves one ``generate`` after another: a prompt that does not go on from the tokens before begins anew.

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
        self._running = begin_guidance(guidance, "logits")
        if set(guidance.branch_names) - {"cond", "uncond"}:
            raise ValueError(
                f"guidance has the branches {guidance.branch_names}, expected 'cond' and 'uncond': use guided_generate"
            )
        if num_tokens is None and callable(guidance.scale):
            raise ValueError(
                "num_tokens is None with a schedule, expected how many tokens are drawn at most: it needs to know its progress"
            )
        self.model, self.num_tokens = model, num_tokens
        self.prompts = as_prompts(uncond_ids, "uncond_ids", model.device, uncond_attention_mask)
        self._seen: Tensor | None = None  # all ids of the last call
        self._start = 0  # tokens of the prompt
        self._rows = self._anew(len(self.prompts.ids))

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Guided log-probabilities (R, V) of the token after ids (R, T), for scores (R, V) of the model.

        Raises:
            ValueError: if the number of rows does not fit ``uncond_ids``, or there are more tokens than ``num_tokens``.
        """
        self._go_on(input_ids)
        index = input_ids.shape[1] - self._start
        if self.num_tokens is not None and index >= self.num_tokens:
            raise ValueError(
                f"token {index} is asked for and num_tokens is {self.num_tokens}, expected at least {index + 1}"
            )
        progress = 0.0 if self.num_tokens is None else progress_at(index, self.num_tokens)
        needed = self._running.branches_at(progress)
        outputs = {"cond": scores.float()} if "cond" in needed else {}
        if "uncond" in needed:
            outputs |= self._rows(index, input_ids[:, self._start :])
        ordered = {name: outputs[name] for name in needed}
        guided = combine(self._running, progress, ordered, f"token {index}")
        return guided.out.log_softmax(-1)

    def _go_on(self, ids: Tensor) -> None:
        """Find out which sequence each row goes on from; begin anew where one goes on from none."""
        before, self._seen = self._seen, ids
        if before is not None and ids.shape == (len(before), before.shape[1] + 1):
            same = (ids[:, None, :-1] == before[None]).all(-1)
            # only among rows with the same unconditional prompt
            group = torch.arange(len(ids), device=ids.device) // (len(ids) // len(self.prompts.ids))
            same &= group[:, None] == group[None]
            if bool(same.any(1).all()):
                places = torch.arange(len(ids), device=ids.device)
                stays = same[places, places]
                self._rows.reorder(torch.where(stays, places, same.int().argmax(1)))
                return
        self._start = ids.shape[1]
        self._rows = self._anew(len(ids))
        self._running = self.guidance.begin("logits")

    def _anew(self, rows: int) -> CausalRows:
        prompts = self.prompts.for_rows(rows, "uncond_ids")
        return CausalRows(self.model, {"uncond": prompts}, {"uncond": (0, sys.maxsize)})

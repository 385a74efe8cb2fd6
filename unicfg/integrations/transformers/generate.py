"""Guided decoding inside ``generate`` of transformers: one batched, cached forward a token for all branches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.generation.logits_process import (
    ClassifierFreeGuidanceLogitsProcessor,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)
from transformers.generation.utils import GenerateDecoderOnlyOutput

from unicfg.guidance.core import Guidance
from unicfg.integrations.transformers.passes import CausalRows, check_causal
from unicfg.integrations.transformers.processor import GuidedLogitsProcessor
from unicfg.integrations.transformers.prompts import Prompts, as_prompts
from unicfg.sampling.autoregressive import TokenStep
from unicfg.sampling.branches import (
    Branch,
    begin_guidance,
    branch_of,
    combine,
    needed_branches,
    network_and_null,
    progress_at,
)
from unicfg.sampling.randomness import check_seeds, generators, uniform
from unicfg.sampling.tokens import draw

_GUIDING = (
    ClassifierFreeGuidanceLogitsProcessor,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
    GuidedLogitsProcessor,
)
# what generate prepares for the conditional rows alone, and is made anew for all rows
_CACHES = ("cache", "past_key_values")  # from transformers 5.24 on, and before
_PREPARED = ("attention_mask", "position_ids", *_CACHES, "use_cache", "logits_to_keep")
_OWN_OUTPUTS = ("output_attentions", "output_hidden_states")


@torch.no_grad()
def guided_generate(
    model: Any,
    input_ids: Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    *,
    guidance: Guidance | None = None,
    guidance_scale: float | None = None,
    uncond_ids: Any = None,
    uncond_attention_mask: Tensor | None = None,
    branches: Mapping[str, Branch] | None = None,
    seeds: Sequence[int] | None = None,
    token_streamer: Any = None,
    callback: Callable[[TokenStep], None] | None = None,
    **model_kwargs: Any,
) -> Any:
    """Guidance for any causal language model: ``model.generate(ids, custom_generate=guided_generate, ...)``.

    ``generate`` prepares everything as usual (lengths, cache, processors, stopping criteria) and gives the loop to this
    function, whose keyword arguments are given to ``generate``. Each token takes one forward of the model for the rows
    [cond; uncond; ...]; branches that no later token needs leave the rows, and those that join late catch up in one call.

    Guidance comes first and the processors after it (temperature, top-k, vocabulary constraints, ...), as they do in
    transformers. Progress is the number of tokens drawn over the most that may be drawn.

    Args:
        model: given by ``generate``, as the next four.
        input_ids: prompts (R, T), padded on the left where ``attention_mask`` says so.
        logits_processor: applied to guided logits.
        stopping_criteria: when to stop.
        generation_config: of this call.
        guidance: scale, schedule, mitigations, weights of branches. None is ``Guidance(guidance_scale)``, or 1.0.
        guidance_scale: the same as ``guidance=Guidance(guidance_scale)``; named here, or transformers would guide as well.
        uncond_ids: prompts of the unconditional rows, of any length: ids (T,) for all, (R, T), a list of ids of different
            lengths, or a tokenizer's output. ``ids[:, -1:]`` is what transformers takes by itself.
        uncond_attention_mask: of ``uncond_ids``, 0 at the padding on the left; without it every token counts,
            and none may be the padding token at the beginning.
        branches: what runs in the branches that ``guidance`` names beside "cond" and "uncond"; ``Branch(cond)`` takes what
            ``uncond_ids`` takes, ``Branch(model=...)`` another causal language model with the same vocabulary.
        seeds: one int a sequence, for ``do_sample``: the same seed draws the same tokens in any batch. None draws from
            the global generator of torch, as transformers does.
        token_streamer: takes the tokens as ``streamer`` does, which ``generate`` keeps from a function of one's own.
        callback: called with a :class:`TokenStep` after each token; its ids are those drawn, without the prompt.
        model_kwargs: what ``generate`` prepared.

    Returns:
        ids (R, T + n), or a ``GenerateDecoderOnlyOutput`` where ``return_dict_in_generate`` is set; its ``logits`` are the
        guided ones.

    Raises:
        ValueError: if an argument does not fit the others, guidance needs a prompt and there is none, something guides
            already, or more was asked of ``generate`` than is done here (beams, prompts as embeddings, attentions).
        TypeError: if the model is no causal language model.
        FloatingPointError: if an output holds NaN or +inf; names the token and the branch.

    Example:
        >>> model.generate(ids, custom_generate=guided_generate, uncond_ids=null_ids, guidance=Guidance(3.0))
    """
    check_causal(model)
    guidance = _one_guidance(guidance, guidance_scale, logits_processor)
    _check_request(input_ids, generation_config, model_kwargs)
    rows = len(input_ids)
    mask = model_kwargs.get("attention_mask")
    prompts = {
        "cond": as_prompts(input_ids, "input_ids", input_ids.device, _or_ones(mask, input_ids))
    }
    total = generation_config.max_length - input_ids.shape[1]
    progresses = [progress_at(index, total) for index in range(total)]
    networks = _networks(
        model,
        prompts["cond"],
        needed_branches(guidance, progresses, rows),
        uncond_ids,
        uncond_attention_mask,
        {} if branches is None else branches,
        guidance,
        _padding(generation_config),
    )
    steps = _steps(guidance, progresses)
    runs = [
        CausalRows(
            network,
            own,
            {name: steps[name] for name in own},
            _cache(model_kwargs) if network is model else None,
            model_kwargs.get("use_cache") is not False,
            max(part.ids.shape[1] for part in own.values()) + total - 1,
        )
        for network, own in networks
    ]
    choose = _Choice(generation_config.do_sample, seeds, rows)
    loop = _Loop(input_ids, logits_processor, stopping_criteria, generation_config, token_streamer)
    for index, progress in enumerate(progresses):
        drawn = loop.ids[:, input_ids.shape[1] :]
        outputs: dict[str, Tensor] = {}
        for run in runs:
            outputs |= run(index, drawn)
        needed = {name: outputs[name] for name in guidance.branches_at(progress)}
        guided = combine(guidance, progress, needed, f"token {index}")
        going_on = loop.take(guided.out, choose)
        if callback is not None:
            drawn = loop.ids[:, input_ids.shape[1] :]
            callback(TokenStep(index, progress, guided.scale, drawn, guided.out, guided.outputs))
        if not going_on:
            break
    return loop.result()


def _one_guidance(
    guidance: Guidance | None, guidance_scale: float | None, logits_processor: Any
) -> Guidance:
    """The guidance of this call, if there is one only."""
    if guidance is not None and guidance_scale is not None:
        raise ValueError(
            f"guidance is {guidance} and guidance_scale {guidance_scale}, expected one of the two"
        )
    if guidance is None:
        guidance = Guidance(1.0 if guidance_scale is None else guidance_scale)
    for processor in logits_processor:
        if isinstance(processor, _GUIDING):
            raise ValueError(
                f"logits_processor holds a {type(processor).__name__}, which guides already: expected it without, or "
                "generation_config.guidance_scale=None, which adds one"
            )
    return begin_guidance(guidance, "logits")


def _check_request(input_ids: Tensor, config: Any, model_kwargs: Mapping[str, Any]) -> None:
    """Refuse what this loop does not do."""
    if config.num_beams > 1:
        raise ValueError(
            f"num_beams is {config.num_beams}, expected 1: for beams give generate a "
            "GuidedLogitsProcessor as logits_processor, without custom_generate"
        )
    if config.prompt_lookup_num_tokens is not None:
        raise ValueError(
            f"prompt_lookup_num_tokens is {config.prompt_lookup_num_tokens}, expected None: give generate a "
            "GuidedLogitsProcessor as logits_processor, without custom_generate"
        )
    if input_ids.shape[1] == 0:
        raise ValueError("input_ids hold no token, expected prompts as token ids")
    asked = [name for name in _OWN_OUTPUTS if getattr(config, name, False)]
    if asked:
        raise ValueError(f"{asked[0]} is True, expected False: rows of several branches have many")
    cache = _cache(model_kwargs)
    if cache is not None and int(cache.get_seq_length()) > 0:
        raise ValueError(
            f"the cache holds {int(cache.get_seq_length())} tokens, expected an empty one: the other branches have not "
            "seen them"
        )
    unknown = [
        name
        for name, value in model_kwargs.items()
        if name not in _PREPARED and not _is_nothing(value)
    ]
    if unknown:
        raise ValueError(
            f"generate got {', '.join(unknown)}, which would reach the conditional rows only: expected prompts that are "
            "token ids and nothing else"
        )


def _cache(model_kwargs: Mapping[str, Any]) -> Any:
    return next((model_kwargs[name] for name in _CACHES if name in model_kwargs), None)


def _is_nothing(value: Any) -> bool:
    """Whether an argument brings no input: a flag, or what models for images prepare where there is none."""
    return value is None or isinstance(value, bool) or (isinstance(value, dict) and not value)


def _or_ones(mask: Tensor | None, ids: Tensor) -> Tensor:
    return torch.ones_like(ids) if mask is None else mask


def _padding(config: Any) -> int | None:
    """The padding token, where it can be told from the end of a text."""
    pad, eos = config._pad_token_tensor, config._eos_token_tensor
    if pad is None or (eos is not None and bool(torch.isin(pad, eos).any())):
        return None
    return int(pad)


def _check_padding(ids: Any, padding: int | None) -> None:
    """Refuse to guess whether what looks like padding is."""
    if padding is None or not isinstance(ids, Tensor) or ids.numel() == 0:
        return
    if bool((ids[..., 0] == padding).any()):
        raise ValueError(
            f"uncond_ids begins with {padding}, the padding token, and there is no mask: expected uncond_attention_mask, "
            "of ones if the token counts"
        )


def _networks(
    model: Any,
    cond: Prompts,
    needed: Sequence[str],
    uncond_ids: Any,
    uncond_attention_mask: Tensor | None,
    branches: Mapping[str, Branch],
    guidance: Guidance,
    padding: int | None,
) -> list[tuple[Any, dict[str, Prompts]]]:
    """Which model runs which branches, with which prompts."""
    unknown = [name for name in branches if name not in guidance.branch_names or name == "cond"]
    if unknown or "uncond" in branches:
        raise ValueError(
            f"branches has {unknown or ['uncond']}, and guidance knows {guidance.branch_names}: expected those beside 'cond' "
            "and 'uncond', which are input_ids and uncond_ids"
        )
    rows, device = len(cond.ids), cond.ids.device
    result: list[tuple[Any, dict[str, Prompts]]] = []
    for name in needed:
        network, own = model, cond
        if name == "uncond":
            if uncond_ids is None:
                raise ValueError(
                    "guidance needs an unconditional branch: expected uncond_ids=, as in uncond_ids=ids[:, -1:]"
                )
            if uncond_attention_mask is None:
                _check_padding(uncond_ids, padding)
            own = as_prompts(uncond_ids, "uncond_ids", device, uncond_attention_mask)
            own = own.for_rows(rows, "uncond_ids")
        elif name != "cond":
            branch, label = branch_of(name, branches), f"cond of the branch {name!r}"
            if branch.model is not None:
                network, _ = network_and_null(branch.model, None)
                check_causal(network, f"the model of the branch {name!r}")
            if branch.cond is not None:
                own = as_prompts(branch.cond, label, device).for_rows(rows, label)
        group = next((held for known, held in result if known is network), None)
        if group is None:
            result.append((network, {name: own}))
        else:
            group[name] = own
    return result


def _steps(guidance: Guidance, progresses: Sequence[float]) -> dict[str, tuple[int, int]]:
    """The first and the last step that needs each branch."""
    steps: dict[str, tuple[int, int]] = {}
    for index, progress in enumerate(progresses):
        for name in guidance.branches_at(progress):
            steps[name] = (steps.get(name, (index, index))[0], index)
    return steps


class _Choice:
    """The next token (R,) from scores (R, V): the best one, or drawn."""

    def __init__(self, do_sample: bool, seeds: Sequence[int] | None, rows: int) -> None:
        if seeds is not None and not do_sample:
            raise ValueError("seeds are given with do_sample False, expected do_sample=True")
        self.do_sample = do_sample
        self.sources = None if seeds is None else generators(check_seeds(seeds, rows))

    def __call__(self, scores: Tensor) -> Tensor:
        if not self.do_sample:
            return scores.argmax(-1)
        probabilities = scores.softmax(-1)
        if self.sources is None:
            return torch.multinomial(probabilities, 1)[:, 0]
        return draw(probabilities, uniform(self.sources, ()).to(scores.device))


class _Loop:
    """Tokens so far, and what generate's arguments make of the next ones."""

    def __init__(
        self, ids: Tensor, processors: Any, criteria: Any, config: Any, streamer: Any
    ) -> None:
        self.ids, self.processors, self.criteria, self.config = ids, processors, criteria, config
        self.streamer = streamer
        self.unfinished = torch.ones(len(ids), dtype=torch.long, device=ids.device)
        self.has_end = any(hasattr(criterion, "eos_token_id") for criterion in criteria)
        self.scores: tuple[Tensor, ...] = ()
        self.logits: tuple[Tensor, ...] = ()
        if streamer is not None:
            streamer.put(ids.cpu())

    def take(self, logits: Tensor, choose: _Choice) -> bool:
        """Add a token a row; False where every row has ended."""
        scores = self.processors(self.ids, logits.clone())
        if self.config.return_dict_in_generate and self.config.output_scores:
            self.scores += (scores,)
        if self.config.return_dict_in_generate and self.config.output_logits:
            self.logits += (logits,)
        tokens = choose(scores)
        if self.has_end:
            padding = self.config._pad_token_tensor.to(tokens.device)
            tokens = torch.where(self.unfinished.bool(), tokens, padding)
        self.ids = torch.cat([self.ids, tokens[:, None]], dim=1)
        if self.streamer is not None:
            self.streamer.put(tokens.cpu())
        self.unfinished = self.unfinished & ~self.criteria(self.ids, self.scores)
        return bool(self.unfinished.any())

    def result(self) -> Any:
        """What generate returns."""
        if self.streamer is not None:
            self.streamer.end()
        if not self.config.return_dict_in_generate:
            return self.ids
        output: Any = GenerateDecoderOnlyOutput
        return output(sequences=self.ids, scores=self.scores or None, logits=self.logits or None)

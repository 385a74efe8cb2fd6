"""VibeVoice, a language model with a diffusion head for each audio token, guided in the head.

The schedule runs over the denoising steps of each token, because nobody knows beforehand how many tokens a speech
takes; ``unicfg.sample_hybrid``, whose images have a fixed length, runs it over the tokens.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import LongTensor, Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    StoppingCriteriaList,
    VibeVoiceForConditionalGeneration,
)

from unicfg.guidance.core import Guidance, Scale
from unicfg.integrations.timetable import Timetable, check_levels, needs_level, predicted_space
from unicfg.sampling.branches import (
    begin_guidance,
    combine,
    needed_branches,
    progress_at,
    require,
)
from unicfg.sampling.randomness import check_seeds, generators, normal
from unicfg.sampling.soundness import LATENTS, Watch

Head = Callable[..., Tensor]


@torch.no_grad()
def guided_latents(
    head: Head,
    scheduler: Any,
    noise: Tensor,
    cond_states: Tensor,
    uncond_states: Tensor | None = None,
    *,
    guidance: Guidance | None = None,
    steps: int = 10,
    sources: Sequence[torch.Generator] | None = None,
) -> Tensor:
    """Denoise the latents of one token of each sample, guided in every step.

    A step is one call of the head: of 2B rows, [cond; uncond], or of B where the scale is 1 or 0.

    Args:
        head: ``model.model.diffusion_head`` of VibeVoice, or any ``head(x (R, C), timesteps (R,), condition=states
            (R, D)) -> (R, C)``.
        scheduler: of diffusers; it is copied.
        noise: (B, C).
        cond_states: hidden states of the language model (B, D).
        uncond_states: those without the prompt (B, D); None where guidance does not need them.
        guidance: scale, schedule over the denoising steps, and mitigations; None is ``Guidance(1.0)``.
        steps: for the scheduler's ``set_timesteps``.
        sources: one generator a sample, for schedulers that draw noise in their steps.

    Returns:
        latents (B, C).

    Raises:
        TypeError: if ``guidance`` is no ``Guidance``.
        ValueError: if guidance needs states that are not there, shapes differ, the scheduler's prediction_type is
            unknown, or a mitigation needs noise levels that it does not tell.
        FloatingPointError: if an output of the head is not finite; names the step and the branch.

    Example:
        >>> z = guided_latents(model.model.diffusion_head, scheduler, noise, cond, uncond, guidance=Guidance(1.3))
    """
    space = predicted_space(scheduler)
    guidance = begin_guidance(guidance, space)
    states = {"cond": cond_states}
    if uncond_states is not None:
        states["uncond"] = uncond_states
    for name, state in states.items():
        if state.ndim != 2 or len(state) != len(noise):
            raise ValueError(
                f"{name}_states has shape {tuple(state.shape)}, expected ({len(noise)}, D): a row for each of noise"
            )
    check_levels(scheduler, guidance)
    scheduler = _set(scheduler, steps)
    timetable = Timetable(scheduler)
    total = timetable.total
    needed = needed_branches(guidance, (progress_at(i, total) for i in range(total)), len(noise))
    missing = [name for name in needed if name not in states]
    if missing:
        raise ValueError(
            f"guidance needs the branches {needed}, and there are states of {tuple(states)} only: expected "
            "uncond_states, and no weights of other branches"
        )
    takes_generator = "generator" in inspect.signature(scheduler.step).parameters
    extra = {"generator": list(sources)} if takes_generator and sources is not None else {}
    x = noise.to(cond_states)
    for i, timestep in enumerate(scheduler.timesteps):
        progress = progress_at(i, total)
        names = guidance.branches_at(progress)
        rows = torch.cat([x] * len(names))
        conditions = torch.cat([states[name] for name in names])
        out = head(rows, timestep.repeat(len(rows)).to(rows), condition=conditions)
        outputs = dict(zip(names, out.split(len(x)), strict=True))
        level = timetable.level(i, x, space) if needs_level(guidance) else None
        guided = combine(
            guidance, progress, outputs, f"denoising step {i}", level, Watch(rule=LATENTS)
        )
        x = scheduler.step(guided.out, timestep, x, **extra).prev_sample
    return x


def _set(scheduler: Any, steps: int) -> Any:
    """A copy of a scheduler, set: it remembers its last steps, and the caller's is left as it is."""
    own = copy.deepcopy(scheduler)
    own.set_timesteps(num_inference_steps=steps)
    return own


def _untyped(config: Any) -> Any:
    """A configuration of transformers, whose entries it does not declare."""
    return config


@dataclass(frozen=True)
class _ScaleOfRows:
    """A schedule for some of the samples."""

    schedule: Callable[[float], Scale]
    rows: Tensor

    def __call__(self, progress: float) -> Scale:
        scale = self.schedule(progress)
        if isinstance(scale, Tensor) and scale.ndim == 1 and len(scale) > 1:
            return scale[self.rows.to(scale.device)]
        return scale


@dataclass
class _Speech:
    """What one call of generate needs to know in the head.

    Attributes:
        guidance: begun for no space yet: every token begins anew.
        sources: one generator a sample.
        needs_uncond: whether any denoising step does.
        rows: bool (B,), the samples whose next token is audio.
    """

    guidance: Guidance
    sources: list[torch.Generator]
    needs_uncond: bool
    rows: Tensor


class GuidedVibeVoice(VibeVoiceForConditionalGeneration):
    """VibeVoice whose head is guided by a ``Guidance``; made by :func:`guided_vibevoice`, used as the model itself."""

    unicfg_guidance: Guidance
    unicfg_seeds: list[int]
    unicfg_speech: _Speech

    def _prepare_generation_config(
        self, generation_config: GenerationConfig | None, **kwargs: Any
    ) -> tuple[GenerationConfig, dict[str, Any]]:
        if kwargs.get("guidance_scale") is not None:
            raise ValueError(
                f"guidance_scale is {kwargs['guidance_scale']} beside a guidance of scale "
                f"{self.unicfg_guidance.scale}, expected one: leave guidance_scale out"
            )
        config, rest = super()._prepare_generation_config(generation_config, **kwargs)
        config.guidance_scale = 1.0  # that of the checkpoint would run a second pass for the logits
        return config, rest

    def _sample(
        self,
        input_ids: LongTensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        synced_gpus: bool = False,
        streamer: Any = None,
        **model_kwargs: Any,
    ) -> Any:
        batch, config = len(input_ids), _untyped(generation_config)
        total = len(_set(config.noise_scheduler, config.num_diffusion_steps).timesteps)
        progresses = [progress_at(i, total) for i in range(total)]
        needed = needed_branches(self.unicfg_guidance, progresses, batch)
        run = copy.copy(self)  # two calls at once do not meet
        run.unicfg_speech = _Speech(
            self.unicfg_guidance,
            generators(check_seeds(self.unicfg_seeds, batch)),
            "uncond" in needed,
            torch.ones(batch, dtype=torch.bool),
        )
        return super(GuidedVibeVoice, run)._sample(
            input_ids,
            logits_processor,
            stopping_criteria,
            generation_config,
            synced_gpus,
            streamer,
            **model_kwargs,
        )

    def _step_negative_branch(
        self,
        diffusion_mask: Tensor,
        next_tokens: LongTensor,
        inputs_embeds: Tensor | None,
        negative_input_ids: LongTensor,
        negative_model_kwargs: dict[str, Any],
        negative_forward: Any,
    ) -> Any:
        self.unicfg_speech.rows = diffusion_mask
        if not self.unicfg_speech.needs_uncond:
            return None, negative_input_ids, negative_model_kwargs
        return super()._step_negative_branch(
            diffusion_mask,
            next_tokens,
            inputs_embeds,
            negative_input_ids,
            negative_model_kwargs,
            negative_forward,
        )

    def _sample_audio_latent(
        self,
        positive_condition: Tensor,
        negative_condition: Tensor | None,
        noise_scheduler: Any,
        num_diffusion_steps: int,
        guidance_scale: float,
    ) -> Tensor:
        speech = self.unicfg_speech
        chosen = speech.rows.nonzero().flatten()
        sources = [speech.sources[row] for row in chosen.tolist()]
        guidance = speech.guidance
        if len(chosen) < len(speech.sources):
            own = _ScaleOfRows(guidance.scale_at, chosen)
            guidance = replace(guidance, scale=own)
        head = self.model.diffusion_head
        device = next(head.parameters()).device
        cond, uncond = (
            None if state is None else state.to(device)
            for state in (positive_condition, negative_condition)
        )
        assert cond is not None
        noise = normal(sources, (_untyped(self.config).audio_config.hidden_size,)).to(cond)
        latents = guided_latents(
            head,
            noise_scheduler,
            noise,
            cond,
            uncond,
            guidance=guidance,
            steps=num_diffusion_steps,
            sources=sources,
        )
        return latents[:, None]


def guided_vibevoice(
    model: VibeVoiceForConditionalGeneration, guidance: Guidance, *, seeds: Sequence[int]
) -> GuidedVibeVoice:
    """The same model, sharing all weights, whose ``generate`` guides the diffusion head by a ``Guidance``.

    In place of ``model.generate(guidance_scale=s)``. Everything else of ``generate`` is the model's own: its prompts, its
    null condition (the start of audio and the audio so far, without the text), its noise scheduler, its decoders. Where
    no denoising step needs the null condition, the language model does not run it. A guidance_scale in its
    generation_config is left out of account: there it would guide the logits too, in one more pass a token.

    Args:
        model: of transformers, in eval mode. It is left as it is.
        guidance: scale, schedule over the denoising steps of each token, and mitigations.
        seeds: one int a sample, from which its noise is drawn; every call of ``generate`` starts from them.

    Returns:
        a model to call ``generate`` of, without guidance_scale.

    Raises:
        TypeError: if the model is another, ``guidance`` no ``Guidance``, or a seed no int.
        ValueError: if the model is in training mode, or guidance is of branches and their weights.

    Example:
        >>> speech = guided_vibevoice(model, Guidance(1.3), seeds=[0]).generate(**inputs)
    """
    if not isinstance(model, VibeVoiceForConditionalGeneration):
        raise TypeError(
            f"model is a {type(model).__name__}, expected a VibeVoiceForConditionalGeneration"
        )
    # were one of them renamed, the model would go on unguided
    require(model, "guided_vibevoice", "_sample", "_step_negative_branch", "_sample_audio_latent")
    if model.training:
        raise ValueError("model is in training mode, expected model.eval() before sampling")
    if not isinstance(guidance, Guidance):
        raise TypeError(f"guidance is {guidance!r}, expected a Guidance, as in Guidance(3.0)")
    if hasattr(guidance.scale, "branches_at"):
        raise ValueError(
            f"guidance has the branches {guidance.branch_names}, expected a scale or a schedule: the model's generate "
            "runs the condition and the null condition only"
        )
    seeds = list(seeds)
    guided: Any = copy.copy(model)
    guided.__class__ = GuidedVibeVoice
    guided.unicfg_guidance, guided.unicfg_seeds = guidance, check_seeds(seeds, len(seeds))
    return guided

"""A guider for the modular pipelines of diffusers that carries any ``Guidance``."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from diffusers.guiders.guider_utils import BaseGuidance, GuiderOutput
from torch import Tensor

from unicfg.guidance.core import Guidance
from unicfg.guidance.spaces import Level, Space
from unicfg.integrations.diffusers.layouts import check_not_distilled
from unicfg.integrations.timetable import (
    Timetable,
    check_branches,
    check_levels,
    describe,
    needs_level,
    predicted_space,
    timetable_from,
)
from unicfg.sampling.branches import begin_guidance, progress_at

# places of the conditional and the unconditional input in the tuples that a pipeline hands over
_PLACES = {"cond": 0, "uncond": 1}


class GuidanceGuider(BaseGuidance):
    """The guider of a ``Guidance``: schedules, scales per sample, mitigations in their own space.

    A step prepares one batch for each branch that it needs: where s is 1 that is the condition alone.

    A guider of diffusers keeps the step that it is in, so one guider serves one sampling at a time; for others take
    ``guider.new()``. What mitigations remember starts anew at step 0.

    The config holds the guidance as text, to read and not to load: a guider is made from a ``Guidance``.

    Args:
        guidance: scale, schedule and mitigations, with the branches "cond" and "uncond".
        scheduler: that of the pipeline, the object itself. Mitigations with a space of their own need it, for the
            noise levels; the noisy sample they take from the network's call, between ``prepare_models`` and
            ``cleanup_models``, which all loops of diffusers have. Schedules in noise levels need it too.
        enabled: False runs the condition alone.

    Raises:
        TypeError: if ``guidance`` is no ``Guidance``.
        ValueError: if it has other branches, or a mitigation that needs a scheduler and there is none, or none that tells
            the noise levels.
    """

    _input_predictions: Any = ["pred_cond", "pred_uncond"]  # noqa: RUF012 - the host asks for a list

    def __init__(self, guidance: Guidance, scheduler: Any = None, enabled: bool = True) -> None:
        super().__init__(enabled=enabled)
        self.guidance, self.scheduler = guidance, scheduler
        # without a scheduler nothing depends on which space of denoisers it is
        self.space: Space = "eps"
        self._running = begin_guidance(guidance, self.space)
        if scheduler is not None:
            self.space = predicted_space(scheduler)
        check_branches(guidance, ("cond", "uncond"), "a guider is given the inputs of no others")
        needing = needs_level(guidance)
        if needing and scheduler is None:
            raise ValueError(
                f"scheduler is None, expected the scheduler of the pipeline: the mitigation {describe(needing[0])}, "
                "which takes the noise levels"
            )
        if scheduler is not None:
            check_levels(scheduler, guidance)
        self._timetable: Timetable | None = None
        self._in_step = False
        self._sample: Tensor | None = None
        self._hook: Any = None
        self.register_to_config(
            guidance=repr(guidance), scheduler=type(scheduler).__name__, enabled=enabled
        )

    def new(self, **kwargs: Any) -> GuidanceGuider:
        """Another guider with the same settings.

        Args:
            **kwargs: arguments of the constructor that are to differ.
        """
        own = {"guidance": self.guidance, "scheduler": self.scheduler, "enabled": self._enabled}
        return type(self)(**{**own, **kwargs})

    def set_state(self, step: int, num_inference_steps: int, timestep: Any) -> None:
        """Tell the guider which step comes next.

        Args:
            step: counted from 0; at 0 a new sampling begins.
            num_inference_steps: of the sampling; the timesteps of the scheduler are counted where there is one.
            timestep: of the step.

        Raises:
            ValueError: if the step is not one of ``num_inference_steps``, or ``timestep`` none of the scheduler's.
        """
        super().set_state(step, num_inference_steps, timestep)
        self._unhook()
        self._sample = None
        if step == 0:
            self._running = begin_guidance(self.guidance, self.space)
        if step < 2 and self.scheduler is not None:
            self._find()
        self._in_step = True
        self._progress()

    def prepare_inputs(self, data: Any) -> list[Any]:
        """One batch for each branch that the step needs.

        Args:
            data: a dict with, for each input of the network, a tuple, conditional and unconditional, or one tensor for
                both.

        Returns:
            a ``BlockState`` for each branch, with its inputs, in the order of ``branches_at``.
        """
        return [self._prepare_batch(data, _PLACES[name], f"pred_{name}") for name in self._needed()]

    def prepare_inputs_from_block_state(
        self, data: Any, input_fields: dict[str, str | tuple[str, str]]
    ) -> list[Any]:
        """One batch for each branch that the step needs.

        Args:
            data: the ``BlockState`` that holds the inputs.
            input_fields: for each input of the network the names of its fields there, conditional and unconditional,
                or one name for both.

        Returns:
            see :meth:`prepare_inputs`.
        """
        return [
            self._prepare_batch_from_block_state(input_fields, data, _PLACES[name], f"pred_{name}")
            for name in self._needed()
        ]

    def prepare_models(self, denoiser: torch.nn.Module) -> None:
        """Before a call of the network: look at the noisy sample, where a mitigation needs it.

        Raises:
            ValueError: if guidance is distilled into the network, as in Flux.
        """
        check_not_distilled(denoiser, f"the {type(denoiser).__name__}")
        super().prepare_models(denoiser)
        self._unhook()
        if self._sample is None and len(self._needed()) > 1 and needs_level(self.guidance):
            self._hook = denoiser.register_forward_pre_hook(self._see, with_kwargs=True)

    def cleanup_models(self, denoiser: torch.nn.Module) -> None:
        """After a call of the network: leave nothing on it."""
        super().cleanup_models(denoiser)
        self._unhook()

    def forward(
        self, pred_cond: Tensor | None = None, pred_uncond: Tensor | None = None
    ) -> GuiderOutput:
        """Guide the predictions of the step.

        Args:
            pred_cond: (B, ...), or None where the step does not need it.
            pred_uncond: (B, ...), or None where the step does not need it.

        Returns:
            the guided prediction (B, ...), and both as they were given.

        Raises:
            ValueError: if a prediction is missing, or the noisy sample that a mitigation needs, or it has another shape
                than the predictions.
        """
        if self._enabled:
            given = {"cond": pred_cond, "uncond": pred_uncond}
            outputs = {name: out for name, out in given.items() if out is not None}
            level = self._level(outputs) if needs_level(self.guidance) else None
            pred: Tensor | None = self._running.combine_branches(self._progress(), outputs, level)
        else:
            pred = pred_cond
        self._in_step, self._sample = False, None
        return GuiderOutput(pred=pred, pred_cond=pred_cond, pred_uncond=pred_uncond)

    @property
    def is_conditional(self) -> bool:
        """Whether the batch that was prepared last is that of the condition."""
        return self._count_prepared > 0 and self._needed()[self._count_prepared - 1] == "cond"

    @property
    def num_conditions(self) -> int:
        """The number of branches of the step; between samplings and steps, of those that some step may need."""
        return len(self._needed())

    def _needed(self) -> tuple[str, ...]:
        """The branches of the step, or between steps those that some step may need."""
        if not self._enabled:
            return ("cond",)
        if self._in_step:
            return self._running.branches_at(self._progress())
        if isinstance(self.guidance.scale, (int, float, Tensor)):
            return self.guidance.branches_at(0.0)
        # pipelines ask before they encode the prompts, when it is not known which steps there will be
        return ("cond", "uncond")

    def _find(self) -> None:
        """Where in the scheduler's timesteps the sampling stands."""
        before = self._timetable if self._step else None
        self._timetable = timetable_from(self.scheduler, self._timestep, self._step, before)
        scale = self._timetable.at_levels(self.guidance).scale
        self._running = replace(self._running, scale=scale)  # which remembers earlier steps

    def _progress(self) -> float:
        """Progress of the step.

        Raises:
            ValueError: if no step was set, or it is none of the sampling.
        """
        if self._timetable is not None:
            return self._timetable.progress(self._step)
        step, total = self._step, self._num_inference_steps
        if step is None or not 0 <= step < total:
            raise ValueError(
                f"step is {step} of num_inference_steps {total}, expected one of them: call set_state first, and pass "
                "scheduler= where a scheduler evaluates the network more than once a step"
            )
        return progress_at(step, total)

    def _level(self, outputs: dict[str, Tensor]) -> Level | None:
        """Where the predictions of the step were made; None if there is one alone, which nothing reins in."""
        if len(outputs) < 2:
            return None
        what = describe(needs_level(self.guidance)[0])
        if self._sample is None or self._timetable is None:
            raise ValueError(
                f"no noisy sample was seen, and the mitigation {what}: expected set_state from step 0 on, and "
                "prepare_models(denoiser) before each call denoiser(sample, ...), as in the loops of diffusers"
            )
        shape = next(iter(outputs.values())).shape
        if self._sample.shape != shape:
            raise ValueError(
                f"the noisy sample has shape {tuple(self._sample.shape)} and the predictions {tuple(shape)}, expected "
                f"equal shapes: the mitigation {what}, and the network is shown more than the sample"
            )
        return self._timetable.level(self._step, self._sample, self.space)

    def _see(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note the sample that the network is called with, once: nothing is left if the call fails."""
        self._unhook()
        sample = args[0] if args else kwargs.get("hidden_states", kwargs.get("sample"))
        self._sample = sample if isinstance(sample, Tensor) else None

    def _unhook(self) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

"""Pipelines of diffusers without guiders, guided by ``Guidance`` in place of their own formula.

Such a pipeline calls its network on doubled rows and combines the two halves by itself. Here the network that it calls
runs only the rows that a step needs, guides them, and returns the result in both halves, of which the pipeline's
own combination is the same again, whatever its scale.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from torch import Tensor

from unicfg.guidance.core import Guidance
from unicfg.guidance.spaces import Space
from unicfg.integrations.diffusers.layouts import Layout, check_not_distilled, layout_of
from unicfg.integrations.timetable import (
    Timetable,
    check_branches,
    check_levels,
    needs_level,
    predicted_space,
    timetable_from,
)
from unicfg.sampling.branches import (
    Branch,
    begin_guidance,
    combine,
    needed_branches,
    network_and_null,
)
from unicfg.sampling.masked import masked_share
from unicfg.sampling.soundness import LATENTS, LOGITS, Watch

# any scale above 1 makes a pipeline double its rows; the halves that it then combines are equal
_DOUBLING = 2.0


@dataclass(frozen=True)
class GuidedPipeline:
    """A pipeline under guidance; :func:`guided_pipeline` makes it.

    Calls may run at the same time: each works on a shallow copy of the pipeline, which is what a callback is given, with
    a copy of the scheduler, and leaves ``pipe`` as it is.

    Attributes:
        pipe: the pipeline itself.
        guidance: scale, schedule and mitigations.
        layout: how the pipeline calls its network.
        branches: other networks, by the branch that they run.
    """

    pipe: Any
    guidance: Guidance
    layout: Layout
    branches: Mapping[str, Branch]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the pipeline.

        Args:
            *args: of the pipeline.
            **kwargs: of the pipeline, without ``guidance_scale`` and ``guidance_rescale``. A ``negative_prompt`` takes
                the place of the null condition, as it does there.

        Returns:
            what the pipeline returns.

        Raises:
            ValueError: if a scale or a rescale is given here, a network is in training mode, the prediction type of
                the scheduler is unknown, a mitigation needs noise levels that the scheduler does not tell, a scale (B,)
                does not fit the batch, or the pipeline calls its network in another way than ``layout`` says.
            FloatingPointError: if an output of the network is not finite; names the step and the branch.
        """
        if "guidance_scale" in kwargs:
            raise ValueError(
                f"guidance_scale is {kwargs['guidance_scale']}, expected none: the scale is that of guidance, "
                f"{self.guidance.scale!r}"
            )
        if kwargs.get("guidance_rescale"):
            phi = kwargs["guidance_rescale"]
            raise ValueError(
                f"guidance_rescale is {phi}, expected none: see mitigations.rescale({phi}) in guidance"
            )
        pipe = copy.copy(self.pipe)
        network = getattr(self.pipe, self.layout.network)
        scheduler = copy.deepcopy(self.pipe.scheduler)
        guided = _GuidedNetwork(network, scheduler, self.guidance, self.layout, self.branches)
        # not by setattr, with which a pipeline writes the class of a component into its config
        vars(pipe)[self.layout.network] = guided
        vars(pipe)["scheduler"] = scheduler
        # it moves all components off the device again, and is to find the network among them
        vars(pipe)["maybe_free_model_hooks"] = self.pipe.maybe_free_model_hooks
        return pipe(*args, guidance_scale=_DOUBLING, **kwargs)


def guided_pipeline(
    pipe: Any,
    guidance: Guidance,
    *,
    layout: Layout | None = None,
    branches: Mapping[str, Branch] | None = None,
) -> GuidedPipeline:
    """Guide a pipeline of diffusers that has no guider.

    Args:
        pipe: a text-to-image pipeline of Stable Diffusion, SDXL, SD 3, PixArt or aMUSEd, an image-to-image one of Stable
            Diffusion, or one of DiT.
        guidance: scale, schedule and mitigations. Of the progress of a step see :class:`Timetable`; for token models
            it is the share of the tokens that is revealed, as in ``sample_masked``.
        layout: how another pipeline calls its network; None looks the pipeline up in ``LAYOUTS``.
        branches: other networks for branches of ``unicfg.guidance.branches``, as in
            ``{"weak": Branch(model=small_unet)}``: of the same kind, called with the rows of the condition.

    Returns:
        what is called in place of the pipeline.

    Raises:
        TypeError: if ``pipe`` is no pipeline of diffusers, or ``guidance`` no ``Guidance``.
        ValueError: if the pipeline is unknown or guided already, guidance is distilled into its network, or ``guidance``
            has branches that nothing runs.

    Example:
        >>> pipe = DiTPipeline.from_pretrained("facebook/DiT-XL-2-256")
        >>> guided = guided_pipeline(pipe, Guidance(schedules.interval(4.0, 0.2, 0.8)))
        >>> images = guided([207, 360], num_inference_steps=25).images
    """
    if isinstance(pipe, GuidedPipeline):
        raise ValueError(
            f"pipe is guided already, by {pipe.guidance!r}: expected the pipeline itself"
        )
    if not isinstance(pipe, DiffusionPipeline):
        raise TypeError(
            f"pipe is a {type(pipe).__name__}, expected a pipeline of diffusers, as in DiTPipeline"
        )
    for component in ("unet", "transformer"):
        name = f"the {component} of the {type(pipe).__name__}"
        check_not_distilled(getattr(pipe, component, None), name)
    layout = layout_of(pipe) if layout is None else layout
    network = getattr(pipe, layout.network, None)
    if network is None:
        raise ValueError(
            f"layout has network {layout.network!r}, which {type(pipe).__name__} lacks: expected one of "
            f"{', '.join(pipe.components)}"
        )
    if isinstance(network, _GuidedNetwork):
        raise ValueError(
            "pipe is the copy of a guided pipeline, as a callback sees it: expected the pipeline itself"
        )
    branches = {} if branches is None else dict(branches)
    begin_guidance(guidance, _space(layout, pipe.scheduler))
    _check_networks(branches, guidance)
    known = ("cond", "uncond", *branches)
    check_branches(guidance, known, "a pipeline runs no others by itself, see branches=")
    return GuidedPipeline(pipe, guidance, layout, branches)


def _check_networks(branches: Mapping[str, Branch], guidance: Guidance) -> None:
    for name, branch in branches.items():
        if name in ("cond", "uncond"):
            raise ValueError(f"branches has {name!r}, which the pipeline runs: expected others")
        if name not in guidance.branch_names:
            raise ValueError(
                f"branches has {name!r}, and guidance knows {guidance.branch_names}: expected weights for each, as in "
                "Guidance(branches.weak(2.0))"
            )
        if branch.model is None or branch.cond is not None:
            raise ValueError(
                f"the branch {name!r} is {branch!r}, expected a Branch with a model and no cond: it is called with the "
                "pipeline's own"
            )


def _space(layout: Layout, scheduler: Any) -> Space | str:
    return "logits" if layout.predicts == "logits" else predicted_space(scheduler)


class _GuidedNetwork:
    """What stands in place of the network in one call of a pipeline: runs the rows that a step needs, and guides them."""

    def __init__(
        self,
        network: Any,
        scheduler: Any,
        guidance: Guidance,
        layout: Layout,
        branches: Mapping[str, Branch],
    ) -> None:
        self.layout, self.scheduler = layout, scheduler
        self.network = network_and_null(network, None)[0]
        others = {name: network_and_null(b.model, None)[0] for name, b in branches.items()}
        self.others: dict[str, Any] = others
        self.space: Any = _space(layout, scheduler)
        self.asked, self.guidance = guidance, begin_guidance(guidance, self.space)
        self.progresses: list[float] = []
        self.index = self.rows = 0
        self.timetable = Timetable(scheduler)

    def __getattr__(self, name: str) -> Any:
        """What a pipeline asks of its network: its config, dtype and device."""
        if name.startswith("__"):  # copying asks for these before there is a network
            raise AttributeError(name)
        return getattr(self.network, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """One evaluation: the arguments and the result of the network, of 2 B rows."""
        layout = self.layout
        names = [name for name in (layout.sample, layout.timestep) if name is not None]
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        missing = [name for name in names if name not in given]
        if missing or len(args) > len(names):
            raise ValueError(
                f"the network is called with {len(args)} arguments by place and {sorted(kwargs)}, expected {names} "
                "among them, and no others by place"
            )
        x = given[layout.sample]
        if self.index == 0:
            self._begin(x)
        if self.index < 2:
            self._find(None if layout.timestep is None else given[layout.timestep])
        if len(x) != self.rows:
            raise ValueError(
                f"{layout.sample} has {len(x)} rows in evaluation {self.index}, expected {self.rows} as before: another "
                "method of guidance may be at work in the pipeline"
            )
        if self.index >= len(self.progresses):
            raise ValueError(
                f"the network is called for the {self.index + 1}th time, expected the {len(self.progresses)} timesteps "
                f"of {type(self.scheduler).__name__}, one call each"
            )
        index, self.index = self.index, self.index + 1
        return self._guided(index, given, x.chunk(2)[0])

    def _begin(self, x: Tensor) -> None:
        """What is known at the first call: the batch."""
        if len(x) % 2 or not torch.equal(*x.chunk(2)):
            raise ValueError(
                f"{self.layout.sample} has {len(x)} rows in halves that differ, expected the same B rows twice: the "
                "pipeline does not guide in the way that layout says"
            )
        self.rows = len(x)

    def _find(self, timestep: Any) -> None:
        """Where in the scheduler's timesteps the sampling started, and what guidance is in each evaluation."""
        if self.layout.predicts == "logits":
            self.progresses = _revealed(self.scheduler)
        else:
            check_levels(self.scheduler, self.guidance)
            if timestep is not None:
                before = self.timetable if self.index else None
                self.timetable = timetable_from(self.scheduler, timestep, self.index, before)
            scale = self.timetable.at_levels(self.asked).scale
            self.guidance = replace(self.guidance, scale=scale)  # which remembers earlier steps
            total = self.timetable.total
            self.progresses = [self.timetable.progress(index) for index in range(total)]
        needed_branches(self.guidance, self.progresses, self.rows // 2)

    def _guided(self, index: int, given: Mapping[str, Any], x: Tensor) -> Any:
        """The network's result for x (B, ...), guided, in both halves."""
        progress = self.progresses[index]
        needed = self.guidance.branches_at(progress)
        outputs: dict[str, Tensor] = {}
        variance: Tensor | None = None
        result: Any = None
        for network, names in self._runs(needed):
            result = network(**self._narrowed(given, names))
            out, rest = self._split(_tensor_of(result), x)
            outputs.update(zip(names, out.chunk(len(names)), strict=True))
            if rest is not None and variance is None:
                # of the condition, where it was run
                variance = rest.chunk(len(names))[names.index("cond") if "cond" in names else 0]
        level = None
        of_latents = self.layout.predicts == "latents"
        if of_latents and needs_level(self.guidance):
            level = self.timetable.level(index, x, self.space)
        watch = Watch(rule=LATENTS if of_latents else LOGITS)
        guided = combine(self.guidance, progress, outputs, f"step {index}", level, watch).out
        whole = self._joined(guided, variance)
        return _replaced(result, torch.cat([whole, whole]))

    def _runs(self, needed: Sequence[str]) -> list[tuple[Any, tuple[str, ...]]]:
        """Each network with the branches that it runs, in the order of the pipeline's rows."""
        own = tuple(name for name in self.layout.order if name in needed)
        runs = [(self.network, own)] if own else []
        return runs + [(self.others[name], (name,)) for name in needed if name in self.others]

    def _narrowed(self, given: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
        """The arguments of the network for the rows of some branches."""
        if names == self.layout.order:
            return dict(given)
        # another network is shown the condition
        half = self.layout.order.index(names[0] if names[0] in self.layout.order else "cond")
        own = (self.layout.sample, self.layout.timestep, *self.layout.rows)
        return {
            name: _half(value, half, self.rows, name) if name in own else value
            for name, value in given.items()
        }

    def _split(self, out: Tensor, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """What is guided, and what is not: the variance that some networks predict in as many channels again."""
        if self.layout.predicts == "logits":
            return out.movedim(1, -1), None  # in a row of logits the tokens come last
        channels = x.shape[1]
        if out.shape[1] not in (channels, 2 * channels):
            raise ValueError(
                f"the network returned {tuple(out.shape)} for {self.layout.sample} {tuple(x.shape)}, expected "
                f"{channels} channels, or {2 * channels} with a variance"
            )
        return out[:, :channels], out[:, channels:] if out.shape[1] > channels else None

    def _joined(self, guided: Tensor, variance: Tensor | None) -> Tensor:
        """What the network would have returned."""
        if self.layout.predicts == "logits":
            # the difference of two masked logits is NaN in the pipeline; a difference of two finite ones is 0
            return guided.movedim(-1, 1).clamp(min=torch.finfo(guided.dtype).min)
        return guided if variance is None else torch.cat([guided, variance], dim=1)


def _revealed(scheduler: Any) -> list[float]:
    """Progress of each step of a token model: the share of the tokens that is revealed before it, as in sample_masked."""
    total = len(scheduler.timesteps)
    reveal = scheduler.config["masking_schedule"]
    shares = [1 - masked_share(reveal, index / total) for index in range(total)]
    return [share / max(shares[-1], 1e-12) for share in shares]


def _half(value: Any, half: int, rows: int, name: str) -> Any:
    """One half of the rows of a tensor, or of all tensors in a dict, list or tuple."""
    if isinstance(value, Tensor):
        if value.ndim == 0 or len(value) == 1:
            return value  # the same for all rows
        if len(value) != rows:
            raise ValueError(f"{name} has {len(value)} rows, expected {rows}")
        return value.chunk(2)[half]
    if isinstance(value, dict):
        return {key: _half(entry, half, rows, f"{name}[{key!r}]") for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_half(entry, half, rows, name) for entry in value)
    return value


def _tensor_of(result: Any) -> Tensor:
    """The prediction in what a network returns: a tensor, a tuple or an output with a sample."""
    out = result[0] if isinstance(result, tuple) else getattr(result, "sample", result)
    if not isinstance(out, Tensor):
        raise TypeError(
            f"the network returned a {type(result).__name__}, expected a tensor, a tuple or an output with a sample"
        )
    return out


def _replaced(result: Any, out: Tensor) -> Any:
    """What the network returned, with another prediction in it."""
    if isinstance(result, Tensor):
        return out
    return (out, *result[1:]) if isinstance(result, tuple) else type(result)(sample=out)

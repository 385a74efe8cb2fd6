"""How the pipelines of diffusers that guide by themselves call their network."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Layout:
    """What there is to know about a pipeline that calls its network on doubled rows and combines them by itself.

    Attributes:
        network: name of the component, as in "unet".
        sample: name of the network's argument that holds the noisy sample (2 B, C, h, w), or token ids (2 B, h, w),
            in two equal halves.
        timestep: name of the network's argument that holds the scheduler's timestep, () or (2 B,). None if there is none,
            or it is given in other units; the sampling is then taken to start at the scheduler's first.
        rows: names of its other arguments with a row for each sample and branch: tensors (2 B, ...), or dicts and
            lists of them.
        order: branch of the first half and of the second half.
        predicts: "latents" in the space that the scheduler expects, of as many channels as the sample (twice as many
            where the network predicts a variance too, which is not guided); or "logits" (2 B, V, h, w).
    """

    network: str
    sample: str
    timestep: str | None
    rows: tuple[str, ...]
    order: tuple[str, str] = ("uncond", "cond")
    predicts: Literal["latents", "logits"] = "latents"

    def __post_init__(self) -> None:
        """Check the order.

        Raises:
            ValueError: if the halves are not the two branches.
        """
        if sorted(self.order) != ["cond", "uncond"]:
            raise ValueError(f"order is {self.order}, expected 'cond' and 'uncond' in some order")


_UNET = Layout("unet", "sample", "timestep", ("encoder_hidden_states", "added_cond_kwargs"))
_PIXART = Layout(
    "transformer",
    "hidden_states",
    "timestep",
    ("encoder_hidden_states", "encoder_attention_mask", "added_cond_kwargs"),
)

LAYOUTS: dict[str, Layout] = {
    "StableDiffusionPipeline": _UNET,
    "StableDiffusionImg2ImgPipeline": _UNET,
    "StableDiffusionXLPipeline": _UNET,
    "StableDiffusion3Pipeline": Layout(
        "transformer", "hidden_states", "timestep", ("encoder_hidden_states", "pooled_projections")
    ),
    "DiTPipeline": Layout(
        "transformer", "hidden_states", "timestep", ("class_labels",), ("cond", "uncond")
    ),
    "PixArtAlphaPipeline": _PIXART,
    "PixArtSigmaPipeline": _PIXART,
    "AmusedPipeline": Layout(
        "transformer",
        "input_ids",
        None,
        ("encoder_hidden_states", "pooled_text_emb", "micro_conds"),
        predicts="logits",
    ),
}


def layout_of(pipe: Any) -> Layout:
    """The layout of a pipeline of diffusers.

    Raises:
        ValueError: if it is not known.
    """
    name = type(pipe).__name__
    if name not in LAYOUTS or not type(pipe).__module__.startswith("diffusers."):
        raise ValueError(
            f"pipe is a {type(pipe).__module__}.{name}, expected one of {', '.join(LAYOUTS)} of diffusers, or layout=, "
            "which says how the pipeline calls its network; a modular pipeline takes a GuidanceGuider instead"
        )
    return LAYOUTS[name]


def check_not_distilled(network: Any, name: str) -> None:
    """Refuse a network that takes the scale as an input: it has no unconditional branch.

    Args:
        network: of a pipeline, or None.
        name: of it, for the error.

    Raises:
        ValueError: says so.
    """
    config = getattr(network, "config", None) or {}
    for setting in ("time_cond_proj_dim", "guidance_embeds"):
        if config.get(setting):
            raise ValueError(
                f"{name} has {setting} = {config[setting]!r}: it takes the scale as an input, guidance is distilled into "
                "it, and what it predicts in one pass is guided already: expected a model that was trained with "
                "condition dropout"
            )

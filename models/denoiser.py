"""``LatentDenoiser``: the transformer body over noisy latents, for the diffusion and the flow family."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.blocks import AdaLN, AdaLNZero, EncodedCondition, TimeEmbedding, modulate
from models.body import Body, BodyConfig, check_positive, initialize
from tokenizers_vq.hub import StrictHubMixin
from unicfg.guidance.spaces import Space, check_space
from unicfg.sampling.paths import PATHS, Path


@dataclass
class LatentDenoiserConfig(BodyConfig):
    """What it takes to rebuild a denoiser; written to ``config.json``."""

    latent_channels: int = 4  # C
    patch: int = 1  # latents a side that make one token
    path: str = "cosine"  # a key of unicfg.sampling.paths.PATHS
    space: str = "v"  # what the network predicts

    def __post_init__(self) -> None:
        """Check the values."""
        super().__post_init__()
        check_positive(self, "latent_channels", "patch")
        if self.grid % self.patch:
            raise ValueError(f"patch is {self.patch}, expected a divisor of the grid {self.grid}")
        check_path_and_space(self.path, self.space)


def check_path_and_space(path: str, space: str) -> tuple[Path, Space]:
    """The path of this name and the space, if they go together.

    Raises:
        ValueError: if one is unknown, or the space says nothing at the noisy end of the path.
    """
    if path not in PATHS:
        raise ValueError(f"path is {path!r}, expected one of {', '.join(map(repr, PATHS))}")
    alpha, _ = PATHS[path].coefficients(torch.ones(()))
    if check_space(space) in ("eps", "score") and float(alpha) == 0:
        raise ValueError(
            f"space is {space!r} on the path {path!r}, which ends in pure noise, where {space} says "
            "nothing about the sample: expected v, flow or x0, or another path"
        )
    return PATHS[path], check_space(space)


class LatentDenoiser(nn.Module, StrictHubMixin, library_name="unicfg", tags=["latent-diffusion"]):
    """Predicts x0, eps, v or flow of noisy latents, with the condition as a prefix and the time by adaLN-zero.

    The prefix knows nothing of the time, so it is computed once for all steps of a sampling.

    Args:
        config: sizes, the path it is trained on, and the space it predicts in.
    """

    config_class = LatentDenoiserConfig

    def __init__(self, config: LatentDenoiserConfig) -> None:
        super().__init__()
        self.config = config
        self.path, self.space = check_path_and_space(config.path, config.space)
        features = config.latent_channels * config.patch**2
        self.body = Body(config, config.grid // config.patch)
        self.inputs = nn.Linear(features, config.width)
        self.time = TimeEmbedding(config.width)
        self.modulations = nn.ModuleList(AdaLNZero(config.width, 2) for _ in range(config.depth))
        self.last = AdaLNZero(config.width, 1)
        self.outputs = nn.Linear(config.width, features)
        initialize(self.body, config.depth)
        nn.init.zeros_(self.outputs.weight)
        nn.init.zeros_(self.outputs.bias)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """C, h, w of one sample."""
        return (self.config.latent_channels, self.config.grid, self.config.grid)

    def encode_condition(self, cond: Tensor | EncodedCondition) -> EncodedCondition:
        """What ``forward`` needs to know of condition ids (B, T), to be computed once per sampling."""
        return self.body.encode_condition(cond)

    def forward(self, x: Tensor, cond: Tensor | EncodedCondition, t: Tensor) -> Tensor:
        """The prediction for noisy latents.

        Args:
            x: noisy latents (B, C, h, w).
            cond: condition ids (B, T), or what ``encode_condition`` made of them.
            t: time in [0, 1], 1 is pure noise, (B,).

        Returns:
            (B, C, h, w) in the space of the configuration.

        Raises:
            ValueError: if the shapes do not fit the configuration.
        """
        if x.shape[1:] != self.latent_shape or t.shape != x.shape[:1]:
            raise ValueError(
                f"x has shape {tuple(x.shape)} and t {tuple(t.shape)}, "
                f"expected (B, {', '.join(map(str, self.latent_shape))}) and (B,)"
            )
        patch, side = self.config.patch, self.config.grid // self.config.patch
        tokens = F.pixel_unshuffle(x, patch).flatten(2).transpose(1, 2)
        embedding = self.time(t)[:, None]
        modulations = [_pair(modulation(embedding)) for modulation in self.modulations]
        hidden = self.body(self.inputs(tokens) + self.body.positions(), cond, None, modulations)
        out = self.outputs(modulate(hidden, self.last(embedding)[0]))
        return F.pixel_shuffle(out.transpose(1, 2).unflatten(2, (side, side)), patch)


def _pair(halves: list[AdaLN]) -> tuple[AdaLN, AdaLN]:
    first, second = halves
    return first, second

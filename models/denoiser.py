"""``LatentDenoiser``: the transformer body over noisy latents, for the diffusion and the flow family."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.blocks import AdaLN, AdaLNZero, EncodedCondition, Modulation, TimeEmbedding, modulate
from models.body import MOST_SIDE, Body, BodyConfig, initialize
from models.packed import pack
from tokenizers_vq.files import check_counts
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
        check_counts(self, latent_channels=1 << 12, patch=MOST_SIDE)
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


@dataclass(frozen=True)
class EncodedTime:
    """What a time does to every block and to the last norm: all that a network needs to know of it.

    Attributes:
        blocks: one a block, (B, 1, D) each, or (1, 1, D) for all samples.
        last: of the last norm.
    """

    blocks: tuple[Modulation, ...]
    last: AdaLN


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

    def encode_times(self, times: Tensor) -> list[EncodedTime]:
        """What ``forward`` needs to know of times (N,), for all steps of a sampling at once."""
        embedding = self.time(times)[:, None]
        blocks = [_pair(modulation(embedding)) for modulation in self.modulations]
        (last,) = self.last(embedding)

        def at(i: int) -> EncodedTime:
            def only(by: AdaLN) -> AdaLN:
                return AdaLN(*(part[i : i + 1] for part in by))

            return EncodedTime(tuple((only(a), only(b)) for a, b in blocks), only(last))

        return [at(i) for i in range(len(times))]

    def for_sampling(self) -> LatentDenoiser:
        """The same network with its weights in the layout that is fastest here, see ``models.packed``."""
        return pack(self)

    def forward(
        self, x: Tensor, cond: Tensor | EncodedCondition, t: Tensor | EncodedTime
    ) -> Tensor:
        """The prediction for noisy latents.

        Args:
            x: noisy latents (B, C, h, w), of any float dtype whatever that of the weights.
            cond: condition ids (B, T), or what ``encode_condition`` made of them.
            t: time in [0, 1], 1 is pure noise, (B,); or what ``encode_times`` made of one for all samples.

        Returns:
            (B, C, h, w) in the space of the configuration, in the dtype of x.

        Raises:
            ValueError: if the shapes do not fit the configuration.
        """
        if x.shape[1:] != self.latent_shape:
            raise ValueError(
                f"x has shape {tuple(x.shape)}, expected (B, {', '.join(map(str, self.latent_shape))})"
            )
        if isinstance(t, Tensor):
            if t.shape != x.shape[:1]:
                raise ValueError(
                    f"t has shape {tuple(t.shape)} for x {tuple(x.shape)}, expected (B,)"
                )
            embedding = self.time(t)[:, None]
            modulations = [_pair(modulation(embedding)) for modulation in self.modulations]
            (last,) = self.last(embedding)
            t = EncodedTime(tuple(modulations), last)
        patch, side = self.config.patch, self.config.grid // self.config.patch
        tokens = F.pixel_unshuffle(x, patch).flatten(2).transpose(1, 2)
        embedded = self.inputs(tokens.to(self.inputs.bias.dtype))
        hidden = self.body(embedded + self.body.positions(), cond, None, t.blocks)
        out = self.outputs(modulate(hidden, t.last)).to(x.dtype)
        return F.pixel_shuffle(out.transpose(1, 2).unflatten(2, (side, side)), patch)


def _pair(halves: list[AdaLN]) -> tuple[AdaLN, AdaLN]:
    first, second = halves
    return first, second

"""``VQTokenizer``: an image as a grid of codebook indices, or as a grid of continuous latents."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

import torch
from torch import Tensor, nn

from tokenizers_vq.files import FORMAT_VERSION, check_counts, check_format_version, whole_number
from tokenizers_vq.hub import StrictHubMixin
from tokenizers_vq.networks import Decoder, Encoder
from tokenizers_vq.quantizers import FiniteScalarQuantizer, Quantized, VectorQuantizer

# far beyond what anyone trains: larger numbers are a damaged or a hostile file
MOST_CODES, MOST_PIXELS, MOST_WIDTH = 1 << 18, 1 << 13, 1 << 14


@dataclass
class VQTokenizerConfig:
    """What it takes to rebuild a tokenizer; written to ``config.json``."""

    image_size: int = 32  # pixels a side of the images it was trained on
    factor: int = 4  # pixels a side of one token: an even number
    width: int = 64  # channels of the fine grid; the coarse grid has twice as many
    depth: int = 2  # residual blocks a grid
    quantizer: Literal["fsq", "vq"] = "fsq"
    levels: tuple[int, ...] = (8, 5, 5, 5)  # fsq: V is their product
    codebook_size: int = 1024  # vq only
    codebook_dim: int = 8  # vq only
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        """Check the values; JSON gives lists where tuples were."""
        check_format_version(vars(self))
        check_counts(self, image_size=MOST_PIXELS, factor=256, width=MOST_WIDTH, depth=256)
        check_counts(self, codebook_size=MOST_CODES, codebook_dim=1 << 12)
        if self.factor < 2 or self.factor % 2:
            raise ValueError(f"factor is {self.factor}, expected an even number of pixels >= 2")
        if self.image_size < self.factor or self.image_size % self.factor:
            raise ValueError(
                f"image_size is {self.image_size}, expected a multiple of the factor {self.factor}"
            )
        if self.width < 16 or self.width % 16:
            raise ValueError(f"width is {self.width}, expected a multiple of 16")
        if not isinstance(self.levels, Sequence):
            raise TypeError(f"levels is {self.levels!r}, expected a list of ints")
        self.levels = tuple(whole_number(own, "one of levels") for own in self.levels)
        if not self.levels or min(self.levels) < 3:
            raise ValueError(f"levels is {self.levels}, expected numbers of at least 3")
        if math.prod(self.levels) > MOST_CODES:
            raise ValueError(
                f"levels is {self.levels}, expected a product of at most {MOST_CODES} codes"
            )
        if self.quantizer not in ("fsq", "vq"):
            raise ValueError(f"quantizer is {self.quantizer!r}, expected 'fsq' or 'vq'")

    @property
    def num_codes(self) -> int:
        """V, the number of distinct tokens."""
        return math.prod(self.levels) if self.quantizer == "fsq" else self.codebook_size

    @property
    def latent_channels(self) -> int:
        """C, the channels of one latent."""
        return len(self.levels) if self.quantizer == "fsq" else self.codebook_dim


class VQTokenizer(nn.Module, StrictHubMixin, library_name="unicfg", tags=["image-tokenizer"]):
    """Convolutional autoencoder with a quantized bottleneck.

    ``decode(encode(x))`` and ``decode_latents(encode_latents(x))`` give the same image: latents are quantized on
    their way back, so that token models and diffusion models share one decoder and one manifold.

    Args:
        config: sizes and the kind of quantizer.
    """

    config_class = VQTokenizerConfig
    latent_mean: Tensor
    latent_std: Tensor

    def __init__(self, config: VQTokenizerConfig) -> None:
        super().__init__()
        self.config = config
        self.quantizer: FiniteScalarQuantizer | VectorQuantizer
        channels = config.latent_channels
        if config.quantizer == "fsq":
            self.quantizer = FiniteScalarQuantizer(config.levels)
        else:
            self.quantizer = VectorQuantizer(config.codebook_size, config.codebook_dim)
        self.encoder = Encoder(config.factor, config.width, config.depth, channels)
        self.decoder = Decoder(config.factor, config.width, config.depth, channels)
        self.register_buffer("latent_mean", torch.zeros(channels))
        self.register_buffer("latent_std", torch.ones(channels))

    @classmethod
    def from_pretrained(cls, name: Path | str, *, revision: str | None = None) -> Self:  # type: ignore[override]
        """Load a local folder, or a repository on the Hugging Face hub, in eval mode on the CPU.

        Args:
            name: folder or repository with ``config.json`` and ``model.safetensors``.
            revision: branch, tag or commit of a repository.

        Raises:
            FileNotFoundError: if a file is missing.
            ValueError: if a file is damaged or belongs to another model, or a weight is not finite: nobody looks at
                what a decoder makes before it is a picture.
        """
        tokenizer = super().from_pretrained(name, revision=revision)
        for key, tensor in tokenizer.state_dict().items():
            if not tensor.isfinite().all():
                raise ValueError(f"{name}: {key} holds NaN or infinity, expected finite numbers")
        return tokenizer

    @property
    def codebook_size(self) -> int:
        """V, the number of distinct tokens."""
        return self.config.num_codes

    @property
    def latent_channels(self) -> int:
        """C, the channels of one latent."""
        return self.latent_mean.numel()

    def grid(self, image_size: int) -> int:
        """Tokens a side of an image with ``image_size`` pixels a side.

        Raises:
            ValueError: if ``image_size`` is no multiple of the factor.
        """
        if image_size < 1 or image_size % self.config.factor:
            raise ValueError(
                f"image size is {image_size}, expected a multiple of the factor "
                f"{self.config.factor}"
            )
        return image_size // self.config.factor

    def _check_images(self, images: Tensor) -> None:
        if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
            raise ValueError(
                f"images have shape {tuple(images.shape)} and dtype {images.dtype}, "
                "expected float (B, 3, H, W) in [-1, 1]"
            )
        for size in images.shape[2:]:
            self.grid(size)

    def _check_ids(self, ids: Tensor) -> None:
        if ids.ndim != 3 or ids.is_floating_point():
            raise ValueError(
                f"ids have shape {tuple(ids.shape)} and dtype {ids.dtype}, "
                "expected integers (B, h, w)"
            )
        if ids.numel() and not (int(ids.min()) >= 0 and int(ids.max()) < self.codebook_size):
            raise ValueError(
                f"ids lie in [{int(ids.min())}, {int(ids.max())}], "
                f"expected [0, {self.codebook_size - 1}]"
            )

    def forward(self, images: Tensor) -> tuple[Tensor, Quantized]:
        """Reconstruct images (B, 3, H, W); used in training.

        Returns:
            the unclamped reconstruction (B, 3, H, W), and what the quantizer did.

        Raises:
            ValueError: if H or W is no multiple of the factor.
        """
        self._check_images(images)
        quantized = self.quantizer(self.encoder(images))
        return self.decoder(quantized.codes), quantized

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] -> ids (B, h, w) int64 in [0, V).

        Raises:
            ValueError: if the shape is another, or H or W is no multiple of the factor.
        """
        self._check_images(images)
        return self.quantizer(self.encoder(images)).ids

    @torch.no_grad()
    def decode(self, ids: Tensor) -> Tensor:
        """Ids (B, h, w) -> images (B, 3, H, W) clamped to [-1, 1].

        Raises:
            ValueError: if the shape is another, or an id lies outside [0, V).
        """
        self._check_ids(ids)
        return self.decoder(self.quantizer.codes(ids)).clamp(-1, 1)

    @torch.no_grad()
    def encode_latents(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] -> latents (B, C, h, w), zero mean and unit std a channel.

        Call :meth:`fit_latent_statistics` once after training; until then the scale is the encoder's.

        Raises:
            ValueError: if the shape is another, or H or W is no multiple of the factor.
        """
        self._check_images(images)
        return (self.encoder(images) - self._mean()) / self._std()

    @torch.no_grad()
    def decode_latents(self, latents: Tensor) -> Tensor:
        """Latents (B, C, h, w) -> images (B, 3, H, W) clamped to [-1, 1], by way of the codebook.

        Raises:
            ValueError: if the shape is another.
        """
        if latents.ndim != 4 or latents.shape[1] != self.latent_channels:
            raise ValueError(
                f"latents have shape {tuple(latents.shape)}, "
                f"expected (B, {self.latent_channels}, h, w)"
            )
        codes = self.quantizer(latents * self._std() + self._mean()).codes
        return self.decoder(codes).clamp(-1, 1)

    @torch.no_grad()
    def fit_latent_statistics(self, images: Tensor, batch_size: int = 256) -> None:
        """Measure mean and std of the latents of images (N, 3, H, W); saved with the weights.

        Raises:
            ValueError: if there are no images.
        """
        if not len(images):
            raise ValueError("images is empty: expected at least one image to measure")
        features = torch.cat([self.encoder(batch) for batch in images.split(batch_size)])
        self.latent_mean.copy_(features.mean((0, 2, 3)))
        # a dead channel must not divide by zero
        self.latent_std.copy_(features.std((0, 2, 3), correction=0).clamp(min=1e-4))

    def _mean(self) -> Tensor:
        return self.latent_mean[:, None, None]

    def _std(self) -> Tensor:
        return self.latent_std[:, None, None]

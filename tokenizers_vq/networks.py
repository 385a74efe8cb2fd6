"""The convolutional encoder, decoder and patch discriminator.

Both networks work on two grids only: pixels are folded into channels first (``factor / 2`` at a time), so that no
convolution runs at full resolution. That is what makes training feasible on a CPU.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

LATENT_LIMIT = 2.0  # |latent| stays below this, so that a diffusion model meets no heavy tails


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with group norm and SiLU before each, added to the input.

    Shape: (B, width, h, w) -> (B, width, h, w).
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        groups = max(1, width // 16)
        self.norm1 = nn.GroupNorm(groups, width)
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)  # starts as the identity: deep stacks train at once

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block."""
        hidden = self.conv1(F.silu(self.norm1(x)))
        hidden = self.conv2(F.silu(self.norm2(hidden)))
        return torch.add(x, hidden)


def _stack(width: int, depth: int) -> nn.Sequential:
    return nn.Sequential(*(ResidualBlock(width) for _ in range(depth)))


class Encoder(nn.Module):
    """Images (B, 3, H, W) -> features (B, C, H / factor, W / factor), each within +-2."""

    def __init__(self, factor: int, width: int, depth: int, channels: int) -> None:
        super().__init__()
        fold = factor // 2
        self.stem = nn.Sequential(
            nn.PixelUnshuffle(fold), nn.Conv2d(3 * fold**2, width, 3, padding=1)
        )
        self.fine = _stack(width, depth)
        self.down = nn.Conv2d(width, 2 * width, 2, stride=2)
        self.coarse = _stack(2 * width, depth)
        self.head = nn.Sequential(
            nn.GroupNorm(max(1, width // 8), 2 * width),
            nn.SiLU(),
            nn.Conv2d(2 * width, channels, 1),
        )

    def forward(self, images: Tensor) -> Tensor:
        """Encode."""
        features = self.coarse(self.down(self.fine(self.stem(images))))
        return LATENT_LIMIT * torch.tanh(self.head(features) / LATENT_LIMIT)


class Decoder(nn.Module):
    """Codes (B, C, h, w) -> images (B, 3, factor * h, factor * w), unclamped."""

    def __init__(self, factor: int, width: int, depth: int, channels: int) -> None:
        super().__init__()
        fold = factor // 2
        self.stem = nn.Conv2d(channels, 2 * width, 3, padding=1)
        self.coarse = _stack(2 * width, depth)
        self.up = nn.ConvTranspose2d(2 * width, width, 2, stride=2)
        self.fine = _stack(width, depth)
        self.head = nn.Sequential(
            nn.GroupNorm(max(1, width // 16), width),
            nn.SiLU(),
            nn.Conv2d(width, 3 * fold**2, 3, padding=1),
            nn.PixelShuffle(fold),
        )

    @property
    def last_layer(self) -> Tensor:
        """Weight of the last convolution, where the losses of a GAN are balanced."""
        layer = self.head[2]
        assert isinstance(layer, nn.Conv2d)
        return layer.weight

    def forward(self, codes: Tensor) -> Tensor:
        """Decode."""
        images: Tensor = self.head(self.fine(self.up(self.coarse(self.stem(codes)))))
        return images


class PatchDiscriminator(nn.Module):
    """Three strided convolutions: images (B, 3, H, W) -> one realness logit a patch.

    The PatchGAN critic of Isola et al., arXiv 1611.07004, section 3.2.2, kept small.
    """

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, width, 4, stride=2, padding=1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(width, 2 * width, 4, stride=2, padding=1),
            nn.GroupNorm(8, 2 * width),
            nn.LeakyReLU(0.2),
            nn.Conv2d(2 * width, 1, 3, padding=1),
        )

    def forward(self, images: Tensor) -> Tensor:
        """Score each patch; positive means real."""
        logits: Tensor = self.layers(images)
        return logits

"""Reconstruction losses that need no pretrained network.

Shape: every function takes images (B, 3, H, W) in [-1, 1] and returns a scalar.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tokenizers_vq.networks import PatchDiscriminator


def _pyramid(images: Tensor, scales: int) -> list[Tensor]:
    levels = [images]
    for _ in range(scales - 1):
        levels.append(F.avg_pool2d(levels[-1], 2))
    return levels


def _gradients(images: Tensor) -> tuple[Tensor, Tensor]:
    return images.diff(dim=-1), images.diff(dim=-2)


def structural_dissimilarity(output: Tensor, target: Tensor, window: int = 7) -> Tensor:
    """1 - SSIM with a uniform window, between 0 (equal) and 2.

    Wang et al., "Image quality assessment" (2004), equation 13; constants for a range of 2.
    """
    output, target = (
        output + 1,
        target + 1,
    )  # the index is made for intensities that are not negative
    c1, c2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2
    mean_x, mean_y = _mean(output, window), _mean(target, window)
    var_x = _mean(output.square(), window) - mean_x.square()
    var_y = _mean(target.square(), window) - mean_y.square()
    cov = _mean(output * target, window) - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + c1) / (mean_x.square() + mean_y.square() + c1)
    structure = (2 * cov + c2) / (var_x + var_y + c2)
    return 1 - (luminance * structure).mean()


def _mean(x: Tensor, window: int) -> Tensor:
    """Means over windows of so many pixels a side; by rows and then by columns, which are far fewer sums."""
    return F.avg_pool2d(F.avg_pool2d(x, (window, 1), 1), (1, window), 1)


def reconstruction_loss(output: Tensor, target: Tensor, scales: int = 3) -> Tensor:
    """L1 over an image pyramid, plus L1 on image gradients, plus structural dissimilarity.

    L1 alone settles on the median, which is blurred; the gradient and SSIM terms price lost edges, and the
    pyramid keeps large areas at the right colour.
    """
    # the variances of SSIM are small differences, which bfloat16 loses; means are dear where channels come last
    output, target = output.float().contiguous(), target.contiguous()
    pairs = list(zip(_pyramid(output, scales), _pyramid(target, scales), strict=True))
    loss = torch.stack([F.l1_loss(o, t) for o, t in pairs]).mean()
    for o, t in zip(_gradients(output), _gradients(target), strict=True):
        loss = loss + 0.5 * F.l1_loss(o, t)
    return loss + 0.2 * structural_dissimilarity(output, target)


class AdversarialLoss(nn.Module):
    """A small PatchGAN critic with hinge losses, for those whom blur bothers.

    Hinge form: Lim and Ye, arXiv 1705.02894. The weight on the generator follows the gradient norms at the
    decoder's last layer, so that neither loss drowns the other (Esser et al., arXiv 2012.09841, equation 7).
    """

    def __init__(self, weight: float = 0.1) -> None:
        super().__init__()
        self.weight = weight
        self.discriminator = PatchDiscriminator()

    def generator(self, output: Tensor, reconstruction: Tensor, last_layer: Tensor) -> Tensor:
        """Loss for the decoder, to be added to ``reconstruction`` (a scalar with its graph)."""
        loss: Tensor = -self.discriminator(output).mean()
        (rec,) = torch.autograd.grad(reconstruction, last_layer, retain_graph=True)
        (adv,) = torch.autograd.grad(loss, last_layer, retain_graph=True)
        balance = (rec.norm() / (adv.norm() + 1e-4)).clamp(max=1e4)
        return self.weight * balance.detach() * loss

    def critic(self, output: Tensor, target: Tensor) -> Tensor:
        """Loss for the discriminator; ``output`` is detached here."""
        real: Tensor = F.relu(1 - self.discriminator(target)).mean()
        fake: Tensor = F.relu(1 + self.discriminator(output.detach())).mean()
        return (real + fake) / 2

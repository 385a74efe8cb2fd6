"""Guidance as published systems use it, in the s convention; each function says where its numbers are from.

A scale belongs to the model it was tuned for: with other models these are a place to start from.
"""

from __future__ import annotations

from unicfg.guidance.core import Guidance
from unicfg.guidance.mitigations import rescale
from unicfg.guidance.schedules import interval, linear, power_cosine

__all__ = [
    "dit",
    "edm2_interval",
    "llamagen_large",
    "magnet",
    "mar_base",
    "mar_huge",
    "mar_large",
    "mdt",
    "rar_b",
    "rar_xxl",
    "rescaled_v",
    "var",
]

# the guided stretch of EDM2-XXL: steps 17 to 22 of 32, counted from 0, both included
_EDM2_FIRST, _EDM2_LAST, _EDM2_STEPS = 17, 22, 32


def mar_base() -> Guidance:
    """MAR-B on ImageNet 256: from 1 up to 2.9 with the revealed share (arXiv 2406.11838, its released settings)."""
    return Guidance(linear(1.0, 2.9))


def mar_large() -> Guidance:
    """MAR-L on ImageNet 256: from 1 up to 3.0 with the revealed share (arXiv 2406.11838, its released settings)."""
    return Guidance(linear(1.0, 3.0))


def mar_huge() -> Guidance:
    """MAR-H on ImageNet 256: from 1 up to 3.2 with the revealed share (arXiv 2406.11838, its released settings)."""
    return Guidance(linear(1.0, 3.2))


def rar_b() -> Guidance:
    """RAR-B: a late power-cosine up to 16, power 2.75, over token positions (arXiv 2411.00776, its released settings)."""
    return Guidance(power_cosine(16.0, 2.75))


def rar_xxl() -> Guidance:
    """RAR-XXL: power-cosine up to 8, power 1.2, over token positions (arXiv 2411.00776, its released settings)."""
    return Guidance(power_cosine(8.0, 1.2))


def var() -> Guidance:
    """VAR: its ``cfg`` 1.5 is w, reached at the last scale, so s goes from 1 to 2.5 (arXiv 2404.02905)."""
    return Guidance(linear(1.0, 1.0 + 1.5))


def mdt() -> Guidance:
    """MDT: power-cosine up to 3.8, power 4, over denoising steps (arXiv 2303.14389, its released settings)."""
    return Guidance(power_cosine(3.8, 4.0))


def magnet() -> Guidance:
    """MAGNeT: falls from 10 to 1 as tokens are revealed, the opposite of Muse and MAR (arXiv 2401.04577)."""
    return Guidance(linear(10.0, 1.0))


def llamagen_large() -> Guidance:
    """LlamaGen-L at 384 px: the constant s with the best FID of its own sweep (arXiv 2406.06525)."""
    return Guidance(2.0)


def dit() -> Guidance:
    """DiT-XL/2: s = 1.5, the setting of its best FID (arXiv 2212.09748, table 2).

    The released code guides three of the four latent channels; this guides all of them, where about 1.375 is its equal.
    """
    return Guidance(1.5)


def edm2_interval() -> Guidance:
    """EDM2-XXL for FID: s = 2.0 in steps 17 to 22 of 32, counted from 0, else 1 (arXiv 2404.07724).

    The stretch is one of noise levels, sigma 1.61 to 0.28 on EDM2's own grid of 32; with other grids give
    ``noise_interval`` of the schedules those. The published sampler guides both evaluations of a Heun step alike; in
    ``unicfg.sampling`` the second one belongs to the next noise level, so that of step 16 is guided and that of 22 is not.
    """
    last = _EDM2_STEPS - 1
    return Guidance(interval(2.0, _EDM2_FIRST / last, _EDM2_LAST / last))


def rescaled_v() -> Guidance:
    """A v model with zero terminal SNR: s = 7.5, rescaled by 0.7 (Lin et al., arXiv 2305.08891, section 3.4)."""
    return Guidance(7.5, (rescale(0.7),))

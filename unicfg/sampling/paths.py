"""Paths from data to noise: x_t = alpha(t) * x0 + sigma(t) * eps, with t = 0 at the data and t = 1 at the noise.

This is what diffusers calls a noise schedule. Training draws points on a path, sampling walks it back.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

TABLE = 1000  # steps of the discrete schedule that `linear` interpolates
TERMINAL_ALPHA = 0.006353  # of the linear path; the cosine path ends there too unless it goes to 0


class Path(Protocol):
    """Any object with these two methods is a path."""

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Alpha and sigma, in the shape of ``t`` in [0, 1]."""

    def time(self, ratio: Tensor) -> Tensor:
        """The t at which sigma / alpha is ``ratio`` >= 0, infinity included; in float64."""


@dataclass(frozen=True)
class straight:
    """alpha = 1 - t, sigma = t: rectified flow (Liu et al., arXiv 2209.03003, equation 1, time reversed)."""

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Alpha and sigma at ``t``."""
        return 1 - t, t

    def time(self, ratio: Tensor) -> Tensor:
        """Invert sigma / alpha."""
        return 1 / (1 + 1 / ratio.double())


@dataclass(frozen=True)
class cosine:
    """alpha = cos, sigma = sin of an angle that grows with t (Salimans and Ho, arXiv 2202.00512, section 2).

    Args:
        zero_terminal_snr: go on to pure noise, alpha = 0, at t = 1 (Lin et al., arXiv 2305.08891, section 3.1); a
            model that predicts eps has nothing to say there. Otherwise the path ends where the linear one does.
    """

    zero_terminal_snr: bool = False

    @property
    def _end(self) -> float:
        return math.pi / 2 if self.zero_terminal_snr else math.acos(TERMINAL_ALPHA)

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Alpha and sigma at ``t``."""
        angle = self._end * t
        alpha = angle.cos()
        if self.zero_terminal_snr:
            alpha = alpha.masked_fill(
                t == 1, 0.0
            )  # the cosine of the rounded pi / 2 is not quite 0
        return alpha, angle.sin()

    def time(self, ratio: Tensor) -> Tensor:
        """Invert sigma / alpha."""
        return (ratio.double().atan() / self._end).clamp(0, 1)


@dataclass(frozen=True)
class linear:
    """The variance-preserving path of DDPM: 1000 steps with beta from 1e-4 to 0.02 (Ho et al., arXiv 2006.11239).

    t = (i + 1) / 1000 is their step i; between steps alpha squared is interpolated.

    Args:
        zero_terminal_snr: shift and stretch alpha so that it ends at 0 (Lin et al., arXiv 2305.08891, algorithm 1).
    """

    zero_terminal_snr: bool = False

    def alpha_squared(self) -> Tensor:
        """The table, float64 (1001,): entry 0 is clean data."""
        betas = torch.linspace(1e-4, 0.02, TABLE, dtype=torch.float64)
        table = (1 - betas).cumprod(0)
        if self.zero_terminal_snr:
            alpha = table.sqrt()
            alpha = (alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])
            table = alpha.square()
        return torch.cat([torch.ones(1, dtype=torch.float64), table])

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Alpha and sigma at ``t``."""
        table = self.alpha_squared().to(t.device)
        place = t.double() * TABLE
        low = place.floor().long().clamp(0, TABLE - 1)
        share = place - low
        squared = (1 - share) * table[low] + share * table[low + 1]
        return squared.sqrt().to(t.dtype), (1 - squared).sqrt().to(t.dtype)

    def time(self, ratio: Tensor) -> Tensor:
        """Invert sigma / alpha."""
        table = self.alpha_squared().to(ratio.device)
        wanted = (1 / (1 + ratio.double().square())).clamp(float(table[-1]), 1.0)
        high = torch.searchsorted(-table, -wanted).clamp(1, TABLE)
        low = high - 1
        return (low + (table[low] - wanted) / (table[low] - table[high])) / TABLE


def shift_time(t: Tensor, shift: float) -> Tensor:
    """Move times in [0, 1] towards the noise (Esser et al., arXiv 2403.03206, equation 23).

    Args:
        t: times.
        shift: > 0; 1 leaves them where they are, more moves them up.

    Raises:
        ValueError: if ``shift`` is not positive.
    """
    if not 0 < shift < math.inf:
        raise ValueError(f"shift is {shift}, expected a number > 0")
    return t / (t + (1 - t) / shift)  # written so that 0 and 1 stay where they are, exactly


PATHS: dict[str, Path] = {
    "straight": straight(),
    "cosine": cosine(),
    "linear": linear(),
    "cosine to zero": cosine(zero_terminal_snr=True),
    "linear to zero": linear(zero_terminal_snr=True),
}
